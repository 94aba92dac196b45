"""What saves memory or time in Diffusers works on long prompts as well."""

from collections.abc import Callable, Iterator
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.hooks import apply_layerwise_casting
from safetensors import safe_open

from finelip_sdxl import ConditioningAdapter, FineLIPSDXLPipeline
from tests.helpers.drawing import draw, embeddings
from tests.helpers.prompts import ENDLESS, LONG, SHORT
from tests.helpers.tiny_sdxl import make_text_encoder

PROMPTS = (SHORT, LONG, ENDLESS)


@pytest.fixture
def pipe(components) -> FineLIPSDXLPipeline:
    """One with all parts that ours add: a FineLIP, the original beside it, a stretched encoder and an adapter."""
    torch.manual_seed(6)
    adapter = ConditioningAdapter([32, 48], 24, 8)
    with torch.no_grad():
        for weight in adapter.parameters():
            weight.normal_(std=0.1)
    pipe = FineLIPSDXLPipeline(**components, conditioning_adapter=adapter)
    pipe.swap_text_encoders(finelip=make_text_encoder(32, positions=248, seed=7))
    return pipe


MODELS = ("stock_text_encoder", "text_encoder", "text_encoder_2", "conditioning_adapter", "unet", "vae")


def images(pipe) -> list[np.ndarray]:
    return [draw(pipe, prompt) for prompt in PROMPTS]


def assert_same(found: list[np.ndarray], expected: list[np.ndarray], tolerance: float = 1e-3) -> None:
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance)


# Offloading


def test_model_offloading_draws_the_same(pipe) -> None:
    expected = images(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert {id(hook.model) for hook in pipe._all_hooks} == {id(getattr(pipe, name)) for name in MODELS}
    assert_same(images(pipe), expected)


def test_sequential_offloading_draws_the_same(pipe, monkeypatch) -> None:
    # Diffusers says "cpu:0" for the CPU, which accelerate takes for another device than that of the weights.
    offload = accelerate.cpu_offload
    monkeypatch.setattr(
        accelerate, "cpu_offload", lambda model, device, **kwargs: offload(model, torch.device("cpu"), **kwargs)
    )
    expected = images(pipe)
    pipe.enable_sequential_cpu_offload(device="cpu")
    for name in MODELS:
        assert {weight.device.type for weight in getattr(pipe, name).parameters()} == {"meta"}
    assert_same(images(pipe), expected)


CPU = torch.device("cpu")
GROUPS = pytest.mark.parametrize(
    "groups", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}], ids=str
)


@GROUPS
def test_group_offloading_draws_the_same(pipe, groups) -> None:
    expected = images(pipe)
    pipe.enable_group_offload(onload_device=CPU, offload_device=CPU, **groups)
    for name in MODELS:
        assert any(hasattr(module, "_diffusers_hook") for module in getattr(pipe, name).modules()), name
    assert_same(images(pipe), expected)


@GROUPS
def test_group_offloading_to_disk_mixes_no_encoders_up(pipe, groups, tmp_path) -> None:
    expected = images(pipe)
    pipe.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_to_disk_path=str(tmp_path), **groups)
    assert_same(images(pipe), expected)
    assert list(tmp_path.glob("*.safetensors"))
    assert list(tmp_path.glob("stock_text_encoder/*.safetensors"))


@pytest.mark.parametrize("excluded", ["stock_text_encoder", ["stock_text_encoder", "vae"], None], ids=str)
def test_what_is_excluded_from_group_offloading_stays(pipe, excluded, tmp_path) -> None:
    disk = {"offload_type": "leaf_level", "offload_to_disk_path": str(tmp_path)}
    pipe.enable_group_offload(onload_device=CPU, offload_device=CPU, exclude_modules=excluded, **disk)
    hooked = {
        name for name in MODELS if any(hasattr(module, "_diffusers_hook") for module in getattr(pipe, name).modules())
    }
    assert set(MODELS) - hooked == {*([excluded] if isinstance(excluded, str) else excluded or [])}


# The VAE


