"""The cache of the text's keys and values: it saves work, changes no picture, and steps aside where it could."""

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import accelerate
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPAGPipeline, UNet2DConditionModel
from diffusers.hooks import apply_layerwise_casting
from diffusers.models.attention_processor import Attention
from PIL import Image
from transformers import CLIPImageProcessorPil

from finelip_sdxl import (
    FineLIPSDXLControlNetPipeline,
    FineLIPSDXLImg2ImgPipeline,
    FineLIPSDXLPipeline,
)
from finelip_sdxl.pipelines import LongPromptMixin
from finelip_sdxl.pipelines.text_projections import cached_text_projections
from finelip_sdxl.sdxl_sizes import UNET
from tests.helpers.drawing import draw
from tests.helpers.prompts import ALL_LENGTHS, LONG, SHORT
from tests.helpers.tiny_sdxl import make_unet
from tests.pipelines.test_ecosystem import save_ip_adapter

STEPS = 4
WIDTH = 32 + 48  # of the embeddings; no other layer of the tiny SDXL takes as many numbers
TEXT_LAYERS = (
    2 * 4
)  # keys and values of the tiny UNet's layers: one on the way down, one in the middle, two on the way up


@pytest.fixture
def pipe(components) -> FineLIPSDXLPipeline:
    pipe = FineLIPSDXLPipeline(**components)
    pipe.swap_text_encoders()
    return pipe


@pytest.fixture
def projected(monkeypatch) -> list[torch.Size]:
    """Shapes of the texts that go through a layer of keys or values."""
    shapes: list[torch.Size] = []
    linear = torch.nn.functional.linear

    def counting(input, weight, bias=None) -> torch.Tensor:
        if input.ndim == 3 and input.shape[-1] == WIDTH and input.shape[1] >= 77 and len(weight) > 4:
            shapes.append(input.shape)
        return linear(input, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counting)
    return shapes


def picture(pipe, prompt=LONG, **arguments) -> np.ndarray:
    return draw(pipe, prompt, num_inference_steps=STEPS, **arguments)


def both_ways(pipe, projected: list, run: Callable[[], np.ndarray]) -> tuple[int, int]:
    """Projections without and with the cache, of a drawing that must be the same both ways."""
    counts, found = [], []
    for switch in (pipe.disable_text_projection_cache, pipe.enable_text_projection_cache):
        switch()
        projected.clear()
        found.append(run())
        counts.append(len(projected))
    assert np.array_equal(*found)
    assert not any("forward" in vars(module) for module in pipe.unet.modules() if isinstance(module, torch.nn.Linear))
    return counts[0], counts[1]


ONCE = (STEPS * TEXT_LAYERS, TEXT_LAYERS)


@ALL_LENGTHS
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_keys_and_values_are_computed_once_a_call(pipe, projected, prompt, guidance) -> None:
    assert both_ways(pipe, projected, lambda: picture(pipe, prompt, guidance_scale=guidance)) == ONCE


def test_it_is_off_until_it_is_enabled(pipe, projected) -> None:
    picture(pipe)
    assert len(projected) == STEPS * TEXT_LAYERS


def test_several_prompts_and_images(pipe, projected) -> None:
    seeds = [torch.Generator().manual_seed(seed) for seed in range(4)]

    def run() -> np.ndarray:
        for seed in seeds:
            seed.manual_seed(3)
        return picture(pipe, [SHORT, LONG], num_images_per_prompt=2, generator=seeds)

    assert both_ways(pipe, projected, run) == ONCE


def test_every_call_computes_its_own(pipe, projected) -> None:
    expected = [picture(pipe, prompt) for prompt in (SHORT, LONG, SHORT)]
    pipe.enable_text_projection_cache()
    projected.clear()
    for prompt, image in zip((SHORT, LONG, SHORT), expected, strict=True):
        assert np.array_equal(picture(pipe, prompt), image)
    assert len(projected) == 3 * TEXT_LAYERS


