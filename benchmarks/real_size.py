"""SDXL of real size with random weights, for benchmarks: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from finelip_sdxl import ConditioningAdapter, FineLIPConfig, FineLIPModel, FineLIPSDXLPipeline
from finelip_sdxl.miniature.tokenizer import build_tokenizer
from finelip_sdxl.options import ENCODERS
from finelip_sdxl.sdxl_sizes import BIG_G, CLIP_L, UNET, VAE

ADAPTER: dict[str, Any] = {}  # its defaults are SDXL's widths


def build_pipeline(
    filled: bool, short_prompt_encoder: str = "original", dtype: torch.dtype = torch.bfloat16, device: str = "cpu"
) -> FineLIPSDXLPipeline:
    """Stock SDXL's parts in our pipeline. The miniature's tokenizers suffice: SDXL's know more words.

    Args:
        filled: whether weights are filled with random numbers, for computing with them. Otherwise no page of their
            memory is touched.
        short_prompt_encoder: the option of the pipeline.
        dtype, device: of all weights.
    """
    tokenizers = build_tokenizer(), build_tokenizer(pad_token="!")
    special = {"bos_token_id": tokenizers[0].bos_token_id, "eos_token_id": tokenizers[0].eos_token_id}
    with torch.device("meta"):
        parts: dict[str, Any] = {
            "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L, **special)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**BIG_G, **special)),
            "unet": UNet2DConditionModel(**UNET),
            "vae": AutoencoderKL(**VAE),
        }
    return FineLIPSDXLPipeline(
        **{name: materialize(part, filled, dtype, device) for name, part in parts.items()},
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        scheduler=EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
        short_prompt_encoder=short_prompt_encoder,
    )


def build_swapped(
    filled: bool,
    replaced: Collection[str] = (),
    short_prompt_encoder: str = "original",
    has_adapter: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
) -> FineLIPSDXLPipeline:
    """A pipeline with new encoders in place of the `replaced` ones, as FineLIPs would be, and the others stretched."""
    pipe = build_pipeline(filled, short_prompt_encoder, dtype, device)
    finelips = []
    for name in ENCODERS:
        stock = getattr(pipe, name)
        with torch.device("meta"):
            text_config = {**stock.config.to_dict(), "max_position_embeddings": 248}
            has_projection = isinstance(stock, CLIPTextModelWithProjection)
            dim = stock.config.projection_dim if has_projection else None
            finelip = FineLIPModel(FineLIPConfig(text_config=text_config, projection_dim=dim))
        finelips.append(materialize(finelip, filled, dtype, device) if name in replaced else None)
    pipe.swap_text_encoders(*finelips)
    if has_adapter:
        with torch.device("meta"):
            adapter = ConditioningAdapter(**ADAPTER)
        pipe.register_modules(conditioning_adapter=materialize(adapter, filled, dtype, device))
    return pipe


def materialize(model: nn.Module, filled: bool, dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> nn.Module:
    """Give memory to a model on the meta device. Unless it is filled, no page of the memory is touched."""
    nn.Module.to(model, dtype).requires_grad_(False).eval().to_empty(device=device)
    for module in model.modules():
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(module.position_ids.shape[-1], device=device)[None]
    if filled:
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    return model
