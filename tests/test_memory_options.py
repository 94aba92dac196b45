"""What saves memory or time in Diffusers works on long prompts as well."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline

from finelip_sdxl import ConditioningAdapter, FineLIPSDXLPipeline

SHORT = "a red fox above the blue square"
LONG = " ".join([SHORT] * 20)  # 142 tokens
ENDLESS = " ".join([SHORT] * 60)  # 422
PROMPTS = (SHORT, LONG, ENDLESS)


@pytest.fixture
def pipe(components) -> FineLIPSDXLPipeline:
    torch.manual_seed(6)
    adapter = ConditioningAdapter([32, 48], 24, 8)
    with torch.no_grad():
        for weight in adapter.parameters():
            weight.normal_(std=0.1)
    pipe = FineLIPSDXLPipeline(**components, conditioning_adapter=adapter)
    pipe.swap_text_encoders()
    return pipe


def draw(pipe, prompt: str, **arguments) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    return pipe(prompt, **{**settings, **arguments}).images[0]


def images(pipe) -> list[np.ndarray]:
    return [draw(pipe, prompt) for prompt in PROMPTS]


def assert_same(found: list[np.ndarray], expected: list[np.ndarray], tolerance: float = 1e-3) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance)


# Offloading


def test_model_offloading_draws_the_same(pipe) -> None:
    expected = images(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert_same(images(pipe), expected)


def test_group_offloading_draws_the_same(pipe) -> None:
    expected = images(pipe)
    pipe.enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    )
    assert_same(images(pipe), expected)


# The VAE


def test_sliced_and_tiled_decoding(pipe) -> None:
    expected = images(pipe)
    pipe.vae.enable_slicing()
    assert_same(images(pipe), expected)
    pipe.vae.disable_slicing()
    pipe.vae.enable_tiling()
    assert isinstance(pipe.vae, AutoencoderKL)
    assert pipe.vae.use_tiling
    assert_same(images(pipe), expected)  # smaller than a tile


# Types of numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(pipe, dtype) -> None:
    pipe.to(dtype)
    for image in images(pipe):
        assert np.isfinite(image).all()
    assert {part.dtype for part in (pipe.text_encoder, pipe.conditioning_adapter, pipe.unet)} == {dtype}


def test_a_variant_of_the_files_is_loaded_and_saved(components, tmp_path) -> None:
    stock = StableDiffusionXLPipeline(**components).to(torch.float16)
    stock.save_pretrained(tmp_path / "stock", variant="fp16")
    pipe = FineLIPSDXLPipeline.from_pretrained(tmp_path / "stock", variant="fp16", dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "ours", variant="fp16")
    again = FineLIPSDXLPipeline.from_pretrained(tmp_path / "ours", variant="fp16", dtype=torch.float16)
    assert again.text_encoder.dtype == torch.float16
    assert_same(images(again), images(pipe), tolerance=5e-3)


def test_layerwise_casting_of_the_unet(pipe) -> None:
    expected = images(pipe)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    found = images(pipe)
    assert all(np.isfinite(image).all() for image in found)
    stored = {weight.dtype for weight in pipe.unet.parameters()}
    assert torch.float8_e4m3fn in stored
    assert np.abs(found[1] - expected[1]).mean() < 0.1


# torch.compile


def test_the_unet_is_compiled_at_most_once_a_bucket(pipe) -> None:
    expected = images(pipe)
    compiled: list[int] = []

    def backend(graph, inputs) -> object:
        compiled.append(1)
        return graph.forward

    torch._dynamo.reset()
    pipe.unet.compile(backend=backend, dynamic=False, fullgraph=True)
    assert_same([draw(pipe, SHORT)], expected[:1])
    a_shape = len(compiled)
    assert a_shape >= 1
    assert_same([draw(pipe, LONG)], expected[1:2])
    assert len(compiled) == 2 * a_shape
    for prompt in (SHORT, f"{SHORT} and {SHORT}", LONG, f"{LONG} a fox", SHORT):
        draw(pipe, prompt)
    assert len(compiled) == 2 * a_shape
    torch._dynamo.reset()


# Quantized text encoders


@pytest.fixture
def quantization() -> Any:
    pytest.importorskip("torchao", reason="QUANTIZATION IS NOT TESTED: torchao is not installed")
    from diffusers import PipelineQuantizationConfig
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    mapping = {name: TorchAoConfig(Int8WeightOnlyConfig()) for name in ("text_encoder", "text_encoder_2")}
    return PipelineQuantizationConfig(quant_mapping=mapping)


def weight_type(pipe) -> str:
    return type(pipe.text_encoder_2.text_model.encoder.layers[0].mlp.fc1.weight).__name__


def test_quantized_text_encoders_of_a_converted_sdxl(components, quantization, tmp_path) -> None:
    pipe = FineLIPSDXLPipeline(**components)
    pipe.swap_text_encoders()
    pipe.save_pretrained(tmp_path)
    quantized = FineLIPSDXLPipeline.from_pretrained(tmp_path, quantization_config=quantization)
    assert weight_type(quantized) == "Int8Tensor"
    for prompt in PROMPTS:
        with torch.no_grad():
            states, expected = (each.encode_prompt(prompt, device="cpu")[0].flatten() for each in (quantized, pipe))
        assert torch.corrcoef(torch.stack([states, expected]))[0, 1] > 0.9
        assert np.isfinite(draw(quantized, prompt)).all()


def test_quantized_text_encoders_cannot_be_stretched_any_more(components, quantization, tmp_path) -> None:
    StableDiffusionXLPipeline(**components).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is quantized, so .* `finelip-sdxl convert` first"):
        FineLIPSDXLPipeline.from_pretrained(tmp_path, quantization_config=quantization)
