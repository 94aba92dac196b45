"""A stand-in for the modules of ComfyUI that the nodes use: no package index has ComfyUI.

`comfyui/check.py` runs the nodes in ComfyUI itself.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch


class ModelPatcher:
    """What the nodes use of ComfyUI's class of this name."""

    def __init__(self, model: torch.nn.Module, load_device: torch.device, offload_device: torch.device) -> None:
        self.model, self.load_device, self.offload_device = model, load_device, offload_device
        model.device = offload_device  # as ComfyUI, which Diffusers' models do not let do


class StandIn:
    """The modules, and what was done with them.

    Args:
        models: the folder of ComfyUI's models.

    Attributes:
        modules: the modules by their names.
        loaded: the models of each call that loads them, with its options.
    """

    def __init__(self, models: Path) -> None:
        self.loaded: list[tuple[list[Any], dict[str, bool]]] = []
        cpu = torch.device("cpu")
        management = _module("comfy.model_management")
        for name in ("text_encoder_device", "text_encoder_offload_device", "vae_device", "vae_offload_device"):
            setattr(management, name, lambda: cpu)
        management.intermediate_device = lambda: cpu
        management.is_device_cpu = lambda device: device.type == "cpu"
        management.text_encoder_dtype = lambda device: torch.float16
        management.load_models_gpu = self._load
        patcher = _module("comfy.model_patcher")
        patcher.ModelPatcher = ModelPatcher
        paths = _module("folder_paths")
        paths.get_folder_paths = lambda kind: [str(models / kind)]
        unused = [_module(f"comfy.{name}") for name in ("latent_formats", "model_base", "supported_models")]
        comfy = _module("comfy")
        for module in (management, patcher, *unused):
            setattr(comfy, module.__name__.removeprefix("comfy."), module)
        self.modules = {module.__name__: module for module in (comfy, management, patcher, paths, *unused)}

    def _load(self, patchers: list[Any], **options: bool) -> None:
        self.loaded.append(([patcher.model for patcher in patchers], options))
        for patcher in patchers:
            if isinstance(patcher, Clip):
                patcher.is_patched = options == {"force_patch_weights": True}


class Clip:
    """A CLIP of ComfyUI.

    Args:
        encoders: weights of each encoder under transformers' keys, by ComfyUI's names of them.

    Attributes:
        model: itself, as its patcher's.
        is_patched: whether its LoRAs are in its weights.
    """

    def __init__(self, encoders: dict[str, dict[str, torch.Tensor]]) -> None:
        self._encoders = encoders
        self.model = self
        self.is_patched = False

    def load_model(self) -> Clip:
        return self

    def get_sd(self) -> dict[str, torch.Tensor]:
        assert self.is_patched, "the weights are without the LoRAs, or with those of a copy"
        tensors = {
            f"{name}.transformer.{key}": weight
            for name, weights in self._encoders.items()
            for key, weight in weights.items()
        }
        return {**tensors, **{f"{name}.logit_scale": torch.tensor(4.6) for name in self._encoders}}


def _module(name: str) -> Any:
    """A module to set names in."""
    return ModuleType(name)
