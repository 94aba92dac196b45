"""How prompts are read: tokens, windows, padding, and a report of what each text encoder saw.

Nothing here touches a model. `plan_prompts` decides everything that happens to a text before it is encoded and says
so in a `PromptPlan`; the pipelines encode exactly that report, so what `describe_prompt` prints is what was read.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from finelip_sdxl.options import LENGTH_BUCKETS, MAX_POSITIONS, STOCK_POSITIONS
from finelip_sdxl.prompts.weighting import WeightedText, parse_weights
from finelip_sdxl.prompts.windows import split_windows

PROMPT = "prompt"


NEGATIVE_PROMPT = "negative prompt"


@dataclass(frozen=True)
class EncoderSpec:
    """A text encoder as far as reading a prompt needs it.

    Attributes:
        encoder: its name in the pipeline, `"text_encoder"` or `"text_encoder_2"`.
        tokenizer: its `CLIPTokenizer`.
        positions: how many positions it reads at once, start and end token included.
        has_stock: whether a short prompt can be read as stock SDXL reads it.
        expand: what is made of a text before it is read, such as all tokens of a textual inversion of its first.
    """

    encoder: str
    tokenizer: Any
    positions: int
    has_stock: bool = False
    expand: Callable[[str], str] | None = None


@dataclass(frozen=True)
class Window:
    """What an encoder reads at once: an exact slice of the text, and its tokens without start and end token."""

    text: str
    token_ids: tuple[int, ...] = field(default=(), repr=False)
    weights: tuple[float, ...] = field(default=(), repr=False)  # of the tokens; empty if all are 1

    @property
    def tokens(self) -> int:
        """Number of tokens, start and end token included."""
        return len(self.token_ids) + 2

    def __str__(self) -> str:
        weighted = f", {sum(weight != 1 for weight in self.weights)} of them weighted" if self.weights else ""
        return f"{self.tokens} tokens{weighted}: {_quoted(self.text)}"


@dataclass(frozen=True)
class EncoderPlan:
    """What one encoder reads of one text.

    Attributes:
        encoder: the encoder's name in the pipeline.
        role: `"prompt"` or `"negative prompt"`.
        index: place of the text in its batch.
        windows: what is read, in order.
        positions: the length to which each window is padded.
        as_stock: whether stock SDXL's own encoder reads it, as stock does.
        cut_text: the part of the text that is not read; empty if all of it is.
        cut_tokens: how many tokens that part has.
    """

    encoder: str
    role: str
    index: int
    windows: tuple[Window, ...]
    positions: int
    as_stock: bool = False
    cut_text: str = ""
    cut_tokens: int = 0

    @property
    def tokens(self) -> int:
        """Number of tokens read, the start and end token of every window included."""
        return sum(window.tokens for window in self.windows)

    def __str__(self) -> str:
        return f"{self.encoder} reads {self.role}: {self._body()}"

    def _body(self) -> str:
        windows = "1 window" if len(self.windows) == 1 else f"{len(self.windows)} windows"
        how = ", as stock SDXL reads it" if self.as_stock else ""
        cut = f"; {self.cut_tokens} tokens are CUT" if self.cut_tokens else "; nothing is cut"
        lines = [f"{self.tokens} tokens in {windows} of {self.positions} positions{how}{cut}"]
        lines += [f"  window {number}, {window}" for number, window in enumerate(self.windows, start=1)]
        if self.cut_tokens:
            lines.append(f"  cut, {self.cut_tokens} tokens: {_quoted(self.cut_text)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class PromptPlan:
    """What every encoder reads of a batch of prompts; `str(report)` is the text for people.

    Attributes:
        readings: one for each encoder and text.
        positions: the length to which every window of the batch is padded.
        windows: how many windows every text of the batch is padded to, with windows of the empty prompt.
    """

    readings: tuple[EncoderPlan, ...]
    positions: int
    windows: int

    @property
    def cut(self) -> tuple[EncoderPlan, ...]:
        """The readings that lose a part of their text."""
        return tuple(reading for reading in self.readings if reading.cut_tokens)

    def select(self, encoder: str, role: str) -> list[EncoderPlan]:
        """The readings of one encoder, `"prompt"` or `"negative prompt"`, in the order of the batch."""
        return [reading for reading in self.readings if reading.encoder == encoder and reading.role == role]

    def __str__(self) -> str:
        # Encoders that read the same are reported once: usually both do.
        batched = any(reading.index for reading in self.readings)
        encoders: dict[str, list[str]] = {}
        for reading in self.readings:
            role = f"{reading.role} {reading.index + 1}" if batched else reading.role
            encoders.setdefault(f"{role}: {reading._body()}", []).append(reading.encoder)
        return "\n".join(
            f"{' and '.join(names)} {'reads' if len(names) == 1 else 'read'} {text}" for text, names in encoders.items()
        )


@dataclass(frozen=True)
class _Text:
    """A text that one encoder is to read, with its tokens and where each of them stands."""

    reader: EncoderSpec
    role: str
    index: int
    weighted: WeightedText
    token_ids: list[int]
    offsets: list[tuple[int, int]]

    @classmethod
    def read(cls, reader: EncoderSpec, role: str, index: int, weighted: WeightedText) -> _Text:
        return cls(reader, role, index, weighted, *tokenize(reader.tokenizer, weighted.text))

    @property
    def text(self) -> str:
        return self.weighted.text

    @property
    def tokens(self) -> int:
        return len(self.token_ids) + 2

    def spans(self, size: int) -> list[tuple[int, int]]:
        """Windows as first and one past last token, none across a break."""
        firsts = [first for first, _ in self.offsets]
        borders = [0, *(bisect_left(firsts, place) for place in self.weighted.breaks), len(self.offsets)]
        parts = [(first, last) for first, last in pairwise(borders) if last > first] or [(0, 0)]
        return [
            (first + start, first + stop)
            for first, last in parts
            for start, stop in split_windows(self.text, self.offsets[first:last], size)
        ]

    def weights(self, start: int, stop: int) -> tuple[float, ...]:
        weights = tuple(self.weighted.weight_at(first) for first, _ in self.offsets[start:stop])
        return weights if any(weight != 1 for weight in weights) else ()

    def after(self, token: int) -> str:
        """The text from a token on."""
        return self.text[self.offsets[token][0] :] if token < len(self.offsets) else ""


def plan_prompts(
    readers: Sequence[EncoderSpec],
    prompts: Sequence[Sequence[str]] | None,
    negative_prompts: Sequence[Sequence[str]] | None = None,
    *,
    short_prompt_encoder: str = "original",
    overflow: str = "window",
    length_buckets: Sequence[int] = LENGTH_BUCKETS,
    weighting: str | None = None,
    shape: tuple[int, int] | None = None,
) -> PromptPlan:
    """Decide how a batch of prompts and negative prompts is read.

    All of them get the same number of windows and the same length, the smallest that holds the longest: hidden states
    of prompt and negative prompt go through the UNet together, and those of the two encoders are concatenated.

    Args:
        readers: the encoders.
        prompts: for each reader its batch of texts; None if the prompts come as embeddings.
        negative_prompts: the same for the negative prompts; None if there are none.
        short_prompt_encoder: `"stock"` reads what fits stock's 77 positions there as stock does, where a reader has a stock.
        overflow: what happens to a text that is longer than the encoders: `"window"`, `"truncate"` or `"error"`.
        length_buckets: lengths to pad to; the encoders' own closes the list.
        weighting: the syntax of weights in the texts, see `finelip_sdxl.prompts.weighting.parse_weights`.
        shape: (windows, positions) when embeddings that were passed in fix them.

    Raises:
        ValueError: a text does not fit and `overflow="error"`, does not fit `shape` and must not be cut, or needs
            windows of more than `MAX_POSITIONS` in all.

    Example:
        >>> from finelip_sdxl.prompts.plan import EncoderSpec, plan_prompts
        >>> reader = EncoderSpec("text_encoder", tokenizer, positions=248)  # doctest: +SKIP
        >>> print(plan_prompts([reader], [["a red square"]]))  # doctest: +SKIP
        text_encoder reads prompt: 5 tokens in 1 window of 77 positions; nothing is cut
          window 1, 5 tokens: "a red square"
    """
    capacity = shape[1] if shape else min(reader.positions for reader in readers)
    texts = [
        _Text.read(reader, role, index, parse_weights(text, weighting, reader.expand))
        for role, batches in ((PROMPT, prompts), (NEGATIVE_PROMPT, negative_prompts))
        for reader, batch in zip(readers, batches or (), strict=False)
        for index, text in enumerate(batch)
    ]
    longest = max(texts, key=lambda text: text.tokens)
    if overflow == "error" and longest.tokens > capacity:
        raise ValueError(
            f"The {longest.role} has {longest.tokens} tokens for {longest.reader.encoder}, which reads {capacity} at"
            ' once: shorten it, or set overflow="window" (reads all of it) or overflow="truncate".'
        )

    spans = [
        [(0, min(len(text.offsets), capacity - 2))] if overflow == "truncate" else text.spans(capacity - 2)
        for text in texts
    ]
    windows = max(map(len, spans))
    most = max(1, MAX_POSITIONS // capacity)
    if windows > most:
        text = texts[[*map(len, spans)].index(windows)]
        raise ValueError(
            f"The {text.role} needs {windows:,} windows of {capacity} positions, and every step of a picture takes in"
            f' all of them; expected at most {most}: shorten it, take BREAKs out, or set overflow="truncate".'
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
        stock = short_prompt_encoder == "original" and any(reader.has_stock for reader in readers)
        positions = _padded_length(min(longest.tokens, capacity), capacity, length_buckets, stock)
    as_stock = short_prompt_encoder == "original" and windows == 1 and positions == STOCK_POSITIONS

    readings = [
        EncoderPlan(
            encoder=text.reader.encoder,
            role=text.role,
            index=text.index,
            windows=_windows(text, text_spans),
            positions=positions,
            as_stock=as_stock and text.reader.has_stock,
            cut_text=text.after(text_spans[-1][1]),
            cut_tokens=len(text.offsets) - text_spans[-1][1],
        )
        for text, text_spans in zip(texts, spans, strict=True)
    ]
    return PromptPlan(tuple(readings), positions, windows)


def padded_token_ids(readings: Sequence[EncoderPlan], tokenizer: Any, windows: int) -> list[list[list[int]]]:
    """Token ids of readings, padded alike: (batch, windows, positions), missing windows as the empty prompt."""
    return [
        [
            _row(window, tokenizer, reading.positions)
            for window in (*reading.windows, *[Window("")] * (windows - len(reading.windows)))
        ]
        for reading in readings
    ]


def tokenize(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """The tokens of a text, without start and end token, and for each its first and one past its last character.

    Example:
        >>> from finelip_sdxl.data import load_tokenizer
        >>> len(tokenize(load_tokenizer("miniature-clip-1"), "a red star")[0])
        3
    """
    # Not by calling it: that would switch off what another thread's call has just switched on, truncation and padding,
    # which belong to the tokenizer and not to the call. Where they are on, the encoding comes in parts, with padding.
    encoding = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    parts = [
        [
            (token, place)
            for token, place, is_text in zip(part.ids, part.offsets, part.attention_mask, strict=True)
            if is_text
        ]
        for part in (encoding, *encoding.overflowing)
    ]
    parts.sort(key=lambda part: [place for _, place in part])  # cut on the left, they come from the end
    tokens = [token for part in parts for token in part]
    return [token for token, _ in tokens], [place for _, place in tokens]


def empty_row(tokenizer: Any, positions: int) -> list[int]:
    """Token ids of the empty prompt."""
    return _row(Window(""), tokenizer, positions)


def padded_weights(readings: Sequence[EncoderPlan], windows: int) -> list[list[float]] | None:
    """Weights of the tokens of `padded_token_ids`, (batch, windows · positions); None if all are 1."""
    if not any(window.weights for reading in readings for window in reading.windows):
        return None
    rows = []
    for reading in readings:
        row: list[float] = []
        for window in (*reading.windows, *[Window("")] * (windows - len(reading.windows))):
            weights = [1.0, *window.weights]
            row += weights + [1.0] * (reading.positions - len(weights))
        rows.append(row)
    return rows


def _padded_length(longest: int, capacity: int, length_buckets: Sequence[int], stock: bool) -> int:
    if stock and longest <= STOCK_POSITIONS <= capacity:
        return STOCK_POSITIONS
    return min(length for length in (*length_buckets, capacity) if longest <= length <= capacity)


def _windows(text: _Text, spans: Sequence[tuple[int, int]]) -> tuple[Window, ...]:
    """Windows whose texts join to the text that is read, spaces between windows included."""
    starts = [0] + [text.offsets[start][0] for start, _ in spans[1:]]
    ends = [*starts[1:], len(text.text) - len(text.after(spans[-1][1]))]
    return tuple(
        Window(text.text[first:last], tuple(text.token_ids[start:stop]), text.weights(start, stop))
        for (start, stop), first, last in zip(spans, starts, ends, strict=True)
    )


def _row(window: Window, tokenizer: Any, positions: int) -> list[int]:
    row = [tokenizer.bos_token_id, *window.token_ids, tokenizer.eos_token_id]
    return row + [tokenizer.pad_token_id] * (positions - len(row))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
