"""Weights in the prompt: the two syntaxes that SDXL's users type, and the effects of a weight on a token's states."""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import inf, pi, tan
from typing import TYPE_CHECKING, Any

from finelip_sdxl.options import Emphasis, Weighting
from finelip_sdxl.prompts.compel_operators import read_operator
from finelip_sdxl.prompts.lora_tags import LoraTag, take_loras

if TYPE_CHECKING:
    from torch import Tensor


MAX_WEIGHT, MAX_DEPTH, MAX_WEAK_PARTS = 10.0, 50, 50

# One scan for both syntaxes: compel's own parser takes minutes for ten open brackets, and knows no `BREAK`.
_SYNTAX: dict[Weighting, re.Pattern[str]] = {
    "a1111": re.compile(
        r"\\(?P<escaped>[\\()\[\]]?)|(?P<open>[(\[])"
        r"|(?::\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*(?=\)))?(?P<close>[)\]])"
        r"|\s*\b(?P<break>BREAK)\b\s*|[^\\()\[\]:B]+|.",
        re.DOTALL,
    ),
    "compel": re.compile(
        r"""\\(?P<escaped>[()"+-])|(?P<open>\()|(?P<close>[)"])(?P<weight>\++|-+|\d+\.\d*|\.?\d+)?"""
        r"""|(?<![^\s(",])(?P<word>[^\s()"\\,.=+-]+(?:[+-][^\s()"\\,.=+-]+)*)(?P<signs>\+\++|--+|[+-](?![^\s()",.=+-]))"""
        r"""|[^\s()"\\,]+|.""",
        re.DOTALL,
    ),
}

# Weights that are clear without knowing the syntax.
_TELLTALES: dict[Weighting, re.Pattern[str]] = {
    "a1111": re.compile(r"\([^()]*:\s*[+-]?\d*\.\d+\s*\)"),
    "compel": re.compile(r"\([^()]*\)\d*\.\d+"),
}
_BRACKETS: dict[Weighting, dict[str, str]] = {"a1111": {")": "(", "]": "["}, "compel": {")": "(", '"': '"'}}


@dataclass(frozen=True)
class WeightedText:
    """A text without the syntax of its weights.

    Attributes:
        text: the text to encode.
        spans: the first and one past the last character, and the weight, of each part with a weight other than 1.
        breaks: characters at which a new window begins.
        loras: the LoRAs that it names; they are no part of `text`.
        shares: the first character and the weight of each part of compel's `.and()`; empty without it.
        unread: for each syntax that is not read, its name and the parts of the text that would be weights with it.
    """

    text: str
    spans: tuple[tuple[int, int, float], ...] = ()
    breaks: tuple[int, ...] = ()
    loras: tuple[LoraTag, ...] = ()
    shares: tuple[tuple[int, float], ...] = ()
    unread: tuple[tuple[Weighting, tuple[str, ...]], ...] = field(default=(), repr=False)

    def weight_at(self, character: int) -> float:
        before = bisect(self.spans, (character, inf, inf))
        _, stop, weight = self.spans[before - 1] if before else (0, 0, 1.0)
        return weight if character < stop else 1.0

    def share_at(self, character: int) -> float:
        before = bisect(self.shares, (character, inf))
        return self.shares[before - 1][1] if before else 1.0


