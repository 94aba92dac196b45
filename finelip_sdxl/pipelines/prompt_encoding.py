"""The pipelines' `encode_prompt`: from the plan of a prompt to embeddings.

Every SDXL pipeline of Diffusers turns texts into embeddings in this one method. The code behind it takes embeddings of
any length, so the denoising loops stay Diffusers' own.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, wraps
from itertools import chain
from threading import Lock, RLock
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Self, TypeVar
from weakref import WeakKeyDictionary

import torch
from diffusers.utils import USE_PEFT_BACKEND, scale_lora_layers, unscale_lora_layers
from diffusers.utils.torch_utils import get_module_execution_device
from transformers import CLIPTokenizer

from finelip_sdxl.attribution.trace import note_plan
from finelip_sdxl.conditioning import Conditioning, fingerprint
from finelip_sdxl.options import (
    AS_SET,
    ENCODERS,
    STOCK_POSITIONS,
    Emphasis,
    HiddenStates,
    Overflow,
    ShortPromptEncoder,
    Weighting,
    check_texts,
)
from finelip_sdxl.pipelines.calls import check_numbers, option_in_force, takes_options
from finelip_sdxl.pipelines.schedules import count_steps, drawing_of, has_several_texts
from finelip_sdxl.prompts.composition import Rows, Share
from finelip_sdxl.prompts.plan import (
    EncoderPlan,
    EncoderSpec,
    PromptPlan,
    empty_row,
    padded_shares,
    padded_token_ids,
    padded_weights,
    plan_prompts,
    tokenize,
)
from finelip_sdxl.prompts.weighting import WeakPart, apply_weights, blend_without, multiply_states, weak_parts
from finelip_sdxl.provenance import Provenance
from finelip_sdxl.text_encoders import TextEncoder, num_positions

logger = logging.getLogger(__name__)

EMBEDDINGS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")

_locks: WeakKeyDictionary[Any, RLock] = WeakKeyDictionary()
_locks_lock = Lock()

# States and pooled vectors in one call, by encoder, `clip_skip` and token ids. Each is computed once: windows of the
# empty prompt fill the shorter of two texts, and weights are relative to it.
_Runs = dict[tuple[TextEncoder, int | None, tuple[tuple[int, ...], ...]], tuple[torch.Tensor, torch.Tensor | None]]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

if TYPE_CHECKING:
    # From its module: under its short name, type checkers see a class without methods.
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    class _Parent(DiffusionPipeline):
        """Any SDXL pipeline of Diffusers: the methods that this package calls and `DiffusionPipeline` lacks, or has
        without types."""

        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

        def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]: ...

        @classmethod
        def from_single_file(cls, pretrained_model_link_or_path: str | os.PathLike[str], **kwargs: Any) -> Self: ...

        @classmethod
        def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Self: ...

        @classmethod
        def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict[str, Any], ...]: ...

        def register_modules(self, **kwargs: Any) -> None: ...

        def maybe_free_model_hooks(self) -> None: ...

        def set_progress_bar_config(self, **kwargs: Any) -> None: ...

        def unload_lora_weights(self, *args: Any, **kwargs: Any) -> None: ...

else:
    _Parent = object


def one_at_a_time(
    method: Callable[Concatenate[Any, Arguments], Result],
) -> Callable[Concatenate[Any, Arguments], Result]:
    """The method of a pipeline, for one thread at a time.

    Diffusers keeps the state of a call on the pipeline (guidance, steps), its scheduler (the current step) and its
    layers (a LoRA's scale). Pipelines that `from_pipe` makes of one another share the scheduler, so each scheduler has
    one lock. Pipelines with schedulers of their own draw at the same time.
    """

    @wraps(method)
    def wait(self: Any, /, *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with _locks_lock:
            lock = _locks.setdefault(self if self.scheduler is None else self.scheduler, RLock())
        with lock:
            return method(self, *args, **kwargs)

    return wait


@dataclass(frozen=True)
class _CallEncoder:
    """A text encoder during one call.

    Attributes:
        spec: the facts that a plan needs.
        model: the encoder.
        original: the original text encoder, for short prompts, and its position ids; None if there is none.
    """

    spec: EncoderSpec
    model: TextEncoder
    original: tuple[TextEncoder, torch.Tensor | None] | None


@dataclass(frozen=True)
class _Weighting:
    """The weights of a batch, and the states that they need.

    Attributes:
        emphasis: the effect of a weight.
        weights: weights of the tokens, (batch, windows · positions).
        positions: length of a window.
        empty: states of the empty prompt, (1, positions, dim); None where the effect needs none.
        weak_parts: the parts with weights below 1.
        without: states of each weak part's window without the part, (parts, positions, dim); None if there are none.
        shares: weights of whole windows, (batch, windows), as in compel's `.and()`; None if all are 1.
    """

    emphasis: Emphasis
    weights: torch.Tensor
    positions: int
    empty: torch.Tensor | None
    weak_parts: Sequence[WeakPart]
    without: torch.Tensor | None
    shares: torch.Tensor | None = None

    def apply(self, states: torch.Tensor) -> torch.Tensor:
        weighted = self._apply_to_tokens(states)
        if self.shares is None or self.empty is None:
            return weighted
        by_token = self.shares.repeat_interleave(self.positions, dim=1)
        return apply_weights(weighted, self.empty.repeat(1, self.shares.shape[1], 1), by_token)

    def _apply_to_tokens(self, states: torch.Tensor) -> torch.Tensor:
        by_window = self.weights.unflatten(1, (-1, self.positions))
        if self.emphasis in ("a1111", "a1111_no_norm") or self.empty is None:
            return multiply_states(states, by_window, restore_mean=self.emphasis == "a1111")
        weighted = apply_weights(states, self.empty.repeat(1, by_window.shape[1], 1), self.weights)
        if self.without is None:
            return weighted
        by_part = torch.stack([by_window[part.row, part.window] for part in self.weak_parts])
        return blend_without(weighted, self.weak_parts, apply_weights(self.without, self.empty, by_part))


@dataclass(frozen=True)
class _Encoded:
    """A batch after one encoder.

    Attributes:
        states: (batch, windows · positions, dim).
        as_stock: whether they are stock SDXL's states.
        pooled: (batch, pooled dim); None from an encoder that has no projection.
        weighting: None if all weights are 1.
    """

    states: torch.Tensor
    as_stock: bool
    pooled: torch.Tensor | None
    weighting: _Weighting | None

    def weighted(self) -> torch.Tensor:
        return self.states if self.weighting is None else self.weighting.apply(self.states)


class PromptEncodingMixin(_Parent):
    """The part of `LongPromptMixin` that encodes prompts."""

    @takes_options
    def describe_prompt(
        self,
        prompt: str | list[str],
        prompt_2: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        *,
        short_prompt_encoder: ShortPromptEncoder = AS_SET,
        overflow: Overflow = AS_SET,
        length_buckets: Sequence[int] | None = AS_SET,
        weighting: Weighting | None = AS_SET,
        emphasis: Emphasis = AS_SET,
        num_inference_steps: int | None = None,
    ) -> PromptPlan:
        """The plan of a prompt: the windows of each encoder, and the text that is cut. No encoder runs.

        Args:
            prompt, prompt_2, negative_prompt, negative_prompt_2, short_prompt_encoder, overflow, length_buckets,
                weighting, emphasis: as in a call of the pipeline.
            num_inference_steps: as in a call of the pipeline, whose prompts may have another text at each step.

        Returns:
            The plan; printed, it is a report.

        Raises:
            TypeError, ValueError: as in `encode_prompt`; or the pipeline has no text encoders.

        Examples:
            >>> from finelip_sdxl import FineLIPSDXLPipeline
            >>> pipe = FineLIPSDXLPipeline.from_pretrained("miniature")
            >>> plan = pipe.describe_prompt("a red square above a blue ring")
            >>> plan.windows, plan.positions, plan.cut
            (1, 77, ())
        """
        specs = [encoder.spec for encoder in self._call_encoders()]
        if not specs:
            raise ValueError("This pipeline has no text encoders to encode a prompt: pass embeddings to it.")
        prompts = self._prompt_batches(prompt, prompt_2)
        negatives = self._negative_batches(negative_prompt, negative_prompt_2, batch_size=len(prompts[0]))
        self._check_weighting(specs)
        given = {"num_inference_steps": num_inference_steps}
        check_numbers(given)
        texts = {"prompt": [*chain(*prompts)], "negative_prompt": [*chain(*negatives or ())]}
        steps = count_steps(self, given)[0] if has_several_texts(self, texts) else None
        return self._plan(specs, prompts, negatives, steps=steps)

    @takes_options
    @one_at_a_time
    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        prompt_2: str | list[str] | None = None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
        *,
        short_prompt_encoder: ShortPromptEncoder = AS_SET,
        hidden_states: HiddenStates = AS_SET,
        overflow: Overflow = AS_SET,
        length_buckets: Sequence[int] | None = AS_SET,
        weighting: Weighting | None = AS_SET,
        emphasis: Emphasis = AS_SET,
        conditioning_adapter_scale: float = AS_SET,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        """Encode prompts of any length. The arguments are the parent's, and the options as in a call of the pipeline.

        With `weighting`, the states of weighted tokens change as `emphasis` says, see
        `finelip_sdxl.prompts.weighting`. Each encoder's states are weighted by themselves. This is the last step, since
        the conditioning adapter was trained on states without weights. Pooled vectors have no weights.

        Returns:
            Prompt, negative prompt, pooled prompt, pooled negative prompt. The first two are the hidden states of both
            encoders, (batch · images, windows · positions, dim); the pooled vectors, (batch · images, pooled dim), come
            from the first window. Both negatives are None without classifier-free guidance.

        Raises:
            TypeError: a prompt is not a string or a list of strings; or an argument has an unknown name.
            ValueError: an empty list; batches of different sizes; a text of more than 20,000 characters, or of more
                windows than `finelip_sdxl.options.MAX_POSITIONS` allows; a prompt with a schedule or `AND`, which only
                a call draws; a text that does not fit, where `overflow="error"` or embeddings passed beside it fix the
                length; weights that `parse_weights` refuses; a `clip_skip` beyond an encoder's layers; fewer than one
                image; or embeddings of other shapes.
        """
        embeddings, _ = self._encode_prompt(
            prompt,
            prompt_2,
            device,
            num_images_per_prompt,
            do_classifier_free_guidance,
            negative_prompt,
            negative_prompt_2,
            prompt_embeds,
            negative_prompt_embeds,
            pooled_prompt_embeds,
            negative_pooled_prompt_embeds,
            lora_scale,
            clip_skip,
        )
        prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds = embeddings
        # By name, as in stock: Diffusers' own tests take the names of the results from this line.
        return prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds

    @takes_options
    @one_at_a_time
    @torch.no_grad()
    def encode(
        self,
        prompt: str | list[str],
        prompt_2: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        *,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
        short_prompt_encoder: ShortPromptEncoder = AS_SET,
        hidden_states: HiddenStates = AS_SET,
        overflow: Overflow = AS_SET,
        length_buckets: Sequence[int] | None = AS_SET,
        weighting: Weighting | None = AS_SET,
        emphasis: Emphasis = AS_SET,
        conditioning_adapter_scale: float = AS_SET,
    ) -> Conditioning:
        """Encode prompts, to keep in a file or to draw from several times: `pipe(**pipe.encode(prompt))`.

        With model offloading, the text encoders leave the device afterward. They may also be set to None.

        Args:
            prompt, prompt_2, negative_prompt, negative_prompt_2, clip_skip: as in a call of the pipeline.
            lora_scale: as in `encode_prompt`.
            short_prompt_encoder, hidden_states, overflow, length_buckets, weighting, emphasis,
                conditioning_adapter_scale: as in a call of the pipeline.

        Returns:
            The conditioning of pictures with and without guidance, with the report of `describe_prompt`.

        Raises:
            TypeError, ValueError: as in `encode_prompt`; or the pipeline has no text encoders.
        """
        if not self._encoders():
            raise ValueError("This pipeline has no text encoders to encode a prompt: load one with text encoders.")
        embeddings, plan = self._encode_prompt(
            prompt,
            prompt_2,
            negative_prompt=negative_prompt,
            negative_prompt_2=negative_prompt_2,
            lora_scale=lora_scale,
            clip_skip=clip_skip,
        )
        self.maybe_free_model_hooks()
        if plan is None:  # encoders of 77 positions: the parent has encoded
            plan = self.describe_prompt(prompt, prompt_2, negative_prompt, negative_prompt_2)
        return Conditioning(
            **dict(zip(EMBEDDINGS, embeddings, strict=True)),
            prompts=tuple(check_texts("prompt", prompt)),
            negative_prompts=() if negative_prompt is None else tuple(check_texts("negative_prompt", negative_prompt)),
            report=str(plan),
            encoder_fingerprint=self._fingerprint(),
        )

    def _fingerprint(self) -> str:
        """The fingerprint of all that encodes a prompt; empty without text encoders."""
        encoders = [getattr(self, name) for name, _ in self._encoders()]
        return fingerprint([*encoders, self.conditioning_adapter]) if encoders else ""

    def _check_fingerprint(self, given: str | None) -> None:
        own = self._fingerprint() if given else ""
        if own and own != given:
            raise ValueError(
                f"These embeddings are from text encoders with the fingerprint {given!s:.60}, but this pipeline's have"
                f" {own}: encode the prompt with this pipeline, load the other encoders, or set `text_encoder` and"
                " `text_encoder_2` to None."
            )

    def _encode_prompt(
        self,
        prompt: str | list[str] | None,
        prompt_2: str | list[str] | None = None,
        device: torch.device | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[tuple[Any, Any, Any, Any], PromptPlan | None]:
        """The results of `encode_prompt`, and the plan; None if the parent encoded, or there were no texts."""
        given = {
            "prompt_embeds": prompt_embeds,
            "negative_prompt_embeds": negative_prompt_embeds,
            "pooled_prompt_embeds": pooled_prompt_embeds,
            "negative_pooled_prompt_embeds": negative_pooled_prompt_embeds,
        }
        self._check_embeddings(**given)
        plan, encoded = None, dict[str, Any]()
        images = num_images_per_prompt
        if not isinstance(images, int) or isinstance(images, bool) or images < 1:
            raise ValueError(f"`num_images_per_prompt` is {images!r:.60}; expected a whole number of at least 1.")
        encoders = self._call_encoders()
        specs = [encoder.spec for encoder in encoders]
        if prompt_embeds is None:
            self._check_weighting(specs)
            self._check_clip_skip(clip_skip)
        if _any_long(specs):
            prompts, negatives, shape = None, None, None
            if prompt_embeds is None:
                prompts = self._prompt_batches(prompt, prompt_2)
                if do_classifier_free_guidance:
                    shape = _shape_of("negative_prompt_embeds", negative_prompt_embeds, specs)
                if any(not "".join(texts).strip() for texts in zip(*prompts, strict=True)):
                    logger.warning("`prompt` is empty, so no text guides the picture.")
            if do_classifier_free_guidance and negative_prompt_embeds is None:
                batch_size = len(prompts[0] if prompts else prompt_embeds)  # type: ignore[arg-type]
                negatives = self._negative_batches(negative_prompt, negative_prompt_2, batch_size)
                shape = None if negatives is None else _shape_of("prompt_embeds", prompt_embeds, specs)

            if prompts or negatives:
                plan = self._plan(specs, prompts, negatives, shape, self._steps(prompts, negatives))
                note_plan(self, plan)
                if plan.cut:
                    lost = dict.fromkeys(f"{cut.role}: {cut.cut_text}" for cut in plan.cut)
                    logger.warning("Cut and not encoded, %s", "; ".join(lost))
                loras = dict.fromkeys(str(lora) for part in plan.plans for lora in part.loras)
                if loras and option_in_force(self, "lora_dir", None) is None:
                    logger.warning(
                        "Left out, not encoded and not loaded: %s. Pass lora_dir= with the folder of these LoRAs to a"
                        " call, or load them by load_lora_weights.",
                        " ".join(loras),
                    )
                with self._scaled_lora(lora_scale):
                    encode = self._encode_each if plan.schedule else self._encode
                    runs: _Runs = {}
                    found: dict[str, Any] = {}
                    if prompts:
                        found["prompt_embeds"], found["pooled_prompt_embeds"] = encode(
                            encoders, plan.prompts, plan.windows, clip_skip, runs
                        )
                    if negatives:  # stock does not apply clip_skip to them
                        found["negative_prompt_embeds"], found["negative_pooled_prompt_embeds"] = encode(
                            encoders, plan.negative_prompts, plan.windows, clip_skip=None, runs=runs
                        )
                encoded = {name: value for name, value in found.items() if given[name] is None}
                prompt = prompt_2 = lora_scale = clip_skip = None

        def finished(embeddings: Mapping[str, Any]) -> tuple[Any, Any, Any, Any]:
            # The parent does the rest: zeros for an absent negative, dtype, copies. It encodes with encoders of 77
            # itself.
            return super(PromptEncodingMixin, self).encode_prompt(
                prompt,
                prompt_2,
                device,
                num_images_per_prompt,
                do_classifier_free_guidance,
                negative_prompt,
                negative_prompt_2,
                **{**given, **embeddings},
                lora_scale=lora_scale,
                **({} if clip_skip is None else {"clip_skip": clip_skip}),  # not every parent has it
            )

        if plan is None or not plan.schedule:
            return finished(encoded), plan
        schedule = plan.schedule

        def finished_part(number: int, part: int) -> tuple[Any, Any, Any, Any]:
            rows = schedule[number].prompts
            if plan.is_conjunction:  # where a prompt has fewer parts, its first stands in, with weight 0
                rows = tuple((Share(row[part if part < len(row) else 0].text),) for row in rows)
            of_name = dict(zip(EMBEDDINGS, (rows, schedule[number].negative_prompts) * 2, strict=True))
            return finished({name: _mixed(value, of_name[name]) for name, value in encoded.items()})

        drawing = drawing_of(self)
        return finished_part(0, 0) if drawing is None else drawing.begin(self, plan, finished_part), plan

    def _steps(self, prompts: list[list[str]] | None, negatives: list[list[str]] | None) -> int | None:
        """The steps of the call that draws prompts with a schedule; None if there is no schedule."""
        drawing = drawing_of(self)
        if drawing is not None and not drawing.is_planned:
            return drawing.steps
        texts = {"prompt": [*chain(*prompts or ())], "negative_prompt": [*chain(*negatives or ())]}
        if has_several_texts(self, texts):
            raise ValueError(
                "The prompt changes while a picture is drawn, as [a:b:0.5] and [a|b] do, or has parts joined by AND, so"
                " that it cannot be encoded beforehand: pass it to a call of the pipeline, or take this out of it."
            )
        return None

    def _encoders(self) -> list[tuple[str, CLIPTokenizer]]:
        """Name and tokenizer of each text encoder, in stock's pairs: without a first tokenizer or encoder (the refiner
        has neither), the prompt goes to the second."""
        tokenizers = [self.tokenizer, self.tokenizer_2] if self.tokenizer is not None else [self.tokenizer_2]
        names = list(ENCODERS) if self.text_encoder is not None else ["text_encoder_2"]
        pairs = zip(names, tokenizers, strict=False)
        return [
            (name, tokenizer) for name, tokenizer in pairs if tokenizer is not None and getattr(self, name) is not None
        ]

    def _call_encoders(self) -> list[_CallEncoder]:
        """The text encoders at the start of a call, in the order of `_encoders`."""
        encoders = []
        for name, tokenizer in self._encoders():
            model, original = getattr(self, name), self._original_encoder(name)
            spec = EncoderSpec(
                name,
                tokenizer,
                positions=min(num_positions(model), tokenizer.model_max_length),
                has_stock=original is not None,
                expand=partial(self.maybe_convert_prompt, tokenizer=_without_state(tokenizer))
                if _has_added_tokens(tokenizer)
                else None,
            )
            encoders.append(_CallEncoder(spec, model, original))
        return encoders

    def _has_long_encoders(self) -> bool:
        return _any_long([encoder.spec for encoder in self._call_encoders()])

    def _check_weighting(self, specs: Sequence[EncoderSpec]) -> None:
        if self.weighting is not None and not _any_long(specs):
            raise ValueError(
                f"weighting={self.weighting!r} needs text encoders of 248 positions: call swap_text_encoders() first."
            )

    def _check_clip_skip(self, clip_skip: object) -> None:
        if clip_skip is None:
            return
        most = min((getattr(self, name).config.num_hidden_layers for name, _ in self._encoders()), default=1) - 1
        if not isinstance(clip_skip, int) or isinstance(clip_skip, bool) or not 0 <= clip_skip <= most:
            raise ValueError(
                f"`clip_skip` is {clip_skip!r:.60}; expected a whole number of layers from 0 to {most} (the text"
                " encoders' layers before the penultimate states), or None."
            )

    def _check_embeddings(self, **given: Any) -> None:
        """Check that embeddings, passed by the names of their arguments, have shapes that the UNet takes.

        Raises:
            ValueError: one is no tensor of floats, (batch, tokens, dim) or, pooled, (batch, dim); or batches differ.
        """
        tensors = {name: value for name, value in given.items() if value is not None}
        for name, value in tensors.items():
            shape = "(batch, dim)" if "pooled" in name else "(batch, tokens, dim)"
            if not (
                isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim == shape.count(",") + 1
            ):
                is_tensor = isinstance(value, torch.Tensor)
                found = f"{value.dtype} of shape {tuple(value.shape)}" if is_tensor else type(value).__name__
                raise ValueError(f"`{name}` must be a tensor of floats, {shape}, but is {found}.")
            if 0 in value.shape:
                raise ValueError(f"`{name}` is empty: its shape is {tuple(value.shape)}.")
            if "pooled" in name:
                dim = None if self.text_encoder_2 is None else self.text_encoder_2.config.projection_dim
            else:
                dim = None if self.unet is None else self.unet.config.cross_attention_dim
            if isinstance(dim, int) and value.shape[-1] != dim:
                raise ValueError(f"`{name}` are {value.shape[-1]} wide, but this SDXL takes {dim}: pass its own.")
        for texts, pooled in (EMBEDDINGS[::2], EMBEDDINGS[1::2]):
            if texts in tensors and pooled in tensors and len(tensors[texts]) != len(tensors[pooled]):
                raise ValueError(
                    f"`{texts}` are {len(tensors[texts])} and `{pooled}` {len(tensors[pooled])}: pass as many of both."
                )

    def _prompt_batches(self, prompt: Any, prompt_2: Any) -> list[list[str]]:
        return self._batches(check_texts("prompt", prompt), "prompt_2", prompt_2)

    def _negative_batches(
        self, negative_prompt: Any, negative_prompt_2: Any, batch_size: int
    ) -> list[list[str]] | None:
        """The negative prompts of each encoder; None where stock uses zeros instead."""
        if negative_prompt is None and self.config["force_zeros_for_empty_prompt"]:
            return None
        texts = check_texts("negative_prompt", "" if negative_prompt is None else negative_prompt)
        if negative_prompt is None or isinstance(negative_prompt, str):
            texts = texts * batch_size
        if isinstance(negative_prompt_2, str) and negative_prompt_2:
            negative_prompt_2 = [negative_prompt_2] * batch_size
        if len(texts) != batch_size:
            raise ValueError(
                f"`negative_prompt` holds {len(texts)} texts and `prompt` {batch_size}: pass as many, or one string."
            )
        return self._batches(texts, "negative_prompt_2", negative_prompt_2)

    def _batches(self, texts: list[str], name_2: str, value_2: Any) -> list[list[str]]:
        """The texts of each encoder."""
        is_absent = value_2 is None or (isinstance(value_2, str) and not value_2)  # as in stock
        texts_2 = texts if is_absent else check_texts(name_2, value_2)
        if len(texts_2) != len(texts):
            raise ValueError(
                f"`{name_2}` holds {len(texts_2)} texts and `{name_2[:-2]}` {len(texts)}: pass as many of both."
            )
        return [batch for batch, _ in zip((texts, texts_2), self._encoders(), strict=False)]

    # Plan, encode, adapt

    def _plan(
        self,
        specs: Sequence[EncoderSpec],
        prompts: list[list[str]] | None,
        negatives: list[list[str]] | None,
        shape: tuple[int, int] | None = None,
        steps: int | None = None,
    ) -> PromptPlan:
        if not _any_long(specs):  # the parent encodes: one window, the rest cut
            return plan_prompts(specs, prompts, negatives, overflow="truncate", length_buckets=())
        return plan_prompts(
            specs,
            prompts,
            negatives,
            short_prompt_encoder=self.short_prompt_encoder,
            overflow=self.overflow,
            length_buckets=self.length_buckets,
            weighting=self.weighting,
            emphasis=self.emphasis,
            shape=shape,
            steps=steps,
        )

    def _encode_each(
        self,
        encoders: Sequence[_CallEncoder],
        plans: Mapping[str, Sequence[EncoderPlan]],
        windows: int,
        clip_skip: int | None,
        runs: _Runs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `_encode`, one text after the other: so many at once would take much memory."""
        texts = [dict(zip(plans, zip(texts), strict=True)) for texts in zip(*plans.values(), strict=True)]
        each = [self._encode(encoders, text, windows, clip_skip, runs) for text in texts]
        pooled = [vector for _, vector in each if vector is not None]
        return torch.cat([states for states, _ in each]), torch.cat(pooled) if pooled else None

    def _encode(
        self,
        encoders: Sequence[_CallEncoder],
        plans: Mapping[str, Sequence[EncoderPlan]],
        windows: int,
        clip_skip: int | None,
        runs: _Runs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states (batch, windows · positions, dim of both encoders) and pooled vector (batch, pooled dim)."""
        encoded = [
            self._encode_by(encoder, plans[encoder.spec.encoder], windows, clip_skip, runs) for encoder in encoders
        ]
        pooled = next((part.pooled for part in encoded if part.pooled is not None), None)
        if self.conditioning_adapter is not None and not all(part.as_stock for part in encoded):
            encoded, pooled = self._adapt(encoded, pooled, clip_skip)
        # The adapter was trained on states without weights, so weights come last.
        return torch.cat([part.weighted() for part in encoded], dim=-1), pooled

    def _encode_by(
        self, encoder: _CallEncoder, plans: Sequence[EncoderPlan], windows: int, clip_skip: int | None, runs: _Runs
    ) -> _Encoded:
        """The states and pooled vector of a batch from one encoder, and its weights."""
        tokenizer, as_stock, positions = encoder.spec.tokenizer, plans[0].as_stock, plans[0].positions
        original = encoder.original if as_stock else None
        model, position_ids = original or (encoder.model, None)
        device = get_module_execution_device(model)
        run = partial(model, position_ids=position_ids, output_hidden_states=True)

        def encode(ids: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor | None]:
            """States and pooled vector of one window of each text."""
            key = model, clip_skip, tuple(map(tuple, ids))
            if key not in runs:
                with _ending_at(model, tokenizer.eos_token_id, plans):
                    output = run(torch.tensor(ids, device=device))
                runs[key] = self._states(output, as_stock, clip_skip), output[0] if output[0].ndim == 2 else None
            return runs[key]

        token_ids = padded_token_ids(plans, tokenizer, windows)
        by_window = [encode(window) for window in zip(*token_ids, strict=True)]
        states, pooled = [states for states, _ in by_window], by_window[0][1]

        weighting, rows, shares = None, padded_weights(plans, windows), padded_shares(plans, windows)
        if rows is not None or shares is not None:
            rows = rows or [[1.0] * windows * positions for _ in plans]
            empty = None
            if self.emphasis in ("compel", "comfyui") or shares is not None:
                empty, _ = encode([empty_row(tokenizer, positions)])
            parts = weak_parts(rows, positions) if self.emphasis == "compel" else []
            without = []
            for part in parts:
                mask = torch.ones(1, positions, dtype=torch.long, device=device)
                mask[:, part.first : part.stop] = 0
                output = run(torch.tensor([token_ids[part.row][part.window]], device=device), attention_mask=mask)
                without.append(self._states(output, as_stock, clip_skip))
            weights = torch.tensor(rows, device=device)
            missing = torch.cat(without) if without else None
            of_windows = None if shares is None else torch.tensor(shares, device=device)
            weighting = _Weighting(self.emphasis, weights, positions, empty, parts, missing, of_windows)
        self._free_original(model)
        return _Encoded(torch.cat(states, dim=1), as_stock, pooled, weighting)

    def _adapt(
        self, encoded: list[_Encoded], pooled: torch.Tensor | None, clip_skip: int | None
    ) -> tuple[list[_Encoded], torch.Tensor | None]:
        """States and pooled vector after the conditioning adapter; an encoder's part stays if encoded as stock does."""
        if self.hidden_states != "penultimate" or clip_skip is not None:
            self._warn_once("The conditioning adapter takes penultimate states only, so it is left out.")
            return encoded, pooled
        scale = self.conditioning_adapter_scale
        if scale == 0:
            return encoded, pooled

        def adapted(states: Sequence[torch.Tensor | None]) -> Sequence[Any]:
            return states if all(part is None for part in states) else self.conditioning_adapter(states, None, scale)[0]

        # The pooled vector is the last encoder's.
        own_pooled = None if encoded[-1].as_stock else pooled
        states, adapted_pooled = self.conditioning_adapter(
            [None if part.as_stock else part.states for part in encoded], own_pooled, scale
        )
        weightings = [None if part.as_stock else part.weighting for part in encoded]
        empties = adapted([None if weighting is None else weighting.empty for weighting in weightings])
        withouts = adapted([None if weighting is None else weighting.without for weighting in weightings])
        new_weightings = [
            None if weighting is None else replace(weighting, empty=empty, without=without)
            for weighting, empty, without in zip(weightings, empties, withouts, strict=True)
        ]
        parts = [
            part if part.as_stock else replace(part, states=new, weighting=weighting)
            for part, new, weighting in zip(encoded, states, new_weightings, strict=True)
        ]
        return parts, pooled if adapted_pooled is None else adapted_pooled

    def _states(self, output: Any, as_stock: bool, clip_skip: int | None) -> torch.Tensor:
        if self.hidden_states == "penultimate" or as_stock:
            states: torch.Tensor = output.hidden_states[-2 if clip_skip is None else -(clip_skip + 2)]
            return states
        if clip_skip is not None:
            raise ValueError(
                f'clip_skip={clip_skip} counts back from the penultimate states, but hidden_states="last" takes the'
                ' last ones: leave out clip_skip, or set hidden_states="penultimate".'
            )
        last: torch.Tensor = output.last_hidden_state
        return last

    def _original_encoder(self, name: str) -> tuple[TextEncoder, torch.Tensor | None] | None:
        """The original text encoder, which encodes short prompts as stock does, and its position ids; None if none."""
        encoder, held = getattr(self, name), getattr(self, f"stock_{name}")
        if held is not None and _is_stock(held):
            if not _was_extended(encoder, held):
                return held, _stock_position_ids(held)
            self._warn_once(
                f"{name} has a LoRA or added tokens that stock_{name} lacks, so {name} encodes short prompts as well."
            )
        return (encoder, _stock_position_ids(encoder)) if _is_stock(encoder) else None

    def _warn_once(self, sentence: str) -> None:
        if sentence not in self._said:
            self._said.add(sentence)
            logger.warning(sentence)

    def _free_original(self, encoder: TextEncoder) -> None:
        # Model offloading frees a model when the next one in a fixed order runs. The original encoder runs in another's
        # place, so the order does not free it.
        for hook in getattr(self, "_all_hooks", []):
            if hook.model is encoder and encoder in (self.stock_text_encoder, self.stock_text_encoder_2):
                hook.offload()

    @contextmanager
    def _scaled_lora(self, scale: float | None) -> Iterator[None]:
        """Set the LoRA scale of a call, and undo it afterward, as the parent does around its own encoding."""
        if scale is None or not USE_PEFT_BACKEND:
            yield
            return
        encoders = [getattr(self, name) for name, _ in self._encoders()]
        for encoder in encoders:
            scale_lora_layers(encoder, scale)
        try:
            yield
        finally:
            for encoder in encoders:
                unscale_lora_layers(encoder, scale)


def _mixed(texts: torch.Tensor | None, rows: Rows) -> torch.Tensor | None:
    """The embeddings of each row, mixed from its shares of texts: (texts, …) to (rows, …)."""
    if texts is None:
        return None
    # A whole share changes no bit.
    mixed = [
        sum((share.weight * texts[share.text] for share in row[1:]), row[0].weight * texts[row[0].text])
        if len(row) > 1
        else texts[row[0].text]
        for row in rows
    ]
    return torch.stack(mixed)


def _any_long(specs: Sequence[EncoderSpec]) -> bool:
    """Whether one of the encoders has more than stock's 77 positions."""
    return any(spec.positions > STOCK_POSITIONS for spec in specs)


def _shape_of(name: str, embeds: torch.Tensor | None, specs: Sequence[EncoderSpec]) -> tuple[int, int] | None:
    """(windows, positions) of embeddings that were passed in; a text beside them must match these."""
    if embeds is None:
        return None
    length, capacity = embeds.shape[1], min(spec.positions for spec in specs)
    if length > capacity and length % capacity:
        raise ValueError(
            f"`{name}` are {length} positions long, but a text beside them is encoded to at most {capacity} or a"
            " multiple of it: pass embeddings for both."
        )
    return (1, length) if length <= capacity else (length // capacity, capacity)


def _is_stock(encoder: TextEncoder) -> bool:
    """Whether an encoder's weights are stock's, with or without a stretched table."""
    return Provenance.of(encoder.config).is_stock(num_positions(encoder))


def _stock_position_ids(encoder: TextEncoder) -> torch.Tensor | None:
    """Positions (1, 77) of the stock table's unchanged rows in a stretched table; None if nothing is stretched."""
    rows = Provenance.of(encoder.config).original_row_indices()
    if rows is None or num_positions(encoder) <= STOCK_POSITIONS:
        return None
    return rows[None].to(get_module_execution_device(encoder))


def _was_extended(encoder: TextEncoder, held: TextEncoder) -> bool:
    """Whether `encoder` has a LoRA or new tokens that `held` lacks."""
    if getattr(encoder.config, "has_fused_lora", False):
        return True
    if encoder.get_input_embeddings().num_embeddings != held.get_input_embeddings().num_embeddings:
        return True
    return any(hasattr(module, "base_layer") for module in encoder.modules())


@contextmanager
def _ending_at(encoder: TextEncoder, end: int, plans: Sequence[EncoderPlan]) -> Iterator[None]:
    """Let an encoder pool at the end token in texts with a textual inversion, too.

    SDXL's configs have the old value `eos_token_id=2`, under which an encoder takes the largest id for the end token.
    The tokens of an inversion have larger ids. Without an inversion, nothing changes.
    """
    tower = getattr(encoder, "text_model", encoder)
    before = tower.eos_token_id
    if any(token > end for plan in plans for window in plan.windows for token in window.token_ids):
        tower.eos_token_id = end
    try:
        yield
    finally:
        tower.eos_token_id = before


def _has_added_tokens(tokenizer: CLIPTokenizer) -> bool:
    """Whether a prompt may hold a textual inversion, which Diffusers must look up."""
    return not tokenizer.get_added_vocab().keys() <= set(tokenizer.all_special_tokens)


def _without_state(tokenizer: CLIPTokenizer) -> Any:
    """The part of a tokenizer that Diffusers needs to look for textual inversions; no truncation or padding is set."""
    return SimpleNamespace(
        tokenize=lambda text: tokenizer.convert_ids_to_tokens(tokenize(tokenizer, text)[0]),
        added_tokens_encoder=tokenizer.added_tokens_encoder,
    )
