"""Four of the pipelines: each against its stock parent, and what the parents can't do."""

import copy
import functools
import json
import logging
import pickle
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    EulerDiscreteScheduler,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from peft import LoraConfig

from finelip_sdxl import (
    ConditioningAdapter,
    FineLIPSDXLControlNetPipeline,
    FineLIPSDXLImg2ImgPipeline,
    FineLIPSDXLInpaintPipeline,
    FineLIPSDXLPipeline,
)
from finelip_sdxl.text_encoders import num_positions, stretch_text_encoder
from tests.helpers.tiny_sdxl import make_text_encoder, make_text_encoders, make_tokenizer

PARENTS = {
    FineLIPSDXLPipeline: StableDiffusionXLPipeline,
    FineLIPSDXLImg2ImgPipeline: StableDiffusionXLImg2ImgPipeline,
    FineLIPSDXLInpaintPipeline: StableDiffusionXLInpaintPipeline,
    FineLIPSDXLControlNetPipeline: StableDiffusionXLControlNetPipeline,
}
ALL_FOUR = pytest.mark.parametrize("ours", PARENTS, ids=lambda ours: ours.__name__)

SHORT = "a red fox above the blue square"
MIDDLE = " ".join(["a quiet hare and the red fox,"] * 12)  # 98 tokens
LONG = " ".join(["A large blue square of the quiet fox is above the hare."] * 12)  # 146
ENDLESS = " ".join(f"The red fox {number} is above the small blue square." for number in range(55))


@pytest.fixture
def components(session_components) -> dict:
    """A test's own text encoders, tokenizers and scheduler; UNet and VAE are the session's, to draw with alone."""
    shared = {name: session_components[name] for name in ("unet", "vae")}
    own = {name: part for name, part in session_components.items() if name not in shared}
    return copy.deepcopy(own) | shared


@pytest.fixture
def own_components(session_components) -> dict:
    """A test's own components, UNet and VAE too: it casts or offloads them."""
    return copy.deepcopy(session_components)


def build(cls, components, controlnet, **kwargs) -> StableDiffusionXLPipeline:
    extra = {"controlnet": controlnet} if "ControlNet" in cls.__name__ else {}
    return cls(**components, **extra, **kwargs)


def draw(pipe, prompt=SHORT, **kwargs) -> np.ndarray:
    """Images (batch, height, width, 3) in [0, 1], always from the same noise."""
    image = np.random.RandomState(0).rand(1, 16, 16, 3).astype(np.float32)
    if "Img2Img" in type(pipe).__name__:
        kwargs = {"image": image, "strength": 0.9, **kwargs}
    elif "Inpaint" in type(pipe).__name__:
        kwargs = {"image": image, "mask_image": (image[..., :1] > 0.5).astype(np.float32), "strength": 0.9, **kwargs}
    elif "ControlNet" in type(pipe).__name__:
        kwargs = {"image": torch.from_numpy(image).permute(0, 3, 1, 2), **kwargs}
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    return pipe(prompt, **{**settings, **kwargs}).images


def embeddings(pipe, **kwargs) -> tuple:
    with torch.no_grad():
        return pipe.encode_prompt(**{"prompt": SHORT, "device": "cpu", **kwargs})


def assert_same(ours, stock) -> None:
    for ours_tensor, stock_tensor in zip(ours, stock, strict=True):
        assert (ours_tensor is None) == (stock_tensor is None)
        assert ours_tensor is None or torch.equal(ours_tensor, stock_tensor)


@functools.cache
def stretched_encoders() -> dict:
    """The tiny SDXL's encoders, stretched once for all tests: change copies only."""
    return {name: stretch_text_encoder(encoder) for name, encoder in make_text_encoders().items()}


def stretched(components) -> dict:
    """Encoders and tokenizers of 248 positions in place of those of 77."""
    return {
        **components,
        **copy.deepcopy(stretched_encoders()),
        "tokenizer": make_tokenizer(248),
        "tokenizer_2": make_tokenizer(248, pad_token="!"),
    }


ARGUMENTS = {
    "prompt": {},
    "longer than stock reads": {"prompt": MIDDLE},
    "empty prompt": {"prompt": ""},
    "list": {"prompt": [SHORT, "a hare"]},
    "prompt_2": {"prompt_2": "the small hare"},
    "empty prompt_2": {"prompt_2": ""},
    "lists of both": {"prompt": [SHORT, "a hare"], "prompt_2": ["a", "the fox"]},
    "negative": {"negative_prompt": "large and blue"},
    "empty negative": {"negative_prompt": ""},
    "negative_prompt_2": {"negative_prompt": "large", "negative_prompt_2": "blue"},
    "negative_prompt_2 alone": {"negative_prompt_2": "blue"},
    "one negative for a list": {"prompt": [SHORT, "a hare"], "negative_prompt": "large"},
    "list of negatives": {"prompt": [SHORT, "a hare"], "negative_prompt": ["large", "blue square"]},
    "negative longer than prompt": {"negative_prompt": MIDDLE},
    "several images": {"num_images_per_prompt": 3, "negative_prompt": "large"},
    "clip_skip": {"clip_skip": 1, "negative_prompt": "large"},
    "no guidance": {"do_classifier_free_guidance": False, "negative_prompt": "large"},
    "typed end token": {"prompt": "a fox <|endoftext|> in the square"},
}


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize("zeros", [True, False])
def test_embeddings_of_77_positions_are_the_parents(components, arguments, zeros) -> None:
    components["force_zeros_for_empty_prompt"] = zeros
    ours, stock = FineLIPSDXLPipeline(**components), StableDiffusionXLPipeline(**components)
    assert_same(embeddings(ours, **arguments), embeddings(stock, **arguments))


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize("zeros", [True, False])
def test_embeddings_at_full_length_are_stocks_over_the_same_encoders(components, arguments, zeros) -> None:
    components = stretched(components) | {"force_zeros_for_empty_prompt": zeros}
    ours = FineLIPSDXLPipeline(**components, length_buckets=(), short_prompt_encoder="long")
    stock = StableDiffusionXLPipeline(**components)
    assert_same(embeddings(ours, **arguments), embeddings(stock, **arguments))


