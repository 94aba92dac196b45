"""Ends the training of the VAE's decoder with latents that the UNet made, after `train_unet.py`.

A UNet's latents are not those of any drawing: its objects are a little smeared, and some are blends. The decoder
learns to draw what such latents show: the scene that is read off their first picture, each object being the nearest of
all that there are. Half of each batch are latents of drawings, disturbed as in `train_vae.py`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from common import parser, train, training_scenes
from diffusers import StableDiffusionXLPipeline
from parts import stock_pipeline
from torch import Tensor, nn
from tqdm import tqdm
from train_clip import training_captions
from train_vae import disturbed, picture_loss

from finelip_sdxl.files import written_whole
from finelip_sdxl.miniature.drawing import draw_batch
from finelip_sdxl.miniature.scoring import read_picture
from finelip_sdxl.miniature.world import Scene, make_scene
from finelip_sdxl.training.command_line import COUNT

AT_ONCE = 20  # pictures that are drawn or decoded together
STEPS_OF_A_PICTURE = 20
GUIDANCE_SCALES = (3.0, 5.0, 7.0)


def main() -> None:
    flags = parser(__doc__, steps=3600, batch_size=4, learning_rate=5e-4)
    flags.add_argument("--pictures", type=COUNT, default=2000, help="pictures that the UNet draws; a multiple of 20")
    arguments = flags.parse_args()
    torch.set_num_threads(arguments.threads)
    pipe = stock_pipeline(arguments.runs).to(arguments.device)
    pipe.set_progress_bar_config(disable=True)
    drawn = drawn_latents(pipe, arguments.runs / "drawn.pt", arguments.pictures).to(arguments.device)
    scenes = read_scenes(pipe, drawn)
    vae, half = pipe.vae, arguments.batch_size // 2

    def step_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        images = draw_batch(training_scenes(step, half)).to(arguments.device)
        with torch.no_grad():
            latents = disturbed(vae.encode(images).latent_dist.mode())
        chosen = torch.randint(len(drawn), (arguments.batch_size - half,))
        shown = draw_batch([scenes[k] for k in chosen.tolist()]).to(arguments.device)
        return picture_loss(vae, torch.cat([latents, drawn[chosen]]), torch.cat([images, shown]))

    train(arguments, "decoder_2", nn.ModuleDict({"decoder": vae.decoder, "after": vae.post_quant_conv}), step_loss)
    vae.save_pretrained(arguments.runs / "vae")


@torch.no_grad()
def drawn_latents(pipe: StableDiffusionXLPipeline, path: Path, count: int) -> Tensor:
    """Latents that the UNet made, (count, 8, 12, 12), as the VAE takes them; kept in a file."""
    if not path.exists():
        latents = []
        for first in tqdm(range(0, count, AT_ONCE), desc="pictures"):
            captions = training_captions([make_scene(f"train-{first + k}") for k in range(AT_ONCE)], first)
            made = pipe(
                [caption.text for caption in captions],
                num_inference_steps=STEPS_OF_A_PICTURE,
                guidance_scale=GUIDANCE_SCALES[first // AT_ONCE % len(GUIDANCE_SCALES)],
                generator=torch.Generator(pipe.device).manual_seed(first),
                output_type="latent",
            )
            latents.append(made.images.cpu() / pipe.vae.config.scaling_factor)
        with written_whole(path) as temporary:
            torch.save(torch.cat(latents), temporary)
    cached: Tensor = torch.load(path, weights_only=True)
    return cached


@torch.no_grad()
def read_scenes(pipe: StableDiffusionXLPipeline, latents: Tensor) -> list[Scene]:
    """The scenes that the pictures of these latents show, before the decoder is trained on."""
    scenes = []
    for part in latents.split(AT_ONCE):
        for image in pipe.image_processor.postprocess(pipe.vae.decode(part).sample):
            shown = read_picture(image)
            scenes.append(Scene(tuple(thing for thing in shown.objects if thing), shown.background))
    return scenes


if __name__ == "__main__":
    main()
