"""Says of a picture which objects it shows where: no learned judge, since every possible look is known.

Each of the nine cells is held against every look (12 shapes × 8 colors × 2 sizes, and nothing at all) on the
picture's background; the nearest by squared difference of the pixels is what the cell shows. An object is clean if it
is that drawing but for a small error; a smeared object, or a mixture of two, is not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
from PIL import Image

from .drawing import CELL_SIZE, IMAGE_SIZE, LOOKS, coverage
from .world import BACKGROUNDS, COLORS, PLACES, SIZES, Scene, SceneObject

CLEAN_ERROR = 0.23
"""Highest error (`drawing_errors`) of a clean object.

benchmarks/miniature_clean.py chooses it: none of 1,800 objects of unseen drawings that went through the miniature's VAE
and back has a larger one, and 99 in 100 objects with a blur of 2 pixels do."""


@dataclass(frozen=True)
class PictureReading:
    """What a picture shows: an object, or None for nothing, in each place in the order of `PLACES`."""

    objects: tuple[SceneObject | None, ...]
    background: str


class Thing(Protocol):
    """An object to look for: a `SceneObject`, or one that a text describes, whose size may be unknown (None)."""

    @property
    def place(self) -> str: ...
    @property
    def shape(self) -> str: ...
    @property
    def color(self) -> str: ...
    @property
    def size(self) -> str | None: ...


@dataclass(frozen=True)
class ObjectScore:
    """Whether a picture has an object right.

    Attributes:
        shape, color, size: Whether the object's cell shows it so; the size is None where it was unknown.
        place: Whether the object's cell shows its shape and color, or at least looks more like it than any other cell.
            A twin elsewhere does not count against an object that stands where it should.
        clean: Whether the object's cell shows a clean object, whichever it is.
    """

    shape: bool
    color: bool
    size: bool | None
    place: bool
    clean: bool

    @property
    def right(self) -> bool:
        """Right in shape, color and place, the three that a caption always says."""
        return self.shape and self.color and self.place


def read_picture(image: Image.Image) -> PictureReading:
    """Reads the nine objects and the background off a picture of the miniature world.

    Args:
        image: Any size and mode; anything but 192 × 192 RGB is resized and converted first.

    Examples:
        >>> from finelip_sdxl.miniature.drawing import draw_scene
        >>> from finelip_sdxl.miniature.world import make_scene
        >>> scene = make_scene("unseen-0")
        >>> read_picture(draw_scene(scene)).objects == scene.objects
        True
    """
    cells = _cells(image)
    background = _nearest_background(cells)
    nearest = _distances(cells, background).argmin(axis=1)
    objects = tuple(
        SceneObject(place, *LOOKS[look]) if look < len(LOOKS) else None
        for place, look in zip(PLACES, nearest, strict=True)
    )
    return PictureReading(objects, background)


def score_picture(image: Image.Image, scene: Scene) -> tuple[ObjectScore, ...]:
    """A score for each of the scene's nine objects, in their order.

    Examples:
        >>> from finelip_sdxl.miniature.drawing import draw_scene
        >>> from finelip_sdxl.miniature.world import make_scene
        >>> scene = make_scene("unseen-0")
        >>> all(score.right for score in score_picture(draw_scene(scene), scene))
        True
    """
    return score_objects(image, scene.objects)


def score_objects(image: Image.Image, objects: Iterable[Thing]) -> tuple[ObjectScore, ...]:
    """A score for each object, in their order, whatever else the picture shows and however many share a place.

    Examples:
        >>> from finelip_sdxl.miniature.drawing import draw_scene
        >>> from finelip_sdxl.miniature.parsing import parse_description
        >>> from finelip_sdxl.miniature.world import make_scene
        >>> described = parse_description("The top left holds a blue leaf. In the top center there is a red moon.")
        >>> [score.right for score in score_objects(draw_scene(make_scene("unseen-0")), described)]
        [True, False]
    """
    cells = _cells(image)
    background = _nearest_background(cells)
    distances = _distances(cells, background)
    nearest = distances.argmin(axis=1)
    clean = _errors(distances, background) <= CLEAN_ERROR
    scores = []
    for thing in objects:
        place = PLACES.index(thing.place)
        seen = LOOKS[nearest[place]] if nearest[place] < len(LOOKS) else ("", "", "")
        # Of either size: a caption need not say it.
        alike = [LOOKS.index((thing.shape, thing.color, size)) for size in SIZES]
        best_place = distances[:, alike].min(axis=1).argmin()
        shape, color = seen[0] == thing.shape, seen[1] == thing.color
        size = None if thing.size is None else seen[2] == thing.size
        stands = bool(best_place == place) or (shape and color)
        scores.append(ObjectScore(shape, color, size, stands, bool(clean[place])))
    return tuple(scores)


def drawing_errors(image: Image.Image) -> np.ndarray:
    """The errors of the nine objects in a picture, from the nearest clean drawing of each, in pixels along its outline.

    An error is the squared difference of the cell's pixels, where 1 is the contrast of object and background, for each
    pixel of outline. So it is the same for every color and shape: about 0.3 after a Gaussian blur with a standard
    deviation of 2 pixels, 0.5 after one of 3.

    Returns:
        float32, (9,), in the order of `PLACES`; infinite where nothing is shown.

    Examples:
        >>> from PIL import ImageFilter
        >>> from finelip_sdxl.miniature.drawing import draw_scene
        >>> from finelip_sdxl.miniature.world import make_scene
        >>> smeared = draw_scene(make_scene("unseen-0")).filter(ImageFilter.GaussianBlur(3))
        >>> bool((drawing_errors(smeared) > 0.5).all())
        True
    """
    cells = _cells(image)
    background = _nearest_background(cells)
    return _errors(_distances(cells, background), background)


def _cells(image: Image.Image) -> np.ndarray:
    """The picture's nine cells, (9, 64 · 64, 3), from 0 to 1."""
    if image.size != (IMAGE_SIZE, IMAGE_SIZE):
        image = image.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    grid = pixels.reshape(3, CELL_SIZE, 3, CELL_SIZE, 3).swapaxes(1, 2)
    return grid.reshape(len(PLACES), CELL_SIZE * CELL_SIZE, 3)


