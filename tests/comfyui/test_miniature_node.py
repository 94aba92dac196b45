"""The miniature's UNet and VAE as ComfyUI calls them give what Diffusers' calls give."""

from importlib import import_module
from types import ModuleType

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.embeddings import get_timestep_embedding

from finelip_sdxl.miniature import miniature_path


@pytest.fixture
def node(comfy) -> ModuleType:
    return import_module("comfyui.miniature")


def test_the_unet_takes_sizes_that_are_embedded_already(node) -> None:
    stock = UNet2DConditionModel.from_pretrained(miniature_path(), subfolder="unet")
    ours = node.ComfyUNet(UNet2DConditionModel.from_pretrained(miniature_path(), subfolder="unet"))
    x, times = torch.randn(2, stock.config.in_channels, 12, 12), torch.tensor([999.0, 500.0])
    context, pooled = torch.randn(2, 248, stock.config.cross_attention_dim), torch.randn(2, 160)
    sizes = torch.tensor([[192.0, 192, 0, 8, 192, 192]] * 2)
    embedded = get_timestep_embedding(sizes.flatten(), 32, flip_sin_to_cos=True, downscale_freq_shift=0).reshape(2, -1)
    with torch.no_grad():
        expected = stock(x, times, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
        found = ours(x, times, context=context, y=torch.cat([pooled, embedded], 1), control=None)
    assert torch.equal(found, expected)


@torch.no_grad()
def test_the_vae_gives_pictures_from_0_to_1_with_channels_last(node) -> None:
    stock = AutoencoderKL.from_pretrained(miniature_path(), subfolder="vae")
    latents = torch.randn(1, stock.config.latent_channels, 12, 12)
    pictures = node.ComfyVAE(stock).decode(latents)
    assert pictures.shape == (1, 192, 192, 3)
    expected = (stock.decode(latents).sample / 2 + 0.5).clamp(0, 1)
    # The same, but for rounding: products in another order.
    assert torch.allclose(pictures, expected.permute(0, 2, 3, 1), atol=1e-6)


@torch.no_grad()
def test_the_vae_encodes_pictures_as_diffusers_does(node) -> None:
    vae = AutoencoderKL.from_pretrained(miniature_path(), subfolder="vae")
    pictures = torch.rand(1, 192, 192, 4)  # with transparency, which ComfyUI's pictures may have
    torch.manual_seed(0)
    found = node.ComfyVAE(vae).encode(pictures)
    torch.manual_seed(0)
    expected = vae.encode(pictures[..., :3].permute(0, 3, 1, 2) * 2 - 1).latent_dist.sample()
    assert found.shape == (1, 8, 12, 12)
    # The same, but for rounding, as above.
    assert torch.allclose(found, expected, atol=1e-4)
