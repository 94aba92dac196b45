"""`trace_attention`: which attention is summed, for whom, and what is said of phrases. On the tiny SDXL."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPAGPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from PIL import Image
from transformers import CLIPImageProcessorPil

from finelip_sdxl import (
    FineLIPSDXLControlNetPipeline,
    FineLIPSDXLImg2ImgPipeline,
    FineLIPSDXLInpaintPipeline,
    FineLIPSDXLPipeline,
    trace_attention,
)
from finelip_sdxl.attribution import sums
from finelip_sdxl.attribution.trace import AttentionTrace
from finelip_sdxl.pipelines import LongPromptMixin
from tests.helpers.drawing import draw
from tests.helpers.prompts import ALL_LENGTHS, ENDLESS, LONG, SHORT
from tests.pipelines.test_ecosystem import make_lora, save_ip_adapter
from tests.pipelines.test_text_projections import by_forward, in_place, one_block, wrapped

TWO = "a red fox above the hare. the blue square of the fox."
GRAY = Image.fromarray(np.full((16, 16, 3), 90, dtype=np.uint8))


@pytest.fixture
def pipe(components) -> FineLIPSDXLPipeline:
    pipe = FineLIPSDXLPipeline(**components)
    pipe.swap_text_encoders()
    return pipe


def traced(pipe: Any, prompt: Any = TWO, plan: Any = None, **arguments: Any) -> AttentionTrace:
    with trace_attention(pipe, plan) as trace:
        draw(pipe, prompt, **arguments)
    return trace


@pytest.fixture
def attentions(monkeypatch) -> list[torch.Tensor]:
    """What Diffusers' own processor computes in the cross-attention layers, (rows, heads, places, tokens)."""
    found: list[torch.Tensor] = []
    compute = Attention.get_attention_scores

    def noting(self, query, key, mask=None) -> torch.Tensor:
        scores = compute(self, query, key, mask)
        if self.is_cross_attention:
            found.append(scores.unflatten(0, (-1, self.heads)))
        return scores

    monkeypatch.setattr(Attention, "get_attention_scores", noting)
    return found


def assert_is_mean_of(trace: AttentionTrace, attentions: list[torch.Tensor], rows: slice) -> None:
    """All layers of the tiny UNet have 4 × 4 places, so that they count equally."""
    expected = torch.stack([part[rows].mean(dim=1) for part in attentions]).mean(dim=0)
    torch.testing.assert_close(trace._drawn().flatten(2), expected.transpose(1, 2), atol=1e-5, rtol=1e-4)


# Which attention


@ALL_LENGTHS
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_maps_are_the_mean_of_diffusers_own_attention_to_the_prompt(pipe, attentions, prompt, guidance) -> None:
    pipe.unet.set_attn_processor(AttnProcessor())
    trace = traced(pipe, prompt, guidance_scale=guidance, negative_prompt="a quiet hare")
    assert_is_mean_of(trace, attentions, slice(1, 2) if guidance > 1 else slice(0, 1))


def test_pictures_stay_the_same_and_nothing_is_left_at_the_layers(pipe) -> None:
    expected = draw(pipe, TWO)
    with trace_attention(pipe):
        assert np.array_equal(draw(pipe, TWO), expected)
    assert np.array_equal(draw(pipe, TWO), expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules())


def test_nothing_is_left_after_an_error(pipe) -> None:
    def fail(*_: Any) -> dict:
        raise KeyError("in the middle")

    with trace_attention(pipe) as trace, pytest.raises(KeyError):
        draw(pipe, callback_on_step_end=fail)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.unet.modules())
    with pytest.raises(ValueError, match="Nothing is traced yet"):
        trace.phrases()


def test_sums_do_not_grow_with_the_steps(pipe, monkeypatch) -> None:
    made: list[sums.AttentionSums] = []
    monkeypatch.setattr(
        sums.AttentionSums,
        "mean",
        lambda self, mean=sums.AttentionSums.mean: (made.append(self), mean(self))[1],
    )
    for steps in (1, 6):
        traced(pipe, LONG, num_inference_steps=steps)
    sizes = [{size: part.numel() for size, part in one._sums.items()} for one in made]
    assert sizes[0] == sizes[1] == {(4, 4): 154 * 16}


@pytest.mark.parametrize("at_once", [1, 2**30])
def test_the_number_of_heads_at_once_changes_nothing(pipe, monkeypatch, at_once) -> None:
    expected = traced(pipe)._drawn()
    monkeypatch.setattr(sums, "_AT_ONCE", at_once)
    torch.testing.assert_close(traced(pipe)._drawn(), expected)


def test_large_layers_are_averaged(pipe, monkeypatch) -> None:
    expected = traced(pipe)._drawn()
    monkeypatch.setattr(sums, "MAX_PLACES", 4)
    found = traced(pipe)._drawn()
    torch.testing.assert_close(found, torch.nn.functional.avg_pool2d(expected, 2))


