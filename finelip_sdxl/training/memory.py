"""Memory of a device: which models are on it, and activations that are computed twice."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from finelip_sdxl import FineLIPSDXLPipeline
from finelip_sdxl.options import ENCODERS


def place(models: Mapping[str, nn.Module], needed: Collection[str], device: torch.device) -> None:
    """Moves models that are needed to the device, and the others out of its memory."""
    for name, model in sorted(models.items(), key=lambda item: item[0] in needed):
        model.to(device if name in needed else "cpu")


def save_memory(pipe: FineLIPSDXLPipeline) -> None:
    """Lets activations be computed again in the backward pass, wherever gradients pass through."""
    pipe.unet.enable_gradient_checkpointing()
    pipe.unet.train()  # SDXL has no dropout: this only turns checkpointing on
    for name in ENCODERS:
        encoder = getattr(pipe, name)
        encoder.activation_checkpointing_enable()
        encoder.train()
