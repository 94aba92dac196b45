"""The measurement of the alignment's memory, at a size that measures nothing but takes a second."""

import itertools

import pytest
import torch
from diffusers import UNet2DConditionModel

from tests.helpers import tiny_sdxl
from training import measure_memory


def test_the_unet_is_that_of_sdxl() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**measure_memory.UNET)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 2_567_463_684


@pytest.mark.parametrize(("stage", "method"), list(itertools.product(("text", "image"), ("adapter", "lora"))))
def test_each_stage_takes_a_step_by_each_method(monkeypatch, stage, method) -> None:
    for name in ("CLIP_L", "BIG_G", "UNET"):
        monkeypatch.setattr(measure_memory, name, getattr(tiny_sdxl, name))
    gib, seconds = measure_memory.measure(stage, method, batch_size=3, resolution=64, device="cpu")
    assert gib >= 0
    assert seconds > 0
