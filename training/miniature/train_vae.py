"""Trains the miniature's VAE: 96 × 96 pixels to 12 × 12 latents of 4 channels, at SDXL's factor of 8.

Squared error of the pixels (absolute error alone stays at painting the background), and linear heads that read each
object's shape, color and size from its 4 × 4 latents: they show the encoder early what matters, and give the UNet
latents with an order. The decoder sees latents with a little noise, as the UNet will give it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import parser, train, training_scenes
from diffusers import AutoencoderKL
from torch import nn

from finelip_sdxl.miniature.drawing import draw_batch
from finelip_sdxl.miniature.world import ATTRIBUTES, make_scene

NOISE = 0.1  # beside latents of about unit variance
HEADS = ("shape", "color", "size")
HEAD_WEIGHT = 0.03


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=(16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=96,
        scaling_factor=1.0,
        force_upcast=False,
    )


def main() -> None:
    arguments = parser(__doc__, steps=1600, batch_size=16, learning_rate=1e-3).parse_args()
    device = arguments.device
    torch.manual_seed(0)
    vae = build_vae().to(device)
    heads = nn.ModuleDict({name: nn.Linear(4 * 4 * 4, len(ATTRIBUTES[name])) for name in HEADS}).to(device)

    def step_loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        scenes = training_scenes(step, arguments.batch_size)
        images = draw_batch(scenes).to(device)
        with torch.autocast(device, torch.bfloat16):
            latents = vae.encode(images).latent_dist.mode().float()
            decoded = vae.decode(latents + NOISE * torch.randn_like(latents)).sample.float()
        squared = F.mse_loss(decoded, images)
        absolute = F.l1_loss(decoded, images)
        figures = {"mse": squared.item(), "l1": absolute.item()}

        # (scenes, 4, 12, 12) → one row of 4 × 4 × 4 latents for each of the scenes' nine cells.
        cells = latents.unflatten(2, (3, 4)).unflatten(4, (3, 4)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)
        reading = torch.zeros((), device=device)
        for name, head in heads.items():
            labels = [ATTRIBUTES[name].index(getattr(thing, name)) for scene in scenes for thing in scene.objects]
            labels = torch.tensor(labels, device=device)
            logits = head(cells)
            reading = reading + F.cross_entropy(logits, labels)
            figures[name] = (logits.argmax(-1) == labels).float().mean().item()

        # Holds the latents at about unit variance without drowning them in noise.
        variance = latents.pow(2).mean()
        figures["variance"] = variance.item()
        return squared + 0.05 * absolute + HEAD_WEIGHT * reading + 0.01 * (variance - 1).relu(), figures

    train(arguments, "vae", nn.ModuleDict({"vae": vae, "heads": heads}), step_loss)

    with torch.no_grad():
        latents = vae.encode(draw_batch([make_scene(f"train-{k}") for k in range(256)]).to(device)).latent_dist.mode()
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    vae.save_pretrained(arguments.runs / "vae")


if __name__ == "__main__":
    main()