def parse_weights(
    text: str, syntax: Weighting | None, expand: Callable[[str], str] | None = None, emphasis: Emphasis = "compel"
) -> WeightedText:
    """Take the weights out of a prompt, and with any syntax the LoRAs, `<lora:name:0.8>`.

    Neighboring parts of different weights are separate words, as in A1111 and compel.

    Args:
        text: the prompt.
        syntax: `"a1111"`: `(word:1.3)`, `((word))` for 1.1 each, `[word]` for 1 / 1.1, a backslash before a bracket or
            backslash that is text (a lone one is left out), and `BREAK` where a new window begins; a bracket without
            its partner reaches to the end. `"compel"`: `(some words)1.3`, `word++` for 1.1 each, `word--` for 0.9,
            quotes in place of brackets, a backslash before a bracket that is text; a bracket without its partner is
            text; or `("one", "other").and()` for parts with windows of their own. None: the text as it is.
        expand: a function that is applied to the parts of the text without their weights.
        emphasis: the effect of the weights, which decides their limits: A1111 and ComfyUI have negative weights, and
            only compel takes a run of the encoders for each part below 1.

    Raises:
        ValueError: a weight below 0, or below -10 where there are negative ones, or above 10; more than 50 nested
            brackets; more than 50 parts of weights below 1 with compel's effect; or an operator of compel's that
            `read_operator` refuses, or `.blend()`, which is several texts.

    Examples:
        >>> parse_weights("a (red:1.3) fox", "a1111")
        WeightedText(text='a red fox', spans=((2, 5, 1.3),), breaks=(), loras=(), shares=())
        >>> parse_weights("a (red)1.3 fox", "compel").spans
        ((2, 5, 1.3),)
        >>> parse_weights("a fox BREAK a hare", "a1111").breaks
        (6,)
        >>> parse_weights('("a fox", "a hare").and(1, 0.5)', "compel").shares
        ((0, 1.0), (6, 0.5))
    """
    expand = expand or str
    text, loras = take_loras(text)
    if syntax is None:
        return WeightedText(expand(text), loras=loras, unread=_weights_of_other_syntaxes(text))
    operator = read_operator(text) if syntax == "compel" else None
    if operator is not None and operator.name == "blend":
        raise ValueError(
            "A .blend() is the sum of several texts, which `finelip_sdxl.prompts.composition` takes apart."
        )
    if operator is not None:
        parts = [parse_weights(part, syntax, expand, emphasis) for part in operator.parts]
        return _one_after_the_other(parts, operator.shares, loras, emphasis)
    least = 0.0 if emphasis == "compel" else -MAX_WEIGHT
    plain, spans, breaks = "", [], []
    for part, weight in _runs(text, syntax):
        if weight is None:
            breaks.append(len(plain))
            continue
        if not least <= weight <= MAX_WEIGHT:
            hint = (
                " with compel's emphasis: A1111's and ComfyUI's take negative ones" if -MAX_WEIGHT <= weight < 0 else ""
            )
            raise ValueError(
                f"{part!r:.60} has weight {weight:g}; expected one from {least:g} to {MAX_WEIGHT:g}{hint}."
            )
        start, plain = len(plain), plain + expand(part)
        if weight != 1:
            spans.append((start, len(plain), weight))
    _check_weak_parts(spans, emphasis)
    return WeightedText(plain, tuple(spans), tuple(breaks), loras)


@dataclass(frozen=True)
class WeakPart:
    """Neighboring tokens of one weight below 1.

    Attributes:
        row, window: number of the text in the batch, and of the window in the text.
        first, stop: the first token and one past the last, counted from the window's start.
        weight: their weight.
    """

    row: int
    window: int
    first: int
    stop: int
    weight: float


def weak_parts(rows: Sequence[Sequence[float]], positions: int) -> list[WeakPart]:
    """Parts with weights below 1, window by window.

    Args:
        rows: weights of all tokens, (batch, windows · positions).
        positions: length of a window.

    Examples:
        >>> weak_parts([[1.0, 0.5, 0.5, 1.0, 1.0, 2.0]], positions=3)
        [WeakPart(row=0, window=0, first=1, stop=3, weight=0.5)]
    """
    found = []
    for row, weights in enumerate(rows):
        for window, start in enumerate(range(0, len(weights), positions)):
            first = 0
            for weight, tokens in groupby(weights[start : start + positions]):
                stop = first + len(list(tokens))
                if weight < 1:
                    found.append(WeakPart(row, window, first, stop, weight))
                first = stop
    return found