def test_a_pipeline_made_of_another_has_it_too(pipe) -> None:
    assert not FineLIPSDXLImg2ImgPipeline.from_pipe(pipe)._caches_text_projections
    pipe.enable_text_projection_cache()
    assert FineLIPSDXLImg2ImgPipeline.from_pipe(pipe)._caches_text_projections


# Embeddings that change on the way


def replaced(_: Any, embeds: torch.Tensor) -> torch.Tensor:
    return embeds.flip(1)


def copied(_: Any, embeds: torch.Tensor) -> torch.Tensor:
    return embeds.clone()


def changed_in_place(_: Any, embeds: torch.Tensor) -> torch.Tensor:
    return embeds.mul_(1.5)


def changed_through_a_view(_: Any, embeds: torch.Tensor) -> torch.Tensor:
    embeds[:, 3].zero_()
    return embeds


def shrunk(pipe: Any, embeds: torch.Tensor) -> torch.Tensor:
    """Guidance is switched off from here on."""
    pipe._guidance_scale = 0.0
    return embeds.chunk(2)[-1]


@pytest.mark.parametrize("change", [replaced, copied, changed_in_place, changed_through_a_view, shrunk])
def test_embeddings_that_a_callback_changes_are_projected_again(pipe, projected, change) -> None:
    def on_step(pipe, step, timestep, tensors) -> dict:
        if step == 1:
            tensors["prompt_embeds"] = change(pipe, tensors["prompt_embeds"])
            if change is shrunk:
                tensors["add_text_embeds"] = tensors["add_text_embeds"].chunk(2)[-1]
                tensors["add_time_ids"] = tensors["add_time_ids"].chunk(2)[-1]
        return tensors

    inputs = ["latents", "prompt_embeds", "add_text_embeds", "add_time_ids"]
    counts = both_ways(
        pipe,
        projected,
        lambda: picture(pipe, callback_on_step_end=on_step, callback_on_step_end_tensor_inputs=inputs),
    )
    assert counts == (STEPS * TEXT_LAYERS, 2 * TEXT_LAYERS)


def test_embeddings_passed_by_the_user_and_changed_between_calls(pipe, projected) -> None:
    with torch.no_grad():
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        given = dict(zip(names, pipe.encode_prompt(LONG, device="cpu"), strict=True))
    first = picture(pipe, None, **given)
    pipe.enable_text_projection_cache()
    assert np.array_equal(picture(pipe, None, **given), first)
    given["prompt_embeds"].zero_()
    second = picture(pipe, None, **given)
    pipe.disable_text_projection_cache()
    assert np.array_equal(picture(pipe, None, **given), second)
    assert not np.array_equal(first, second)


# LoRAs, and other changes of the weights


def load_lora(pipe, name: str, seed: int) -> None:
    """A LoRA on all keys and values of the text, at times on all other layers of these attentions."""
    random = torch.Generator().manual_seed(seed)
    weights = {}
    for path, module in pipe.unet.named_modules():
        if isinstance(module, Attention) and module.is_cross_attention:
            for layer in ("to_k", "to_v"):
                out = getattr(module, layer).out_features
                weights[f"unet.{path}.{layer}.lora_A.weight"] = torch.randn(2, WIDTH, generator=random) / 4
                weights[f"unet.{path}.{layer}.lora_B.weight"] = torch.randn(out, 2, generator=random) / 4
    pipe.load_lora_weights(weights, adapter_name=name)


def in_callback(change: Callable[[Any], Any]) -> Callable[..., dict]:
    def on_step(pipe, step, timestep, tensors) -> dict:
        if step == 1:
            change(pipe)
        return tensors

    return on_step


def other_scale(pipe) -> None:
    pipe.set_adapters("one", 0.3)


def other_scale_of_the_call(pipe) -> None:
    pipe._cross_attention_kwargs = {"scale": 0.25}


def other_adapter(pipe) -> None:
    pipe.set_adapters("two", 1.0)


def no_adapter(pipe) -> None:
    pipe.disable_lora()


def fused(pipe) -> None:
    pipe.fuse_lora(lora_scale=0.7)


