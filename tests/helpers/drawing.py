"""How tests call a pipeline: two steps from the same noise, or its text encoders alone."""

from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from tests.helpers.prompts import LONG


def draw(pipe: DiffusionPipeline, prompt: str | list[str] = LONG, **arguments: Any) -> np.ndarray:
    """Images (batch, height, width, 3) in [0, 1], from the same noise unless `generator` says otherwise."""
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    return pipe(prompt, **{**settings, **arguments}).images


def embeddings(pipe: DiffusionPipeline, prompt: str | list[str] = LONG, **arguments: Any) -> torch.Tensor:
    """The states that the UNet gets (batch, positions, width)."""
    with torch.no_grad():
        return pipe.encode_prompt(prompt, device="cpu", **arguments)[0]
