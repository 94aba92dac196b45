"""The measurement of the alignment's memory, at a size that measures nothing but takes a second."""

import itertools

import pytest
import torch
from diffusers import UNet2DConditionModel

from training import measure_memory


def test_the_unet_is_that_of_sdxl() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**measure_memory.UNET)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 2_567_463_684


@pytest.mark.parametrize(("stage", "method"), list(itertools.product(("text", "image"), ("adapter", "lora"))))
def test_each_stage_takes_a_step_by_each_method(monkeypatch, stage, method) -> None:
    small = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    monkeypatch.setattr(measure_memory, "CLIP_L", {**small, "hidden_size": 16})
    monkeypatch.setattr(measure_memory, "BIG_G", {**small, "hidden_size": 24, "projection_dim": 24})
    unet = {
        "block_out_channels": (32, 64, 64),
        "transformer_layers_per_block": 1,
        "attention_head_dim": (2, 4, 4),
        "cross_attention_dim": 40,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24 + 6 * 8,
    }
    monkeypatch.setattr(measure_memory, "UNET", {**measure_memory.UNET, **unet})
    gib, seconds = measure_memory.measure(stage, method, batch_size=3, resolution=64, device="cpu")
    assert gib >= 0
    assert seconds > 0
