"""Prompts that are drawn with several texts: A1111's schedules and `AND`, at any length, in every kind of call."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AnimateDiffSDXLPipeline,
    HeunDiscreteScheduler,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPAGPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLControlNetXSPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    StableDiffusionXLPAGPipeline,
)
from diffusers.callbacks import SDXLCFGCutoffCallback

from finelip_sdxl import FineLIPSDXLImg2ImgPipeline, FineLIPSDXLPipeline, long_prompts, trace_attention
from finelip_sdxl.cli.main import main
from tests.helpers.drawing import draw, embeddings
from tests.helpers.prompts import ALL_LENGTHS, ENDLESS, LONG, SHORT

STEPS = 4
IMAGE = np.random.RandomState(0).rand(1, 16, 16, 3).astype(np.float32)
CONTROL = torch.from_numpy(IMAGE).permute(0, 3, 1, 2)
MASK = (IMAGE[..., :1] > 0.5).astype(np.float32)

Texts = Sequence[str]


@pytest.fixture
def pipe(components) -> FineLIPSDXLPipeline:
    return build(FineLIPSDXLPipeline, components)


def build(cls: Any, parts: dict[str, Any]) -> Any:
    pipe = cls(**parts, weighting="a1111")
    pipe.swap_text_encoders()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def by_hand(pipe: Any, texts: Texts, negatives: Texts | None = None, **arguments: Any) -> np.ndarray:
    """The pictures of texts, one for each step, whose embeddings a callback of our own puts in."""
    pairs = zip(texts, negatives or [None] * len(texts), strict=True)
    with torch.no_grad():
        encoded = [pipe.encode_prompt(text, device="cpu", negative_prompt=negative) for text, negative in pairs]
    names = ["prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"]

    def swap(_: Any, index: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        prompt, negative, pooled, negative_pooled = encoded[min(index + 1, len(encoded) - 1)]
        return {"prompt_embeds": torch.cat([negative, prompt]), "add_text_embeds": torch.cat([negative_pooled, pooled])}

    return draw(
        pipe,
        None,
        **dict(zip(names, encoded[0], strict=True)),
        num_inference_steps=len(texts),
        callback_on_step_end=swap,
        **arguments,
    )


@contextmanager
def seen_by(unet: torch.nn.Module) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """The states and pooled vectors that a UNet gets at each step."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(_: Any, __: Any, kwargs: dict[str, Any]) -> None:
        seen.append((kwargs["encoder_hidden_states"].clone(), kwargs["added_cond_kwargs"]["text_embeds"].clone()))

    handle = unet.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def said_by_us(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name.startswith("finelip_sdxl")]


def differ(one: np.ndarray, other: np.ndarray) -> bool:
    """By more than rounding does."""
    return float(np.abs(one - other).max()) > 1e-3


FORMS = [
    ("[red:blue:0.5]", ["red", "red", "blue", "blue"]),
    ("[red:blue:1]", ["red", "blue", "blue", "blue"]),
    ("[red:blue:.3]", ["red", "blue", "blue", "blue"]),
    ("[red:0.75]", ["", "", "", "red"]),
    ("[red::3]", ["red", "red", "red", ""]),
    ("[red:blue:9]", ["red"] * 4),
    ("[red:blue:0]", ["blue"] * 4),
    ("[red|blue]", ["red", "blue", "red", "blue"]),
    ("[red|blue|]", ["red", "blue", "", "red"]),
    ("[red:[blue|small]:2]", ["red", "red", "blue", "small"]),
    ("[[red:blue:1]:[small::3]:2]", ["red", "blue", "small", ""]),
    ("[(red:1.4):(blue:0.6):2]", ["(red:1.4)", "(red:1.4)", "(blue:0.6)", "(blue:0.6)"]),
]


@pytest.mark.parametrize(("form", "words"), FORMS, ids=[form for form, _ in FORMS])
def test_every_step_has_its_text(pipe, form, words) -> None:
    found = draw(pipe, f"{form} fox", num_inference_steps=STEPS)
    assert np.array_equal(found, by_hand(pipe, [f"{word} fox" for word in words]))


@ALL_LENGTHS
@pytest.mark.parametrize(("form", "words"), [FORMS[0], FORMS[7]], ids=["edited", "alternating"])
def test_at_any_length(pipe, prompt, form, words) -> None:
    texts = [f"{word} fox. {prompt}" for word in words]
    found = draw(pipe, f"{form} fox. {prompt}", num_inference_steps=STEPS)
    assert np.array_equal(found, by_hand(pipe, texts))
    assert not any(np.array_equal(found, by_hand(pipe, [text] * STEPS)) for text in set(texts))