def apply_weights(states: Tensor, empty: Tensor, weights: Tensor) -> Tensor:
    """States moved away from the empty prompt's states, or toward them: `empty + weight · (states − empty)`.

    Source: ComfyUI (`ClipTokenWeightEncoder.encode_token_weights` in `comfy/sd1_clip.py`), and compel
    (`EmbeddingsProvider.build_weighted_embedding_tensor`). In compel, `blend_without` comes next for weights below 1.

    Args:
        states: (batch, tokens, dim).
        empty: states of the empty prompt at the same positions, (1, tokens, dim).
        weights: weight of each token, (batch, tokens).

    Examples:
        >>> import torch
        >>> apply_weights(torch.ones(1, 1, 1), torch.zeros(1, 1, 1), torch.tensor([[1.5]]))
        tensor([[[1.5000]]])
    """
    factors = weights[..., None].to(states.dtype)
    return (empty + factors * (states - empty)).where(factors != 1, states)  # 1 changes no bit


def multiply_states(states: Tensor, weights: Tensor, restore_mean: bool) -> Tensor:
    """States times their weights, as A1111 has it, window by window.

    Source: A1111 (`EmphasisOriginal` and `EmphasisOriginalNoNorm` in `modules/sd_emphasis.py`). It takes the mean over
    all that it encodes at once, which is one text as a rule; here it is over each window of each text.

    Args:
        states: (batch, windows · positions, dim).
        weights: weight of each token, (batch, windows, positions).
        restore_mean: scale the states of each window so that their mean stays what it was.

    Examples:
        >>> import torch
        >>> states = torch.tensor([[[1.0], [3.0]]])
        >>> multiply_states(states, torch.tensor([[[1.0, 3.0]]]), restore_mean=False)[0, :, 0]
        tensor([1., 9.])
        >>> multiply_states(states, torch.tensor([[[1.0, 3.0]]]), restore_mean=True)[0, :, 0]
        tensor([0.4000, 3.6000])
    """
    by_window = states.unflatten(1, weights.shape[1:])
    weighted = by_window * weights[..., None].to(states.dtype)
    if restore_mean:
        before, after = (part.float().mean(dim=(2, 3), keepdim=True) for part in (by_window, weighted))
        # Where the weights leave a mean of 0, there is nothing to scale.
        weighted = weighted * (before / after).where(after != 0, 1.0).to(states.dtype)
    is_weighted = (weights != 1).any(dim=2)[..., None, None]
    changed: Tensor = weighted.where(is_weighted, by_window).flatten(1, 2)  # a window without weights changes no bit
    return changed


def blend_without(states: Tensor, parts: Sequence[WeakPart], without: Tensor) -> Tensor:
    """States blended with the states of the text without a part: half of these at weight 0.5, only these at 0.

    Source: compel (`EmbeddingsProvider.get_embeddings_for_weighted_prompt_fragments`). Here each window is blended by
    itself; in compel, weak parts of other windows weaken the blend.

    Args:
        states: weighted states, (batch, windows · positions, dim).
        parts: parts with weights below 1, in order.
        without: weighted states of each part's window without the part, (parts, positions, dim).

    Examples:
        >>> import torch
        >>> part = WeakPart(row=0, window=0, first=1, stop=2, weight=0.5)
        >>> blend_without(torch.ones(1, 3, 1), [part], torch.zeros(1, 3, 1))[0, :, 0]
        tensor([0.5000, 0.5000, 0.5000])
    """
    blended, positions = states.clone(), without.shape[1]
    for (row, window), numbered in groupby(enumerate(parts), key=lambda item: (item[1].row, item[1].window)):
        # Weight 0 would be an infinite share.
        shares = {number: tan((1 - max(part.weight, 1e-5)) * pi / 2) for number, part in numbered}
        total = 1 + sum(shares.values())
        place = blended[row, window * positions : (window + 1) * positions]
        place /= total
        for number, share in shares.items():
            place += share / total * without[number]
    return blended


def _one_after_the_other(
    parts: Sequence[WeightedText], shares: Sequence[float], loras: tuple[LoraTag, ...], emphasis: Emphasis
) -> WeightedText:
    """The parts of compel's `.and()` as one text, with windows for each of them."""
    text, spans, starts = "", list[tuple[int, int, float]](), list[int]()
    for part in parts:
        text += " " if text else ""
        starts.append(len(text))
        spans += [(len(text) + first, len(text) + stop, weight) for first, stop, weight in part.spans]
        text += part.text
    _check_weak_parts(spans, emphasis)
    are_equal = all(share == 1 for share in shares)
    of_parts = () if are_equal else tuple(zip(starts, shares, strict=True))
    return WeightedText(text, tuple(spans), tuple(starts[1:]), loras, of_parts)


