"""`Conditioning`: prompts that are encoded once, kept in a file, and drawn without text encoders."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from finelip_sdxl import (
    Conditioning,
    ConditioningAdapter,
    FineLIPSDXLControlNetPipeline,
    FineLIPSDXLImg2ImgPipeline,
    FineLIPSDXLPipeline,
)
from finelip_sdxl.conditioning import ConditioningHeader, fingerprint
from tests.helpers.drawing import draw
from tests.helpers.prompts import ALL_LENGTHS, LONG, SHORT
from tests.helpers.tiny_sdxl import make_text_encoder
from tests.pipelines.test_ecosystem import make_lora


@pytest.fixture
def pipe(components) -> FineLIPSDXLPipeline:
    pipe = FineLIPSDXLPipeline(**components)
    pipe.swap_text_encoders()
    return pipe


def without_encoders(pipe) -> FineLIPSDXLPipeline:
    parts = {name: part for name, part in pipe.components.items() if not name.startswith(("text_", "token", "stock_"))}
    empty = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return type(pipe)(**{**parts, **empty})


@ALL_LENGTHS
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_a_conditioning_draws_what_its_prompt_does_also_from_a_file_without_encoders(
    pipe, tmp_path, prompt, guidance
) -> None:
    texts = {"negative_prompt": "a small hare"}
    expected = draw(pipe, prompt, **texts, guidance_scale=guidance)
    conditioning = pipe.encode(prompt, **texts)
    assert conditioning.report == str(pipe.describe_prompt(prompt, **texts))
    assert np.array_equal(draw(pipe, None, **conditioning, guidance_scale=guidance), expected)
    conditioning.save(tmp_path / "fox.safetensors")
    loaded = Conditioning.load(tmp_path / "fox.safetensors")
    assert (loaded.prompts, loaded.negative_prompts) == ((prompt,), ("a small hare",))
    assert (loaded.report, loaded.encoder_fingerprint) == (conditioning.report, conditioning.encoder_fingerprint)
    assert np.array_equal(draw(without_encoders(pipe), None, **loaded, guidance_scale=guidance), expected)


def test_options_are_those_of_the_call(pipe) -> None:
    expected = draw(pipe, f"{SHORT} (large)1.5", weighting="compel", clip_skip=1)
    conditioning = pipe.encode(f"{SHORT} (large)1.5", weighting="compel", clip_skip=1)
    assert np.array_equal(draw(pipe, None, **conditioning), expected)
    assert "1 of them weighted" in conditioning.report


def test_batches_and_several_images(pipe) -> None:
    def seeds() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(4)]

    expected = draw(pipe, [SHORT, LONG], num_images_per_prompt=2, generator=seeds())
    conditioning = pipe.encode([SHORT, LONG])
    assert conditioning.prompts == (SHORT, LONG)
    found = draw(pipe, None, **conditioning, num_images_per_prompt=2, generator=seeds())
    assert np.array_equal(found, expected)


def test_stock_and_other_pipelines_draw_from_it(pipe, components, controlnet) -> None:
    conditioning = pipe.encode(LONG)
    stock = StableDiffusionXLPipeline(**components)
    assert np.array_equal(draw(stock, None, **conditioning), draw(pipe, LONG))
    image = torch.rand(1, 3, 16, 16)
    for cls, parts, more in (
        (FineLIPSDXLImg2ImgPipeline, {}, {"strength": 1.0}),
        (FineLIPSDXLControlNetPipeline, {"controlnet": controlnet}, {}),
    ):
        other = cls.from_pipe(pipe, **parts)
        expected = draw(other, LONG, image=image, **more)
        assert np.array_equal(draw(other, None, **conditioning, image=image, **more), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_conditioning_of_one_precision_is_drawn_in_another(pipe, dtype) -> None:
    conditioning = pipe.encode(LONG)
    assert pipe.to(dtype)._fingerprint() == conditioning.encoder_fingerprint
    image = draw(pipe, None, **conditioning)
    assert np.isfinite(image).all()
    assert np.array_equal(draw(without_encoders(pipe), None, **conditioning), image)


def test_an_unswapped_pipeline_and_a_refiner_encode_too(components) -> None:
    unswapped = FineLIPSDXLPipeline(**copy.deepcopy(components))
    conditioning = unswapped.encode(LONG)
    assert "are CUT" in conditioning.report
    assert np.array_equal(draw(unswapped, None, **conditioning), draw(unswapped, LONG))


def test_encoders_leave_the_device_after_encoding(pipe, monkeypatch) -> None:
    pipe.enable_model_cpu_offload(device="cpu")
    freed: list[bool] = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: freed.append(True))
    pipe.encode(LONG)
    assert freed == [True]


# Other encoders


def test_other_encoders_are_refused_and_none_are_not(components, pipe) -> None:
    conditioning = pipe.encode(LONG)
    others = [FineLIPSDXLPipeline(**copy.deepcopy(components)) for _ in range(3)]
    others[0].swap_text_encoders(finelip=make_text_encoder(32, positions=248, seed=7))
    others[1].swap_text_encoders()
    others[1].register_modules(conditioning_adapter=ConditioningAdapter((32, 48), pooled_dim=24, hidden_dim=8))
    for other in others:  # the last one has encoders of 77 positions
        with pytest.raises(ValueError, match=f"fingerprint {conditioning.encoder_fingerprint}, but this pipeline's"):
            draw(other, None, **conditioning)
    same = FineLIPSDXLPipeline(**copy.deepcopy(components))
    same.swap_text_encoders()
    draw(same, None, **conditioning)


def test_a_small_training_step_is_another_fingerprint(pipe) -> None:
    before = pipe._fingerprint()
    with torch.no_grad():
        for weight in pipe.text_encoder.parameters():
            weight.add_(torch.randn_like(weight), alpha=1e-3)
    assert pipe._fingerprint() != before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_fingerprint_is_of_every_precision(dtype) -> None:
    encoder = make_text_encoder(32)
    with torch.no_grad():
        encoder.get_input_embeddings().weight[:, 0] = -1e-9  # zero in float16
    before = fingerprint([encoder])
    assert len(before) == 16
    assert fingerprint([encoder.to(dtype)]) == before
    assert fingerprint([encoder.float()]) == before


def test_a_lora_and_its_scale_are_another_fingerprint(pipe) -> None:
    found = [pipe._fingerprint()]
    pipe.load_lora_weights(make_lora("diffusers"), adapter_name="style")
    for change in (lambda: None, lambda: pipe.set_adapters("style", 0.5), pipe.disable_lora, pipe.unload_lora_weights):
        change()
        found.append(pipe._fingerprint())
    assert len(set(found)) == 4
    assert found[0] == found[-1]


def test_what_has_no_weights_here_has_no_fingerprint() -> None:
    assert fingerprint([]) == fingerprint([None]) == fingerprint([torch.nn.Linear(2, 2, device="meta")]) == ""
    quantized = torch.nn.Linear(2, 2)
    quantized.weight = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    assert fingerprint([quantized]) == ""


def test_an_unknown_fingerprint_is_not_compared(pipe) -> None:
    conditioning = pipe.encode(LONG)
    draw(pipe, None, **{**conditioning, "encoder_fingerprint": ""})


def test_the_embeddings_of_another_model_are_refused_in_a_sentence(pipe) -> None:
    conditioning = pipe.encode(LONG)
    for name, text in (("prompt_embeds", "but this SDXL takes 80"), ("pooled_prompt_embeds", "but this SDXL takes 24")):
        with pytest.raises(ValueError, match=f"`{name}` are 8 wide, {text}: pass its own"):
            draw(pipe, None, **{**conditioning, name: conditioning[name][..., :8]})


def test_without_encoders_no_prompt_is_encoded(pipe) -> None:
    with pytest.raises(ValueError, match="has no text encoders to encode a prompt: load one with text encoders"):
        without_encoders(pipe).encode(SHORT)


# Files


@pytest.fixture
def file(pipe, tmp_path) -> Path:
    pipe.encode(SHORT).save(tmp_path / "fox.safetensors")
    return tmp_path / "fox.safetensors"


def test_the_metadata_is_for_people_too(file) -> None:
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    assert SHORT in about["report"]
    assert json.loads(about["prompts"]) == [SHORT]
    assert len(about["encoder_fingerprint"]) == 16


@pytest.mark.parametrize("name", ["fox.pt", "fox", "safetensors"])
def test_a_file_needs_its_ending(pipe, tmp_path, name) -> None:
    for use in (pipe.encode(SHORT).save, Conditioning.load):
        with pytest.raises(ValueError, match=r"is no name for a conditioning: expected one that ends in \.safetensors"):
            use(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_not_there_or_damaged(file, tmp_path) -> None:
    whole = file.read_bytes()
    for content in (whole[:-10], whole[: len(whole) // 2], whole[:20], b"", b"\xff" * 400, whole + b"\0" * 8):
        file.write_bytes(content)
        for read in (Conditioning.load, ConditioningHeader.read):
            with pytest.raises(OSError, match=r"fox\.safetensors is (not a whole safetensors file|empty)"):
                read(file)
    with pytest.raises(OSError, match="is no file"):
        Conditioning.load(tmp_path / "gone.safetensors")
    with pytest.raises(OSError, match="is no file"):
        Conditioning.load(tmp_path.with_suffix(".safetensors"))


def rewritten(file: Path, change) -> None:
    """The file after a change of its tensors and metadata."""
    tensors = load_file(file)
    with safe_open(file, "pt") as opened:
        about = dict(opened.metadata())
    tensors, about = change(tensors, about)
    save_file(tensors, file, metadata=about)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, about: (tensors, {}), "holds no conditioning of FineLIP-SDXL: pass a file that"),
        (lambda tensors, about: (tensors, None), "holds no conditioning of FineLIP-SDXL: pass a file that"),
        (lambda tensors, about: (tensors, {**about, "finelip_sdxl_conditioning": "9"}), "update the package"),
        (lambda tensors, about: (dict(list(tensors.items())[1:]), about), "lacks a part of a conditioning"),
        (lambda tensors, about: ({**tensors, "more": torch.ones(1)}, about), "or has too many"),
        (lambda tensors, about: (tensors, {**about, "prompts": "[1]"}), "lacks a part"),
        (lambda tensors, about: (tensors, {**about, "prompts": "3"}), "lacks a part"),
        (lambda tensors, about: (tensors, {**about, "prompts": "[" * 10**5}), "lacks a part"),
        (lambda tensors, about: (tensors, {key: about[key] for key in about if key != "report"}), "lacks a part"),
        (lambda tensors, about: ({**tensors, "prompt_embeds": torch.ones(77, 80)}, about), "of shape .77, 80. and"),
        (lambda tensors, about: ({**tensors, "prompt_embeds": torch.ones(1, 0, 80)}, about), "of shape"),
        (
            lambda tensors, about: ({**tensors, "prompt_embeds": torch.ones(1, 77, 80, dtype=int)}, about),
            "type I64; expected floats, .batch, positions, dim.",
        ),
        (lambda tensors, about: ({**tensors, "prompt_embeds": torch.ones(1, 154, 80)}, about), "do not go together"),
        (lambda tensors, about: ({**tensors, "pooled_prompt_embeds": torch.ones(2, 24)}, about), "do not go together"),
        (
            lambda tensors, about: ({**tensors, "pooled_prompt_embeds": torch.full((1, 24), torch.nan)}, about),
            "NaN or infinite",
        ),
    ],
)
def test_what_is_no_conditioning_is_told_in_a_sentence(file, change, message) -> None:
    rewritten(file, change)
    with pytest.raises(ValueError, match=message) as told:
        Conditioning.load(file)
    assert str(file) in str(told.value)
    assert "\n" not in str(told.value)
