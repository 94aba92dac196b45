"""The command `generate`."""

import argparse

from finelip_sdxl.cli.options import chosen_prompt, device_and_dtype, loading_arguments, settings_by_seed
from finelip_sdxl.cli.output import image_files, picture_parameters
from finelip_sdxl.console import quiet_transformers

# Commands


def generate(options: argparse.Namespace) -> None:
    """A prompt to one or more PNG files."""
    prompt, files = chosen_prompt(options), image_files(options.out, options.num_images)
    quiet_transformers()
    import torch

    from finelip_sdxl.comparison import comparison
    from finelip_sdxl.images import save_png, to_image
    from finelip_sdxl.pipelines.opening import open_text_to_image

    seeds = [settings.seed for settings in settings_by_seed(options, prompt, options.num_images)]
    device, dtype = device_and_dtype(options)
    pipe = open_text_to_image(options.base, **loading_arguments(options), dtype=dtype)
    print(pipe.describe_prompt(prompt, negative_prompt=options.negative_prompt), flush=True)
    if options.offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    pipe.set_conditioning_adapter_scale(options.conditioning_adapter_scale)
    try:
        images = pipe(
            prompt,
            negative_prompt=options.negative_prompt,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance_scale,
            width=options.width,
            height=options.height,
            num_images_per_prompt=options.num_images,
            # Noise is drawn on the CPU, so that a seed gives the same picture on every device.
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="pt",
        ).images
    except RuntimeError as error:
        if not comparison.is_out_of_memory(error):
            raise
        side = pipe.default_sample_size * pipe.vae_scale_factor
        comparison.raise_out_of_memory(options.width or side, options.height or side, options.num_images)

    parameters = picture_parameters(options, prompt, dtype, pipe)
    for seed, pixels, file in zip(seeds, images, files, strict=True):
        image = to_image(pixels)
        size = {"width": image.width, "height": image.height}
        save_png(image, file, {**parameters, **size, "seed": seed})
        print(f"{file} (seed {seed})", flush=True)