def _weights_of_other_syntaxes(text: str) -> tuple[tuple[Weighting, tuple[str, ...]], ...]:
    """Parts of a text without weights that nearly nobody writes but as a weight: brackets with a decimal number."""
    found = ((syntax, tuple(pattern.findall(text))) for syntax, pattern in _TELLTALES.items())
    return tuple((syntax, parts) for syntax, parts in found if parts)


def _check_weak_parts(spans: Sequence[tuple[int, int, float]], emphasis: Emphasis) -> None:
    weak = sum(weight < 1 for *_, weight in spans)
    if emphasis == "compel" and weak > MAX_WEAK_PARTS:
        raise ValueError(
            f"The prompt has {weak} parts with weights below 1; expected at most {MAX_WEAK_PARTS}, since each takes"
            " another run of the encoders: take some out."
        )


def _runs(text: str, syntax: Weighting) -> Iterator[tuple[str, float | None]]:
    """The longest parts of one weight, and their weights; None for a break."""
    run, of_run = "", 1.0
    for part, weight in _pieces(text, syntax):
        # A1111 joins neighbors of equal weight; compel keeps them apart.
        apart = weight != of_run or syntax == "compel"
        space = " " if apart and run[-1:].isalnum() and part[:1].isalnum() else ""
        if weight == of_run:
            run += space + part
        elif part or weight is None:
            if run:
                yield run + (space if weight is not None else ""), of_run
            if weight is None:
                yield "", None
            run, of_run = part, 1.0 if weight is None else weight
    if run:
        yield run, of_run


def _pieces(text: str, syntax: Weighting) -> Iterator[tuple[str, float | None]]:
    """The parts that the syntax cuts, and their weights."""
    pieces: list[list[Any]] = []  # text and weight of each
    brackets = _BRACKETS[syntax]
    opened: dict[str, list[int]] = {bracket: [] for bracket in brackets.values()}  # indices of their pieces

    def close(bracket: str, factor: float) -> None:
        first = opened[bracket].pop()
        pieces[first][0] = ""
        for piece in pieces[first:]:
            if piece[1] is not None:
                piece[1] *= factor

    for match in _SYNTAX[syntax].finditer(text):
        found = match.groupdict()
        closes = brackets.get(found["close"])
        if closes and opened[closes]:
            close(closes, _factor(syntax, closes, found["weight"]))
        elif found["open"] or closes == '"':
            if sum(map(len, opened.values())) == MAX_DEPTH:
                raise ValueError(f"The prompt has more than {MAX_DEPTH} nested brackets: take some out.")
            bracket = found["open"] or '"'
            opened[bracket].append(len(pieces))
            pieces.append([bracket, 1.0])
            pieces.append([match[0][1:], 1.0])  # a quote may stand before a number
        elif found.get("break"):
            pieces.append(["", None])
        elif found.get("signs"):
            pieces.append([found["word"], _factor(syntax, "", found["signs"])])
        else:
            pieces.append([match[0] if found["escaped"] is None else found["escaped"], 1.0])
    if syntax == "a1111":
        for bracket, starts in opened.items():
            while starts:
                close(bracket, _factor(syntax, bracket, None))
    # Rounded: equally many `(` and `[` cancel to exactly 1.
    yield from ((part, weight if weight is None else round(weight, 6)) for part, weight in pieces)


def _factor(syntax: Weighting, bracket: str, weight: str | None) -> float:
    if weight is None:
        return {"(": 1.1, "[": 1 / 1.1}[bracket] if syntax == "a1111" else 1.0
    if weight[0] in "+-" and not weight.strip("+-"):
        # 999 signs are far out of range already, and a larger power could overflow a float.
        return (1.1 if weight[0] == "+" else 0.9) ** min(len(weight), 999)
    return float(weight)