def unloaded(pipe) -> None:
    pipe.unload_lora_weights()


@pytest.mark.parametrize("change", [other_scale, other_scale_of_the_call, other_adapter, no_adapter, fused, unloaded])
def test_a_lora_that_changes_on_the_way(components, change) -> None:
    found = []
    for cached in (False, True):
        pipe = FineLIPSDXLPipeline(**copy.deepcopy(components))
        pipe.swap_text_encoders()
        load_lora(pipe, "two", seed=2)
        load_lora(pipe, "one", seed=1)
        pipe.set_adapters("one", 1.0)
        if cached:
            pipe.enable_text_projection_cache()
        scale = {"cross_attention_kwargs": {"scale": 0.8}}
        found.append(picture(pipe, callback_on_step_end=in_callback(change), **scale))
        unchanged = picture(pipe, **scale) if change is not unloaded else None
    assert np.array_equal(*found)
    assert unchanged is None or not np.array_equal(found[0], unchanged)


def test_a_lora_fused_anew_at_another_scale_on_the_way(components) -> None:
    def refuse(pipe) -> None:
        pipe.unfuse_lora()
        pipe.fuse_lora(lora_scale=0.2)

    found = []
    for cached in (False, True):
        pipe = FineLIPSDXLPipeline(**copy.deepcopy(components))
        pipe.swap_text_encoders()
        load_lora(pipe, "one", seed=1)
        pipe.fuse_lora(lora_scale=0.9)
        if cached:
            pipe.enable_text_projection_cache()
        found.append(picture(pipe, callback_on_step_end=in_callback(refuse)))
    assert np.array_equal(*found)


def test_a_lora_between_calls(pipe, projected) -> None:
    for change in (
        lambda: load_lora(pipe, "one", seed=1),
        lambda: pipe.set_adapters("one", 0.5),
        pipe.fuse_lora,
        pipe.unfuse_lora,
        pipe.unload_lora_weights,
    ):
        change()
        assert both_ways(pipe, projected, lambda: picture(pipe)) == ONCE


def test_weights_that_are_changed_or_replaced_on_the_way(pipe, projected) -> None:
    original = copy.deepcopy(pipe.unet.state_dict())
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2

    def changed(pipe) -> None:
        with torch.no_grad():
            attention.to_k.weight.mul_(2)

    def another(pipe) -> None:
        attention.to_v.weight = torch.nn.Parameter(attention.to_v.weight.detach().flip(0))

    for change in (changed, another):

        def run(change=change) -> np.ndarray:
            pipe.unet.load_state_dict(original)
            return picture(pipe, callback_on_step_end=in_callback(change))

        assert both_ways(pipe, projected, run) == (STEPS * TEXT_LAYERS, TEXT_LAYERS + 1)


# Other parts of Diffusers


def test_an_ip_adapter_keeps_its_processors(components, projected, tmp_path) -> None:
    crop = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    pipe = FineLIPSDXLPipeline(**components, feature_extractor=crop)
    pipe.swap_text_encoders()
    save_ip_adapter(pipe.unet, tmp_path)
    pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name="ip-adapter.safetensors")
    image = Image.fromarray(np.full((16, 16, 3), 200, dtype=np.uint8))
    processors = pipe.unet.attn_processors
    assert both_ways(pipe, projected, lambda: picture(pipe, ip_adapter_image=image)) == ONCE
    assert pipe.unet.attn_processors == processors


def test_perturbed_attention_guidance(components, projected) -> None:
    class Perturbed(LongPromptMixin, StableDiffusionXLPAGPipeline):
        pass

    pipe = Perturbed(**components, pag_applied_layers=["mid"])
    pipe.swap_text_encoders()
    assert both_ways(pipe, projected, lambda: picture(pipe, pag_scale=3.0)) == ONCE


def test_fused_projections(pipe, projected) -> None:
    pipe.fuse_qkv_projections()
    assert both_ways(pipe, projected, lambda: picture(pipe)) == (STEPS * TEXT_LAYERS / 2, TEXT_LAYERS / 2)
    pipe.unfuse_qkv_projections()
    assert both_ways(pipe, projected, lambda: picture(pipe)) == ONCE


