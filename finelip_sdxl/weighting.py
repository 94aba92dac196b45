"""Weights in the prompt: the two syntaxes that SDXL's users type, and what a weight does to a token's states."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# `None` leaves texts as they are.
WEIGHTING = (None, "compel", "a1111")
MAX_WEIGHT, MAX_DEPTH = 10.0, 50
# compel's parser takes a second for so many.
MAX_COMPEL_CHARACTERS = 4000

_A1111 = re.compile(
    r"\\(?P<escaped>[\\()\[\]])|(?P<open>[(\[])|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|(?P<close>[)\]])"
    r"|\s*\b(?P<break>BREAK)\b\s*|(?P<text>[^\\()\[\]:B]+|.)",
    re.DOTALL,
)


@dataclass(frozen=True)
class WeightedText:
    """A text without the syntax of its weights.

    Attributes:
        text: what is read.
        spans: first and one past last character of parts with a weight other than 1, and that weight; in order.
        breaks: characters before which a new window has to begin.
    """

    text: str
    spans: tuple[tuple[int, int, float], ...] = ()
    breaks: tuple[int, ...] = ()

    def weight_at(self, character: int) -> float:
        return next((weight for start, stop, weight in self.spans if start <= character < stop), 1.0)


def parse_weights(text: str, syntax: str | None) -> WeightedText:
    """Take the weights out of a prompt.

    Args:
        text: the prompt.
        syntax: `"a1111"`: `(word:1.3)`, `((word))` for 1.1 each, `[word]` for 1 / 1.1, a backslash before what is
            meant as it stands, and `BREAK` where a new window has to begin. `"compel"`: `(word)1.3`, `word++` for 1.1
            each, `word--` for 0.9. None: the text as it is.

    Raises:
        ValueError: a weight below 0 or above 10, more than 50 brackets within one another, what compel cannot parse, or
            its `.and()`, `.blend()` and `.swap()`, which are more than weights.

    Example:
        >>> parse_weights("a (red:1.3) fox", "a1111")
        WeightedText(text='a red fox', spans=((2, 5, 1.3),), breaks=())
        >>> parse_weights("a fox BREAK a hare", "a1111").breaks
        (6,)
    """
    if syntax is None:
        return WeightedText(text)
    pieces = list(_parse_compel(text) if syntax == "compel" else _parse_a1111(text))
    parts, spans, breaks, length = [], [], [], 0
    for part, weight in pieces:
        if weight is None:
            breaks.append(length)
            continue
        if not 0 <= weight <= MAX_WEIGHT:
            raise ValueError(f"{part!r:.60} has weight {weight:g}; expected one from 0 to {MAX_WEIGHT:g}.")
        if weight != 1:
            spans.append((length, length + len(part), weight))
        parts.append(part)
        length += len(part)
    return WeightedText("".join(parts), tuple(spans), tuple(breaks))


def apply_weights(states: Tensor, empty: Tensor, weights: Tensor) -> Tensor:
    """States drawn away from those of the empty prompt, or towards them: `empty + weight · (states − empty)`.

    That is what compel does with weights above 1. Below 1 compel also blends in what the encoder reads without the
    words; this does not.

    Args:
        states: (batch, tokens, dim).
        empty: of the empty prompt at the same positions, (1, tokens, dim).
        weights: of each token, (batch, tokens).

    Example:
        >>> import torch
        >>> apply_weights(torch.ones(1, 1, 1), torch.zeros(1, 1, 1), torch.tensor([[1.5]]))
        tensor([[[1.5000]]])
    """
    factors = weights[..., None].to(states.dtype)
    return (empty + factors * (states - empty)).where(factors != 1, states)  # 1 changes no bit


def _parse_a1111(text: str) -> Iterator[tuple[str, float | None]]:
    """Parts and their weights; None for a break."""
    pieces: list[list] = []
    open_brackets: dict[str, list[int]] = {"(": [], "[": []}  # the pieces before which they stand
    factors = {"(": 1.1, "[": 1 / 1.1}

    def close(bracket: str, factor: float) -> None:
        for piece in pieces[open_brackets[bracket].pop() :]:
            if piece[1] is not None:
                piece[1] *= factor

    for match in _A1111.finditer(text):
        bracket = match["open"] or {")": "(", "]": "["}.get(match["close"] or "", "")
        if match["open"]:
            if sum(map(len, open_brackets.values())) == MAX_DEPTH:
                raise ValueError(f"The prompt has more than {MAX_DEPTH} brackets within one another: take some out.")
            open_brackets[bracket].append(len(pieces))
        elif match["weight"] and open_brackets["("]:
            close("(", float(match["weight"]))
        elif match["close"] and open_brackets[bracket]:
            close(bracket, factors[bracket])
        elif match["break"]:
            pieces.append(["", None])
        else:
            pieces.append([match["escaped"] or match[0], 1.0])
    for bracket, starts in open_brackets.items():  # what is never closed reaches to the end
        while starts:
            close(bracket, factors[bracket])
    yield from ((part, weight) for part, weight in pieces)


def _parse_compel(text: str) -> Iterator[tuple[str, float | None]]:
    from compel import Compel
    from compel.prompt_parser import FlattenedPrompt, Fragment

    from finelip_sdxl.compel_windows import parsing

    if len(text) > MAX_COMPEL_CHARACTERS:
        raise ValueError(
            f"The prompt has {len(text):,} characters; with compel's syntax at most {MAX_COMPEL_CHARACTERS:,} are read:"
            ' shorten it, or set weighting=None or "a1111".'
        )
    with parsing():
        prompts = Compel.parse_prompt_string(text).prompts
    is_plain = len(prompts) == 1 and isinstance(prompts[0], FlattenedPrompt)
    parts = prompts[0].children if is_plain else []
    if not is_plain or not all(isinstance(part, Fragment) for part in parts):
        raise ValueError(
            "The prompt uses compel's .and(), .blend() or .swap(), which are more than weights: pass the embeddings of"
            " CompelForSDXL(pipe) instead."
        )
    if all(part.weight == 1 for part in parts) and " ".join(part.text for part in parts).split() == text.split():
        yield text, 1.0  # as it was written: compel makes one space of any white space
        return
    for number, part in enumerate(parts):
        if number:
            yield " ", 1.0
        yield part.text, part.weight
