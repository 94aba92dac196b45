"""The command `generate`: a prompt to PNG files."""

import argparse
import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from finelip_sdxl.cli.drawing import (
    add_everyday,
    check_everyday,
    everyday_parameters,
    image_to_image,
    load_loras,
    set_scheduler,
    upscaled,
    vae_arguments,
)
from finelip_sdxl.cli.options import (
    PICTURES,
    Commands,
    add_command,
    add_drawing,
    add_encoding,
    add_prompt,
    check_models,
    chosen_prompt,
    device_and_dtype,
    flags_of,
    loading_arguments,
    settings_by_seed,
)
from finelip_sdxl.cli.output import image_files, picture_parameters, print_notice
from finelip_sdxl.conditioning import ConditioningHeader, check_name
from finelip_sdxl.console import announce, quiet_diffusers
from finelip_sdxl.options import ENCODING


def add_parser(commands: Commands) -> None:
    command = add_command(commands, "generate", generate, "draw a prompt")
    add_prompt(command)
    text = "file to write (default: %(default)s)"
    command.add_argument("--out", default="finelip-sdxl.png", metavar="PNG", help=text)
    text = "number of images (default: %(default)s)"
    command.add_argument("--num-images", type=PICTURES, default=1, metavar="N", help=text)
    add_drawing(command)
    add_encoding(command)
    add_everyday(command)
    text = "file for a sheet of the picture and of where each phrase of the prompt acted in it (PNG; default: none)"
    command.add_argument("--heat-maps", metavar="PNG", help=text)
    text = "file to write the encoded prompt to, for --conditioning (.safetensors; default: none)"
    command.add_argument("--save-conditioning", metavar="FILE", help=text)
    text = "file that --save-conditioning wrote, to draw from in place of a prompt"
    command.add_argument("--conditioning", metavar="FILE", help=text)


def generate(options: argparse.Namespace) -> None:
    """Print the prompt's plan, draw the prompt, and write one or more PNG files."""
    encoded = _check_conditioning(options)
    prompt = chosen_prompt(options) if encoded is None else encoded.prompts[0]
    files = image_files(options.out, options.num_images)
    sheets = [] if options.heat_maps is None else image_files(options.heat_maps, options.num_images, "--heat-maps")
    if set(map(os.path.realpath, sheets)) & set(map(os.path.realpath, files)):
        raise ValueError(f"--heat-maps {options.heat_maps} is the picture's own file: pass another name.")
    rows = settings_by_seed(options, prompt, options.num_images)
    check_everyday(options)
    check_models(options)
    announce(f"Opening {options.base}…")

    quiet_diffusers()
    import torch

    from finelip_sdxl.attribution.overlays import heat_map_sheet
    from finelip_sdxl.attribution.trace import trace_attention
    from finelip_sdxl.comparison import comparison
    from finelip_sdxl.conditioning import Conditioning
    from finelip_sdxl.images import save_png, to_image
    from finelip_sdxl.pipelines.opening import open_text_to_image
    from finelip_sdxl.recommended import Recommended, recommended_of

    device, dtype = device_and_dtype(options)
    pipe = open_text_to_image(options.base, **loading_arguments(options), **vae_arguments(options, dtype), dtype=dtype)
    set_scheduler(pipe, options.scheduler)
    load_loras(pipe, options.lora)
    drawing, how = image_to_image(pipe, options)
    plan = None
    if encoded is None:
        plan = pipe.describe_prompt(prompt, negative_prompt=options.negative_prompt, num_inference_steps=rows[0].steps)
        print(plan, flush=True)
        print_notice(prompt, plan.plans)
    else:
        print(encoded.report, flush=True)
    if options.offload:
        drawing.enable_model_cpu_offload(device=device)
    else:
        drawing.to(device)
    drawing.enable_text_projection_cache()
    drawing.set_conditioning_adapter_scale(options.conditioning_adapter_scale)
    chosen = rows[0].filled(recommended_of(pipe.config) or Recommended())
    texts = {"prompt": prompt, "negative_prompt": options.negative_prompt, "clip_skip": options.clip_skip}
    try:
        inputs: Mapping[str, Any] = texts
        if encoded is not None:
            inputs = Conditioning.load(options.conditioning)
        elif options.save_conditioning is not None:
            inputs = drawing.encode(**texts)
            inputs.save(options.save_conditioning)
            print(options.save_conditioning, flush=True)
        # The plan is passed on for embeddings alone: of a prompt, the call makes its own.
        given = plan if options.save_conditioning is not None else None
        with trace_attention(drawing, given) if sheets else nullcontext() as trace:
            images = drawing(
                **inputs,
                num_inference_steps=chosen.steps,
                guidance_scale=chosen.guidance_scale,
                **how,
                num_images_per_prompt=options.num_images,
                # Noise is drawn on the CPU, so that a seed means the same noise on every device.
                generator=[torch.Generator().manual_seed(settings.seed) for settings in rows],
                output_type="pt",
            ).images
    except RuntimeError as error:
        if not comparison.is_out_of_memory(error):
            raise
        side = pipe.default_sample_size * pipe.vae_scale_factor
        comparison.raise_out_of_memory(options.width or side, options.height or side, options.num_images)

    parameters = {**picture_parameters(options, chosen, dtype, pipe), **everyday_parameters(options)}
    if encoded is not None:
        # The options of encoding are those of the file, which does not tell them.
        parameters = {name: value for name, value in parameters.items() if name not in _ENCODED_WITH}
        negative = encoded.negative_prompts[0] if encoded.negative_prompts else None
        parameters |= {"negative_prompt": negative, "conditioning": Path(options.conditioning).name}
    for index, (settings, pixels, file) in enumerate(zip(rows, images, files, strict=True)):
        image = to_image(pixels)
        size = {"width": image.width, "height": image.height}
        about = {**parameters, **size, "seed": settings.seed}
        save_png(upscaled(image, options.upscale), file, about)
        print(f"{file} (seed {settings.seed})", flush=True)
        if trace is not None:
            save_png(heat_map_sheet(image, trace, index), sheets[index], about)
            print(f"{sheets[index]} (heat maps)", flush=True)


# What a conditioning's file holds already
_ENCODED_WITH = (*ENCODING, "conditioning_adapter_scale", "clip_skip")
_DEFAULTS = {"conditioning_adapter_scale": 1.0}


def _check_conditioning(options: argparse.Namespace) -> ConditioningHeader | None:
    """Check the flags of files with an encoded prompt; return the header of the one to draw from.

    Raises:
        OSError, ValueError: a file cannot be read or written, or a flag does not go with it.
    """
    if options.save_conditioning is not None:
        check_name(options.save_conditioning, to_write=True)
    if options.conditioning is None:
        return None
    header = ConditioningHeader.read(options.conditioning)
    flags = {"text": "PROMPT", **flags_of(options)}
    if options.heat_maps is not None:
        raise ValueError(
            f"--conditioning {options.conditioning} does not tell which token is at which position: leave --heat-maps"
            " out, or pass the prompt."
        )
    for name in ("text", "prompt", "prompt_file", "negative_prompt", "save_conditioning", *_ENCODED_WITH):
        if getattr(options, name) not in (None, _DEFAULTS.get(name)):
            raise ValueError(f"--conditioning {options.conditioning} holds an encoded prompt: leave {flags[name]} out.")
    if len(header.prompts) != 1:
        raise ValueError(
            f"--conditioning {options.conditioning} holds {len(header.prompts)} prompts; expected one: draw from it in"
            " Python."
        )
    return header
