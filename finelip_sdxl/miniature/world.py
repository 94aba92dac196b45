"""The miniature world: scenes of nine objects on a 3 × 3 grid, known exactly.

A scene is made from a name, such as `"unseen-17"`, and is the same on every machine.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

PLACES = (
    "top left",
    "top center",
    "top right",
    "middle left",
    "center",
    "middle right",
    "bottom left",
    "bottom center",
    "bottom right",
)
SHAPES = (
    "circle",
    "square",
    "triangle",
    "star",
    "heart",
    "diamond",
    "cross",
    "ring",
    "moon",
    "arrow",
    "hourglass",
    "leaf",
)
COLORS = {
    "red": (222, 60, 54),
    "orange": (240, 140, 42),
    "yellow": (247, 208, 56),
    "green": (66, 168, 84),
    "teal": (38, 184, 196),
    "blue": (54, 96, 214),
    "purple": (138, 78, 190),
    "pink": (244, 132, 186),
}
SIZES = ("small", "large")
# The attributes of an object, and their values in a fixed order.
ATTRIBUTES = {"place": PLACES, "shape": SHAPES, "color": tuple(COLORS), "size": SIZES}
BACKGROUNDS = {
    "paper": (250, 247, 240),
    "sand": (232, 220, 196),
    "mist": (206, 216, 224),
    "night": (28, 32, 48),
}


@dataclass(frozen=True)
class SceneObject:
    """One object: its place and its look."""

    place: str
    shape: str
    color: str
    size: str


@dataclass(frozen=True)
class Scene:
    """Nine objects of different shapes, one in each place in the order of `PLACES`, before a background."""

    objects: tuple[SceneObject, ...]
    background: str


def make_scene(name: str) -> Scene:
    """The scene of this name; equal names have equal scenes on every machine.

    Examples:
        >>> make_scene("unseen-0") == make_scene("unseen-0")
        True
    """
    rng = random.Random(f"scene {name}")
    shapes = rng.sample(SHAPES, len(PLACES))
    # Few colors in a scene please the eye, and some objects share a color, which captions can link.
    palette = rng.sample(list(COLORS), rng.randint(4, 7))
    objects = tuple(_make_object(place, shape, palette, rng) for place, shape in zip(PLACES, shapes, strict=True))
    return Scene(objects, rng.choice(list(BACKGROUNDS)))


def make_family(name: str, count: int, shared: int) -> tuple[list[Scene], list[int]]:
    """Scenes that share their background and some objects, and cannot be told apart by these.

    Args:
        name: name of the family; equal names have equal families on every machine.
        count: number of scenes.
        shared: number of objects that are the same in all of them.

    Returns:
        The scenes, and the indices of the shared objects in `Scene.objects`, in random order.

    Examples:
        >>> (first, second), shared = make_family("unseen-0", count=2, shared=4)
        >>> [first.objects[k] == second.objects[k] for k in shared]
        [True, True, True, True]
    """
    rng = random.Random(f"family {name}")
    parent = make_scene(name)
    same = rng.sample(range(len(PLACES)), shared)
    taken = {parent.objects[k].shape for k in same}
    palette = sorted({thing.color for thing in parent.objects})
    scenes = []
    for _ in range(count):
        shapes = iter(rng.sample([shape for shape in SHAPES if shape not in taken], len(PLACES) - shared))
        objects = tuple(
            thing if k in same else _make_object(thing.place, next(shapes), palette, rng)
            for k, thing in enumerate(parent.objects)
        )
        scenes.append(Scene(objects, parent.background))
    return scenes, same


def _make_object(place: str, shape: str, palette: list[str], rng: random.Random) -> SceneObject:
    return SceneObject(place, shape, rng.choice(palette), rng.choice(SIZES))
