"""Marks on a picture: which of the described objects it shows right, and which wrong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from .scoring import ObjectScore, Thing
from .world import PLACES

RIGHT = (15, 146, 88)
WRONG = (208, 38, 50)
_WHITE = (255, 255, 255)
# A light line around the frames, for dark backgrounds.
_HALO = (255, 255, 255, 110)
# Marks are drawn larger by this factor and then reduced, for smooth edges.
_OVERSAMPLING = 4
# All lengths below are in this fraction of a cell.
_PARTS = 160
_CORNER = 13
_CHECK = (((-4.5, 0.5), (-1.5, 3.5), (4.5, -3)),)
_CROSS = (((-3.5, -3.5), (3.5, 3.5)), ((-3.5, 3.5), (3.5, -3.5)))


def mark_objects(
    image: Image.Image, described: Sequence[Thing], scores: Sequence[ObjectScore], scale: int = 3
) -> Image.Image:
    """The enlarged picture with frames around its described objects: green with a check, or red with a cross.

    Objects are numbered in the order of the text, from 1. If a text contradicts itself and has several objects in one
    place, the last two are marked, above and below, and the frame is green only if both are right.

    Args:
        image: a picture of the miniature world.
        described: the objects in its prompt, from `parse_description`.
        scores: the scores of these objects, from `score_objects`.
        scale: factor of the enlargement.

    Raises:
        ValueError: there is not one score for each object.

    Examples:
        >>> from finelip_sdxl.miniature.drawing import draw_scene
        >>> from finelip_sdxl.miniature.parsing import parse_description
        >>> from finelip_sdxl.miniature.scoring import score_objects
        >>> from finelip_sdxl.miniature.world import make_scene
        >>> picture = draw_scene(make_scene("unseen-0"))
        >>> described = parse_description("The top left holds a blue leaf. In the top center there is a red moon.")
        >>> mark_objects(picture, described, score_objects(picture, described)).size
        (576, 576)
    """
    if len(described) != len(scores):
        raise ValueError(f"Got {len(described)} objects and {len(scores)} scores; pass one score for each object.")
    marks = defaultdict[str, list[tuple[int, bool]]](list)
    for number, (thing, score) in enumerate(zip(described, scores, strict=True), start=1):
        marks[thing.place].append((number, score.right))
    width, height = image.width * scale, image.height * scale
    marked = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    for place, marks_here in marks.items():
        row, column = divmod(PLACES.index(place), 3)
        left, top = column * width // 3, row * height // 3
        overlay = _draw_marks((width // 3, height // 3), marks_here[-2:])
        marked.paste(overlay, (left, top), overlay)
    return marked


def _draw_marks(size: tuple[int, int], marks: list[tuple[int, bool]]) -> Image.Image:
    """A frame with one or two marks for a cell of this size, on a transparent background."""
    width, height = size[0] * _OVERSAMPLING, size[1] * _OVERSAMPLING
    part = min(width, height) / _PARTS
    cell = Image.new("RGBA", (width, height))
    pen = ImageDraw.Draw(cell)
    frame = RIGHT if all(right for _, right in marks) else WRONG
    for inset, thickness, color in ((0.75, 4, _HALO), (2, 3, frame)):
        edge = inset * part
        box = (edge, edge, width - 1 - edge, height - 1 - edge)
        pen.rounded_rectangle(box, radius=(14 - inset) * part, outline=color, width=round(thickness * part))
    for (number, right), y in zip(marks, (_CORNER * part, height - _CORNER * part), strict=False):
        for x in (_CORNER * part, width - _CORNER * part):
            pen.circle((x, y), 11 * part, fill=_WHITE)
            pen.circle((x, y), 10 * part, fill=RIGHT if right else WRONG)
        font = ImageFont.load_default(size=(14 if number < 10 else 11) * part)
        pen.text((_CORNER * part, y), str(number), _WHITE, font, anchor="mm", stroke_width=0.4 * part)
        for stroke in _CHECK if right else _CROSS:
            points = [(width + (dx - _CORNER) * part, y + dy * part) for dx, dy in stroke]
            pen.line(points, fill=_WHITE, width=round(2.4 * part))
            for point in points:  # round ends and bends
                pen.circle(point, 1.2 * part, fill=_WHITE)
    return cell.resize(size, Image.Resampling.BOX)