@ALL_LENGTHS
def test_a_text_that_never_changes_is_drawn_as_it_is_alone(pipe, prompt) -> None:
    expected = draw(pipe, f"red fox. {prompt}")
    for form in ("[red:blue:2]", "[blue:red:0]", "[red:blue:1.0]", "[red|red]"):
        assert np.array_equal(draw(pipe, f"{form} fox. {prompt}"), expected)


@ALL_LENGTHS
def test_negative_prompts_have_schedules_too(pipe, prompt) -> None:
    negatives = [f"red {prompt}", *[f"blue {prompt}"] * 3]
    found = draw(pipe, SHORT, negative_prompt=f"[red:blue:1] {prompt}", num_inference_steps=STEPS)
    expected = by_hand(pipe, [SHORT] * STEPS, negatives) if prompt == SHORT else None
    if expected is not None:
        assert np.array_equal(found, expected)
    assert differ(found, draw(pipe, SHORT, negative_prompt=negatives[0], num_inference_steps=STEPS))
    both = draw(pipe, "a [small|large] fox", negative_prompt="[red:blue:1]", num_inference_steps=2)
    assert np.array_equal(both, by_hand(pipe, ["a small fox", "a large fox"], ["red", "blue"]))


def test_texts_of_other_lengths_share_one_length(pipe) -> None:
    """The longest text decides it, so that no shape changes between steps."""
    with seen_by(pipe.unet) as seen:
        draw(pipe, f"[a fox:{LONG}:1]", negative_prompt="[a hare:a fox:1]")
    assert [tuple(states.shape) for states, _ in seen] == [(2, 154, 80)] * 2
    with seen_by(pipe.unet) as seen:
        draw(pipe, f"[a fox:{ENDLESS}:1]")
    assert [tuple(states.shape) for states, _ in seen] == [(2, 496, 80)] * 2


def test_each_text_is_encoded_once_and_before_drawing(pipe) -> None:
    runs: list[str] = []
    pipe.text_encoder_2.register_forward_hook(lambda *_: runs.append("text"))
    pipe.unet.register_forward_hook(lambda *_: runs.append("step"))
    draw(pipe, "a [red|blue] fox", num_inference_steps=6)
    assert runs == ["text"] * 2 + ["step"] * 6  # for an absent negative prompt, SDXL takes zeros


@ALL_LENGTHS
def test_the_text_projection_cache_sees_every_change(pipe, prompt) -> None:
    expected = draw(pipe, f"[red|blue] fox. {prompt}", num_inference_steps=STEPS)
    pipe.enable_text_projection_cache()
    assert np.array_equal(draw(pipe, f"[red|blue] fox. {prompt}", num_inference_steps=STEPS), expected)


# Batches, guidance, callbacks


def test_prompts_of_a_batch_have_schedules_of_their_own(pipe) -> None:
    prompts = ["a [red:blue:1] fox", "a [small|large] hare", "a quiet fox"]
    with seen_by(pipe.unet) as seen:
        draw(pipe, prompts, num_inference_steps=STEPS)
    steps = [("red", "small"), ("blue", "large"), ("blue", "small"), ("blue", "large")]
    for (states, _), (first, second) in zip(seen, steps, strict=True):
        texts = [f"a {first} fox", f"a {second} hare", "a quiet fox"]
        assert torch.equal(states[3:], torch.cat([embeddings(pipe, text) for text in texts]))
    plan = pipe.describe_prompt(prompts, num_inference_steps=STEPS)
    titles = [(text.index, text.label) for text in plan.prompts["text_encoder"]]
    assert titles == [(0, "step 1"), (0, "steps 2–4"), (1, "steps 1, 3"), (1, "steps 2, 4"), (2, "")]


def test_several_pictures_of_a_prompt(pipe) -> None:
    with seen_by(pipe.unet) as seen:
        draw(pipe, ["a [red:blue:1] fox", "a hare"], num_images_per_prompt=2)
    for (states, _), word in zip(seen, ("red", "blue"), strict=True):
        texts = [f"a {word} fox"] * 2 + ["a hare"] * 2
        assert torch.equal(states[4:], torch.cat([embeddings(pipe, text) for text in texts]))


