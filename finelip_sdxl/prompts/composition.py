"""What each prompt of a batch is made of at each step: one text, or several by a schedule, an `AND` or a blend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from finelip_sdxl.options import Weighting
from finelip_sdxl.prompts.compel_operators import read_operator
from finelip_sdxl.prompts.lora_tags import take_loras
from finelip_sdxl.prompts.schedules import ScheduledText, describe_steps, split_conjunction

MAX_TEXTS = 200


@dataclass(frozen=True)
class Share:
    """A text of a composition, by its number, and its weight."""

    text: int
    weight: float = 1.0


Rows = tuple[tuple[Share, ...], ...]


@dataclass(frozen=True)
class ComposedText:
    """A text that is encoded by itself.

    Attributes:
        row: place of its prompt in the batch.
        texts: the text for each encoder.
        label: the part of the prompt that it is, and the steps that it is drawn with; empty if it is all of it.
    """

    row: int
    texts: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class Composition:
    """A batch of prompts, taken apart.

    Attributes:
        texts: all texts, each once for each prompt.
        stages: the last of some steps, and the shares of texts that each prompt of the batch has in these.
        is_conjunction: whether shares are of the noise that is predicted, as with `AND`, and not of embeddings.
    """

    texts: tuple[ComposedText, ...]
    stages: tuple[tuple[int, Rows], ...]
    is_conjunction: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether each prompt is one text at all steps."""
        return all(row == (Share(number),) for _, rows in self.stages for number, row in enumerate(rows))

    def at(self, step: int) -> Rows:
        return next(rows for last, rows in self.stages if step <= last)


@dataclass(frozen=True)
class _Part:
    """A part of a prompt, as it is for each encoder, and its weight."""

    texts: tuple[ScheduledText, ...]
    weight: float = 1.0


def compose(
    batches: Sequence[Sequence[str]], syntax: Weighting | None, steps: int | None = None, *, conjoins: bool = True
) -> Composition:
    """Take a batch of prompts apart.

    Args:
        batches: the texts of each encoder.
        syntax: `"compel"` has blends, and `"a1111"`, where `steps` are known, schedules and `AND`.
        steps: number of steps of the drawing; None for no drawing.
        conjoins: whether `AND` is read; A1111 takes it for text in negative prompts.

    Raises:
        ValueError: the encoders' prompts have different parts; the texts are more than 200; or an operator of compel's
            cannot be read.

    Examples:
        >>> composition = compose([["a [red:blue:0.5] fox"]], "a1111", steps=10)
        >>> [(text.texts, text.label) for text in composition.texts]
        [(('a red fox',), 'steps 1–5'), (('a blue fox',), 'steps 6–10')]
    """
    total = steps or 1
    rows = [_parts(texts, syntax, steps is not None, conjoins) for texts in zip(*batches, strict=True)]
    scheduled = [text for parts in rows for part in parts for text in part.texts]
    lasts = sorted({total}.union(*(text.last_steps(total) for text in scheduled)))
    # By prompt, part and text: the ranges of steps
    ranges: dict[tuple[int, int, tuple[str, ...]], list[tuple[int, int]]] = {}
    stages = []
    for before, last in pairwise([0, *lasts]):
        keys = [
            [(row, number, tuple(text.at(last, total) for text in part.texts)) for number, part in enumerate(parts)]
            for row, parts in enumerate(rows)
        ]
        stages.append((last, keys))
        for key in (key for of_row in keys for key in of_row):
            known = ranges.setdefault(key, [])
            first = known.pop()[0] if known and known[-1][1] == before else before + 1
            known.append((first, last))
        if len(ranges) > MAX_TEXTS:
            raise ValueError(
                f"The prompts become more than {MAX_TEXTS} different texts in {total:,} steps, and each is encoded:"
                " write fewer alternations, or draw fewer prompts at once."
            )
    ordered = sorted(ranges, key=lambda key: key[:2])  # the order within is that of the steps
    numbers = {key: number for number, key in enumerate(ordered)}
    texts = tuple(
        ComposedText(row, texts, _label(rows[row], number, ranges[row, number, texts], total))
        for row, number, texts in ordered
    )
    by_stage = tuple(
        (last, tuple(tuple(Share(numbers[key], rows[key[0]][key[1]].weight) for key in of_row) for of_row in keys))
        for last, keys in stages
    )
    is_conjunction = syntax == "a1111" and any(len(parts) > 1 for parts in rows)
    return Composition(texts, by_stage, is_conjunction)


def _label(parts: Sequence[_Part], number: int, ranges: Sequence[tuple[int, int]], total: int) -> str:
    of_parts = f"part {number + 1} of {len(parts)}, weight {parts[number].weight:.3g}" if len(parts) > 1 else ""
    of_steps = "" if [*ranges] == [(1, total)] else describe_steps(ranges)
    return ", ".join(filter(None, [of_parts, of_steps]))


def _parts(texts: Sequence[str], syntax: Weighting | None, is_drawing: bool, conjoins: bool) -> list[_Part]:
    """The parts of one prompt, which has a text for each encoder."""
    if syntax == "a1111" and is_drawing:
        split = [_split(text, conjoins) for text in texts]
        read = ScheduledText.parse
    elif syntax == "compel":
        split = [_split_blend(text) for text in texts]
        read = ScheduledText.constant
    else:
        return [_Part(tuple(map(ScheduledText.constant, texts)))]
    first, *others = ([weight for _, weight in parts] for parts in split)
    if any(other != first for other in others):
        raise ValueError(
            "The prompts of the two text encoders are joined from different parts, by AND or .blend(): write as many"
            " parts, with the same weights, in both."
        )
    return [
        _Part(tuple(read(text) for text, _ in parts), weight)
        for parts, weight in zip(zip(*split, strict=True), first, strict=True)
    ]


def _split(text: str, conjoins: bool) -> list[tuple[str, float]]:
    plain, loras = take_loras(text)  # A1111 takes them out first
    parts = split_conjunction(plain) if conjoins else [(plain, 1.0)]
    return [(parts[0][0] + "".join(map(str, loras)), parts[0][1]), *parts[1:]]


def _split_blend(text: str) -> list[tuple[str, float]]:
    plain, loras = take_loras(text)
    operator = read_operator(plain)
    if operator is None or operator.name != "blend":
        return [(text, 1.0)]
    parts = [*zip(operator.parts, operator.shares, strict=True)]
    return [(parts[0][0] + "".join(map(str, loras)), parts[0][1]), *parts[1:]]
