"""Models of Diffusers and transformers in the hands of ComfyUI's memory management."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from torch import nn


class ManagedModels:
    """Models that ComfyUI moves to a device when they are needed, and away when it needs the memory.

    Args:
        models: the models by their names.
        load_device: where they compute.
        offload_device: where they wait.
    """

    def __init__(
        self, models: Mapping[str, nn.Module], load_device: torch.device, offload_device: torch.device
    ) -> None:
        # In a container, since ComfyUI sets attributes, and `device` of Diffusers' models cannot be set.
        self._patcher = comfy.model_patcher.ModelPatcher(
            nn.ModuleDict(models), load_device=load_device, offload_device=offload_device
        )

    def load(self) -> torch.device:
        """Have all of them on their device.

        Returns:
            The device.
        """
        # In full: ComfyUI splits models between devices by its own kinds of layers.
        comfy.model_management.load_models_gpu([self._patcher], force_full_load=True)
        device: torch.device = self._patcher.load_device
        return device


def to_intermediate(tensor: torch.Tensor) -> Any:
    """A tensor as ComfyUI hands it from node to node: float32, on its device for results."""
    return tensor.float().to(comfy.model_management.intermediate_device())
