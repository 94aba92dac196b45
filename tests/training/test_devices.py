"""The recipes on a device other than the CPU, in half precision, without such a device: at tiny size, and at the real
one, which takes no memory. Nothing is saved."""

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTextConfig, CLIPVisionConfig

from benchmarks import real_size
from finelip_sdxl import FineLIPConfig, FineLIPModel
from finelip_sdxl.data import load_image_processor
from finelip_sdxl.sdxl_sizes import CLIP_L, VIT_L
from finelip_sdxl.training import precompute, task
from finelip_sdxl.training.health import Health
from tests.helpers.recipes import forget_accelerator
from tests.helpers.strict_device import DEVICE, StrictDevice
from training import align_adapter, train_finelip, train_lora


@pytest.fixture(autouse=True)
def strict_device(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(Accelerator, "device", DEVICE)
    for recipe in (align_adapter, train_finelip, train_lora):
        monkeypatch.setattr(recipe, "RunFolder", UnsavedRun)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # PyTorch has none for this device
    monkeypatch.setattr(Health, "check", lambda *figures: None)  # numbers mean nothing here
    with StrictDevice():
        yield
    forget_accelerator()


class UnsavedRun(SimpleNamespace):
    """A run folder that keeps nothing."""

    def __init__(self, folder: Any, *_: Any, **__: Any) -> None:
        super().__init__(folder=folder, also={}, resume=lambda: None, save=lambda progress: None)

    def check_settings(self) -> None: ...

    def save_model(self, *_: Any, **__: Any) -> None: ...


# Training of a FineLIP


def train(tmp_path: Any, monkeypatch: pytest.MonkeyPatch, size: str) -> dict[str, Any]:
    """A step with all losses; at real size of a CLIP ViT-L/14 with the miniature's words and scenes."""
    if size == "real":
        monkeypatch.setattr(train_finelip, "load_finelip", lambda name, **stretch: vit_l())
        processor = load_image_processor(tmp_path, VIT_L["image_size"])  # CLIP's own, since the folder has none
        monkeypatch.setattr(train_finelip, "load_image_processor", lambda name, size: processor)
    flags = {"data": "miniature:10", "eval-data": "none", "max-steps": 1, "batch-size": 5, "output-dir": tmp_path}
    losses = {f"{name}-weight": 1 for name in ("triplet", "contrastive", "region", "distillation")}
    return train_finelip.train(train_finelip.parse(words(**flags, **losses)))


def vit_l() -> FineLIPModel:
    """On the device: the recipe copies it, which takes memory on the CPU."""
    text = CLIPTextConfig(**CLIP_L, max_position_embeddings=248)
    config = FineLIPConfig(text_config=text, vision_config=CLIPVisionConfig(**VIT_L), projection_dim=768)
    with DEVICE:
        return FineLIPModel(config).eval()


@pytest.mark.parametrize("size", ["tiny", pytest.param("real", marks=pytest.mark.slow)])
def test_a_finelip_is_trained(tmp_path, monkeypatch, size) -> None:
    assert train(tmp_path, monkeypatch, size)["step"] == 1


@pytest.mark.parametrize("forgotten", ["a batch", "the teacher"])
def test_what_a_training_leaves_on_the_cpu_is_caught(tmp_path, monkeypatch, forgotten) -> None:
    if forgotten == "a batch":
        monkeypatch.setattr(train_finelip, "send_to_device", lambda batch, device: batch)
    else:
        encode = task.FrozenTeacher.encode
        monkeypatch.setattr(
            task.FrozenTeacher, "encode", lambda self, ids: tuple(part.cpu() for part in encode(self, ids))
        )
    with pytest.raises(RuntimeError, match="two devices"):
        train(tmp_path, monkeypatch, "tiny")


# Alignment of SDXL's encoders: the pictures are encoded before, and each stage takes a step.


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adapter", "lora"])
def test_encoders_of_real_size_are_aligned(tmp_path, monkeypatch, method) -> None:
    flags: dict[str, Any] = {"captions": "miniature:3", "method": method, "validate-every": 0, "batch-size": 3}
    steps = {"text-steps": 1, "image-steps": 1, "snr-gamma": 5, "output-dir": tmp_path}
    arguments = align_adapter.parse(words(**flags, **steps))
    arguments.finelip, arguments.finelip_2, arguments.resolution = None, None, 1024
    monkeypatch.setattr(align_adapter, "load_stock", lambda arguments: stock())
    monkeypatch.setattr(precompute, "digests_of_models", lambda pipe, with_states: iter(()))  # it reads all weights
    assert align_adapter.align(arguments)["step"] == 2


@pytest.mark.parametrize("flags", [[], ["--train-text-encoders"]], ids=" ".join)
def test_a_lora_is_trained(tmp_path, flags) -> None:
    given = words(captions="miniature:2", steps=1, **{"batch-size": 2, "snr-gamma": 5, "output-dir": tmp_path})
    assert train_lora.train(train_lora.parse([*given, *flags]))["step"] == 1


def stock() -> StableDiffusionXLPipeline:
    """Stock SDXL on the CPU in bfloat16, as `--mixed-precision bf16` loads it."""
    parts = real_size.build_pipeline(False, dtype=torch.bfloat16).components
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
    return StableDiffusionXLPipeline(**{name: parts[name] for name in names}, add_watermarker=False)


def words(**flags: Any) -> list[str]:
    return list(itertools.chain(*((f"--{name}", str(value)) for name, value in flags.items())))