@pytest.mark.parametrize("kept", ["prompt", "negative", "both", "pooled"])
def test_embeddings_passed_in_are_handled_as_in_stock(components, kept) -> None:
    components = stretched(components)
    ours = FineLIPSDXLPipeline(**components, length_buckets=(), short_prompt_encoder="long")
    stock = StableDiffusionXLPipeline(**components)
    prompt, negative, pooled, negative_pooled = embeddings(stock, prompt=LONG, negative_prompt="large")
    arguments = {"prompt": LONG, "negative_prompt": "large", "num_images_per_prompt": 2}
    if kept in ("prompt", "both"):
        arguments |= {"prompt": None, "prompt_embeds": prompt, "pooled_prompt_embeds": pooled}
    if kept in ("negative", "both"):
        arguments |= {"negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": negative_pooled}
        del arguments["negative_prompt"]
    if kept == "pooled":
        arguments |= {"pooled_prompt_embeds": pooled + 1, "negative_pooled_prompt_embeds": negative_pooled + 1}
    assert_same(embeddings(ours, **arguments), embeddings(stock, **arguments))


@ALL_FOUR
def test_images_of_77_positions_are_the_parents(components, controlnet, ours) -> None:
    pipe, stock = build(ours, components, controlnet), build(PARENTS[ours], components, controlnet)
    arguments = {"prompt": [MIDDLE, SHORT], "negative_prompt": "large", "num_images_per_prompt": 2, "clip_skip": 1}
    assert np.array_equal(draw(pipe, **arguments), draw(stock, **arguments))


@ALL_FOUR
def test_short_prompts_give_stocks_images_bit_for_bit(components, controlnet, ours, caplog) -> None:
    stock = build(PARENTS[ours], components, controlnet)
    pipe = build(ours, components, controlnet)
    pipe.swap_text_encoders()
    assert num_positions(pipe.text_encoder) == num_positions(pipe.text_encoder_2) == 248
    for arguments in (
        {"prompt": SHORT},
        {"prompt": " ".join(["a"] * 75), "negative_prompt": "large"},  # 77 tokens: as much as stock holds
        {"prompt": [SHORT, "a hare"], "clip_skip": 1, "guidance_scale": 1.0},
    ):
        assert np.array_equal(draw(pipe, **arguments), draw(stock, **arguments))
    assert not np.array_equal(draw(pipe, MIDDLE), draw(stock, MIDDLE)), "the tail beyond 77 tokens should be read"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_short_prompts_are_stocks_in_half_precision(own_components, dtype) -> None:
    stock = StableDiffusionXLPipeline(**own_components).to(dtype)
    pipe = FineLIPSDXLPipeline(**own_components)
    pipe.swap_text_encoders()
    assert pipe.text_encoder.dtype == pipe.text_encoder_2.dtype == dtype
    assert_same(embeddings(pipe, negative_prompt="large"), embeddings(stock, negative_prompt="large"))


def test_length_is_the_smallest_bucket_that_holds_prompt_and_negative(components) -> None:
    pipe = FineLIPSDXLPipeline(**stretched(components))
    for prompt, negative, length in (
        (SHORT, "large", 77),
        (MIDDLE, "large", 154),
        ("a fox", MIDDLE, 154),
        (LONG, None, 248),
        (ENDLESS, "large", 3 * 248),
    ):
        prompt_embeds, negative_embeds, *_ = embeddings(pipe, prompt=prompt, negative_prompt=negative)
        assert prompt_embeds.shape[1] == negative_embeds.shape[1] == length
    pipe.length_buckets = ()
    assert embeddings(pipe, prompt=MIDDLE)[0].shape[1] == 248
    assert embeddings(pipe)[0].shape[1] == 77, "as stock reads it, whatever the buckets"
    pipe.short_prompt_encoder = "long"
    assert embeddings(pipe)[0].shape[1] == 248


def test_stretched_short_prompts_use_the_stretched_rows(components) -> None:
    pipe = FineLIPSDXLPipeline(**stretched(components), short_prompt_encoder="long")
    stock = StableDiffusionXLPipeline(**components)
    ours, theirs = embeddings(pipe)[0], embeddings(stock)[0]
    assert torch.allclose(ours[:, :9], theirs[:, :9], atol=1e-4), "the first 20 rows are kept"
    assert not torch.allclose(ours[:, 30:], theirs[:, 30:], atol=1e-4)