def _nearest_background(cells: np.ndarray) -> str:
    """The background nearest to the cells' corners, which no object reaches."""
    corner = np.zeros((CELL_SIZE, CELL_SIZE), dtype=bool)
    corner[:4, :4] = corner[:4, -4:] = corner[-4:, :4] = corner[-4:, -4:] = True
    color = np.median(cells[:, corner.ravel()], axis=(0, 1)) * 255
    return min(BACKGROUNDS, key=lambda name: float(np.square(color - BACKGROUNDS[name]).sum()))


def _distances(cells: np.ndarray, background: str) -> np.ndarray:
    """Squared differences between cells and looks, (9, looks + 1)."""
    looks = _looks(background)
    flat = cells.reshape(len(cells), -1)
    distances: np.ndarray = np.square(flat).sum(axis=1)[:, None] - 2 * flat @ looks.T + _squares(background)
    return distances


def _errors(distances: np.ndarray, background: str) -> np.ndarray:
    """The distances to the nearest looks, for each pixel of outline and of full contrast, (9,)."""
    outlines = _outlines(background)[distances.argmin(axis=1)]
    errors = np.full(len(distances), np.inf, dtype=np.float32)
    # Rounding may leave a drawing a little less than nothing from itself.
    np.divide(distances.min(axis=1).clip(0), outlines, out=errors, where=outlines > 0)
    return errors


@cache
def _outlines(background: str) -> np.ndarray:
    """The length of each look's outline in pixels, times its squared contrast; last 0 for nothing; (looks + 1,)."""
    ground = np.array(BACKGROUNDS[background], dtype=np.float32) / 255
    outlines = []
    for shape, color, size in LOOKS:
        mask = coverage(shape, size)
        length = np.hypot(np.diff(mask, axis=0)[:, :-1], np.diff(mask, axis=1)[:-1]).sum()
        outlines.append(length * np.square(np.array(COLORS[color], dtype=np.float32) / 255 - ground).sum())
    return np.array([*outlines, 0], dtype=np.float32)


@cache
def _squares(background: str) -> np.ndarray:
    """The sum of the squared pixels of each look, (looks + 1,)."""
    squares: np.ndarray = np.square(_looks(background)).sum(axis=1)
    return squares


@cache
def _looks(background: str) -> np.ndarray:
    """A cell's pixels for every look, and last for nothing: (looks + 1, 64 · 64 · 3)."""
    ground = np.array(BACKGROUNDS[background], dtype=np.float32) / 255
    cells = [
        ground + coverage(shape, size)[..., None] * (np.array(COLORS[color], dtype=np.float32) / 255 - ground)
        for shape, color, size in LOOKS
    ]
    cells.append(np.broadcast_to(ground, cells[0].shape))
    return np.stack(cells).reshape(len(cells), -1)
