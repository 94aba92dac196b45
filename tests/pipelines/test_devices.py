"""Encoding and drawing on a device other than the CPU, in half precision, without such a device: at tiny size, and at
the real one, which takes no memory."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers.pipelines import pipeline_utils
from torch import Tensor

from benchmarks import real_size
from finelip_sdxl import Conditioning, FineLIPSDXLPipeline
from finelip_sdxl.pipelines import prompt_encoding
from finelip_sdxl.pipelines.prompt_encoding import EMBEDDINGS
from tests.helpers.strict_device import DEVICE, StrictDevice
from tests.helpers.tiny_benchmarks import make_tiny

# By the original encoders: held for the first, and the stretched one's own rows for the second.
SHORT = "a red star (and a ring)0.5"
# Two windows by the new ones, the adapter and weights.
LONG = f"{'a red star, ' * 120} (a blue star)1.3 (and a ring)0.5"


def build() -> FineLIPSDXLPipeline:
    """A pipeline on the CPU, with a FineLIP in place of the first encoder, the second stretched, and an adapter."""
    pipe = real_size.build_swapped(False, ["text_encoder"], has_adapter=True, dtype=torch.float16)
    pipe.weighting = "compel"
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=["tiny", pytest.param("real", marks=pytest.mark.slow)], scope="module")
def size(request) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "tiny":
            make_tiny(patch)
        yield request.param


@pytest.fixture(scope="module")
def pipe(size) -> FineLIPSDXLPipeline:
    with StrictDevice():
        return build().to(DEVICE)


@pytest.mark.parametrize("prompt", [SHORT, LONG], ids=["short", "long"])
def test_embeddings_are_on_the_device_in_its_dtype(pipe, prompt) -> None:
    with StrictDevice(), torch.no_grad():
        embeddings = pipe.encode_prompt(prompt, negative_prompt="a (ring)0.8")
    for name, found in zip(EMBEDDINGS, embeddings, strict=True):
        assert (found.device, found.dtype) == (DEVICE, torch.float16), name


def test_encoders_move_to_the_device_and_back(size, monkeypatch) -> None:
    monkeypatch.setattr(pipeline_utils, "empty_device_cache", lambda kind: None)  # PyTorch has no module of this device
    pipe = build()
    with StrictDevice(), torch.no_grad():
        pipe.enable_model_cpu_offload(device=DEVICE)
        for prompt in (SHORT, LONG):
            conditioning = pipe.encode(prompt, negative_prompt="a (ring)0.8")
            assert {conditioning[name].device.type for name in EMBEDDINGS} == {
                DEVICE.type
            }  # with a number, as of a GPU
            parts = (pipe.stock_text_encoder, pipe.text_encoder, pipe.text_encoder_2, pipe.conditioning_adapter)
            assert {part.device.type for part in parts} == {"cpu"}


def test_a_picture_is_drawn_on_the_device(pipe) -> None:
    pipe.enable_text_projection_cache()
    with StrictDevice():
        picture = pipe(LONG, num_inference_steps=2, height=64, width=64, output_type="latent").images
    assert (picture.device, picture.dtype) == (DEVICE, torch.float16)


def test_a_picture_is_drawn_of_a_file(pipe, tmp_path) -> None:
    options: Any = {"num_inference_steps": 1, "height": 64, "width": 64, "output_type": "latent"}
    with StrictDevice():
        pipe.encode(LONG).save(tmp_path / "prompt.safetensors")
        conditioning = Conditioning.load(tmp_path / "prompt.safetensors")
        assert conditioning.prompt_embeds.device.type == "cpu"
        picture = pipe(**conditioning, **options).images
    assert (picture.device, picture.dtype) == (DEVICE, torch.float16)


# The test of the test: faults as they are made

is_tiny = pytest.mark.parametrize("size", ["tiny"], indirect=True)


@is_tiny
def test_token_ids_left_on_the_cpu_are_caught(pipe, monkeypatch) -> None:
    monkeypatch.setattr(prompt_encoding, "get_module_execution_device", lambda model: torch.device("cpu"))
    with StrictDevice(), pytest.raises(RuntimeError, match=r"embedding.* two devices: .* on meta, .*int64 on cpu"):
        pipe.encode_prompt(LONG)


@is_tiny
def test_positions_left_on_the_cpu_are_caught(pipe, monkeypatch) -> None:
    found = prompt_encoding._stock_position_ids

    def forgotten(encoder: Any) -> Tensor | None:
        rows = found(encoder)
        return None if rows is None else rows.cpu()

    monkeypatch.setattr(prompt_encoding, "_stock_position_ids", forgotten)
    with StrictDevice(), pytest.raises(RuntimeError, match=r"embedding.* two devices"):
        pipe.encode_prompt(SHORT)


@is_tiny
def test_weights_left_on_the_cpu_are_caught(pipe, monkeypatch) -> None:
    apply = prompt_encoding.apply_weights
    monkeypatch.setattr(
        prompt_encoding, "apply_weights", lambda states, empty, weights: apply(states, empty, weights.cpu())
    )
    with StrictDevice(), pytest.raises(RuntimeError, match="two devices"):
        pipe.encode_prompt(LONG)


@is_tiny
@pytest.mark.parametrize(("moved", "fault"), [("cpu", "two devices"), (torch.float32, "two dtypes")])
def test_a_layer_of_another_device_or_dtype_is_caught(pipe, monkeypatch, moved, fault) -> None:
    with StrictDevice():
        adapter = copy.deepcopy(pipe.conditioning_adapter)
        adapter.states[0][1].to(moved)
        monkeypatch.setattr(pipe, "conditioning_adapter", adapter)
        with pytest.raises(RuntimeError, match=rf"mm\.default got tensors (on|of) {fault}"):
            pipe.encode_prompt(LONG)
