"""Benchmarks of real size, made tiny."""

import pytest

from benchmarks import real_size
from tests.helpers import tiny_sdxl


def make_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CLIP_L", "BIG_G", "UNET"):
        monkeypatch.setattr(real_size, name, getattr(tiny_sdxl, name))
    monkeypatch.setattr(real_size, "ADAPTER", {"state_dims": (16, 24), "pooled_dim": 24, "hidden_dim": 8})
    monkeypatch.setattr(real_size, "VAE", {**real_size.VAE, "block_out_channels": (32,) * 4, "sample_size": 64})
