"""Trains the miniature's VAE: 192 × 192 pixels to 12 × 12 latents of 8 channels.

The loss is the squared error of the pixels (absolute error alone stays at painting the background), with absolute
errors of pixels and of their differences to the right and downward, which keep edges sharp. Linear heads read each
object's shape, color and size from its 4 × 4 latents: they show the encoder early what matters, and give the UNet
latents with an order.

The decoder sees latents as a UNet makes them: with noise, too strong or too weak, and mixed with another scene's. It
learns to draw the nearest whole object in place of a blend, and the encoder learns to keep objects far apart. Then
the decoder is trained on alone: a UNet can begin with the latents meanwhile. `train_decoder.py` ends its training, with
latents that the UNet made.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from common import parser, train, training_scenes
from diffusers import AutoencoderKL
from torch import Tensor, nn

from finelip_sdxl.miniature.drawing import IMAGE_SIZE, draw_batch
from finelip_sdxl.miniature.world import ATTRIBUTES, make_scene
from finelip_sdxl.training.command_line import STEPS

LATENT_CHANNELS = 8
# How far the decoder's latents may be from the encoder's, which have about unit variance. Most are much nearer.
NOISE = 0.5  # standard deviation
MIXTURE = 0.35  # share of another scene
GAIN = 0.2  # stronger or weaker by this share

HEADS = ("shape", "color", "size")
HEAD_WEIGHT = 0.03
ABSOLUTE_WEIGHT = 0.1
EDGE_WEIGHT = 0.2
MOMENT_WEIGHT = 0.01


def build_vae() -> AutoencoderKL:
    """One block more than SDXL's VAE: it scales by 16."""
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 5,
        up_block_types=["UpDecoderBlock2D"] * 5,
        block_out_channels=(16, 16, 32, 64, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,
        force_upcast=False,
    )


def disturbed(latents: Tensor) -> Tensor:
    """Latents, (scenes, channels, 12, 12), as a UNet could have made them; each scene by its own amounts."""

    def amount(most: float) -> Tensor:
        return most * torch.rand(len(latents), 1, 1, 1, device=latents.device).square()

    mixed = torch.lerp(latents, latents.roll(1, dims=0).detach(), amount(MIXTURE))
    sign = torch.randint(2, (len(latents), 1, 1, 1), device=latents.device) * 2 - 1
    return mixed * (1 + sign * amount(GAIN)) + amount(NOISE) * torch.randn_like(latents)


def edges(images: Tensor) -> Tensor:
    """Differences of pixels to the right and downward, flat."""
    return torch.cat([images.diff(dim=-1).flatten(), images.diff(dim=-2).flatten()])


def picture_loss(vae: AutoencoderKL, latents: Tensor, images: Tensor) -> tuple[Tensor, dict[str, float]]:
    """The loss of the images that the decoder draws from these latents, and its parts."""
    decoded = vae.decode(latents).sample
    squared = F.mse_loss(decoded, images)
    absolute = F.l1_loss(decoded, images)
    edge = F.l1_loss(edges(decoded), edges(images))
    loss = squared + ABSOLUTE_WEIGHT * absolute + EDGE_WEIGHT * edge
    return loss, {"mse": squared.item(), "l1": absolute.item(), "edge": edge.item()}


def main() -> None:
    flags = parser(__doc__, steps=3700, batch_size=4, learning_rate=1e-3)
    flags.add_argument("--decoder-steps", type=STEPS, default=3000, help="further optimizer steps of the decoder alone")
    arguments = flags.parse_args()
    device = arguments.device
    torch.manual_seed(0)
    vae = build_vae().to(device)
    heads = nn.ModuleDict({name: nn.Linear(LATENT_CHANNELS * 4 * 4, len(ATTRIBUTES[name])) for name in HEADS})
    heads.to(device)

    def step_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        scenes = training_scenes(step, arguments.batch_size)
        images = draw_batch(scenes).to(device)
        latents = vae.encode(images).latent_dist.mode()
        loss, figures = picture_loss(vae, disturbed(latents), images)

        # (scenes, 8, 12, 12) → one row of 8 × 4 × 4 latents for each of the scenes' nine cells.
        cells = latents.unflatten(2, (3, 4)).unflatten(4, (3, 4)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2)
        reading = torch.zeros((), device=device)
        for name, head in heads.items():
            labels = [ATTRIBUTES[name].index(getattr(thing, name)) for scene in scenes for thing in scene.objects]
            labels = torch.tensor(labels, device=device)
            logits = head(cells)
            reading = reading + F.cross_entropy(logits, labels)
            figures[name] = (logits.argmax(-1) == labels).float().mean().item()

        # Holds every channel at about zero mean and unit variance.
        channels = latents.transpose(0, 1).flatten(1)
        moments = channels.mean(dim=1).square().mean() + (channels.var(dim=1) - 1).square().mean()
        figures["moments"] = moments.item()
        return loss + HEAD_WEIGHT * reading + MOMENT_WEIGHT * moments, figures

    train(arguments, "vae", nn.ModuleDict({"vae": vae, "heads": heads}), step_loss)

    def decoder_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        images = draw_batch(training_scenes(arguments.steps + step, arguments.batch_size)).to(device)
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mode()
        return picture_loss(vae, disturbed(latents), images)

    with torch.no_grad():
        scenes = [make_scene(f"train-{k}") for k in range(256)]
        latents = [vae.encode(draw_batch(scenes[k : k + 16]).to(device)).latent_dist.mode() for k in range(0, 256, 16)]
    vae.register_to_config(scaling_factor=1 / torch.cat(latents).std().item())
    vae.save_pretrained(arguments.runs / "vae")
    # The encoder is as good as it gets long before the decoder: edges take it many more steps.
    steps = argparse.Namespace(**{**vars(arguments), "steps": arguments.decoder_steps})
    train(steps, "decoder", nn.ModuleDict({"decoder": vae.decoder, "after": vae.post_quant_conv}), decoder_loss)
    vae.save_pretrained(arguments.runs / "vae")


if __name__ == "__main__":
    main()