def test_windows_are_encoded_alone_and_joined(components) -> None:
    pipe = FineLIPSDXLPipeline(**stretched(components), short_prompt_encoder="long", length_buckets=())
    report = pipe.describe_prompt(ENDLESS)
    texts = [window.text for window in report.plans[0].windows]
    assert "".join(texts) == ENDLESS
    assert len(texts) == 3
    assert all(text.rstrip().endswith(".") for text in texts)

    joined, negative, pooled, _ = embeddings(pipe, prompt=[ENDLESS, SHORT], negative_prompt="large")
    alone = [embeddings(pipe, prompt=text) for text in texts]
    assert torch.allclose(joined[0], torch.cat([states[0] for states, *_ in alone]), atol=1e-5)
    assert torch.allclose(pooled[0], alone[0][2][0], atol=1e-5), "pooled from the first window"

    empty = embeddings(pipe, prompt="")[0][0]
    for states, text in ((joined[1], SHORT), (negative[0], "large")):
        expected = torch.cat([embeddings(pipe, prompt=text)[0][0], empty, empty])
        assert torch.allclose(states, expected, atol=1e-5), "shorter ones are padded with empty windows"
    assert draw(pipe, ENDLESS).shape == (1, 16, 16, 3)


@pytest.mark.parametrize(
    ("prompt", "negative", "runs"),
    [
        (SHORT, "large", 2),
        ("", "", 1),
        (ENDLESS, "", 4),  # three windows, and the empty one, of which the negative prompt has three
        (ENDLESS, "large", 5),
        (f"{ENDLESS} (a hare)2.0", "large", 5),  # weights are relative to the empty window
        (f"{ENDLESS} (a hare)0.5", "large", 6),  # and those below 1 to a window without the part
    ],
)
def test_equal_windows_are_encoded_once(components, prompt, negative, runs) -> None:
    pipe = FineLIPSDXLPipeline(**stretched(components), weighting="compel")
    counts: Counter[str] = Counter()
    for name in ("text_encoder", "text_encoder_2"):
        getattr(pipe, name).register_forward_pre_hook(lambda *_, name=name: counts.update([name]))
    embeddings(pipe, prompt=prompt, negative_prompt=negative)
    assert counts == {"text_encoder": runs, "text_encoder_2": runs}


def test_truncate_reads_the_beginning_and_logs_what_is_lost(components, caplog) -> None:
    pipe = FineLIPSDXLPipeline(**stretched(components), overflow="truncate")
    stock = StableDiffusionXLPipeline(**stretched(components))
    with caplog.at_level(logging.WARNING, "finelip_sdxl"):
        ours = embeddings(pipe, prompt=ENDLESS)
    assert_same(ours, embeddings(stock, prompt=ENDLESS))
    lost = pipe.describe_prompt(ENDLESS).plans[0].cut_text
    assert ENDLESS.endswith(lost)
    assert len(lost) > 1000
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("finelip_sdxl")]
    assert messages == [f"Cut and not encoded, prompt: {lost}"]


def test_error_names_the_counts(components) -> None:
    pipe = FineLIPSDXLPipeline(**stretched(components), overflow="error")
    with pytest.raises(ValueError, match=r"prompt has \d{3} tokens for text_encoder; expected at most 248"):
        embeddings(pipe, prompt=ENDLESS)
    embeddings(pipe, prompt=LONG)


