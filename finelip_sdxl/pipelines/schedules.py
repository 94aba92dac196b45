"""Calls that draw a prompt with several texts, as A1111 does: in turn by a schedule, or joined by `AND`.

A schedule is drawn by Diffusers' callback after each step, `AND` by a hook behind the UNet.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from copy import deepcopy
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import retrieve_timesteps
from torch import Tensor, nn

from finelip_sdxl.attribution.sums import is_compiled
from finelip_sdxl.prompts.plan import PromptPlan
from finelip_sdxl.prompts.schedules import ScheduledText, is_scheduled, split_conjunction
from finelip_sdxl.recommended import recommended_of

logger = logging.getLogger(__name__)

_PROMPTS, _NEGATIVES = ("prompt", "prompt_2"), ("negative_prompt", "negative_prompt_2")
_CALLBACK, _INPUTS = "callback_on_step_end", "callback_on_step_end_tensor_inputs"

# What a denoising loop calls the embeddings of both prompts together, and pooled.
_TOGETHER = ("prompt_embeds", "add_text_embeds")

# Prompt, negative prompt and both pooled, as `encode_prompt` returns them.
Embeddings = tuple[Tensor, Tensor | None, Tensor, Tensor | None]


class Drawing:
    """A call that draws prompts with several texts.

    Attributes:
        steps: number of steps of the whole drawing.
        first: number of the first of them that this call draws, from 1; a refiner goes on where the base ended.
    """

    def __init__(self, steps: int, first: int) -> None:
        self.steps, self.first = steps, first
        self._plan: PromptPlan | None = None
        self._encoded: Callable[[int, int], Embeddings] | None = None
        self._stage, self._drawn = 0, 0
        # The loop's own tensors, from the first step on
        self._held: dict[str, Tensor] = {}
        # Of each part but the first: embeddings, pooled vectors, and weights of the prompts
        self._parts: list[tuple[Tensor, Tensor, list[float]]] = []

    @property
    def is_planned(self) -> bool:
        return self._plan is not None

    def begin(self, pipe: Any, plan: PromptPlan, encoded: Callable[[int, int], Embeddings]) -> Embeddings:
        """The embeddings of the first step.

        Args:
            pipe: the pipeline.
            plan: the plan of the prompts, which has a schedule.
            encoded: a function of the numbers of a stage in the schedule, and of a part joined by `AND`, for their
                embeddings.

        Raises:
            ValueError: parts are joined by `AND`, and the call has no guidance or more than the usual.
        """
        self._plan, self._encoded = plan, encoded
        if plan.is_conjunction:
            _check_guidance(pipe)
        return self._go_to(self._stage_of(self.first))

    def _stage_of(self, step: int) -> int:
        assert self._plan is not None
        lasts = [stage.last for stage in self._plan.schedule]
        return next((number for number, last in enumerate(lasts) if step <= last), len(lasts) - 1)

    def _go_to(self, stage: int) -> Embeddings:
        assert self._plan is not None
        assert self._encoded is not None
        self._stage = stage
        rows = self._plan.schedule[stage].prompts
        self._parts = []
        for part in range(1, max(map(len, rows), default=0) if self._plan.is_conjunction else 0):
            prompt, _, pooled, _ = self._encoded(stage, part)
            self._parts.append((prompt, pooled, [row[part].weight if part < len(row) else 0.0 for row in rows]))
        return self._encoded(stage, 0)

    # A schedule, after each step

    def end_step(self, pipe: Any, index: int, tensors: Mapping[str, Tensor], changed: dict[str, Any]) -> None:
        """Put in the embeddings of the next step, where they are others.

        Args:
            pipe: the pipeline.
            index: number of the step that has ended, from 0, of those of this call.
            tensors: those of the denoising loop.
            changed: those that the user's own callback has replaced, to which others may be added.
        """
        if self._plan is None:
            return
        self._drawn = index + 1
        # After the last step comes the first, for loops that draw several times (FreeInit).
        is_last = index + 1 == getattr(pipe, "num_timesteps", None)
        stage = self._stage_of(self.first + (0 if is_last else index + 1))
        if stage == self._stage:
            return
        for name, value in zip(_TOGETHER, _together(pipe, self._go_to(stage)), strict=True):
            now: Tensor = changed.get(name, tensors[name])
            fitted = _fitted(value.to(now), len(now))
            # In place: not every loop looks at what a callback returns for pooled vectors.
            if now is self._held.get(name):
                now.copy_(fitted)
            else:
                changed[name] = fitted

    def check_layout(self, pipe: Any, tensors: Mapping[str, Tensor]) -> None:
        """Check once that a denoising loop holds the embeddings as they are put in.

        Raises:
            ValueError: it has another order.
        """
        if self._encoded is None or self._held:
            return
        for name, value in zip(_TOGETHER, _together(pipe, self._encoded(self._stage, 0)), strict=True):
            now = tensors[name]
            if len(now) % len(value) or not torch.equal(_fitted(value.to(now), len(now)), now):
                raise ValueError(
                    f"{type(pipe).__name__} keeps the embeddings in an order of its own, so that the schedule or AND of"
                    " the prompt cannot be drawn: take it out."
                )
        self._held = {name: tensors[name] for name in _TOGETHER}

    def warn_of_texts_left_out(self) -> None:
        """Say which texts no step has used, where a call draws fewer steps than its schedule has."""
        if self._plan is None or not self._drawn:
            return
        last = self.first + self._drawn - 1
        reached = self._plan.schedule[: self._stage_of(last) + 1]
        used = {share.text for stage in reached for row in stage.prompts for share in row}
        used_negatives = {share.text for stage in reached for row in stage.negative_prompts for share in row}
        unused = dict.fromkeys(
            "".join(window.text for window in text.windows)
            for by_encoder, numbers in ((self._plan.prompts, used), (self._plan.negative_prompts, used_negatives))
            for texts in by_encoder.values()
            for number, text in enumerate(texts)
            if number not in numbers
        )
        if unused:
            logger.warning(
                "Only %d of the %d steps of the schedule were drawn, so that these texts were not used: %s",
                last,
                self.steps,
                "; ".join(unused),
            )

    # `AND`, behind the UNet

    def join(self, pipe: Any, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The output of the UNet with all parts in the place of the first: the noise of the negative prompt, and the
        weighted differences from it. Guidance then multiplies their sum.

        Source: A1111 (`combine_denoised` in `modules/sd_samplers_cfg_denoiser.py`), after Composable Diffusion (arXiv
        2206.01714).
        """
        if self._plan is None or not self._plan.is_conjunction:
            return output
        _check_guidance(pipe)  # which a callback may have ended
        states, added = kwargs["encoder_hidden_states"], kwargs["added_cond_kwargs"]
        self.check_layout(pipe, dict(zip(_TOGETHER, (states, added["text_embeds"]), strict=True)))
        half, pooled_negative = len(states) // 2, added["text_embeds"].chunk(2)[0]
        negative, first = output[0].chunk(2)
        rows = self._plan.schedule[self._stage].prompts
        joined = negative + self._weights([row[0].weight for row in rows], first) * (first - negative)
        for prompt, pooled, weights in self._parts:
            # The whole batch again, so that nothing else must be cut and a shape stays what it was.
            others = {
                **kwargs,
                "encoder_hidden_states": torch.cat([states[:half], _fitted(prompt.to(states), half)]),
                "added_cond_kwargs": {**added, "text_embeds": torch.cat([pooled_negative, pooled.to(pooled_negative)])},
            }
            _, other = unet.forward(*args, **others)[0].chunk(2)
            joined = joined + self._weights(weights, other) * (other - negative)
        together = torch.cat([negative, joined])
        return (together,) if isinstance(output, tuple) else type(output)(together)

    @staticmethod
    def _weights(weights: Sequence[float], noise: Tensor) -> Tensor:
        """The weights of a batch's prompts for all its pictures."""
        by_prompt = torch.tensor(weights, dtype=noise.dtype, device=noise.device)
        return by_prompt.repeat_interleave(len(noise) // len(weights)).reshape(-1, *[1] * (noise.ndim - 1))


# The call that runs in this thread, and its pipeline; None where it draws each prompt with one text.
_drawing: ContextVar[tuple[object, Drawing | None]] = ContextVar("drawing", default=(None, None))


def drawing_of(pipe: object) -> Drawing | None:
    """The call of `pipe` that runs in this thread, if it draws prompts with several texts."""
    calling, drawing = _drawing.get()
    return drawing if calling is pipe else None


@contextmanager
def scheduled_call(pipe: Any, call: Callable[..., Any], bound: inspect.BoundArguments) -> Iterator[None]:
    """Within this context, a call of a pipeline draws the schedules of its prompts, and `AND`, if they have any.

    Args:
        pipe: the pipeline.
        call: the parent's `__call__`.
        bound: its arguments. With a schedule, those of the callback are replaced by one that changes the embeddings and
            does what the user's own does.

    Raises:
        ValueError: the pipeline has no callback after each step, or cannot draw `AND`.
    """
    given = bound.arguments
    drawing = Drawing(*count_steps(pipe, given)) if has_several_texts(pipe, given) else None
    with ExitStack() as stack:
        if drawing is not None:
            _change_texts(pipe, call, given, drawing)
            if any(len(split_conjunction(text)) > 1 for text in _texts(given, _PROMPTS)):
                stack.enter_context(_joining(pipe, drawing))
        token = _drawing.set((pipe, drawing))
        stack.callback(_drawing.reset, token)
        yield
    if drawing is not None and given.get("denoising_end") is None:
        drawing.warn_of_texts_left_out()


def _change_texts(pipe: Any, call: Callable[..., Any], given: dict[str, Any], drawing: Drawing) -> None:
    """Put a callback that changes the embeddings into the arguments of a call whose prompts have a schedule."""
    if not any(map(is_scheduled, _texts(given, (*_PROMPTS, *_NEGATIVES)))):
        return
    known = getattr(pipe, "_callback_tensor_inputs", ())
    if _CALLBACK not in inspect.signature(call).parameters or not {*_TOGETHER} <= {*known}:
        raise ValueError(
            f"The prompt has a schedule, such as [a:b:0.5], but {type(pipe).__name__} calls nothing back after a step:"
            r" take it out, or write \[ for a bracket that is text."
        )
    own, inputs = given.get(_CALLBACK), given.get(_INPUTS) or ["latents"]
    if isinstance(own, PipelineCallback | MultiPipelineCallbacks):
        inputs = own.tensor_inputs

    def end_step(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        drawing.check_layout(pipe, tensors)
        changed: dict[str, Any] = {}
        if own is not None:
            changed = own(pipe, index, timestep, {name: tensors[name] for name in inputs})
        drawing.end_step(pipe, index, tensors, changed)
        return changed

    given[_CALLBACK], given[_INPUTS] = end_step, [*dict.fromkeys([*inputs, *_TOGETHER])]


@contextmanager
def _joining(pipe: Any, drawing: Drawing) -> Iterator[None]:
    """Within this context, the UNet of a pipeline predicts for all parts of an `AND`, in this thread."""
    if getattr(pipe, "controlnet", None) is not None:
        raise ValueError(
            f"The prompt has parts joined by AND, but the ControlNet of {type(pipe).__name__} reads one text alone:"
            " write one text, or draw without it."
        )
    if any(is_compiled(module) for module in pipe.unet.modules()):
        raise ValueError(
            "The prompt has parts joined by AND, which a compiled UNet cannot draw: write one text, or draw with a UNet"
            " that is not compiled."
        )

    def join(unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        # Other pipelines may share the UNet: calls from other threads, or from a callback, are not ours.
        return drawing.join(pipe, unet, args, kwargs, output) if drawing_of(pipe) is drawing else output

    handle = pipe.unet.register_forward_hook(join, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def has_several_texts(pipe: Any, given: Mapping[str, Any]) -> bool:
    """Whether a call's prompts are drawn with several texts, by a schedule or an `AND`."""
    if pipe.weighting != "a1111":
        return False
    return any(len(split_conjunction(text)) > 1 or is_scheduled(text) for text in _texts(given, _PROMPTS)) or any(
        ScheduledText.parse(text).changes for text in _texts(given, _NEGATIVES)
    )


def _texts(given: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    values = [given.get(name) for name in names]
    texts = [text for value in values for text in (value if isinstance(value, list | tuple) else [value])]
    return [text for text in texts if isinstance(text, str)]


def count_steps(pipe: Any, given: Mapping[str, Any]) -> tuple[int, int]:
    """The steps of a whole drawing, and the number of the first that a call draws, from 1.

    As A1111 counts: an image-to-image call draws the first steps of the schedule, whatever its strength, and a refiner
    goes on where the base has ended. Schedulers with two evaluations a step (Heun) have twice as many steps.

    Args:
        pipe: the pipeline.
        given: the arguments of the call.
    """
    steps = given.get("num_inference_steps") or _default_steps(pipe)
    scheduler = deepcopy(pipe.scheduler)
    timesteps, _ = retrieve_timesteps(scheduler, steps, "cpu", given.get("timesteps"), given.get("sigmas"))
    start, first = given.get("denoising_start"), 1
    if start is not None:
        noises = scheduler.config.num_train_timesteps
        drawn = int((timesteps < round(noises - start * noises)).sum())
        # As in the pipelines' `get_timesteps`: a step of two evaluations is not torn apart.
        first += len(timesteps) - drawn - int(scheduler.order == 2 and drawn % 2 == 0)
    return len(timesteps), first


def _default_steps(pipe: Any) -> int:
    """The steps of a call without `num_inference_steps`."""
    recommended = recommended_of(pipe.config)
    default: int = inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default
    return default if recommended is None else recommended.steps


def _check_guidance(pipe: Any) -> None:
    if not pipe.do_classifier_free_guidance or getattr(pipe, "do_perturbed_attention_guidance", False):
        raise ValueError(
            "The prompt has parts joined by AND, which needs guidance by a negative prompt at every step, and no other:"
            " pass a guidance_scale above 1 and no pag_scale, or write one text."
        )


def _together(pipe: Any, embeddings: Embeddings) -> tuple[Tensor, Tensor]:
    """The embeddings of both prompts and their pooled vectors, in the order of the rows of a denoising loop."""
    prompt, negative, pooled, negative_pooled = embeddings
    is_guided = bool(pipe.do_classifier_free_guidance)
    if getattr(pipe, "do_perturbed_attention_guidance", False):
        order = pipe._prepare_perturbed_attention_guidance
        return order(prompt, negative, is_guided), order(pooled, negative_pooled, is_guided)
    if not is_guided or negative is None or negative_pooled is None:
        return prompt, pooled
    return torch.cat([negative, prompt]), torch.cat([negative_pooled, pooled])


def _fitted(value: Tensor, rows: int) -> Tensor:
    """As many rows as a loop has: each again for each frame of a video."""
    return value.repeat_interleave(rows // len(value), dim=0) if rows > len(value) else value