def test_without_guidance(pipe) -> None:
    with seen_by(pipe.unet) as seen:
        draw(pipe, "a [red|blue] fox", negative_prompt="[hare|square]", guidance_scale=0, num_inference_steps=3)
    red, blue = (embeddings(pipe, f"a {word} fox") for word in ("red", "blue"))
    assert all(torch.equal(states, word) for (states, _), word in zip(seen, (red, blue, red), strict=True))


def test_the_callback_of_a_call_runs_as_well(pipe) -> None:
    expected = draw(pipe, "a [red:blue:1] fox", num_inference_steps=STEPS)
    seen = []

    def look(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append((index, sorted(tensors)))
        return tensors

    found = draw(pipe, "a [red:blue:1] fox", num_inference_steps=STEPS, callback_on_step_end=look)
    assert np.array_equal(found, expected)
    assert seen == [(index, ["latents"]) for index in range(STEPS)]
    names = ["latents", "prompt_embeds"]
    found = draw(
        pipe,
        "a [red:blue:1] fox",
        num_inference_steps=STEPS,
        callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=names,
    )
    assert np.array_equal(found, expected)
    assert seen[-1] == (STEPS - 1, names)


def test_a_callback_may_end_guidance_halfway(pipe) -> None:
    with seen_by(pipe.unet) as seen:
        cutoff = SDXLCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
        draw(pipe, "a [red|blue] fox", num_inference_steps=STEPS, callback_on_step_end=cutoff)
    assert [len(states) for states, _ in seen] == [2, 2, 1, 1]
    for (states, _), word in zip(seen, ("red", "blue", "red", "blue"), strict=True):
        assert torch.equal(states[-1:], embeddings(pipe, f"a {word} fox"))


def test_a_callback_may_put_in_embeddings_of_its_own(pipe) -> None:
    own = torch.cat([embeddings(pipe, "a hare")] * 2)
    kept = own.clone()
    with seen_by(pipe.unet) as seen:
        draw(
            pipe,
            "a [red:blue:2] fox",
            num_inference_steps=3,
            callback_on_step_end=lambda pipe, index, timestep, tensors: {"prompt_embeds": own} if index == 0 else {},
        )
    assert torch.equal(seen[1][0], own)
    assert torch.equal(seen[2][0][1:], embeddings(pipe, "a blue fox"))
    assert torch.equal(own, kept)


# The count of steps


def test_image_to_image_counts_the_steps_that_it_draws(pipe, caplog) -> None:
    """As A1111: by the whole number of steps, from the first that is drawn."""
    other = FineLIPSDXLImg2ImgPipeline.from_pipe(pipe)
    how = {"image": IMAGE, "strength": 0.5, "num_inference_steps": STEPS}
    with seen_by(other.unet) as seen:
        draw(other, "a [red:blue:1] fox", **how)
    assert [torch.equal(states[1:], embeddings(pipe, "a red fox")) for states, _ in seen] == [True, False]
    caplog.clear()
    found = draw(other, "a [red:blue:0.5] fox", **how)
    assert np.array_equal(found, draw(other, "a red fox", **how))
    assert said_by_us(caplog) == [
        "Only 2 of the 4 steps of the schedule were drawn, so that these texts were not used: a blue fox"
    ]


def test_a_second_pipeline_goes_on_where_the_first_ended(pipe, caplog) -> None:
    other = FineLIPSDXLImg2ImgPipeline.from_pipe(pipe)
    prompt, steps = "a [red:blue:3] fox", {"num_inference_steps": STEPS, "output_type": "latent"}
    with seen_by(pipe.unet) as seen:
        latents = draw(pipe, prompt, denoising_end=0.5, **steps)
        draw(other, prompt, image=latents, denoising_start=0.5, num_inference_steps=STEPS)
    words = [torch.equal(states[1:], embeddings(pipe, "a red fox")) for states, _ in seen]
    assert words == [True, True, True, False]
    assert not said_by_us(caplog)


def test_a_scheduler_of_two_evaluations_counts_each(pipe) -> None:
    pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    with seen_by(pipe.unet) as seen:
        draw(pipe, "a [red:blue:2] fox", num_inference_steps=2)
    assert [torch.equal(states[1:], embeddings(pipe, "a red fox")) for states, _ in seen] == [True, True, False]


def test_timesteps_may_be_given(pipe) -> None:
    with seen_by(pipe.unet) as seen:
        draw(pipe, "a [red:blue:0.5] fox", num_inference_steps=None, sigmas=[10.0, 5.0, 2.0, 0.0])
    found = [torch.equal(states[1:], embeddings(pipe, "a red fox")) for states, _ in seen]
    assert found == [True, False, False]


# Other pipelines


CLASSES: list[tuple[type, dict[str, str], dict[str, Any]]] = [
    (StableDiffusionXLInpaintPipeline, {}, {"image": IMAGE, "mask_image": MASK, "strength": 1.0}),
    (StableDiffusionXLControlNetPipeline, {"controlnet": "controlnet"}, {"image": CONTROL}),
    (StableDiffusionXLControlNetPipeline, {"controlnet": "controlnet"}, {"image": CONTROL, "guess_mode": True}),
    (
        StableDiffusionXLControlNetInpaintPipeline,
        {"controlnet": "controlnet"},
        {"image": IMAGE, "mask_image": MASK, "control_image": CONTROL, "strength": 1.0},
    ),
    (StableDiffusionXLControlNetXSPipeline, {"controlnet": "controlnet_xs", "unet": "deep_unet"}, {"image": CONTROL}),
    (StableDiffusionXLPAGPipeline, {}, {"pag_scale": 2.0}),
    (StableDiffusionXLControlNetPAGPipeline, {"controlnet": "controlnet"}, {"image": CONTROL, "pag_scale": 2.0}),
    (AnimateDiffSDXLPipeline, {"motion_adapter": "motion_adapter"}, {"num_frames": 2}),
]


@pytest.mark.parametrize(("cls", "own", "arguments"), CLASSES)
def test_every_pipeline_with_a_callback_draws_schedules(components, request, cls, own, arguments) -> None:
    """The states and, in any loop, the pooled vectors are at each step those of the text alone."""
    with_pag = {"pag_applied_layers": ["mid"]} if "PAG" in cls.__name__ else {}
    parts = {**components, **{part: request.getfixturevalue(name) for part, name in own.items()}, **with_pag}
    pipe = build(long_prompts(cls), parts)
    seen = {}
    for prompt in ("a red fox", "a blue fox", "a [red:blue:1] fox", "a [blue|red] fox"):
        with seen_by(pipe.unet) as seen[prompt]:
            pipe(prompt, num_inference_steps=2, generator=torch.Generator().manual_seed(0), **arguments)
    words = {prompt: each for prompt, each in seen.items() if "[" not in prompt}
    for prompt, order in (("a [red:blue:1] fox", ("red", "blue")), ("a [blue|red] fox", ("blue", "red"))):
        assert len(seen[prompt]) == 2
        for step, word in enumerate(order):
            expected = words[f"a {word} fox"][step]
            assert all(torch.equal(*pair) for pair in zip(seen[prompt][step], expected, strict=True))


@pytest.mark.parametrize(
    ("cls", "own", "image"),
    [
        (StableDiffusionXLAdapterPipeline, {"adapter": "t2i_adapter"}, CONTROL),
        (StableDiffusionXLInstructPix2PixPipeline, {"unet": "editing_unet"}, IMAGE),
    ],
)
def test_a_pipeline_without_a_callback_refuses(components, request, cls, own, image) -> None:
    parts = {**components, **{part: request.getfixturevalue(name) for part, name in own.items()}}
    pipe = build(long_prompts(cls), parts)
    with pytest.raises(ValueError, match=f"has a schedule.* but {type(pipe).__name__} calls nothing back after a step"):
        draw(pipe, "a [red:blue:1] fox", image=image)
    draw(pipe, r"a \[red:blue:1\] fox", image=image)


def test_a_loop_with_an_order_of_its_own_is_refused(components) -> None:
    class Turned(FineLIPSDXLPipeline):
        """A pipeline whose loop has the rows of the prompt first."""

        def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple:
            prompt, negative, pooled, negative_pooled = super().encode_prompt(*args, **kwargs)
            return negative, prompt, negative_pooled, pooled

    pipe = build(Turned, components)
    for prompt in ("a [red:blue:1] fox", "a fox AND a hare"):
        with pytest.raises(ValueError, match="Turned keeps the embeddings in an order of its own"):
            draw(pipe, prompt)
    assert not pipe.unet._forward_hooks


# `AND`


def noise_of(pipe: Any, latents: torch.Tensor, prompts: Texts, weights: Sequence[float], scale: float) -> torch.Tensor:
    """The noise that guidance makes of several prompts: the sum of their weighted differences from the negative's."""
    timestep = pipe.scheduler.timesteps[0]
    scaled = pipe.scheduler.scale_model_input(latents, timestep)
    sizes = torch.tensor([[16, 16, 0, 0, 16, 16]], dtype=torch.float32)

    def predicted(states: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        added = {"text_embeds": pooled, "time_ids": sizes}
        with torch.no_grad():
            return pipe.unet(scaled, timestep, encoder_hidden_states=states, added_cond_kwargs=added).sample

    with torch.no_grad():
        encoded = [pipe.encode_prompt(prompt, device="cpu") for prompt in prompts]
    negative = predicted(encoded[0][1], encoded[0][3])
    noise = negative.clone()
    for (states, _, pooled, _), weight in zip(encoded, weights, strict=True):
        noise += scale * weight * (predicted(states, pooled) - negative)
    return noise


@ALL_LENGTHS
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.2, 0.7), (1.0, -0.5), (0.0, 1.0)])
def test_the_parts_of_and_are_summed_as_noise(pipe, prompt, weights) -> None:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = f"{prompt} red :{weights[0]} AND {prompt} blue:{weights[1]}"
    found = torch.as_tensor(draw(pipe, text, latents=latents, num_inference_steps=1, output_type="latent"))
    pipe.scheduler.set_timesteps(1)
    start = latents * pipe.scheduler.init_noise_sigma
    noise = noise_of(pipe, start, [f"{prompt} red", f" {prompt} blue"], weights, scale=5.0)
    expected = pipe.scheduler.step(noise, pipe.scheduler.timesteps[0], start).prev_sample
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def test_equal_parts_multiply_guidance(pipe) -> None:
    expected = draw(pipe, SHORT, guidance_scale=6.0, num_inference_steps=STEPS)
    found = draw(pipe, f"{SHORT} AND {SHORT} :0.5", guidance_scale=4.0, num_inference_steps=STEPS)
    assert not differ(found, expected)


