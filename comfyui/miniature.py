"""The miniature in ComfyUI: its UNet and VAE are Diffusers' own, since ComfyUI builds SDXLs of real size only."""

from __future__ import annotations

from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import torch

# From their modules: under their short names, type checkers see classes without methods.
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from finelip_sdxl.miniature import miniature_path

from .devices import ManagedModels, to_intermediate


class ComfyUNet(nn.Module):
    """Diffusers' UNet of an SDXL, called as ComfyUI calls its own.

    Args:
        unet: the UNet. Its embedding of the sizes is taken out: ComfyUI embeds them.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet
        self.dtype = unet.dtype
        added_dim, size_dim = (
            unet.config["projection_class_embeddings_input_dim"],
            unet.config["addition_time_embed_dim"],
        )
        self._pooled_dim = added_dim - 6 * size_dim
        unet.add_time_proj = nn.Identity()  # type: ignore[assignment]

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor, y: torch.Tensor, **_: Any
    ) -> torch.Tensor:
        """The UNet's output for noisy latents, (batch, channels, height, width).

        Args:
            x: the latents.
            timesteps: (batch,).
            context: states of the text, (batch, positions, dim).
            y: pooled vectors and embedded sizes, (batch, pooled dim + 6 · embedding dim).
        """
        pooled, sizes = y[:, : self._pooled_dim], y[:, self._pooled_dim :]
        added = {"text_embeds": pooled, "time_ids": sizes}
        output: torch.Tensor = self.unet(x, timesteps, context, added_cond_kwargs=added, return_dict=False)[0]
        return output


class ComfyVAE:
    """Diffusers' VAE with the two methods that ComfyUI's nodes call."""

    def __init__(self, vae: AutoencoderKL) -> None:
        self._vae = vae
        self._models = ManagedModels(
            {"vae": vae}, comfy.model_management.vae_device(), comfy.model_management.vae_offload_device()
        )

    def decode(self, samples: torch.Tensor) -> Any:
        """Pictures (batch, height, width, 3) from 0 to 1, of latents (batch, channels, height, width)."""
        device = self._models.load()
        pictures = self._vae.decode(samples.to(device, self._vae.dtype)).sample
        return to_intermediate(pictures.div(2).add(0.5).clamp(0, 1).movedim(1, -1))

    def encode(self, pixels: torch.Tensor) -> Any:
        """Latents of pictures; the inverse of `decode`."""
        device = self._models.load()
        pictures = pixels[..., :3].movedim(-1, 1).to(device, self._vae.dtype).mul(2).sub(1)
        return to_intermediate(self._vae.encode(pictures).latent_dist.sample())


def load_miniature() -> tuple[Any, ComfyVAE, dict[str, torch.Tensor]]:
    """The miniature's UNet as ComfyUI's MODEL, its VAE, and an empty latent of its size.

    Sampling, guidance and SDXL's sizes are ComfyUI's own code, as with any SDXL.
    """
    unet = UNet2DConditionModel.from_pretrained(miniature_path(), subfolder="unet", dtype=torch.float32)
    vae = AutoencoderKL.from_pretrained(miniature_path(), subfolder="vae", dtype=torch.float32)
    side, channels = unet.config.sample_size, unet.config.in_channels
    config = comfy.supported_models.SDXL(
        {
            "disable_unet_model_creation": True,
            "in_channels": channels,
            "adm_in_channels": unet.config.projection_class_embeddings_input_dim,
        }
    )
    config.latent_format = comfy.latent_formats.LatentFormat()
    config.latent_format.latent_channels = channels
    config.latent_format.scale_factor = vae.config.scaling_factor
    model = comfy.model_base.SDXL(config, model_type=comfy.model_base.ModelType.V_PREDICTION)
    model.embedder = type(model.embedder)(unet.config.addition_time_embed_dim)
    model.diffusion_model = ComfyUNet(unet).eval()
    patcher = comfy.model_patcher.ModelPatcher(
        model,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    latent = torch.zeros(1, channels, side, side, device=comfy.model_management.intermediate_device())
    return patcher, ComfyVAE(vae.eval()), {"samples": latent}