def test_last_hidden_states_are_the_last_after_the_norm(components) -> None:
    pipe = FineLIPSDXLPipeline(**stretched(components), hidden_states="last")
    rows = pipe.tokenizer(LONG, padding="max_length", max_length=248, return_tensors="pt").input_ids
    rows_2 = pipe.tokenizer_2(LONG, padding="max_length", max_length=248, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = torch.cat(
            [pipe.text_encoder(rows).last_hidden_state, pipe.text_encoder_2(rows_2).last_hidden_state], dim=-1
        )
    assert torch.equal(embeddings(pipe, prompt=LONG)[0], expected)
    assert_same(embeddings(pipe), embeddings(StableDiffusionXLPipeline(**components)))  # read as stock: as trained
    with pytest.raises(ValueError, match="clip_skip=1 counts back"):
        embeddings(pipe, prompt=LONG, clip_skip=1)


@pytest.mark.parametrize("length", [77, 154, 248, 2 * 248])
def test_text_beside_embeddings_takes_their_length(components, length) -> None:
    pipe = FineLIPSDXLPipeline(**stretched(components))
    embeds, pooled = torch.randn(1, length, 80), torch.randn(1, 24)
    prompt, negative, *_ = embeddings(
        pipe, prompt=None, prompt_embeds=embeds, pooled_prompt_embeds=pooled, negative_prompt="large"
    )
    assert prompt.shape == negative.shape == (1, length, 80)
    prompt, negative, *_ = embeddings(
        pipe, negative_prompt_embeds=embeds, negative_pooled_prompt_embeds=pooled, prompt="a red fox"
    )
    assert prompt.shape == negative.shape == (1, length, 80)


def test_text_that_does_not_fit_beside_embeddings_is_refused(components) -> None:
    pipe = FineLIPSDXLPipeline(**stretched(components))
    beside = {"negative_prompt_embeds": torch.randn(1, 154, 80), "negative_pooled_prompt_embeds": torch.randn(1, 24)}
    with pytest.raises(
        ValueError, match="needs 2 windows of 154 positions, but the embeddings passed beside it have 1"
    ):
        embeddings(pipe, prompt=LONG, **beside)
    embeddings(pipe, prompt=LONG, do_classifier_free_guidance=False, **beside)  # they play no part, as in stock
    with pytest.raises(ValueError, match="300 positions long"):
        embeddings(pipe, **{**beside, "negative_prompt_embeds": torch.randn(1, 300, 80)})


def test_embeddings_of_any_length_need_no_negative_where_sdxl_takes_zeros(components) -> None:
    pipe = FineLIPSDXLPipeline(**stretched(components))
    compels = {"prompt_embeds": torch.randn(1, 4 * 77, 80), "pooled_prompt_embeds": torch.randn(1, 24)}
    states, negative, *_ = embeddings(pipe, prompt=None, **compels)
    assert torch.equal(states, compels["prompt_embeds"])
    assert torch.equal(negative, torch.zeros_like(states))


def test_refiner_without_a_first_text_encoder(components, caplog) -> None:
    components |= {"text_encoder": None, "tokenizer": None, "force_zeros_for_empty_prompt": False}
    stock = StableDiffusionXLImg2ImgPipeline(**components)
    pipe = FineLIPSDXLImg2ImgPipeline(**components)
    assert_same(embeddings(pipe), embeddings(stock))
    pipe.swap_text_encoders()
    assert_same(embeddings(pipe, prompt_2="ignored"), embeddings(stock, prompt_2="ignored"))
    prompt, negative, *_ = embeddings(pipe, prompt=ENDLESS)
    assert prompt.shape == negative.shape == (1, 3 * 248, 48)
    assert {plan.encoder for plan in pipe.describe_prompt(SHORT).plans} == {"text_encoder_2"}
    with pytest.raises(ValueError, match="no such text encoder"):
        pipe.swap_text_encoders(finelip=object())


def test_embeddings_alone_need_no_text_encoders(components) -> None:
    whole = FineLIPSDXLPipeline(**stretched(components))
    prompt, negative, pooled, negative_pooled = embeddings(whole, prompt=LONG)
    components |= dict.fromkeys(["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"])
    pipe = FineLIPSDXLPipeline(**components)
    image = draw(
        pipe,
        None,
        prompt_embeds=prompt,
        negative_prompt_embeds=negative,
        pooled_prompt_embeds=pooled,
        negative_pooled_prompt_embeds=negative_pooled,
    )
    assert np.array_equal(image, draw(whole, LONG))
    with pytest.raises(ValueError, match="no text encoders"):
        pipe.describe_prompt(SHORT)


# What is loaded into the encoders


def add_lora(encoder) -> None:
    encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


@pytest.mark.parametrize("scale", [None, 0.0, 0.5, 1.0])
def test_lora_scale_is_applied_and_undone_as_in_stock(components, scale) -> None:
    torch.manual_seed(0)
    for encoder in (components["text_encoder"], components["text_encoder_2"]):
        add_lora(encoder)
    ours, stock = FineLIPSDXLPipeline(**components), StableDiffusionXLPipeline(**components)
    assert_same(embeddings(ours, lora_scale=scale), embeddings(stock, lora_scale=scale))

    components["tokenizer"], components["tokenizer_2"] = make_tokenizer(248), make_tokenizer(248, pad_token="!")
    components["text_encoder"] = make_text_encoder(32, positions=248, seed=1)
    components["text_encoder_2"] = make_text_encoder(48, projection_dim=24, positions=248, seed=2)
    for encoder in (components["text_encoder"], components["text_encoder_2"]):
        add_lora(encoder)
    ours = FineLIPSDXLPipeline(**components, length_buckets=())
    stock = StableDiffusionXLPipeline(**components)
    before = embeddings(stock, negative_prompt="large")
    assert_same(
        embeddings(ours, negative_prompt="large", lora_scale=scale),
        embeddings(stock, negative_prompt="large", lora_scale=scale),
    )
    assert_same(embeddings(ours, negative_prompt="large"), before)


def test_lora_scale_is_undone_after_an_error(components) -> None:
    pipe = FineLIPSDXLPipeline(**stretched(components), hidden_states="last")
    add_lora(pipe.text_encoder)
    before = embeddings(pipe, prompt=LONG)
    with pytest.raises(ValueError, match="clip_skip"):
        embeddings(pipe, prompt=LONG, lora_scale=0.5, clip_skip=1)
    assert_same(embeddings(pipe, prompt=LONG), before)


def test_lora_on_a_stretched_encoder_acts_on_short_prompts(components) -> None:
    pipe = FineLIPSDXLPipeline(**stretched(components))
    before = embeddings(pipe)[0]
    add_lora(pipe.text_encoder)
    assert pipe.describe_prompt(SHORT).plans[0].as_stock
    assert not torch.equal(embeddings(pipe)[0], before)


def test_textual_inversion_of_several_vectors(components) -> None:
    components = stretched(components)
    ours = FineLIPSDXLPipeline(**components, length_buckets=(), short_prompt_encoder="long")
    stock = StableDiffusionXLPipeline(**components)
    for width, number in ((32, ""), (48, "_2")):
        torch.manual_seed(0)
        ours.load_textual_inversion(
            {"<scene>": torch.randn(3, width)},
            token="<scene>",
            tokenizer=components[f"tokenizer{number}"],
            text_encoder=components[f"text_encoder{number}"],
        )
    prompt = "a <scene> in the square"
    assert_same(embeddings(ours, prompt=prompt), embeddings(stock, prompt=prompt))
    assert ours.describe_prompt(prompt).plans[0].tokens == 2 + 7


def add_scene(pipe) -> None:
    for name, tokenizer, width in (("text_encoder", pipe.tokenizer, 32), ("text_encoder_2", pipe.tokenizer_2, 48)):
        vectors = torch.randn(3, width, generator=torch.Generator().manual_seed(0))
        encoder = getattr(pipe, name)
        pipe.load_textual_inversion({"<scene>": vectors}, token="<scene>", text_encoder=encoder, tokenizer=tokenizer)


@pytest.mark.parametrize("rest", [" square", MIDDLE], ids=["77", "248"])
@pytest.mark.parametrize("offload", [None, "enable_model_cpu_offload", "enable_group_offload"])
def test_pooled_vectors_know_what_stands_behind_a_textual_inversion(own_components, rest, offload) -> None:
    """Under SDXL's own configs, which say `eos_token_id=2`, stock takes the inversion's last token for the end."""
    encoder = own_components["text_encoder_2"]
    encoder.text_model.eos_token_id = encoder.config.eos_token_id = 2
    stock = StableDiffusionXLPipeline(**copy.deepcopy(own_components))
    add_scene(stock)
    pooled = [embeddings(stock, prompt=f"a <scene> {color}")[2] for color in ("red", "blue")]
    assert torch.equal(*pooled)

    pipe = FineLIPSDXLPipeline(**own_components)
    pipe.swap_text_encoders()
    plain = embeddings(pipe, prompt=f"a red{rest}")
    add_scene(pipe)
    if offload == "enable_model_cpu_offload":
        pipe.enable_model_cpu_offload(device="cpu")
    elif offload:
        pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level")
    found = [embeddings(pipe, prompt=f"a <scene> {color}{rest}")[2] for color in ("red", "blue")]
    assert not torch.equal(*found)
    assert_same(embeddings(pipe, prompt=f"a red{rest}"), plain)
    assert pipe.text_encoder_2.text_model.eos_token_id == 2
    pipe.text_encoder_2.text_model.eos_token_id = pipe.tokenizer_2.eos_token_id  # as the corrected configs say
    again = [embeddings(pipe, prompt=f"a <scene> {color}{rest}")[2] for color in ("red", "blue")]
    assert_same(found, again)


# Threads


def in_threads(*calls) -> list:
    with ThreadPoolExecutor(len(calls)) as threads:
        return [drawn.result() for drawn in [threads.submit(call) for call in calls]]


def with_adapter(components) -> FineLIPSDXLPipeline:
    torch.manual_seed(0)
    adapter = ConditioningAdapter([32, 48], 24, 8)
    for weight in adapter.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return FineLIPSDXLPipeline(
        **stretched(components), conditioning_adapter=adapter.eval(), short_prompt_encoder="long"
    )


@pytest.mark.parametrize("shared", [False, True], ids=["one pipeline", "one made of the other"])
def test_two_threads_draw_what_each_has_asked_for(components, shared) -> None:
    pipe = with_adapter(components)
    other = FineLIPSDXLPipeline.from_pipe(pipe) if shared else pipe
    whole = draw(pipe, LONG, num_inference_steps=3)
    pipe.set_conditioning_adapter_scale(0.0)
    assert other.conditioning_adapter_scale == (1.0 if shared else 0.0), "a scale is its pipeline's"
    asked = [
        (pipe, {"prompt": LONG, "num_inference_steps": 3}),
        (other, {"prompt": "a fox", "num_inference_steps": 2, "guidance_scale": 1.0}),
        (other, {"prompt": LONG, "num_inference_steps": 3}),
    ]
    alone = [draw(each, **arguments) for each, arguments in asked]
    assert not np.array_equal(whole, alone[0]), "the adapter counts"
    assert np.array_equal(whole, alone[2]) == shared
    drawn = in_threads(*[lambda each=each, own=own: draw(each, **own) for each, own in asked] * 3)
    for number, image in enumerate(drawn):
        assert np.array_equal(image, alone[number % 3])


def test_the_scale_of_a_pipeline_is_no_other_pipeline_s(components) -> None:
    pipe = with_adapter(components)
    other = FineLIPSDXLPipeline(
        **{**pipe.components, "scheduler": EulerDiscreteScheduler()}, short_prompt_encoder="long"
    )
    whole, none = embeddings(pipe, prompt=LONG), []
    inside = []

    def look(pipe, step, timestep, tensors) -> dict:
        (encoded,) = in_threads(lambda: embeddings(other, prompt=LONG))
        inside.extend([embeddings(other, prompt=LONG), encoded])
        none.append(embeddings(pipe, prompt=LONG))
        return {}

    pipe.set_conditioning_adapter_scale(0.0)
    draw(pipe, LONG, num_inference_steps=1, callback_on_step_end=look)
    with pytest.raises(ZeroDivisionError):
        draw(pipe, LONG, callback_on_step_end=lambda *arguments: 1 / 0)
    pipe.set_conditioning_adapter_scale(1.0)
    for encoded in (*inside, embeddings(pipe, prompt=LONG)):
        assert_same(encoded, whole)
    assert not torch.equal(none[0][0], whole[0]), "inside, it is the pipeline's"


def test_a_lora_s_scale_is_no_other_call_s(components) -> None:
    pipe = FineLIPSDXLPipeline(**stretched(components), short_prompt_encoder="long")
    torch.manual_seed(0)
    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        add_lora(encoder)
    scales = (0.0, 0.5, None)
    alone = [embeddings(pipe, lora_scale=scale) for scale in scales]
    found = in_threads(*[lambda scale=scale: embeddings(pipe, lora_scale=scale) for scale in scales] * 8)
    for number, encoded in enumerate(found):
        assert_same(encoded, alone[number % 3])


def test_pipelines_with_schedulers_of_their_own_draw_at_the_same_time(components) -> None:
    pipe = FineLIPSDXLPipeline(**stretched(components))
    copies = [
        FineLIPSDXLPipeline(**{**pipe.components, "scheduler": EulerDiscreteScheduler()}),
        copy.deepcopy(pipe),
        pickle.loads(pickle.dumps(pipe)),
    ]
    for other in copies:
        both = threading.Barrier(2, timeout=60)  # which one that waited for the other would never pass

        def meet(pipe, step, timestep, tensors, both=both) -> dict:
            both.wait()
            return {}

        calls = [lambda each=each: draw(each, callback_on_step_end=meet) for each in (pipe, other)]
        assert np.array_equal(*in_threads(*calls))


def test_how_a_tokenizer_last_cut_is_not_saved(components, tmp_path) -> None:
    embeddings(StableDiffusionXLPipeline(**components), prompt=LONG)
    assert components["tokenizer"].backend_tokenizer.padding is not None
    pipe = FineLIPSDXLPipeline(**components)
    pipe.swap_text_encoders()
    draw(pipe, LONG)
    pipe.save_pretrained(tmp_path)
    for name in ("tokenizer", "tokenizer_2"):
        saved = json.loads((tmp_path / name / "tokenizer.json").read_text())
        assert (saved["truncation"], saved["padding"]) == (None, None)


def test_a_report_does_not_wait_for_a_drawing(components) -> None:
    pipe = FineLIPSDXLPipeline(**stretched(components))
    reports = []

    def report(pipe, step, timestep, tensors) -> dict:
        reports.extend([pipe.describe_prompt(LONG), *in_threads(lambda: pipe.describe_prompt(LONG))])
        return {}

    draw(pipe, LONG, callback_on_step_end=report)
    assert Counter(map(str, reports)) == {str(pipe.describe_prompt(LONG)): 4}


# Diffusers' machinery


@ALL_FOUR
def test_components_and_parameters_rebuild_the_pipeline(components, controlnet, ours) -> None:
    pipe = build(ours, stretched(components), controlnet, overflow="truncate", length_buckets=[100])
    assert pipe.components.keys() - {"controlnet", "image_encoder", "feature_extractor"} == components.keys()
    again = ours(**pipe.components, **pipe.parameters)
    assert again.overflow == "truncate"
    assert again.length_buckets == (100,)
    assert np.array_equal(draw(again, LONG), draw(pipe, LONG))


def test_from_pipe_shares_components_and_options(components, controlnet) -> None:
    pipe = FineLIPSDXLPipeline(**stretched(components), overflow="truncate")
    for ours in PARENTS:
        extra = {"controlnet": controlnet} if "ControlNet" in ours.__name__ else {}
        other = ours.from_pipe(pipe, **extra)
        assert type(other) is ours
        assert other.text_encoder is pipe.text_encoder
        assert other.overflow == "truncate"
        assert draw(other, LONG).shape == (1, 16, 16, 3)
    stock = StableDiffusionXLPipeline.from_pipe(pipe)
    assert np.array_equal(draw(stock, " ".join(["a"] * 200)), draw(pipe, " ".join(["a"] * 200)))
    assert FineLIPSDXLPipeline.from_pipe(stock).overflow == "truncate"


def test_auto_pipelines_turn_one_of_ours_into_another(components, controlnet) -> None:
    pipe = FineLIPSDXLPipeline(**stretched(components), overflow="error")
    image_to_image = AutoPipelineForImage2Image.from_pipe(pipe)
    assert type(image_to_image) is FineLIPSDXLImg2ImgPipeline
    assert image_to_image.overflow == "error"
    assert type(AutoPipelineForInpainting.from_pipe(image_to_image)) is FineLIPSDXLInpaintPipeline
    assert type(AutoPipelineForText2Image.from_pipe(image_to_image)) is FineLIPSDXLPipeline
    with_controlnet = AutoPipelineForText2Image.from_pipe(pipe, controlnet=controlnet)
    assert type(with_controlnet) is FineLIPSDXLControlNetPipeline


@ALL_FOUR
def test_callbacks_see_the_prompt_and_may_stop(components, controlnet, ours) -> None:
    pipe = build(ours, stretched(components), controlnet)
    steps = []

    def stop_after_first(pipe, step, timestep, tensors) -> dict:
        steps.append(tensors["prompt_embeds"].shape)
        pipe._interrupt = True
        return tensors

    names = ["latents", "prompt_embeds"]
    draw(pipe, LONG, callback_on_step_end=stop_after_first, callback_on_step_end_tensor_inputs=names)
    assert steps == [(2, 248, 80)]


def test_offloading(own_components) -> None:
    held = make_text_encoder(32, seed=5)
    pipe = FineLIPSDXLPipeline(**own_components)
    pipe.swap_text_encoders()
    pipe.text_encoder = make_text_encoder(32, positions=248, seed=5)
    pipe.stock_text_encoder = held
    short, long = draw(pipe), draw(pipe, LONG)

    pipe.enable_model_cpu_offload(device="cpu")
    assert {hook.model for hook in pipe._all_hooks} >= {held, pipe.text_encoder, pipe.text_encoder_2, pipe.unet}
    assert np.array_equal(draw(pipe), short)
    assert np.array_equal(draw(pipe, LONG), long)
    pipe.remove_all_hooks()

    pipe.enable_sequential_cpu_offload(device="meta")
    assert pipe.describe_prompt(ENDLESS).windows == 3, "needs no weights"
    assert pipe.encode_prompt(SHORT, device="meta")[0].shape == (1, 77, 80)


# Options and bad input


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("short_prompt_encoder", "stretched"),
        ("short_prompt_encoder", None),
        ("overflow", ["window"]),
        ("hidden_states", "published"),
        ("length_buckets", 77),
        ("length_buckets", [77, "154"]),
        ("length_buckets", [2]),
        ("length_buckets", [True]),
        ("weighting", True),
        ("weighting", ["a1111"]),
        ("hidden_states", np.array(["penultimate", "last"])),
    ],
)
def test_unknown_options_are_refused_on_construction_and_later(components, option, value) -> None:
    with pytest.raises(ValueError, match=f"`{option}` must be"):
        FineLIPSDXLPipeline(**components, **{option: value})
    pipe = FineLIPSDXLPipeline(**components)
    before = getattr(pipe, option)
    with pytest.raises(ValueError, match=f"`{option}` must be"):
        setattr(pipe, option, value)
    assert getattr(pipe, option) == pipe.config[option] == before


