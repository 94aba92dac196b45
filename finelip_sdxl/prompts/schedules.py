"""Prompts that change while a picture is drawn, as A1111 reads them: `[a:b:0.5]`, `[a|b]`, and `a AND b`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

from finelip_sdxl.prompts.lora_tags import take_loras
from finelip_sdxl.prompts.weighting import MAX_DEPTH

# Text without the signs of a schedule; a backslash takes the meaning of the next character.
_PLAIN = re.compile(r"(?:[^\\\[\]():|]|\\.)+")
_NUMBER = re.compile(r"\s*([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")
_AND = re.compile(r"\bAND\b")
_WEIGHT = re.compile(r"\s*:\s*([+-]?(?:\d+\.?|\d*\.\d+))\s*\Z")


@dataclass(frozen=True)
class _Edited:
    """`[before:after:when]`, with `when` as it is written."""

    before: _Nodes
    after: _Nodes
    when: str

    def last_step(self, steps: int) -> int:
        """The last step with the first of the texts: a number with a point is a share of the steps."""
        number = float(self.when) * (steps if "." in self.when else 1)
        return int(max(-1.0, min(number, float(steps))))


@dataclass(frozen=True)
class _Alternating:
    """`[one|other]`, a text for each step in turn."""

    texts: tuple[_Nodes, ...]


_Nodes = Sequence[str | _Edited | _Alternating]


@dataclass(frozen=True)
class ScheduledText:
    """A prompt whose text may be another at each step.

    Source: A1111 (`modules/prompt_parser.py`), whose grammar this agrees with. A bracket whose inside does not parse is
    text, and so is a whole prompt with a `|` or a lone backslash outside of what parses.

    Examples:
        >>> text = ScheduledText.parse("a [red:blue:0.5] fox")
        >>> text.changes, text.at(5, steps=10), text.at(6, steps=10)
        (True, 'a red fox', 'a blue fox')
        >>> [ScheduledText.parse("a [red|blue|] fox").at(step, steps=10) for step in (1, 2, 3, 4)]
        ['a red fox', 'a blue fox', 'a  fox', 'a red fox']
    """

    nodes: _Nodes
    loras: str = ""

    @classmethod
    def parse(cls, text: str) -> ScheduledText:
        """Read a prompt.

        Raises:
            ValueError: it has more than 50 nested brackets.
        """
        plain, loras = take_loras(text)  # A1111 takes them out first
        return cls(_parse(plain), "".join(map(str, loras)))

    @classmethod
    def constant(cls, text: str) -> ScheduledText:
        """A prompt that is the same at each step, whatever it holds."""
        return cls((text,))

    @property
    def changes(self) -> bool:
        """Whether it holds a schedule."""
        return any(not isinstance(node, str) for node in self.nodes)

    def at(self, step: int, steps: int) -> str:
        """The text of one of the steps, which are counted from 1."""
        return "".join(_text_at(self.nodes, step, steps)) + self.loras

    def last_steps(self, steps: int) -> set[int]:
        """The steps after which the text may be another."""
        return set(_last_steps(self.nodes, steps))


def is_scheduled(text: str) -> bool:
    """Whether A1111 reads a schedule in a prompt or in a part of it.

    Examples:
        >>> is_scheduled("a [red:blue:0.5] fox"), is_scheduled("a [red] (fox:1.2) AND a hare")
        (True, False)
    """
    return any(ScheduledText.parse(part).changes for part, _ in split_conjunction(text))


def split_conjunction(text: str) -> list[tuple[str, float]]:
    """The parts of a prompt with `AND`, and their weights, as A1111 splits it; a prompt without is one part.

    Raises:
        ValueError: a weight is too large for a number.

    Examples:
        >>> split_conjunction("a cat :1.2 AND a dog:.5 AND a BRAND")
        [('a cat', 1.2), (' a dog', 0.5), (' a BRAND', 1.0)]
    """
    parts = _AND.split(text)
    return [_weighted(part) for part in parts] if len(parts) > 1 else [(text, 1.0)]


def describe_steps(ranges: Sequence[tuple[int, int]]) -> str:
    """Ranges of steps for people, the middle ones of many left out.

    Examples:
        >>> describe_steps([(1, 15)]), describe_steps([(3, 3)]), describe_steps([(n, n) for n in range(1, 30, 2)])
        ('steps 1–15', 'step 3', 'steps 1, 3, 5, … 29')
    """
    texts = [f"{first}" if first == last else f"{first}–{last}" for first, last in ranges]
    if len(texts) > 4:
        texts = [*texts[:3], f"… {texts[-1]}"]
    single = len(ranges) == 1 and ranges[0][0] == ranges[0][1]
    return f"{'step' if single else 'steps'} {', '.join(texts)}"


def _weighted(part: str) -> tuple[str, float]:
    found = _WEIGHT.search(part)
    if found is None:
        return part, 1.0
    weight = float(found[1])
    if abs(weight) == inf:
        raise ValueError(f"{part!r:.60} has a weight that is no number of a usual size: write one such as 1.2.")
    return part[: found.start()], weight


def _parse(text: str) -> _Nodes:
    """The nodes of a whole prompt; a bracket that does not parse is text."""
    nodes: list[str | _Edited | _Alternating] = []
    at = 0
    while at < len(text):
        if plain := _PLAIN.match(text, at):
            nodes.append(plain[0])
            at = plain.end()
        elif text[at] in "([" and (found := _bracket(text, at, depth=1)):
            inside, at = found
            nodes += inside
        elif text[at] in "()[]:":
            nodes.append(text[at])
            at += 1
        else:  # `|`, or a lone backslash: A1111 gives up
            return (text,)
    return tuple(nodes)


def _bracket(text: str, start: int, depth: int) -> tuple[_Nodes, int] | None:
    """The nodes of what a bracket opens, and one past its partner; None if it does not parse."""
    if depth > MAX_DEPTH:
        raise ValueError(f"The prompt has more than {MAX_DEPTH} nested brackets: take some out.")
    fields: list[list[str | _Edited | _Alternating]] = [[]]
    borders = [start]  # the brackets, and the signs between the fields
    at = start + 1
    while at < len(text) and text[at] not in ")]":
        if plain := _PLAIN.match(text, at):
            fields[-1].append(plain[0])
            at = plain.end()
        elif text[at] in ":|":
            borders.append(at)
            fields.append([])
            at += 1
        elif text[at] in "([" and (found := _bracket(text, at, depth + 1)):
            inside, at = found
            fields[-1] += inside
        else:
            return None
    nodes = _closed(text, [*borders, at], fields) if at < len(text) else None
    return None if nodes is None else (nodes, at + 1)


def _closed(text: str, borders: Sequence[int], fields: Sequence[_Nodes]) -> _Nodes | None:
    """The nodes of a bracket, its fields and its partner."""
    signs = [text[border] for border in borders]
    raw = [text[first + 1 : last] for first, last in pairwise(borders)]
    match "".join(signs):
        case "()" | "[]":
            return (signs[0], *fields[0], signs[-1])
        case "(:)":
            return ("(", *fields[0], ":", *fields[1], ")")
        case "[:]" | "[::]" if number := _NUMBER.fullmatch(raw[-1]):
            before, after = fields[:2] if len(fields) == 3 else ((), fields[0])
            return (_Edited(tuple(before), tuple(after), number[1]),)
        case joined if re.fullmatch(r"\[\|+\]", joined):
            return (_Alternating(tuple(map(tuple, fields))),)
    return None


def _text_at(nodes: _Nodes, step: int, steps: int) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, str):
            yield node
        elif isinstance(node, _Edited):
            yield from _text_at(node.before if step <= node.last_step(steps) else node.after, step, steps)
        else:
            yield from _text_at(node.texts[(step - 1) % len(node.texts)], step, steps)


def _last_steps(nodes: _Nodes, steps: int) -> Iterator[int]:
    for node in nodes:
        if isinstance(node, _Edited):
            if node.last_step(steps) >= 1:
                yield node.last_step(steps)
            yield from _last_steps(node.before, steps)
            yield from _last_steps(node.after, steps)
        elif isinstance(node, _Alternating):
            yield from range(1, steps + 1)
