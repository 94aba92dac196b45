"""compel's operators for a whole prompt: `("a", "b").and()` and `("a", "b").blend(0.7, 0.3)`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import isfinite
from typing import Literal

MAX_SHARE = 10.0

_MORE_THAN_WEIGHTS = re.compile(r"\.(?:and|add|attend|blend|swap)\s*\(|(?:use|with)Lora\s*\(")

# The parts of an operator: texts in quotes, in brackets without others inside, or single words.
_PART = re.compile(
    r"""\s*(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|\((?P<bracketed>[^()"]*)\)|(?P<word>[^\s()",]+))\s*""", re.DOTALL
)
_CALL = re.compile(r"\s*\.\s*(?P<name>and|add|blend)\s*\((?P<arguments>[^()]*)\)\s*\Z")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")


@dataclass(frozen=True)
class Operator:
    """Parts of a prompt that are encoded by themselves, and what becomes of them.

    Attributes:
        name: `"and"`, whose parts stand one after the other, each in windows of its own; or `"blend"`, the sum of them.
        parts: the texts, with weights of words inside.
        shares: the weight of each part; those of a blend add up to 1 unless it says `no_normalize`.
    """

    name: Literal["and", "blend"]
    parts: tuple[str, ...]
    shares: tuple[float, ...]


def is_more_than_weights(text: str) -> bool:
    """Whether a text for compel has parts that it encodes by themselves: `.and()`, `.attend()`, `.blend()`, `.swap()`
    or `withLora()`.

    Examples:
        >>> is_more_than_weights('("a fox", "a hare").blend(1, 1)'), is_more_than_weights("a (fox)1.2")
        (True, False)
    """
    return _MORE_THAN_WEIGHTS.search(text) is not None


def read_operator(text: str) -> Operator | None:
    """The operator that a prompt is, or None if it has none.

    Raises:
        ValueError: it has an operator that is not the whole prompt, or another than `.and()` and `.blend()`; or its
            weights are not one number from -10 to 10 for each part, or add up to 0.

    Examples:
        >>> read_operator('("a red star", "a blue ring").blend(3, 1)')
        Operator(name='blend', parts=('a red star', 'a blue ring'), shares=(0.75, 0.25))
        >>> read_operator("a (red)1.3 star")
    """
    if not is_more_than_weights(text):
        return None
    parts, call = _split(text)
    if call is None or not parts or any(is_more_than_weights(part) for part in parts):
        raise ValueError(
            "The prompt uses compel's .and(), .attend(), .blend(), .swap() or withLora() in a way that is not read"
            ' here: expected ("a fox", "a hare").and() or ("a fox", "a hare").blend(0.7, 0.3) as the whole prompt, or'
            " pass the embeddings of CompelForSDXL(pipe) instead."
        )
    arguments = [argument.strip() for argument in call["arguments"].split(",")] if call["arguments"].strip() else []
    is_blend = call["name"] == "blend"
    normalizes = is_blend and arguments[-1:] != ["no_normalize"]
    numbers = arguments if normalizes or not is_blend else arguments[:-1]
    shares = [float(number) if _NUMBER.fullmatch(number) else float("nan") for number in numbers] or [1.0] * len(parts)
    written = f".{call['name']}({call['arguments']})"
    if len(shares) != len(parts) or not all(isfinite(share) and abs(share) <= MAX_SHARE for share in shares):
        raise ValueError(
            f"{written:.60} stands behind {len(parts)} parts; expected as many numbers from -{MAX_SHARE:g} to"
            f" {MAX_SHARE:g}, or none."
        )
    total = sum(shares)
    if normalizes and abs(total) < 1e-6:
        raise ValueError(f"The weights of {written:.60} add up to 0: write others, or no_normalize behind them.")
    factor = 1 / total if normalizes else 1.0
    return Operator("blend" if is_blend else "and", tuple(parts), tuple(share * factor for share in shares))


def _split(text: str) -> tuple[list[str], re.Match[str] | None]:
    """The parts in a prompt's first bracket, and what is called on it; None if this is not all of the prompt."""
    start = re.match(r"\s*\(", text)
    at, parts = start.end() if start else len(text), list[str]()
    while part := _PART.match(text, at):
        parts.append(next(found for found in part.groups() if found is not None))
        at = part.end()
        if not text.startswith(",", at):
            break
        at += 1
    return parts, _CALL.match(text, at + 1) if text.startswith(")", at) else None