def test_sliced_decoding_draws_the_same(pipe) -> None:
    for prompt in PROMPTS:
        expected = draw(pipe, [prompt] * 2)
        decoded = []
        hook = pipe.vae.decoder.register_forward_hook(
            lambda _, given, __, decoded=decoded: decoded.append(len(given[0]))
        )
        pipe.vae.enable_slicing()
        np.testing.assert_allclose(draw(pipe, [prompt] * 2), expected, atol=1e-3)
        assert decoded == [1, 1]
        pipe.vae.disable_slicing()
        hook.remove()


def test_tiled_decoding_draws_nearly_the_same(pipe) -> None:
    for prompt in PROMPTS:
        [expected] = draw(pipe, prompt, height=32, width=32)
        pipe.vae.enable_tiling()
        [found] = draw(pipe, prompt, height=32, width=32)
        pipe.vae.disable_tiling()
        assert found.shape == (32, 32, 3)
        assert not np.array_equal(found, expected)
        assert np.abs(found - expected).mean() < 0.1


# Types of numbers


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(pipe, dtype) -> None:
    expected = images(pipe)
    pipe.to(dtype)
    assert {getattr(pipe, name).dtype for name in MODELS} == {dtype}
    for prompt, image, whole in zip(PROMPTS, images(pipe), expected, strict=True):
        assert embeddings(pipe, prompt).dtype == dtype
        assert np.isfinite(image).all()
        assert np.abs(image - whole).mean() < 0.2


def test_a_variant_of_the_files_is_loaded_and_saved(components, tmp_path) -> None:
    stock = StableDiffusionXLPipeline(**components).to(torch.float16)
    stock.save_pretrained(tmp_path / "stock", variant="fp16")
    pipe = FineLIPSDXLPipeline.from_pretrained(tmp_path / "stock", variant="fp16", dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "ours", variant="fp16")
    files = list((tmp_path / "ours").rglob("*.safetensors"))
    assert len(files) == 4
    for file in files:
        assert file.name.endswith(".fp16.safetensors")
        with safe_open(file, "pt") as opened:
            assert {opened.get_tensor(key).dtype for key in opened.keys()} == {torch.float16}  # noqa: SIM118
    again = FineLIPSDXLPipeline.from_pretrained(tmp_path / "ours", variant="fp16", dtype=torch.float16)
    assert again.text_encoder.dtype == torch.float16
    assert_same(images(again), images(pipe), tolerance=5e-3)


@pytest.mark.parametrize("name", ["unet", "vae", "conditioning_adapter"])
def test_layerwise_casting(pipe, name) -> None:
    expected = images(pipe)
    model = getattr(pipe, name)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert torch.float8_e4m3fn in {weight.dtype for weight in model.parameters()}
    found = images(pipe)
    for number in range(
        1 if name == "conditioning_adapter" else 0, 3
    ):  # what is read as stock does not pass through it
        assert not np.array_equal(found[number], expected[number])
        assert np.abs(found[number] - expected[number]).mean() < 0.1


def test_layerwise_casting_of_the_first_text_encoder(pipe) -> None:
    """Of the second, no SDXL pipeline can do with: noise takes its dtype, and there is none in eight bits."""
    whole = [embeddings(pipe, prompt) for prompt in PROMPTS]
    for encoder in (pipe.text_encoder, pipe.stock_text_encoder):
        apply_layerwise_casting(encoder, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    for prompt, expected in zip(PROMPTS, whole, strict=True):
        found = embeddings(pipe, prompt)
        assert found.dtype == torch.float32
        assert 0.8 < torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] < 0.9999999
        assert np.isfinite(draw(pipe, prompt)).all()


# torch.compile


@pytest.fixture
def compiled(pipe) -> Iterator[Any]:
    """Compiles the UNet with the arguments that it is given, and counts."""
    graphs: list[int] = []

    def backend(graph, inputs) -> Any:
        graphs.append(1)
        return graph.forward

    def compile_unet(**kwargs) -> list[int]:
        torch._dynamo.reset()
        pipe.unet.compile(backend=backend, fullgraph=True, **kwargs)
        return graphs

    yield compile_unet
    torch._dynamo.reset()


GROWING = [SHORT, LONG, " ".join([SHORT] * 30), ENDLESS]  # one of every bucket, and one of two windows