def test_parts_of_and_have_schedules_and_batches(pipe) -> None:
    pipe.to(torch.float64)  # batches round in another order
    prompts = ["a [red:blue:1] fox AND a hare :0.5", "a quiet fox", "a fox AND a [small|large] hare AND a square:-0.2"]
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    together = draw(pipe, prompts, latents=noise, num_inference_steps=STEPS)
    for index, prompt in enumerate(prompts):
        alone = draw(pipe, prompt, latents=noise[index : index + 1], num_inference_steps=STEPS)
        assert not differ(together[index], alone[0])
    steady = draw(pipe, "a red fox AND a hare :0.5", latents=noise[:1], num_inference_steps=STEPS)
    assert differ(together[0], steady[0])


def test_and_with_the_text_projection_cache_and_several_pictures(pipe) -> None:
    pipe.to(torch.float64)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = draw(pipe, "a fox AND a hare", latents=noise, num_images_per_prompt=2)
    pipe.enable_text_projection_cache()
    found = draw(pipe, "a fox AND a hare", latents=noise, num_images_per_prompt=2)
    assert np.array_equal(found, expected)
    assert not differ(found[1], draw(pipe, "a fox AND a hare", latents=noise[1:])[0])


def test_the_parts_of_and_in_a_video(components, motion_adapter) -> None:
    pipe = build(long_prompts(AnimateDiffSDXLPipeline), {**components, "motion_adapter": motion_adapter})

    def frames(prompt: str, scale: float) -> np.ndarray:
        noise = torch.Generator().manual_seed(0)
        drawn = pipe(
            prompt, num_frames=2, num_inference_steps=2, guidance_scale=scale, generator=noise, output_type="np"
        )
        return np.asarray(drawn.frames)

    assert not differ(frames("a fox AND a fox :0.5", 4.0), frames("a fox", 6.0))
    assert differ(frames("a fox AND a hare", 4.0), frames("a fox", 6.0))