def test_sliced_attention(pipe, projected) -> None:
    pipe.enable_attention_slicing(1)
    assert both_ways(pipe, projected, lambda: picture(pipe)) == ONCE


@pytest.mark.parametrize("guess_mode", [False, True])
def test_a_controlnet_has_keys_and_values_of_its_own(components, controlnet, projected, guess_mode) -> None:
    pipe = FineLIPSDXLControlNetPipeline(**components, controlnet=[controlnet, copy.deepcopy(controlnet)])
    pipe.swap_text_encoders()
    edges = Image.fromarray(np.full((16, 16, 3), 90, dtype=np.uint8))
    arguments: dict = {"controlnet_conditioning_scale": [1.0, 0.5], "guess_mode": guess_mode}
    without, with_cache = both_ways(pipe, projected, lambda: picture(pipe, image=[edges, edges], **arguments))
    own = 2 * sum(layer.is_cross_attention for layer in controlnet.modules() if isinstance(layer, Attention))
    assert without == STEPS * (TEXT_LAYERS + 2 * own)
    # In guess mode Diffusers cuts the embeddings anew at each step.
    assert with_cache == TEXT_LAYERS + 2 * own * (STEPS if guess_mode else 1)


def test_a_refiner_that_takes_over(pipe, components, projected) -> None:
    refiner = FineLIPSDXLImg2ImgPipeline(**copy.deepcopy(components))
    refiner.swap_text_encoders()
    without = picture(
        refiner, image=picture(pipe, denoising_end=0.5, output_type="latent"), denoising_start=0.5, strength=1.0
    )
    pipe.enable_text_projection_cache()
    refiner.enable_text_projection_cache()
    projected.clear()
    found = picture(
        refiner, image=picture(pipe, denoising_end=0.5, output_type="latent"), denoising_start=0.5, strength=1.0
    )
    assert np.array_equal(found, without)
    assert len(projected) == 2 * TEXT_LAYERS


# Offloading, hooks, compilers, modes


@pytest.fixture
def one_cpu(monkeypatch) -> None:
    """Diffusers says "cpu:0" for the CPU, which PyTorch and accelerate take for another device than that of tensors."""
    for name in ("cpu_offload", "cpu_offload_with_hook"):
        offload = getattr(accelerate, name)
        monkeypatch.setattr(
            accelerate, name, lambda model, device, *args, offload=offload, **kwargs: offload(
                model, torch.device("cpu"), *args, **kwargs
            )
        )  # fmt: skip


def test_model_offloading(pipe, projected, one_cpu) -> None:
    pipe.enable_model_cpu_offload(device="cpu")
    assert both_ways(pipe, projected, lambda: picture(pipe)) == ONCE


def test_sequential_offloading(pipe, projected, one_cpu) -> None:
    expected = picture(pipe)
    pipe.enable_sequential_cpu_offload(device="cpu")
    hooked = {name for name, module in pipe.unet.named_modules() if "forward" in vars(module)}
    pipe.enable_text_projection_cache()
    for _ in range(2):
        projected.clear()
        np.testing.assert_allclose(picture(pipe), expected, atol=1e-3)
        assert len(projected) == TEXT_LAYERS
        assert {name for name, module in pipe.unet.named_modules() if "forward" in vars(module)} == hooked


@pytest.mark.parametrize(
    ("groups", "count"),
    [
        ({"offload_type": "leaf_level"}, STEPS * TEXT_LAYERS),
        ({"offload_type": "block_level", "num_blocks_per_group": 1}, TEXT_LAYERS),
    ],
    ids=str,
)
def test_group_offloading(pipe, projected, groups, count) -> None:
    expected = picture(pipe)
    cpu = torch.device("cpu")
    pipe.enable_group_offload(onload_device=cpu, offload_device=cpu, **groups)
    pipe.enable_text_projection_cache()
    projected.clear()
    np.testing.assert_allclose(picture(pipe), expected, atol=1e-3)
    assert len(projected) == count