@pytest.mark.parametrize(
    ("places", "latents", "size"),
    [
        (4096, (128, 128), (64, 64)),
        (1024, (128, 128), (32, 32)),
        (38 * 64, (75, 128), (38, 64)),  # halves are rounded up, as a convolution of stride 2 does
        (19 * 32, (75, 128), (19, 32)),
        (9, (12, 12), (3, 3)),
        (1, (8, 8), (1, 1)),
        (77, (128, 128), None),
    ],
)
def test_the_size_of_a_layers_map(places, latents, size) -> None:
    assert sums.size_of(places, latents) == size


# Together with other parts


def test_with_the_projection_cache_maps_are_the_same(pipe) -> None:
    expected = traced(pipe, LONG)._drawn()
    pipe.enable_text_projection_cache()
    assert torch.equal(traced(pipe, LONG)._drawn(), expected)
    assert not any("forward" in vars(module) for module in pipe.unet.modules())


def test_with_a_lora(pipe, attentions) -> None:
    plain = traced(pipe)._drawn()
    pipe.load_lora_weights(make_lora("kohya", parts=("unet",)))
    pipe.unet.set_attn_processor(AttnProcessor())
    trace = traced(pipe)
    assert_is_mean_of(trace, attentions, slice(1, 2))
    assert not torch.allclose(trace._drawn(), plain)


@pytest.mark.parametrize("change", ["fuse_qkv_projections", "enable_attention_slicing"])
def test_with_other_processors(pipe, change) -> None:
    expected = traced(pipe, num_inference_steps=1)._drawn()
    getattr(pipe, change)()
    # They round otherwise, and random weights enlarge it.
    torch.testing.assert_close(traced(pipe, num_inference_steps=1)._drawn(), expected, atol=1e-3, rtol=0)


def test_an_ip_adapters_image_tokens_are_left_out(components, tmp_path) -> None:
    crop = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    pipe = FineLIPSDXLPipeline(**components, feature_extractor=crop)
    pipe.swap_text_encoders()
    save_ip_adapter(pipe.unet, tmp_path)
    pipe.load_ip_adapter(str(tmp_path), subfolder="", weight_name="ip-adapter.safetensors")
    maps = traced(pipe, ip_adapter_image=GRAY)._drawn()
    assert maps.shape == (1, 77, 4, 4)
    torch.testing.assert_close(maps.sum(dim=1), torch.ones(1, 4, 4))


@pytest.mark.parametrize(
    ("pipeline", "arguments"),
    [
        (FineLIPSDXLImg2ImgPipeline, {"image": GRAY, "strength": 0.9}),
        (FineLIPSDXLInpaintPipeline, {"image": GRAY, "mask_image": GRAY.convert("L"), "strength": 0.9}),
        (FineLIPSDXLControlNetPipeline, {"image": GRAY}),
        (FineLIPSDXLControlNetPipeline, {"image": GRAY, "guess_mode": True}),
    ],
    ids=("img2img", "inpaint", "ControlNet", "ControlNet, guess mode"),  # a picture's own name has its address
)
def test_other_pipelines(components, controlnet, attentions, pipeline, arguments) -> None:
    is_controlled = pipeline is FineLIPSDXLControlNetPipeline
    pipe = pipeline(**components, **({"controlnet": copy.deepcopy(controlnet)} if is_controlled else {}))
    pipe.swap_text_encoders()
    pipe.unet.set_attn_processor(AttnProcessor())  # the ControlNet has another one, whose attention is not noted
    assert_is_mean_of(traced(pipe, LONG, num_inference_steps=3, **arguments), attentions, slice(1, 2))


def test_a_refiner_with_one_text_encoder(components) -> None:
    unet = UNet2DConditionModel.from_config({**components["unet"].config, "cross_attention_dim": 48})
    components |= {"text_encoder": None, "tokenizer": None, "unet": unet.eval()}
    pipe = FineLIPSDXLImg2ImgPipeline(**components)
    pipe.swap_text_encoders()
    trace = traced(pipe, ENDLESS, image=GRAY, strength=0.9)
    assert trace._drawn().shape == (1, 2 * 248, 4, 4)
    assert trace.text() == ENDLESS


def test_perturbed_attention_guidance(components, attentions) -> None:
    class Perturbed(LongPromptMixin, StableDiffusionXLPAGPipeline):
        pass

    pipe = Perturbed(**components, pag_applied_layers=["mid"])
    pipe.swap_text_encoders()
    plain = traced(pipe, num_inference_steps=1, pag_scale=0.0)._drawn()
    torch.testing.assert_close(traced(pipe, num_inference_steps=1, pag_scale=3.0)._drawn(), plain)