def test_and_leaves_the_unet_as_it_was(pipe) -> None:
    usual = draw(pipe, SHORT)
    assert differ(draw(pipe, f"{SHORT} AND a hare"), usual)
    assert not pipe.unet._forward_hooks
    assert np.array_equal(draw(pipe, SHORT), usual)


def test_a_drawing_in_a_callback_is_none_of_the_parts(pipe) -> None:
    """Of a pipeline that shares the UNet, with a scheduler of its own."""
    other = FineLIPSDXLPipeline.from_pipe(pipe)
    other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    expected, usual = draw(pipe, "a fox AND a hare"), draw(other, "a square")
    found = []

    def meanwhile(*_: Any) -> dict[str, Any]:
        found.append(draw(other, "a square"))
        return {}

    assert np.array_equal(draw(pipe, "a fox AND a hare", callback_on_step_end=meanwhile), expected)
    assert len(found) == 2
    assert all(np.array_equal(each, usual) for each in found)


def test_and_is_text_in_negative_prompts_and_other_syntaxes(pipe) -> None:
    assert np.array_equal(
        draw(pipe, SHORT, negative_prompt="a fox AND a hare"),
        draw(pipe, SHORT, negative_prompt="a fox AND a hare", weighting=None),
    )
    for weighting in (None, "compel"):
        plan = pipe.describe_prompt("a fox AND a [red|blue] hare", weighting=weighting)
        assert not plan.schedule
        assert plan.plans[0].windows[0].text == "a fox AND a [red|blue] hare"


