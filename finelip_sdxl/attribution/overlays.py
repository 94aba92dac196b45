"""Pictures that show heat maps: one phrase's, and a sheet of all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageFilter

from finelip_sdxl.images import MIN_SIDE, label_grid

if TYPE_CHECKING:
    from finelip_sdxl.attribution.trace import AttentionTrace, Phrase

_LINE = (255, 122, 0)  # around the places where a map has at least half of its highest value
_FADED, _MIDDLE = 0.3, 115  # contrast of everything else, and its gray

COLUMNS, MAX_SIDE, MAX_PIXELS = 4, 512, 48_000_000  # of a sheet; more columns and smaller pictures with many phrases


def overlay(image: Image.Image, heat: np.ndarray[Any, Any]) -> Image.Image:
    """A picture in its own colors where a map is high, and faded to gray elsewhere; a line stands at half height.

    Args:
        image: the picture.
        heat: values from 0 to 1, (height, width), of any size. Where all are 0, all of the picture is faded.

    Raises:
        TypeError: `image` is no picture of Pillow's.

    Examples:
        >>> heat = np.zeros((8, 8), dtype=np.float32)
        >>> heat[:4, :4] = 1
        >>> shown = overlay(Image.new("RGB", (64, 64), "red"), heat)
        >>> shown.getpixel((8, 8)), len(set(shown.getpixel((56, 56))))
        ((255, 0, 0), 1)
    """
    if not isinstance(image, Image.Image):
        kind = type(image).__name__
        raise TypeError(f"`image` is of type {kind}; expected a PIL.Image, as a pipeline returns by default.")
    picture = image.convert("RGB")
    mask = Image.fromarray((255 * heat).round().astype(np.uint8)).resize(picture.size, Image.Resampling.BILINEAR)
    faded = picture.convert("L").point(lambda gray: round(_FADED * gray + _MIDDLE)).convert("RGB")
    shown = Image.composite(picture, faded, mask)
    inside = mask.point(lambda value: 255 * (value >= 128))
    width = 2 * max(1, min(picture.size) // 160) + 1
    around = inside.filter(ImageFilter.MaxFilter(width))
    line = np.asarray(around) > np.asarray(inside)
    shown.paste(_LINE, mask=Image.fromarray(line))
    return shown


def describe(phrase: Phrase) -> str:
    """What a phrase did, in a few words, such as `"top left, 74 %"`."""
    if not phrase.is_encoded:
        return "cut: it never reached the picture"
    if phrase.is_ignored:
        return "acted nowhere"
    return f"{phrase.place}, {phrase.strength:.0%}".replace("%", " %")


def heat_map_sheet(image: Image.Image, trace: AttentionTrace, index: int = 0) -> Image.Image:
    """A picture and the overlay of each phrase of its prompt, with its text and what it did.

    Args:
        image: the picture.
        trace: the trace of its drawing.
        index: number of the picture in that call's output.
    """
    phrases = trace.phrases(index)
    room = math.sqrt(MAX_PIXELS / (len(phrases) + 1))
    factor = min(1.0, max(MIN_SIDE, min(MAX_SIDE, room)) / min(image.size))
    small = image.convert("RGB").resize((round(image.width * factor), round(image.height * factor)))
    shown = [small, *(trace.overlay(small, (phrase.start, phrase.end), index) for phrase in phrases)]
    texts = ["The picture", *(f"{phrase.text}\n{describe(phrase)}" for phrase in phrases)]
    columns = min(len(shown), max(COLUMNS, round(math.sqrt(len(shown)))))
    missing = -len(shown) % columns
    shown += [Image.new("RGB", small.size, "white")] * missing
    texts += [""] * missing
    rows: list[Sequence[Image.Image]] = [shown[first : first + columns] for first in range(0, len(shown), columns)]
    captions = [texts[first : first + columns] for first in range(0, len(texts), columns)]
    title = (
        "In color is where each phrase acted most, inside the line at least half as much. In percent: its share there"
        " of the attention that all phrases get."
    )
    return label_grid(rows, [""] * len(rows), [""] * columns, title=title, captions=captions)