def test_options_are_readable_and_settable(components) -> None:
    pipe = FineLIPSDXLPipeline(**components, length_buckets=[154, 77, 77])
    assert (pipe.short_prompt_encoder, pipe.overflow, pipe.hidden_states) == ("original", "window", "penultimate")
    assert pipe.length_buckets == (77, 154)
    pipe.length_buckets = None
    assert pipe.length_buckets == pipe.config.length_buckets == ()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt": None}, TypeError, "`prompt` must be a string or a list of strings, but is None"),
        ({"prompt": 3}, TypeError, "`prompt` must be a string or a list of strings, but is int"),
        ({"prompt": ["a", 3]}, TypeError, r"`prompt\[1\]` must be a string, but is int"),
        ({"prompt": []}, ValueError, "`prompt` is an empty list"),
        ({"prompt": [["a"]]}, TypeError, r"`prompt\[0\]` must be a string, but is list"),
        ({"prompt": {"a": 1}}, TypeError, "`prompt` must be a string or a list of strings, but is dict"),
        ({"prompt": b"a"}, TypeError, "`prompt` must be a string or a list of strings, but is bytes"),
        ({"prompt": float("nan")}, TypeError, "`prompt` must be a string or a list of strings, but is float"),
        ({"prompt": "a", "prompt_2": 3}, TypeError, "`prompt_2` must be a string"),
        ({"prompt": "a", "negative_prompt": 3}, TypeError, "`negative_prompt` must be a string"),
        ({"prompt": "a", "negative_prompt": ["a", None]}, TypeError, r"`negative_prompt\[1\]` must be a string"),
        ({"prompt": "a", "negative_prompt": "a", "negative_prompt_2": 3.5}, TypeError, "`negative_prompt_2` must be"),
        ({"prompt": "a", "negative_prompt": []}, ValueError, "`negative_prompt` is an empty list"),
        ({"prompt": "a", "prompt_2": []}, ValueError, "`prompt_2` is an empty list"),
        ({"prompt": "a", "negative_prompt": 0}, TypeError, "`negative_prompt` must be a string"),
        ({"prompt": "a" * 100_000}, ValueError, "100,000 characters; expected at most 20,000"),
        ({"negative_prompt": ["a" * 20_001]}, ValueError, r"`negative_prompt\[0\]` has 20,001 characters"),
        ({"prompt": "fox \ud83e"}, ValueError, "surrogate"),
        ({"prompt": ["a", "b"], "prompt_2": "a"}, ValueError, "`prompt_2` holds 1 texts and `prompt` 2"),
        (
            {"prompt": ["a", "b"], "negative_prompt": ["a"]},
            ValueError,
            "`negative_prompt` holds 1 texts and `prompt` 2",
        ),
        (
            {"prompt": ["a", "b"], "negative_prompt": "a", "negative_prompt_2": ["a"]},
            ValueError,
            "`negative_prompt_2` holds 1 texts and `negative_prompt` 2",
        ),
    ],
)
def test_bad_prompts_are_refused_before_any_work(components, arguments, error, message) -> None:
    pipe = FineLIPSDXLPipeline(**stretched(components))
    pipe.text_encoder.forward = pipe.text_encoder_2.forward = None
    with pytest.raises(error, match=message):
        embeddings(pipe, **arguments)