@pytest.mark.slow
def test_a_unet_of_fixed_shapes_is_compiled_once_a_bucket(pipe, compiled) -> None:
    expected = [draw(pipe, prompt) for prompt in GROWING]
    graphs = compiled(dynamic=False)
    for number, prompt in enumerate(GROWING):
        assert_same([draw(pipe, prompt)], [expected[number]])
        assert len(graphs) == number + 1
    assert [embeddings(pipe, prompt).shape[1] for prompt in GROWING] == [77, 154, 248, 2 * 248]
    for prompt in (f"{SHORT} and {SHORT}", f"{LONG} a fox", *GROWING):
        draw(pipe, prompt)
    assert len(graphs) == len(GROWING)


@pytest.mark.slow
def test_a_unet_is_compiled_at_most_twice_by_default(pipe, compiled) -> None:
    """The second length tells the compiler that lengths vary."""
    expected = [draw(pipe, prompt) for prompt in GROWING]
    graphs = compiled()
    assert_same([draw(pipe, prompt) for prompt in GROWING], expected)
    assert len(graphs) == 2


# Quantized text encoders


@pytest.fixture
def quantize() -> Callable[..., Any]:
    pytest.importorskip("torchao", reason="QUANTIZATION IS NOT TESTED: torchao is not installed")
    from diffusers import PipelineQuantizationConfig
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return lambda *names: PipelineQuantizationConfig(
        quant_mapping={name: TorchAoConfig(Int8WeightOnlyConfig()) for name in names}
    )


def weight_types(pipe, *names: str) -> set[str]:
    return {
        type(weight).__name__
        for name in names
        for key, weight in getattr(pipe, name).named_parameters()
        if key.endswith("fc1.weight")
    }


def test_quantized_text_encoders_of_a_converted_sdxl(pipe, quantize, tmp_path) -> None:
    pipe.save_pretrained(tmp_path)
    names = ("text_encoder", "text_encoder_2", "stock_text_encoder")
    quantized = FineLIPSDXLPipeline.from_pretrained(tmp_path, quantization_config=quantize(*names))
    assert weight_types(quantized, *names) == {"Int8Tensor"}
    for prompt in PROMPTS:
        found, expected = embeddings(quantized, prompt).flatten(), embeddings(pipe, prompt).flatten()
        assert 0.9 < torch.corrcoef(torch.stack([found, expected]))[0, 1] < 0.9999999
        assert np.isfinite(draw(quantized, prompt)).all()
    assert_same(images(quantized), images(FineLIPSDXLPipeline.from_pipe(quantized)))
    expected = images(quantized)
    quantized.enable_model_cpu_offload(device="cpu")
    assert_same(images(quantized), expected)


def test_quantized_text_encoders_cannot_be_stretched_any_more(components, quantize, tmp_path) -> None:
    StableDiffusionXLPipeline(**components).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is quantized, so .* `finelip-sdxl convert` first"):
        FineLIPSDXLPipeline.from_pretrained(tmp_path, quantization_config=quantize("text_encoder", "text_encoder_2"))


def test_a_finelip_does_not_take_the_place_of_a_quantized_encoder(components, quantize, tmp_path) -> None:
    """In silence it would be as large as before."""
    StableDiffusionXLPipeline(**components).save_pretrained(tmp_path)
    finelip = make_text_encoder(32, positions=248, seed=7)
    with pytest.raises(ValueError, match=r"`text_encoder` is quantized, .* `finelip-sdxl convert` first"):
        FineLIPSDXLPipeline.from_pretrained(tmp_path, finelip, quantization_config=quantize("text_encoder"))


def test_a_quantized_unet_of_any_sdxl(components, quantize, tmp_path) -> None:
    from diffusers import PipelineQuantizationConfig, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    StableDiffusionXLPipeline(**components).save_pretrained(tmp_path)
    config = PipelineQuantizationConfig(quant_mapping={"unet": TorchAoConfig(Int8WeightOnlyConfig())})
    quantized = FineLIPSDXLPipeline.from_pretrained(tmp_path, quantization_config=config)
    attention = quantized.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn2
    assert type(attention.to_q.weight).__name__ == "Int8Tensor"
    for image, expected in zip(images(quantized), images(FineLIPSDXLPipeline.from_pretrained(tmp_path)), strict=True):
        assert np.abs(image - expected).mean() < 0.1
