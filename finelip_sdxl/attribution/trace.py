"""`trace_attention`: heat maps of a drawn picture, for every phrase of its prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from finelip_sdxl.attribution.overlays import overlay
from finelip_sdxl.attribution.phrases import UNITS, TokenPlaces, Unit, split_phrases
from finelip_sdxl.attribution.sums import AttentionSums, not_summing
from finelip_sdxl.options import check_choice
from finelip_sdxl.prompts.plan import PromptPlan
from finelip_sdxl.prompts.weighting import parse_weights

_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")


@dataclass(frozen=True)
class Phrase:
    """A phrase of a prompt, and its effect on the picture.

    Attributes:
        text: the phrase.
        start, end: its first and one past its last character in `AttentionTrace.text`.
        strength: its share of the attention that all phrases get, where this share weighs most; from 0 to 1.
        equal: the share that it would have if all phrases got equally much.
        x, y: the place where it acted most, as shares of the picture's width and height; None if it is not encoded.
    """

    text: str
    start: int
    end: int
    strength: float
    equal: float
    x: float | None
    y: float | None

    @property
    def is_encoded(self) -> bool:
        """Whether any of its tokens reached the UNet. A cut phrase did not."""
        return self.x is not None

    @property
    def is_ignored(self) -> bool:
        """Whether it acted nowhere: even where it acted most it got less than an equal share, or it is cut."""
        return self.strength < self.equal or not self.is_encoded

    @property
    def place(self) -> str:
        """The place where it acted most in words, such as `"top left"`; empty if it is not encoded."""
        if self.x is None or self.y is None:
            return ""
        row, column = _ROWS[min(2, int(3 * self.y))], _COLUMNS[min(2, int(3 * self.x))]
        return "center" if (row, column) == ("middle", "center") else f"{row} {column}"


@contextmanager
def trace_attention(pipe: Any, plan: PromptPlan | None = None) -> Iterator[AttentionTrace]:
    """Within this context, note where in the picture each part of the prompt acts, while a pipeline draws.

    The maps are the UNet's cross-attention from the picture's places to the prompt's tokens, averaged over heads,
    layers and steps. With guidance, only the half with the prompt counts. The pictures stay the same. The sums take
    (positions) · (places) · 4 bytes for each picture, and no more with more steps: 5 MB at 1024 pixels and 248
    positions.

    Args:
        pipe: a pipeline of this package, on any device. Its UNet must not be compiled. A refiner has a
            trace of its own.
        plan: the plan of the prompts, for calls that get embeddings in place of prompts: `pipe.describe_prompt` of the
            same texts and options. By default the plan of each call's own prompts.

    Returns:
        The trace of the last call within the context; it can also be asked afterward.

    Raises:
        TypeError: `pipe` is no pipeline of this package, or `plan` no plan.
        ValueError: `plan` is of several texts for one picture.

    A call of the pipeline raises:
        ValueError: the UNet is compiled, or the prompt is drawn with several texts, by a schedule, `AND` or `.blend()`.

    Source: DAAM (arXiv 2210.04885), which averages the maps of a word's tokens. Here a phrase's map is that of its last
    token, since CLIP's text encoders are causal, and phrases are held against one another.

    Examples:
        >>> from finelip_sdxl import FineLIPSDXLPipeline, trace_attention
        >>> pipe = FineLIPSDXLPipeline.from_pretrained("miniature")
        >>> pipe.set_progress_bar_config(disable=True)
        >>> prompt = "A red star is in the top left. A blue ring is in the bottom right."
        >>> with trace_attention(pipe) as trace:
        ...     image = pipe(prompt, num_inference_steps=8, generator=torch.Generator().manual_seed(0)).images[0]
        >>> [phrase.place for phrase in trace.phrases()]
        ['top left', 'bottom right']
        >>> trace.heat_map("A red star is in the top left.").shape == (image.height, image.width)
        True
    """
    if not hasattr(pipe, "describe_prompt"):
        raise TypeError(
            f"trace_attention takes a pipeline of this package, but got {type(pipe).__name__}: make one with"
            " FineLIPSDXLPipeline.from_pipe."
        )
    if not isinstance(plan, PromptPlan | None):
        raise TypeError(f"`plan` is {plan!r:.60}; expected the plan that `pipe.describe_prompt` returns, or none.")
    if plan is not None:
        _check_one_text(plan)
    trace, before = AttentionTrace(plan), _traces.get(pipe)
    _traces[pipe] = trace
    try:
        yield trace
    finally:
        del _traces[pipe]
        if before is not None:
            _traces[pipe] = before


class AttentionTrace:
    """Heat maps of the last call within `trace_attention`.

    Its methods raise:
        ValueError: nothing was drawn yet; the call got embeddings, and no `plan` was passed; or a phrase, range or
            number of a picture is not there.
    """

    def __init__(self, plan: PromptPlan | None = None) -> None:
        self._given = plan
        self._plan: PromptPlan | None = None
        self._places: Mapping[str, Sequence[TokenPlaces]] = {}
        self._weights: dict[str, Any] = {"syntax": None}
        self._maps: torch.Tensor | None = None
        self._size = (0, 0)

    # The results

    def text(self, index: int = 0) -> str:
        """The prompt of a picture, as the first text encoder gets it: without the syntax of weights."""
        return self._text_places(index)[0].text

    def heat_map(
        self, phrase: str | tuple[int, int], index: int = 0, size: tuple[int, int] | None = None
    ) -> np.ndarray:
        """Where a phrase acted.

        The states of a phrase's last token know the whole phrase, so it is that token's map (with a mark behind it:
        that of the mark), times its share among the maps of the prompt's other phrases.

        Args:
            phrase: a part of the prompt, at its first place there; or its first and one past its last character in
                `text()`.
            index: number of the picture in the call's output.
            size: height and width of the map; by default those of the picture.

        Returns:
            Values from 0 to 1, (height, width), in float32; the largest is 1. All are 0 if the phrase is cut.
        """
        heat, _ = self._heat(*self._find(phrase, index))
        sized = F.interpolate(heat[None, None], size or self._size, mode="bicubic").clamp(min=0)[0, 0]
        scaled: np.ndarray = (sized / sized.max().clamp(min=torch.finfo().tiny)).numpy()
        return scaled

    def overlay(self, image: Image.Image, phrase: str | tuple[int, int], index: int = 0) -> Image.Image:
        """The picture with the places where a phrase acted in their own colors, and everything else faded.

        Args:
            image: the picture, in any size.
            phrase, index: as in `heat_map`.
        """
        return overlay(image, self.heat_map(phrase, index))

    def phrases(self, index: int = 0, unit: Unit | None = None) -> tuple[Phrase, ...]:
        """The phrases of a prompt, each with how strongly and where it acted, also those that acted nowhere.

        Args:
            index: number of the picture in the call's output.
            unit: `"sentence"` or `"clause"`. By default sentences, and the clauses of a prompt that is one sentence.
        """
        if unit is not None:
            check_choice("unit", unit, UNITS)
        text = self.text(index)
        spans = split_phrases(text, unit)
        return tuple(self._phrase(start, end, index, spans) for start, end in spans)

    def _phrase(self, start: int, end: int, index: int, spans: Sequence[tuple[int, int]]) -> Phrase:
        heat, share = self._heat(start, end, index, self._text_places(index)[0], spans)
        text, x, y, strength = self.text(index)[start:end], None, None, 0.0
        if heat.any():
            height, width = heat.shape
            row, column = divmod(int(heat.argmax()), width)
            x, y = (column + 0.5) / width, (row + 0.5) / height
            strength = float(share[row, column])
        return Phrase(text, start, end, strength, 1 / len(spans), x, y)

    def _heat(
        self,
        start: int,
        end: int,
        index: int,
        places: TokenPlaces,
        spans: Sequence[tuple[int, int]] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A phrase's map and its share among the maps of all phrases, both (height, width)."""
        maps = self._drawn()[index]
        position = places.last_position(start, end)
        if position is None:
            return torch.zeros(maps.shape[1:]), torch.zeros(maps.shape[1:])
        others = [
            other
            for first, last in (split_phrases(places.text) if spans is None else spans)
            if (last <= start or first >= end) and (other := places.last_position(first, last)) is not None
        ]
        own = maps[position]
        share = own / (own + maps[others].sum(dim=0)).clamp(min=torch.finfo().tiny)
        return own * share, share

    def _find(self, phrase: str | tuple[int, int], index: int) -> tuple[int, int, int, TokenPlaces]:
        """First and one past the last character of a phrase, the picture's number, and the text that the phrase is in:
        of the encoders' texts, which may differ (`prompt_2`), the first that holds it."""
        texts = self._text_places(index)
        if not isinstance(phrase, str):
            start, end = _check_range(phrase, len(texts[0].text))
            return start, end, index, texts[0]
        plain = parse_weights(phrase, **self._weights).text.strip()
        for places in texts if plain else ():
            start = places.text.find(plain)
            if start >= 0:
                return start, start + len(plain), index, places
        raise ValueError(f"The phrase {phrase!r:.60} is not in the prompt: pass a part of it as it was written.")

    def _text_places(self, index: int) -> list[TokenPlaces]:
        """The texts of a picture, of each encoder."""
        pictures = len(self._drawn())
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < pictures:
            raise ValueError(f"`index` is {index!r:.60}; expected the number of a picture, from 0 to {pictures - 1}.")
        return [texts[index * len(texts) // pictures] for texts in self._places.values()]

    def _drawn(self) -> torch.Tensor:
        """The maps of all pictures: (pictures, tokens, height, width)."""
        if self._maps is None:
            raise ValueError("Nothing is traced yet: call the pipeline within `with trace_attention(pipe)`.")
        if not self._places:
            raise ValueError(
                "The traced call got embeddings, which do not tell their prompt: pass its plan, as in"
                " `trace_attention(pipe, pipe.describe_prompt(prompt))`."
            )
        return self._maps

    # A call of the pipeline

    def _begin(self) -> None:
        self._plan, self._places, self._maps = self._given, {}, None

    def _note(self, plan: PromptPlan) -> None:
        _check_one_text(plan)
        self._plan = self._plan or plan

    def _finish(self, pipe: Any, sums: AttentionSums) -> None:
        self._maps, latents = sums.mean(), sums.latents
        if self._maps is None or latents is None:
            raise ValueError("The UNet has no cross-attention that could be traced: draw without `trace_attention`.")
        self._size = (latents[0] * pipe.vae_scale_factor, latents[1] * pipe.vae_scale_factor)
        self._weights = {"syntax": pipe.weighting, "emphasis": pipe.emphasis}
        if self._plan is None:
            return
        planned, drawn = self._plan.windows * self._plan.positions, self._maps.shape[1]
        texts, pictures = max(map(len, self._plan.prompts.values()), default=0), len(self._maps)
        if planned != drawn or not texts or pictures % texts:
            raise ValueError(
                f"The plan is of {texts} prompts in {planned} positions, but the call drew {pictures} pictures from"
                f" {drawn}: pass the plan of the same prompts and options."
            )
        tokenizers = {"text_encoder": pipe.tokenizer or pipe.tokenizer_2, "text_encoder_2": pipe.tokenizer_2}
        self._places = {
            encoder: [TokenPlaces.of(plan, tokenizers[encoder] or pipe.tokenizer) for plan in plans]
            for encoder, plans in self._plan.prompts.items()
        }


# The trace of each pipeline that is within `trace_attention` now.
_traces: WeakKeyDictionary[Any, AttentionTrace] = WeakKeyDictionary()


@contextmanager
def traced_call(pipe: Any, given: Mapping[str, Any]) -> Iterator[None]:
    """A call of a pipeline, which is traced within `trace_attention`.

    Args:
        pipe: the pipeline.
        given: the arguments of the call, by name.
    """
    trace = _traces.get(pipe)
    if trace is None:
        with not_summing():
            yield
        return
    trace._begin()
    sums = AttentionSums(lambda rows: conditional_rows(pipe, rows))
    with sums.summing(pipe.unet):
        yield
    if trace._plan is None and given.get("prompt") is not None:  # encoders of 77 positions: the parent has encoded
        trace._note(pipe.describe_prompt(given["prompt"], given.get("prompt_2")))
    trace._finish(pipe, sums)


def note_plan(pipe: Any, plan: PromptPlan) -> None:
    """Note the plan of the prompts that a call encodes, if it is traced."""
    trace = _traces.get(pipe)
    if trace is not None and plan.prompts:
        trace._note(plan)


def _check_one_text(plan: PromptPlan) -> None:
    if plan.schedule:
        raise ValueError(
            "Heat maps are of one text, but this prompt is drawn with several, by a schedule, AND or .blend(): draw it"
            " without heat maps, or write one text."
        )


def conditional_rows(pipe: Any, rows: int) -> slice:
    """The rows with the prompt, of those that go through the UNet: with guidance those of the negative prompt come
    first, and with perturbed-attention guidance the perturbed ones last."""
    is_guided = bool(pipe.do_classifier_free_guidance)
    pictures = rows // (1 + is_guided + bool(getattr(pipe, "do_perturbed_attention_guidance", False)))
    return slice(pictures, 2 * pictures) if is_guided else slice(0, pictures)


def _check_range(given: Any, length: int) -> tuple[int, int]:
    try:
        start, end = given
    except (TypeError, ValueError):
        start = end = None
    if not (type(start) is int and type(end) is int and 0 <= start < end <= length):
        raise ValueError(
            f"The range {given!r:.60} is no part of the prompt; expected its first and one past its last character,"
            f" from 0 to {length}."
        )
    return start, end