CLIP_SKIPS = [3, 11, -1, -2, 10**30, True, 1.0, "1", [1], float("nan")]


@ALL_FOUR
def test_a_clip_skip_beyond_the_layers_is_refused(components, controlnet, ours) -> None:
    stock = build(ours, components, controlnet)
    for weighting in (None, "a1111"):
        pipe = build(ours, stretched(components), controlnet, weighting=weighting)
        for clip_skip in CLIP_SKIPS:
            with pytest.raises(ValueError, match=r"`clip_skip` is .*; expected a whole number of layers from 0 to 2"):
                draw(pipe, "a (red:0.5) fox", clip_skip=clip_skip)
    for clip_skip in CLIP_SKIPS:
        with pytest.raises(ValueError, match=r"`clip_skip` is .*from 0 to 2"):
            draw(stock, clip_skip=clip_skip)
    assert draw(pipe, clip_skip=2).shape == (1, 16, 16, 3)


EMBEDS, POOLED = torch.zeros(1, 77, 80), torch.zeros(1, 24)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"prompt_embeds": [[0.0]]},
            r"`prompt_embeds` must be a tensor of floats, \(batch, tokens, dim\), but is list",
        ),
        ({"prompt_embeds": EMBEDS.numpy()}, "but is ndarray"),
        ({"prompt_embeds": EMBEDS[0]}, r"but is torch.float32 of shape \(77, 80\)"),
        ({"prompt_embeds": EMBEDS.long()}, "but is torch.int64"),
        ({"prompt_embeds": EMBEDS[..., :79]}, "`prompt_embeds` are 79 wide, but this SDXL takes 80"),
        ({"prompt_embeds": EMBEDS[:, :0]}, "`prompt_embeds` is empty"),
        ({"prompt_embeds": EMBEDS[:0]}, "`prompt_embeds` is empty"),
        ({"pooled_prompt_embeds": EMBEDS}, r"`pooled_prompt_embeds` must be a tensor of floats, \(batch, dim\)"),
        ({"pooled_prompt_embeds": POOLED[:, :7]}, "`pooled_prompt_embeds` are 7 wide, but this SDXL takes 24"),
        ({"pooled_prompt_embeds": POOLED.repeat(2, 1)}, "`prompt_embeds` are 1 and `pooled_prompt_embeds` 2"),
        (
            {"negative_prompt_embeds": "red", "negative_pooled_prompt_embeds": POOLED},
            "`negative_prompt_embeds` must be",
        ),
        ({"negative_prompt_embeds": EMBEDS, "negative_pooled_prompt_embeds": 1.0}, "but is float"),
    ],
)
def test_embeddings_that_are_none_are_refused(components, given, message) -> None:
    pipe = FineLIPSDXLPipeline(**stretched(components))
    arguments = {"prompt_embeds": EMBEDS, "pooled_prompt_embeds": POOLED, **given}
    with pytest.raises(ValueError, match=message):
        draw(pipe, None, **arguments)
    with pytest.raises(ValueError, match=message):
        embeddings(pipe, prompt=None, **arguments)


