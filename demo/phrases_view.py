"""The prompt's phrases: a list that says how strongly each acted in every column, and their overlays on the pictures.

Of a trace the page keeps one small picture of all maps, beside the column's own (`tile_maps`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from demo.rendering import render
from finelip_sdxl.attribution.overlays import overlay
from finelip_sdxl.attribution.phrases import split_phrases
from finelip_sdxl.attribution.trace import AttentionTrace, Phrase
from finelip_sdxl.options import COLUMNS

MAX_PHRASES = 100  # of a column: more would be no list to read, and their maps no small picture
MAX_SIDE = 64  # of a kept map


@dataclass(frozen=True)
class Row:
    """A phrase in all columns: its text, and its number among each column's phrases."""

    text: str
    numbers: Mapping[str, int]


def list_phrases(trace: AttentionTrace | None) -> tuple[Phrase, ...]:
    """The phrases of a column; none without a trace, and none of a prompt that has more than `MAX_PHRASES`."""
    if trace is None or len(split_phrases(trace.text())) > MAX_PHRASES:
        return ()
    return trace.phrases()


def match(texts: Mapping[str, Sequence[str]]) -> list[Row]:
    """Match the phrases of all columns with one another, in the order of the text.

    Columns differ in the syntax of weights that they take out of the prompt, and so in marks and numbers. Phrases with
    the same letters are the same phrase; of phrases that repeat, the first is the first.

    Args:
        texts: by column, the texts of its phrases.

    Examples:
        >>> match({"stock": ["A (red)1.5 star.", "A ring."], "compel": ["A red star."]})[0]
        Row(text='A (red)1.5 star.', numbers={'stock': 0, 'compel': 0})
    """
    rows: dict[tuple[str, int], Row] = {}
    for column, phrases in texts.items():
        seen = Counter[str]()
        for number, text in enumerate(phrases):
            key = letters(text)
            row = rows.setdefault((key, seen[key]), Row(text, {}))
            rows[key, seen[key]] = Row(row.text, {**row.numbers, column: number})
            seen[key] += 1
    return list(rows.values())


def letters(text: str) -> str:
    """The letters of a phrase, by which it is known."""
    return "".join(filter(str.isalpha, text))


def render_phrases(prompt: str, drawn: Mapping[str, Sequence[Phrase]]) -> str:
    """The list of phrases, each a button.

    Args:
        prompt: the prompt of the pictures.
        drawn: by column, its phrases.

    Returns:
        HTML, with all text escaped.
    """
    rows = match({column: [phrase.text for phrase in phrases] for column, phrases in drawn.items()})
    cells = [
        [_cell(column, drawn[column][row.numbers[column]] if column in row.numbers else None) for column in drawn]
        for row in rows
    ]
    return render(
        "phrases",
        prompt=prompt,
        most=MAX_PHRASES,
        columns=[(column, COLUMNS[column], _summary(phrases)) for column, phrases in drawn.items()],
        rows=[(row.text, parts) for row, parts in zip(rows, cells, strict=True)],
        kinds={cell["kind"] for row in cells for cell in row},
    )


def _cell(column: str, phrase: Phrase | None) -> dict[str, str]:
    """What a phrase did in a column."""
    about = {"column": column, "title": COLUMNS[column], "place": "", "percent": "0"}
    if phrase is None:
        return {**about, "kind": "missing", "said": "\N{EM DASH}"}
    if phrase.is_ignored:
        kind = "nowhere" if phrase.is_encoded else "cut"
        return {**about, "kind": kind, "said": kind}
    percent = f"{100 * phrase.strength:.0f}"
    return {
        **about,
        "kind": "acted",
        "said": f"{percent}\N{NO-BREAK SPACE}%",
        "place": phrase.place,
        "percent": percent,
    }


def _summary(phrases: Sequence[Phrase]) -> str:
    """How many phrases acted nowhere."""
    if not phrases:
        return "not known"
    cut = sum(not phrase.is_encoded for phrase in phrases)
    nowhere = sum(phrase.is_ignored for phrase in phrases) - cut
    parts = [f"{count} {word}" for count, word in ((cut, "cut"), (nowhere, "nowhere")) if count]
    return ", ".join(parts) or "all acted"


def tile_maps(trace: AttentionTrace, phrases: Sequence[Phrase], size: tuple[int, int]) -> Image.Image:
    """The heat maps of all phrases as one gray picture, below one another, each with sides of at most `MAX_SIDE`.

    Args:
        trace: the trace of a column.
        phrases: its phrases, at least one.
        size: width and height of its picture.
    """
    width, height = (max(1, round(MAX_SIDE * side / max(size))) for side in size)
    maps = [trace.heat_map((phrase.start, phrase.end), size=(height, width)) for phrase in phrases]
    return Image.fromarray((255 * np.concatenate(maps)).round().astype(np.uint8))


def overlay_phrase(image: Image.Image, tiles: Image.Image, number: int, count: int) -> Image.Image:
    """A picture with the overlay of one of its phrases.

    Args:
        image: the picture.
        tiles: the result of `tile_maps` for its phrases.
        number: the phrase's number among them, from 0.
        count: their number.
    """
    height = tiles.height // count
    heat = tiles.crop((0, number * height, tiles.width, (number + 1) * height))
    return overlay(image, np.asarray(heat, dtype=np.float32) / 255)