def test_and_needs_guidance(pipe) -> None:
    with pytest.raises(ValueError, match="AND, which needs guidance by a negative prompt at every step"):
        draw(pipe, "a fox AND a hare", guidance_scale=0)


def test_and_is_refused_where_something_else_reads_the_prompt(components, controlnet) -> None:
    pipe = build(long_prompts(StableDiffusionXLControlNetPipeline), {**components, "controlnet": controlnet})
    with pytest.raises(ValueError, match="AND, but the ControlNet of FineLIPSDXLControlNetPipeline reads one text"):
        draw(pipe, "a fox AND a hare", image=CONTROL)
    pipe = build(long_prompts(StableDiffusionXLPAGPipeline), {**components, "pag_applied_layers": ["mid"]})
    with pytest.raises(ValueError, match="pass a guidance_scale above 1 and no pag_scale"):
        draw(pipe, "a fox AND a hare", pag_scale=1.0)
    assert np.array_equal(
        draw(pipe, "a fox AND a hare", pag_scale=0),
        draw(build(FineLIPSDXLPipeline, components), "a fox AND a hare"),
    )


def test_and_is_refused_with_a_compiled_unet(pipe) -> None:
    pipe.unet.compile()
    with pytest.raises(ValueError, match="AND, which a compiled UNet cannot draw"):
        draw(pipe, "a fox AND a hare")


def test_both_encoders_need_the_same_parts(pipe) -> None:
    with pytest.raises(ValueError, match="joined from different parts, by AND or"):
        draw(pipe, "a fox AND a hare", prompt_2="a fox")
    draw(pipe, "a fox AND a hare", prompt_2="a red fox AND a blue hare")


# Reports and refusals


def test_the_report_says_what_each_step_is_drawn_with(pipe) -> None:
    plan = pipe.describe_prompt("a [red:blue:0.5] fox", num_inference_steps=30)
    assert str(plan).splitlines()[:4] == [
        "text_encoder and text_encoder_2 encode prompt, steps 1–15: 5 tokens in 1 window of 77 positions, as stock"
        " SDXL encodes it; nothing is cut",
        '  window 1, 5 tokens: "a red fox"',
        "text_encoder and text_encoder_2 encode prompt, steps 16–30: 5 tokens in 1 window of 77 positions, as stock"
        " SDXL encodes it; nothing is cut",
        '  window 1, 5 tokens: "a blue fox"',
    ]
    assert [stage.last for stage in plan.schedule] == [15, 30]
    titles = [text.title for text in pipe.describe_prompt("a [red|blue] fox AND a hare :0.5").plans[:3]]
    assert titles == [
        "prompt, part 1 of 2, weight 1, steps 1, 3, 5, … 49",
        "prompt, part 1 of 2, weight 1, steps 2, 4, 6, … 50",
        "prompt, part 2 of 2, weight 0.5",
    ]
    assert pipe.describe_prompt("a (red:1.2) [fox]").schedule == ()


def test_what_is_cut_of_a_later_text_is_said(pipe, caplog) -> None:
    pipe.overflow = "truncate"
    plan = pipe.describe_prompt(f"[a fox:{ENDLESS} hare:1]", num_inference_steps=2)
    assert [cut.label for cut in plan.cut] == ["step 2"] * 2
    caplog.clear()
    draw(pipe, f"[a fox:{ENDLESS} hare:1]")
    assert "Cut and not encoded, prompt: " in caplog.text
    pipe.overflow = "error"
    with pytest.raises(ValueError, match="shorten it, or set overflow"):
        draw(pipe, f"[a fox:{ENDLESS}:1]")