@pytest.mark.parametrize("images", [0, -1, 1.5, True, "2", None])
def test_a_number_of_images_that_is_none_is_refused(components, images) -> None:
    pipe = FineLIPSDXLPipeline(**stretched(components))
    with pytest.raises(ValueError, match=r"`num_images_per_prompt` is .*; expected a whole number of at least 1"):
        draw(pipe, num_images_per_prompt=images, generator=None)


@pytest.mark.parametrize("scale", [-0.1, 1.1, float("nan"), float("inf"), "1", None, [1], True, torch.ones(2)])
def test_a_scale_that_is_none_is_refused(components, scale) -> None:
    with pytest.raises(ValueError, match=r"scale of the conditioning adapter is .*; expected a number from 0"):
        FineLIPSDXLPipeline(**components).set_conditioning_adapter_scale(scale)


def test_prompt_and_embeddings_together_are_refused(components) -> None:
    pipe = FineLIPSDXLPipeline(**stretched(components))
    with pytest.raises(ValueError, match="Cannot forward both `prompt`"):
        pipe(SHORT, prompt_embeds=torch.zeros(1, 77, 80))


@pytest.mark.parametrize(
    "text", ["🦊🏽‍🚀", "赤い狐が青い四角の上にいる。", "a\x00fox\x07\x1b[0m", "\u202efox", "ﬁ İ ß", "\t\n"]
)
def test_any_unicode_is_encoded_and_reported(components, text, caplog) -> None:
    pipe = FineLIPSDXLPipeline(**stretched(components), length_buckets=(), short_prompt_encoder="long")
    stock = StableDiffusionXLPipeline(**stretched(components))
    assert_same(embeddings(pipe, prompt=text), embeddings(stock, prompt=text))
    report = pipe.describe_prompt(text)
    assert [window.text for window in report.plans[0].windows] == [text]
    assert not set(str(report)) & {"\0", "\x07", "\x1b", "\t"}, "control characters stay out of the terminal"

    many = f"{text} a fox. " * 60
    windows = pipe.describe_prompt(many).plans[0].windows
    assert "".join(window.text for window in windows) == many