def test_layerwise_casting(pipe, projected) -> None:
    apply_layerwise_casting(pipe.unet, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    expected = picture(pipe)
    pipe.enable_text_projection_cache()
    assert np.array_equal(picture(pipe), expected)


def test_offloading_that_is_enabled_on_the_way_stays(pipe, monkeypatch) -> None:
    def offload(pipe) -> None:
        accelerate.cpu_offload(pipe.unet.down_blocks, torch.device("cpu"))

    pipe.enable_text_projection_cache()
    picture(pipe, callback_on_step_end=in_callback(offload))
    layers = [module for module in pipe.unet.down_blocks.modules() if isinstance(module, torch.nn.Linear)]
    assert all(hasattr(layer, "_hf_hook") and "forward" in vars(layer) for layer in layers)
    expected = picture(pipe)
    pipe.disable_text_projection_cache()
    assert np.array_equal(picture(pipe), expected)


def wrapped(model: torch.nn.Module) -> torch.nn.Module:
    return torch.compile(model, backend="eager")


def in_place(model: torch.nn.Module) -> torch.nn.Module:
    model.compile(backend="eager")
    return model


def by_forward(model: torch.nn.Module) -> torch.nn.Module:
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def block_by_block(model: torch.nn.Module) -> torch.nn.Module:
    model.compile_repeated_blocks(backend="eager")
    return model


def one_block(model: torch.nn.Module) -> torch.nn.Module:
    model.mid_block = torch.compile(model.mid_block, backend="eager")
    return model


@pytest.mark.parametrize("compiled", [wrapped, in_place, by_forward, block_by_block, one_block])
def test_compiled_models_are_left_alone(compiled) -> None:
    """What changes at a layer would be compiled anew."""
    unet = make_unet()
    layers = [module for module in unet.modules() if isinstance(module, torch.nn.Linear)]

    def replaced() -> int:
        return sum("forward" in vars(layer) for layer in layers)

    with cached_text_projections([unet]):
        assert replaced() == TEXT_LAYERS
    with cached_text_projections([compiled(unet)]):
        assert replaced() == 0


def text_layer() -> tuple[Attention, torch.nn.Linear]:
    attention = Attention(8, cross_attention_dim=WIDTH, heads=2, dim_head=4)
    return attention, attention.to_k


@pytest.mark.slow
def test_a_layer_that_somebody_else_compiles_computes(projected) -> None:
    model, layer = text_layer()
    compiled = torch.compile(lambda text: layer(text), backend="eager", fullgraph=True)
    text = torch.randn(1, 77, WIDTH)
    with torch.no_grad(), cached_text_projections([model]):
        for _ in range(2):
            torch.testing.assert_close(compiled(text), layer(text))


def test_gradients_and_inference_mode_go_without(projected) -> None:
    model, layer = text_layer()
    text = torch.randn(1, 77, WIDTH)
    for mode, count in ((torch.no_grad, 1), (torch.enable_grad, 3), (torch.inference_mode, 3)):
        projected.clear()
        with mode(), cached_text_projections([model]):
            for _ in range(3):
                layer(text)
        assert len(projected) == count


def test_a_model_that_was_loaded_in_inference_mode_goes_without(projected) -> None:
    with torch.inference_mode():
        model, layer = text_layer()
        text = torch.randn(1, 77, WIDTH)
    with torch.no_grad(), cached_text_projections([model]):
        layer(text)
        layer(text)
        layer(text.clone())
    assert len(projected) == 3


def test_a_result_that_somebody_changes_is_computed_again(projected) -> None:
    model, layer = text_layer()
    text = torch.randn(1, 77, WIDTH)
    with torch.no_grad(), cached_text_projections([model]):
        expected = layer(text).clone()
        layer(text).add_(1)
        assert torch.equal(layer(text), expected)
        assert torch.equal(layer(input=text), expected)
    assert len(projected) == 2


def test_an_address_that_is_used_again_is_no_hit(projected) -> None:
    model, layer = text_layer()
    with torch.no_grad(), cached_text_projections([model]):
        for number in range(10):
            assert torch.equal(layer(torch.full((1, 77, WIDTH), float(number))), torch.nn.Linear.forward(
                layer, torch.full((1, 77, WIDTH), float(number))
            ))  # fmt: skip


# Sharing, threads, errors


def test_pipelines_that_share_a_unet_draw_at_the_same_time(components, projected) -> None:
    shared = {name: part for name, part in components.items() if name != "scheduler"}
    pipes = [FineLIPSDXLPipeline(**shared, scheduler=copy.deepcopy(components["scheduler"])) for _ in range(3)]
    for pipe in pipes:
        pipe.swap_text_encoders()
    prompts = [LONG, LONG[: len(LONG) // 2], SHORT]
    expected = [picture(pipe, prompt) for pipe, prompt in zip(pipes, prompts, strict=True)]
    for pipe in pipes[:2]:
        pipe.enable_text_projection_cache()
    together = threading.Barrier(3, timeout=60)

    def wait(pipe, step, timestep, tensors) -> dict:
        together.wait()
        return tensors

    found: dict[int, np.ndarray] = {}

    def run(number: int) -> None:
        found[number] = picture(pipes[number], prompts[number], callback_on_step_end=wait)

    projected.clear()
    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    for number, image in enumerate(expected):
        assert np.array_equal(found[number], image)
    assert len(projected) == (2 + STEPS) * TEXT_LAYERS
    assert not any("forward" in vars(module) for module in components["unet"].modules())


def test_a_call_within_a_callback_has_its_own(pipe, components, projected) -> None:
    other = FineLIPSDXLPipeline(**{**components, "scheduler": copy.deepcopy(components["scheduler"])})
    expected, inner = picture(pipe), picture(other, SHORT)
    for each in (pipe, other):
        each.enable_text_projection_cache()
    drawn = []
    projected.clear()
    found = picture(pipe, callback_on_step_end=in_callback(lambda _: drawn.append(picture(other, SHORT))))
    assert np.array_equal(found, expected)
    assert np.array_equal(drawn[0], inner)
    assert len(projected) == 2 * TEXT_LAYERS


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_held_after_the_call(pipe, fails) -> None:
    held: list = []

    def on_step(pipe, step, timestep, tensors) -> dict:
        held.append(weakref.ref(tensors["prompt_embeds"]))
        if fails and step == 1:
            raise KeyError("in the middle")
        return tensors

    pipe.enable_text_projection_cache()
    expected = None
    with suppress(KeyError):
        expected = picture(pipe, callback_on_step_end=on_step, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert (expected is None) == fails
    gc.collect()
    assert [reference() for reference in held] == [None] * len(held)
    assert not any("forward" in vars(module) for module in pipe.unet.modules())
    pipe.disable_text_projection_cache()
    without = picture(pipe)
    assert expected is None or np.array_equal(expected, without)


def test_the_memory_is_as_the_docstring_says() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
    layers = [module for module in unet.modules() if isinstance(module, Attention) and module.is_cross_attention]
    numbers = sum(layer.to_k.out_features + layer.to_v.out_features for layer in layers)
    assert (len(layers), numbers) == (70, 166_400)
    assert round(numbers * 248 * 2 * 2 / 1e6) == 165
    assert round(numbers * 77 * 2 * 2 / 1e6) == 51
    below = sum(
        layer.to_k.out_features + layer.to_v.out_features
        for part in (unet.down_blocks, unet.mid_block)
        for layer in part.modules()
        if isinstance(layer, Attention) and layer.is_cross_attention
    )
    assert below == 81_920
    for said in ("166,400", "165 MB", "51 MB", "81,920"):
        assert said in (LongPromptMixin.enable_text_projection_cache.__doc__ or "")


def test_a_folder_is_saved_without_it(pipe, tmp_path) -> None:
    pipe.enable_text_projection_cache()
    pipe.save_pretrained(tmp_path)
    assert "projection_cache" not in (Path(tmp_path) / "model_index.json").read_text()