def test_stock_encoders_of_77_positions(components) -> None:
    trace = traced(FineLIPSDXLPipeline(**components), LONG)
    assert trace._drawn().shape[1] == 77
    assert [phrase.is_encoded for phrase in trace.phrases()] == [True]
    assert not trace.heat_map((len(LONG) - 20, len(LONG))).any()  # the parent cuts it


def test_offloading(pipe) -> None:
    expected = traced(pipe)._drawn()
    pipe.enable_model_cpu_offload(device="cpu")
    torch.testing.assert_close(traced(pipe)._drawn(), expected)


# For whom


def test_every_picture_of_a_batch_has_its_own_maps(pipe) -> None:
    prompts = [SHORT, "the quiet hare of the square"]

    def seeds(*numbers: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(number) for number in numbers]

    options = {"num_inference_steps": 1}  # later steps differ: batches round otherwise, and random weights enlarge it
    together = traced(pipe, prompts, num_images_per_prompt=2, generator=seeds(0, 1, 2, 3), **options)
    assert [together.text(index) for index in range(4)] == [prompts[0], prompts[0], prompts[1], prompts[1]]
    for index in range(4):
        alone = traced(pipe, together.text(index), generator=seeds(index), **options)
        torch.testing.assert_close(together._drawn()[index], alone._drawn()[0], atol=1e-3, rtol=0)
    assert not torch.allclose(together._drawn()[0], together._drawn()[1], atol=1e-2)  # of another seed
    with pytest.raises(ValueError, match=r"`index` is 4; expected the number of a picture, from 0 to 3"):
        together.phrases(4)


def test_a_trace_is_of_the_last_call(pipe) -> None:
    with trace_attention(pipe) as trace:
        draw(pipe, SHORT)
        draw(pipe, TWO)
    assert trace.text() == TWO
    draw(pipe, SHORT)  # outside
    assert trace.text() == TWO


def test_a_trace_within_a_trace(pipe) -> None:
    with trace_attention(pipe) as outer:
        with trace_attention(pipe) as inner:
            draw(pipe, SHORT)
        draw(pipe, TWO)
    assert (inner.text(), outer.text()) == (SHORT, TWO)


def test_pipelines_that_share_a_unet_are_not_mixed_up(pipe, components) -> None:
    other = FineLIPSDXLPipeline(**{**components, "scheduler": copy.deepcopy(components["scheduler"])})
    expected = traced(pipe)._drawn()
    together = threading.Barrier(2, timeout=60)

    def wait(pipe: Any, step: int, timestep: Any, tensors: dict) -> dict:
        together.wait()
        return tensors

    thread = threading.Thread(target=draw, args=(other, SHORT), kwargs={"callback_on_step_end": wait})
    thread.start()
    found = traced(pipe, callback_on_step_end=wait)
    thread.join(timeout=60)
    assert torch.equal(found._drawn(), expected)

    def draw_another(*arguments: Any) -> dict:
        draw(other, SHORT)
        return arguments[-1]

    assert torch.equal(traced(pipe, callback_on_step_end=draw_another)._drawn(), expected)


# Phrases


@pytest.mark.parametrize("phrase", ["the red fox 54 is", "a hare in the end", "end"])
def test_a_phrase_at_any_position(pipe, phrase) -> None:
    prompt = " ".join(f"the red fox {number} is above." for number in range(55)) + " a hare in the end"
    trace = traced(pipe, prompt)
    maps = trace._drawn()
    assert maps.shape[1] > 2 * 248
    start = prompt.index(phrase)
    by_range = trace.heat_map((start, start + len(phrase)))
    assert np.array_equal(trace.heat_map(phrase), by_range)
    assert by_range.shape == (16, 16)
    assert (by_range.min() >= 0, by_range.max()) == (True, 1.0)


def test_a_map_of_another_size(pipe) -> None:
    trace = traced(pipe)
    for size in ((4, 4), (3, 7)):
        heat = trace.heat_map("the hare.", size=size)
        assert heat.shape == size
        assert (heat.min() >= 0, heat.max()) == (True, 1)


def test_a_phrase_is_its_last_token_held_against_the_other_phrases(pipe) -> None:
    trace = traced(pipe)
    maps = trace._drawn()[0]
    first, second = pipe.tokenizer("a red fox above the hare.").input_ids, pipe.tokenizer(TWO).input_ids
    one, other = maps[len(first) - 2], maps[len(second) - 2]  # the periods
    expected = one * one / (one + other)
    heat = trace._heat(*trace._find("a red fox above the hare.", 0))[0]
    torch.testing.assert_close(heat, expected)
    found, _ = trace.phrases()
    row, column = divmod(int(expected.argmax()), 4)
    assert (found.x, found.y) == ((column + 0.5) / 4, (row + 0.5) / 4)
    assert found.strength == pytest.approx(float((one / (one + other))[row, column]))
    assert found.equal == 0.5
    assert found.is_ignored == (found.strength < 0.5)
    # Without the mark behind it, it is the same phrase.
    assert np.array_equal(trace.heat_map("a red fox above the hare"), trace.heat_map("a red fox above the hare."))