@pytest.mark.parametrize("prompt", ["", "  \n", ["a fox", ""]])
def test_an_empty_prompt_is_valid_and_logged(components, caplog, prompt) -> None:
    pipe = FineLIPSDXLPipeline(**stretched(components))
    embeddings(pipe, prompt=prompt)
    assert [record.getMessage() for record in caplog.records if "empty" in record.getMessage()]
    caplog.clear()
    embeddings(pipe, prompt="", prompt_2="a fox")
    assert not caplog.records


def test_report_of_encoders_that_read_77(components) -> None:
    report = FineLIPSDXLPipeline(**components).describe_prompt(MIDDLE, negative_prompt="large")
    assert report.positions == 77
    assert report.windows == 1
    assert len(report.cut) == 2
    assert "are CUT" in str(report)


def test_report_is_what_is_encoded(components) -> None:
    pipe = FineLIPSDXLPipeline(**stretched(components))
    report = pipe.describe_prompt(["a fox", MIDDLE], ["a", "the hare"], "large")
    assert [(plan.encoder, plan.role, plan.index) for plan in report.plans] == [
        ("text_encoder", "prompt", 0),
        ("text_encoder", "prompt", 1),
        ("text_encoder_2", "prompt", 0),
        ("text_encoder_2", "prompt", 1),
        ("text_encoder", "negative prompt", 0),
        ("text_encoder", "negative prompt", 1),
        ("text_encoder_2", "negative prompt", 0),
        ("text_encoder_2", "negative prompt", 1),
    ]
    assert report.positions == embeddings(pipe, prompt=["a fox", MIDDLE])[0].shape[1] == 154
    assert not any(plan.as_stock for plan in report.plans)
    assert "as stock SDXL encodes it" in str(pipe.describe_prompt(SHORT))


@pytest.mark.parametrize("prompt", [SHORT, LONG, ENDLESS], ids=["short", "long", "endless"])
def test_layers_are_skipped_for_prompts_alone(components, prompt) -> None:
    pipe = FineLIPSDXLPipeline(**components)
    pipe.swap_text_encoders()
    with torch.no_grad():
        skipped, plain = (pipe.encode_prompt(prompt, negative_prompt="small", clip_skip=skip) for skip in (1, None))
    assert not torch.equal(skipped[0], plain[0])
    torch.testing.assert_close(skipped[1], plain[1])
