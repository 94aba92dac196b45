"""The plan of a prompt for each text encoder: tokens, windows, padding, and the text that is cut.

Nothing here touches a model. `plan_prompts` decides everything that happens to a text before it is encoded. The
pipelines encode exactly this `PromptPlan`, and `describe_prompt` returns it: the report is the input of the encoders.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, pairwise
from typing import TYPE_CHECKING

from finelip_sdxl.options import (
    LENGTH_BUCKETS,
    MAX_POSITIONS,
    STOCK_POSITIONS,
    Emphasis,
    Overflow,
    ShortPromptEncoder,
    Weighting,
)
from finelip_sdxl.prompts.composition import ComposedText, Composition, Rows, compose
from finelip_sdxl.prompts.lora_tags import LoraTag
from finelip_sdxl.prompts.vocabulary import MINIATURE, name_tokens
from finelip_sdxl.prompts.weighting import WeightedText, parse_weights
from finelip_sdxl.prompts.windows import split_windows

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

PROMPT = "prompt"

NEGATIVE_PROMPT = "negative prompt"


@dataclass(frozen=True)
class EncoderSpec:
    """The facts of a text encoder that a plan needs.

    Attributes:
        encoder: its name in the pipeline, `"text_encoder"` or `"text_encoder_2"`.
        tokenizer: its `CLIPTokenizer`.
        positions: number of positions that it encodes at once, start and end token included.
        has_stock: whether it can encode a short prompt as stock SDXL does.
        expand: a function that changes a text before it is tokenized, for example replaces the first token of a
            textual inversion by all its tokens.
    """

    encoder: str
    tokenizer: CLIPTokenizer
    positions: int
    has_stock: bool = False
    expand: Callable[[str], str] | None = None


@dataclass(frozen=True)
class Window:
    """The text that is encoded at once: an exact slice of the prompt, and its tokens without start and end token."""

    text: str
    token_ids: tuple[int, ...] = field(default=(), repr=False)
    weights: tuple[float, ...] = field(default=(), repr=False)  # weights of the tokens; empty if all are 1
    share: float = field(default=1.0, repr=False)  # the weight of all of it, as in compel's `.and()`

    @property
    def tokens(self) -> int:
        """Number of tokens, start and end token included."""
        return len(self.token_ids) + 2

    def __str__(self) -> str:
        weighted = f", {sum(weight != 1 for weight in self.weights)} of them weighted" if self.weights else ""
        share = f", all with weight {self.share:.3g}" if self.share != 1 else ""
        return f"{self.tokens} tokens{weighted}{share}: {_quoted(self.text)}"


@dataclass(frozen=True)
class EncoderPlan:
    """The plan of one text for one encoder.

    Attributes:
        encoder: the encoder's name in the pipeline.
        role: `"prompt"` or `"negative prompt"`.
        index: place of the prompt in its batch.
        label: the part of the prompt that the text is, and the steps that it is drawn with, where it is not all of it.
        windows: the windows that are encoded, in order.
        positions: the length to which each window is padded.
        as_stock: whether the text is encoded as stock SDXL does.
        cut_text: the part of the text that is not encoded; empty if nothing is cut.
        cut_tokens: number of tokens of that part.
        vocabulary: whose tokens are counted, such as `"SDXL's tokens"`; see `finelip_sdxl.prompts.vocabulary`.
        loras: the LoRAs that the text names; they are not encoded.
        unread: for each syntax that is not read, its name and the parts of the text that would be weights with it.
    """

    encoder: str
    role: str
    index: int
    windows: tuple[Window, ...]
    positions: int
    as_stock: bool = False
    cut_text: str = ""
    cut_tokens: int = 0
    vocabulary: str = ""
    loras: tuple[LoraTag, ...] = ()
    label: str = ""
    unread: tuple[tuple[Weighting, tuple[str, ...]], ...] = ()

    @property
    def title(self) -> str:
        """Its role and its label."""
        return f"{self.role}, {self.label}" if self.label else self.role

    @property
    def tokens(self) -> int:
        """Number of tokens that are encoded, the start and end token of every window included."""
        return sum(window.tokens for window in self.windows)

    def __str__(self) -> str:
        return "\n".join([f"{self.encoder} encodes {self.title}: {self._body()}", *counted_in([self])])

    def _body(self) -> str:
        windows = "1 window" if len(self.windows) == 1 else f"{len(self.windows)} windows"
        stock = "the stock miniature" if self.vocabulary == MINIATURE else "stock SDXL"
        how = f", as {stock} encodes it" if self.as_stock else ""
        cut = f"; {self.cut_tokens} tokens are CUT" if self.cut_tokens else "; nothing is cut"
        lines = [f"{self.tokens} tokens in {windows} of {self.positions} positions{how}{cut}"]
        lines += [f"  window {number}, {window}" for number, window in enumerate(self.windows, start=1)]
        if self.cut_tokens:
            lines.append(f"  cut, {self.cut_tokens} tokens: {_quoted(self.cut_text)}")
        if self.loras:
            lines.append(f"  LoRAs, not encoded: {' '.join(map(str, self.loras))}")
        for syntax, parts in self.unread:
            lines.append(f'  plain text, no weights without weighting="{syntax}": {" ".join(parts)}')
        return "\n".join(lines)


@dataclass(frozen=True)
class Stage:
    """Steps that are drawn with the same texts.

    Attributes:
        last: the last of the steps.
        prompts, negative_prompts: for each prompt of the batch the numbers and weights of its texts in the plan; empty
            if the plan has none.
    """

    last: int
    prompts: Rows
    negative_prompts: Rows


@dataclass(frozen=True)
class PromptPlan:
    """The plans of a batch of prompts for all encoders; `str(plan)` is the report for people.

    Attributes:
        prompts: for each encoder, by its name in the pipeline, a plan for each text: one of each prompt of the batch,
            or more, see `schedule`; empty if the prompts came as embeddings.
        negative_prompts: the same for the negative prompts; empty if there are none.
        positions: the length to which every window of the batch is padded.
        windows: number of windows to which every text of the batch is padded, with windows of the empty prompt.
        schedule: the texts of the prompts at each step, in order; empty if each prompt is one text at all steps.
        is_conjunction: whether prompts are joined by A1111's `AND`, which weighs the noise that texts predict. Other
            weights are of embeddings.
    """

    prompts: Mapping[str, tuple[EncoderPlan, ...]]
    negative_prompts: Mapping[str, tuple[EncoderPlan, ...]]
    positions: int
    windows: int
    schedule: tuple[Stage, ...] = ()
    is_conjunction: bool = False

    @property
    def plans(self) -> tuple[EncoderPlan, ...]:
        """The plans of all encoders and texts: prompts first, in the order of the encoders and of the batch."""
        return tuple(chain(*self.prompts.values(), *self.negative_prompts.values()))

    @property
    def cut(self) -> tuple[EncoderPlan, ...]:
        """The plans that lose a part of their text."""
        return tuple(plan for plan in self.plans if plan.cut_tokens)

    def __str__(self) -> str:
        # Encoders of equal plans, usually both, share one paragraph.
        batched = any(plan.index for plan in self.plans)
        encoders: dict[str, list[str]] = {}
        for plan in self.plans:
            title = plan.title.replace(plan.role, f"{plan.role} {plan.index + 1}", 1) if batched else plan.title
            encoders.setdefault(f"{title}: {plan._body()}", []).append(plan.encoder)
        lines = [
            f"{' and '.join(names)} {'encodes' if len(names) == 1 else 'encode'} {text}"
            for text, names in encoders.items()
        ]
        return "\n".join([*lines, *counted_in(self.plans)])


def plan_prompts(
    specs: Sequence[EncoderSpec],
    prompts: Sequence[Sequence[str]] | None,
    negative_prompts: Sequence[Sequence[str]] | None = None,
    *,
    short_prompt_encoder: ShortPromptEncoder = "original",
    overflow: Overflow = "window",
    length_buckets: Sequence[int] = LENGTH_BUCKETS,
    weighting: Weighting | None = None,
    emphasis: Emphasis = "compel",
    shape: tuple[int, int] | None = None,
    steps: int | None = None,
) -> PromptPlan:
    """Plan the encoding of a batch of prompts and negative prompts.

    All texts get the same number of windows and the same length, the smallest that holds the longest text. Prompt and
    negative prompt go through the UNet together, and the hidden states of the two encoders are concatenated.

    Args:
        specs: the encoders.
        prompts: for each encoder its batch of texts; None if the prompts come as embeddings.
        negative_prompts: the same for the negative prompts; None if there are none.
        short_prompt_encoder: `"original"` encodes texts of up to 77 tokens as stock does, with encoders that have a
            stock (`EncoderSpec.has_stock`).
        overflow: treatment of a text that is longer than the encoders: `"window"`, `"truncate"` or `"error"`.
        length_buckets: lengths to pad to; the length of the encoders is added to them.
        weighting, emphasis: the syntax of weights in the texts, and their effect, which decides their limits; see
            `finelip_sdxl.prompts.weighting.parse_weights`.
        shape: (windows, positions), if embeddings that were passed in fix them.
        steps: number of steps of a drawing, whose texts may change by A1111's schedules; None reads none.

    Raises:
        ValueError: a text does not fit the encoders and `overflow="error"`; a text does not fit `shape` and must not
            be cut; the windows of a text have more than `MAX_POSITIONS` in all; or prompts cannot be read, see
            `finelip_sdxl.prompts.composition.compose`.

    Examples:
        >>> from finelip_sdxl.prompts.vocabulary import clip_tokenizer
        >>> spec = EncoderSpec("text_encoder", clip_tokenizer(), positions=248)
        >>> print(plan_prompts([spec], [["a red square"]]))
        text_encoder encodes prompt: 5 tokens in 1 window of 77 positions; nothing is cut
          window 1, 5 tokens: "a red square"
        Counted in SDXL's tokens.
    """
    capacity = shape[1] if shape else min(spec.positions for spec in specs)
    parse = partial(parse_weights, syntax=weighting, emphasis=emphasis)
    cut = partial(_cut_texts, specs, size=capacity - 2, truncate=overflow == "truncate", parse=parse)
    composed = None if prompts is None else compose(prompts, weighting, steps)
    negative = None if negative_prompts is None else compose(negative_prompts, weighting, steps, conjoins=False)
    prompt_texts, negative_texts = cut(PROMPT, composed), cut(NEGATIVE_PROMPT, negative)
    texts = [*chain(*prompt_texts.values(), *negative_texts.values())]
    longest = max(texts, key=lambda text: text.tokens)
    most_cut = max(texts, key=lambda text: len(text.spans))
    windows = len(most_cut.spans)
    if overflow == "error" and longest.tokens > capacity:
        raise ValueError(
            f"The {longest.role} has {longest.tokens} tokens for {longest.spec.encoder}; expected at most {capacity}:"
            ' shorten it, or set overflow="window" (to encode all of it) or overflow="truncate".'
        )
    most = max(1, MAX_POSITIONS // capacity)
    if windows > most:
        raise ValueError(
            f"The {most_cut.role} needs {windows:,} windows of {capacity} positions; expected at most {most}, since"
            ' every step of a picture uses all of them: shorten it, take BREAKs out, or set overflow="truncate".'
        )
    if shape and windows > shape[0]:
        raise ValueError(
            f"The text needs {windows} windows of {capacity} positions, but the embeddings passed beside it have"
            f' {shape[0]}: pass both as text, shorten it, or set overflow="truncate".'
        )

    if shape:
        windows, positions = shape
    elif windows > 1:
        positions = capacity
    else:
        stock = short_prompt_encoder == "original" and any(spec.has_stock for spec in specs)
        positions = _padded_length(min(longest.tokens, capacity), capacity, length_buckets, stock)
    as_stock = short_prompt_encoder == "original" and windows == 1 and positions == STOCK_POSITIONS

    by_encoder, negative_by_encoder = (
        {encoder: tuple(text.plan(positions, as_stock) for text in batch) for encoder, batch in texts_of.items()}
        for texts_of in (prompt_texts, negative_texts)
    )
    is_conjunction = composed is not None and composed.is_conjunction
    return PromptPlan(
        by_encoder, negative_by_encoder, positions, windows, _schedule(composed, negative), is_conjunction
    )


def _schedule(prompts: Composition | None, negative_prompts: Composition | None) -> tuple[Stage, ...]:
    compositions = [composition for composition in (prompts, negative_prompts) if composition is not None]
    if all(composition.is_plain for composition in compositions):
        return ()
    lasts = sorted({last for composition in compositions for last, _ in composition.stages})
    found = [
        Stage(last, *(() if part is None else part.at(last) for part in (prompts, negative_prompts))) for last in lasts
    ]
    # A change of a text may be none, as in `[fox:fox:3]`.
    following = [*found[1:], None]
    return tuple(
        stage
        for stage, after in zip(found, following, strict=True)
        if after is None or (stage.prompts, stage.negative_prompts) != (after.prompts, after.negative_prompts)
    )


def counted_in(plans: Iterable[EncoderPlan]) -> list[str]:
    """The line of a report that says whose tokens the plans count; empty if they do not say."""
    names = " and ".join(dict.fromkeys(plan.vocabulary for plan in plans if plan.vocabulary))
    return [f"Counted in {names}."] if names else []


def padded_token_ids(plans: Sequence[EncoderPlan], tokenizer: CLIPTokenizer, windows: int) -> list[list[list[int]]]:
    """Token ids of plans, (batch, windows, positions); missing windows are filled with the empty prompt."""
    return [
        [
            _row(window, tokenizer, plan.positions)
            for window in (*plan.windows, *[Window("")] * (windows - len(plan.windows)))
        ]
        for plan in plans
    ]


def padded_shares(plans: Sequence[EncoderPlan], windows: int) -> list[list[float]] | None:
    """Weights of whole windows, (batch, windows); None if all are 1."""
    rows = [[window.share for window in plan.windows] + [1.0] * (windows - len(plan.windows)) for plan in plans]
    return rows if any(share != 1 for row in rows for share in row) else None


def tokenize(tokenizer: CLIPTokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """The tokens of a text without start and end token, and the first and one past the last character of each.

    Examples:
        >>> from finelip_sdxl.data import load_tokenizer
        >>> len(tokenize(load_tokenizer("miniature-clip-1"), "a red star")[0])
        3
    """
    # The backend is used directly, since truncation and padding are state of the tokenizer: a call would switch them
    # off for a call in another thread. Where they are on, the encoding comes in parts, with padding.
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    parts = [
        [
            (token, place)
            for token, place, is_text in zip(part.ids, part.offsets, part.attention_mask, strict=True)
            if is_text
        ]
        for part in (encoding, *encoding.overflowing)
    ]
    parts.sort(key=lambda part: [place for _, place in part])  # with truncation on the left, the last part comes first
    tokens = [token for part in parts for token in part]
    return [token for token, _ in tokens], [place for _, place in tokens]


def empty_row(tokenizer: CLIPTokenizer, positions: int) -> list[int]:
    """Token ids of the empty prompt."""
    return _row(Window(""), tokenizer, positions)


def padded_weights(plans: Sequence[EncoderPlan], windows: int) -> list[list[float]] | None:
    """Weights of the tokens of `padded_token_ids`, (batch, windows · positions); None if all are 1."""
    if not any(window.weights for plan in plans for window in plan.windows):
        return None
    rows = []
    for plan in plans:
        row: list[float] = []
        for window in (*plan.windows, *[Window("")] * (windows - len(plan.windows))):
            weights = [1.0, *window.weights]
            row += weights + [1.0] * (plan.positions - len(weights))
        rows.append(row)
    return rows


@dataclass(frozen=True)
class _CutText:
    """A text for one encoder: its tokens, their places in the text, and its windows.

    Attributes:
        spec: the encoder.
        role, index, label: see `EncoderPlan`.
        weighted: the text and its weights.
        token_ids: its tokens, without start and end token.
        offsets: the first and one past the last character of each token.
        spans: the first and one past the last token of each window.
    """

    spec: EncoderSpec
    role: str
    index: int
    label: str
    weighted: WeightedText
    token_ids: Sequence[int]
    offsets: Sequence[tuple[int, int]]
    spans: Sequence[tuple[int, int]]

    @property
    def tokens(self) -> int:
        """Number of tokens, start and end token included."""
        return len(self.token_ids) + 2

    def plan(self, positions: int, as_stock: bool) -> EncoderPlan:
        """The plan for this text, once the length of the batch is known."""
        stop = self.spans[-1][1]
        return EncoderPlan(
            encoder=self.spec.encoder,
            role=self.role,
            index=self.index,
            windows=self._windows(),
            positions=positions,
            as_stock=as_stock and self.spec.has_stock,
            cut_text=self._text_from(stop),
            cut_tokens=len(self.offsets) - stop,
            vocabulary=name_tokens(self.spec.tokenizer),
            loras=self.weighted.loras,
            label=self.label,
            unread=self.weighted.unread,
        )

    def _windows(self) -> tuple[Window, ...]:
        """Windows whose texts join to the text that is encoded, spaces between windows included."""
        text = self.weighted.text
        starts = [0] + [self.offsets[start][0] for start, _ in self.spans[1:]]
        ends = [*starts[1:], len(text) - len(self._text_from(self.spans[-1][1]))]
        return tuple(
            Window(
                text[first:last],
                tuple(self.token_ids[start:stop]),
                self._weights(start, stop),
                self.weighted.share_at(self.offsets[start][0] if start < len(self.offsets) else 0),
            )
            for (start, stop), first, last in zip(self.spans, starts, ends, strict=True)
        )

    def _weights(self, start: int, stop: int) -> tuple[float, ...]:
        weights = tuple(self.weighted.weight_at(first) for first, _ in self.offsets[start:stop])
        return weights if any(weight != 1 for weight in weights) else ()

    def _text_from(self, token: int) -> str:
        return self.weighted.text[self.offsets[token][0] :] if token < len(self.offsets) else ""


def _cut_texts(
    specs: Sequence[EncoderSpec],
    role: str,
    composition: Composition | None,
    *,
    size: int,
    truncate: bool,
    parse: Callable[..., WeightedText],
) -> dict[str, list[_CutText]]:
    """The texts of each encoder, cut into windows of at most `size` tokens, or after the first window."""
    if composition is None:
        return {}
    return {
        spec.encoder: [
            _cut_text(spec, role, text, parse(text.texts[number], expand=spec.expand), size, truncate)
            for text in composition.texts
        ]
        for number, spec in enumerate(specs[: len(composition.texts[0].texts)])
    }


def _cut_text(
    spec: EncoderSpec, role: str, text: ComposedText, weighted: WeightedText, size: int, truncate: bool
) -> _CutText:
    token_ids, offsets = tokenize(spec.tokenizer, weighted.text)
    spans = [(0, min(len(offsets), size))] if truncate else _spans(weighted, offsets, size)
    return _CutText(spec, role, text.row, text.label, weighted, token_ids, offsets, spans)


def _spans(weighted: WeightedText, offsets: Sequence[tuple[int, int]], size: int) -> list[tuple[int, int]]:
    """The first and one past the last token of each window; no window crosses a break."""
    firsts = [first for first, _ in offsets]
    borders = [0, *(bisect_left(firsts, place) for place in weighted.breaks), len(offsets)]
    parts = [(first, last) for first, last in pairwise(borders) if last > first] or [(0, 0)]
    return [
        (first + start, first + stop)
        for first, last in parts
        for start, stop in split_windows(weighted.text, offsets[first:last], size)
    ]


def _padded_length(longest: int, capacity: int, length_buckets: Sequence[int], stock: bool) -> int:
    if stock and longest <= STOCK_POSITIONS <= capacity:
        return STOCK_POSITIONS
    return min(length for length in (*length_buckets, capacity) if longest <= length <= capacity)


def _row(window: Window, tokenizer: CLIPTokenizer, positions: int) -> list[int]:
    row = [tokenizer.bos_token_id, *window.token_ids, tokenizer.eos_token_id]
    return row + [tokenizer.pad_token_id] * (positions - len(row))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