def test_sentences_and_clauses(pipe) -> None:
    trace = traced(pipe, "a fox, a hare. the blue square.")
    assert [phrase.text for phrase in trace.phrases()] == ["a fox, a hare.", "the blue square."]
    assert [phrase.text for phrase in trace.phrases(unit="clause")] == ["a fox,", "a hare.", "the blue square."]
    with pytest.raises(ValueError, match="unit"):
        trace.phrases(unit="word")  # type: ignore[arg-type]


def test_a_phrase_with_a_negative_weight_is_found_as_it_was_written(pipe) -> None:
    pipe.weighting, pipe.emphasis = "a1111", "comfyui"
    trace = traced(pipe, "a fox, (blur:-0.5)")
    assert np.array_equal(trace.heat_map("(blur:-0.5)"), trace.heat_map("blur"))


def test_weights_are_no_part_of_the_text(pipe) -> None:
    pipe.weighting = "a1111"
    trace = traced(pipe, "a (red:1.4) fox, [the hare] BREAK the blue square")
    assert trace.text() == "a red fox, the harethe blue square"  # as it is encoded: the break stands between two words
    for phrase in ("(red:1.4) fox", "red fox", (2, 9)):
        assert np.array_equal(trace.heat_map(phrase), trace.heat_map("a red fox"))


def test_a_second_prompt_is_found_too(pipe) -> None:
    trace = traced(pipe, "a red fox", prompt_2="the quiet hare above")
    assert trace.text() == "a red fox"
    assert trace.heat_map("quiet hare").any()


def test_what_is_cut_acted_nowhere(pipe) -> None:
    prompt = " ".join(["the red fox is above."] * 80) + " the quiet hare of the end."
    trace = traced(pipe, prompt, overflow="truncate")
    assert not trace.heat_map("the quiet hare of the end").any()
    first, *_, last = trace.phrases()
    assert (last.is_encoded, last.is_ignored, last.strength, last.place) == (False, True, 0.0, "")
    assert first.is_encoded


def test_embeddings_need_their_plan(pipe) -> None:
    expected = traced(pipe, LONG)
    conditioning = pipe.encode(LONG)
    plain = traced(pipe, None, **conditioning)
    with pytest.raises(ValueError, match=r"pass its plan, as in `trace_attention\(pipe, pipe.describe_prompt"):
        plain.phrases()
    trace = traced(pipe, None, plan=pipe.describe_prompt(LONG), **conditioning)
    assert trace.phrases() == expected.phrases()
    with pytest.raises(ValueError, match="The plan is of 1 prompts in 77 positions, but the call drew 1 pictures"):
        traced(pipe, None, plan=pipe.describe_prompt(SHORT), **conditioning)


# Mistakes


def refused(trace: AttentionTrace, phrase: Any) -> str:
    with pytest.raises(ValueError, match=r"\.$") as error:
        trace.heat_map(phrase)
    return str(error.value)


def test_phrases_that_are_not_there(pipe) -> None:
    trace = traced(pipe)
    for phrase in ("a green dog", "", "  "):
        assert "is not in the prompt: pass a part of it" in refused(trace, phrase)
    for span in ((5, 5), (-1, 4), (0, 1000), (0.0, 2.0), (1, 2, 3), None, 7):
        assert "is no part of the prompt; expected its first and one past its last character" in refused(trace, span)


def test_before_the_first_picture(pipe) -> None:
    with trace_attention(pipe) as trace:
        assert "Nothing is traced yet: call the pipeline within" in refused(trace, "a fox")


def test_other_pipelines_are_refused(components) -> None:
    stock = StableDiffusionXLPipeline(**components)
    with pytest.raises(TypeError, match=r"takes a pipeline of this package, but got StableDiffusionXLPipeline"):
        trace_attention(stock).__enter__()


def test_what_is_no_plan_is_refused(pipe) -> None:
    with pytest.raises(TypeError, match="`plan` is 'a red fox'; expected the plan that"):
        trace_attention(pipe, "a red fox").__enter__()  # type: ignore[arg-type]


@pytest.mark.parametrize("compiled", [wrapped, in_place, by_forward, one_block])
def test_a_compiled_unet_is_refused(pipe, compiled: Callable) -> None:
    pipe.unet = compiled(pipe.unet)
    with pytest.raises(ValueError, match="attention of a compiled UNet cannot be traced"):
        traced(pipe)