def test_loras_of_a_schedule_are_never_encoded(pipe, caplog) -> None:
    caplog.clear()
    found = draw(pipe, "a [red:blue:1] fox<lora:ink:0.5>")
    assert said_by_us(caplog) == [
        "Left out, not encoded and not loaded: <lora:ink:0.5>. Pass lora_dir= with the folder of these LoRAs to a call,"
        " or load them by load_lora_weights."
    ]
    assert np.array_equal(found, draw(pipe, "a [red:blue:1] fox"))


@pytest.mark.parametrize("prompt", ["a [red:blue:0.5] fox", "a [red|blue] fox", "a fox AND a hare"])
def test_it_cannot_be_encoded_beforehand(pipe, prompt) -> None:
    for encode in (pipe.encode, pipe.encode_prompt):
        with pytest.raises(ValueError, match="cannot be encoded beforehand: pass it to a call of the pipeline"):
            encode(prompt)


def test_heat_maps_are_refused(pipe) -> None:
    for prompt in ("a [red:blue:1] fox", "a fox AND a hare"):
        with pytest.raises(ValueError, match="Heat maps are of one text"), trace_attention(pipe):
            draw(pipe, prompt)
    plan = pipe.describe_prompt("a [red:blue:1] fox")
    with pytest.raises(ValueError, match="Heat maps are of one text"), trace_attention(pipe, plan):
        pass


def test_too_many_texts_are_refused(pipe) -> None:
    prompt = " ".join(f"[{'|'.join(f'a{number}' for number in range(size))}]" for size in (13, 17, 19))
    with pytest.raises(ValueError, match="become more than 200 different texts in 300 steps"):
        draw(pipe, prompt, num_inference_steps=300)


def test_a_failed_call_leaves_nothing_behind(pipe) -> None:
    def fail(*_: Any) -> dict[str, Any]:
        raise RuntimeError("stop")

    usual = draw(pipe, SHORT)
    with pytest.raises(RuntimeError, match="stop"):
        draw(pipe, "a [red|blue] fox AND a hare", callback_on_step_end=fail)
    assert not pipe.unet._forward_hooks
    assert np.array_equal(draw(pipe, SHORT), usual)
    with pytest.raises(ValueError, match="beforehand"):
        pipe.encode_prompt("a [red|blue] fox")


def test_encoders_of_77_positions_read_no_schedule(components) -> None:
    stock = FineLIPSDXLPipeline(**components, weighting="a1111")
    with pytest.raises(ValueError, match=re.escape("call swap_text_encoders() first")):
        draw(stock, "a [red:blue:1] fox")


# The miniature


@pytest.mark.slow
def test_a_color_that_changes_early_is_the_color_of_the_picture() -> None:
    pipe = FineLIPSDXLPipeline.from_pretrained("miniature", weighting="a1111")
    rest = " star is in the center. A green ring is in the top left."
    red, changed, blue = (
        draw(pipe, f"A {word}{rest}", num_inference_steps=10) for word in ("red", "[red:blue:1]", "blue")
    )
    assert np.abs(changed - blue).mean() < np.abs(changed - red).mean() / 5


# The command line


def test_the_command_line_draws_schedules(tmp_path, capsys) -> None:
    prompt, out = "A [red:blue:1] star is in the top left.", str(tmp_path / "picture.png")
    flags = ["--weighting", "a1111", "--steps", "2", "--seed", "0", "--out", out]
    assert main(["generate", prompt, *flags]) == 0
    printed = capsys.readouterr().out
    assert "encode prompt, step 1: " in printed
    assert '"A blue star is in the top left."' in printed
    assert main(["tokens", prompt, "--weighting", "a1111", "--steps", "8"]) == 0
    assert "encode prompt, steps 2–8: " in capsys.readouterr().out
    for flag, file, said in (
        ("--heat-maps", "sheet.png", "Heat maps are of one text"),
        ("--save-conditioning", "prompt.safetensors", "cannot be encoded beforehand"),
    ):
        assert main(["generate", prompt, *flags, flag, str(tmp_path / file)]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert len(error.strip().splitlines()[-1:]) == 1
