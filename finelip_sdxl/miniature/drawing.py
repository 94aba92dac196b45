"""Draws scenes: flat, anti-aliased shapes on 192 × 192 pixels, 64 × 64 for each place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw

from .world import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, Scene

IMAGE_SIZE = 192
CELL_SIZE = 64
RADIUS = {"small": 17.0, "large": 26.0}
_OVERSAMPLING = 8


@cache
def coverage(shape: str, size: str) -> np.ndarray:
    """How much of each pixel of a cell the shape covers, from 0 to 1: float32 of (64, 64)."""
    big = CELL_SIZE * _OVERSAMPLING
    mask = Image.new("L", (big, big), 0)
    _draw_shape(mask, shape, big / 2, RADIUS[size] * _OVERSAMPLING)
    small = mask.resize((CELL_SIZE, CELL_SIZE), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255


def draw_pixels(scene: Scene) -> np.ndarray:
    """The scene as float32 of (192, 192, 3), from 0 to 1."""
    background = np.array(BACKGROUNDS[scene.background], dtype=np.float32) / 255
    pixels = np.tile(background, (IMAGE_SIZE, IMAGE_SIZE, 1))
    for thing in scene.objects:
        row, column = divmod(PLACES.index(thing.place), 3)
        cell = pixels[row * CELL_SIZE : (row + 1) * CELL_SIZE, column * CELL_SIZE : (column + 1) * CELL_SIZE]
        alpha = coverage(thing.shape, thing.size)[..., None]
        color = np.array(COLORS[thing.color], dtype=np.float32) / 255
        cell += alpha * (color - cell)
    return pixels


def draw_scene(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of 192 × 192 pixels."""
    return Image.fromarray((draw_pixels(scene) * 255 + 0.5).astype(np.uint8))


def draw_batch(scenes: Sequence[Scene]) -> torch.Tensor:
    """The scenes' pictures as a VAE or a CLIP of the miniature takes them: (scenes, 3, 192, 192), from -1 to 1."""
    pixels = np.stack([draw_pixels(scene) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2) * 2 - 1


def _draw_shape(mask: Image.Image, shape: str, center: float, radius: float) -> None:
    """Draws a white shape around (center, center) on a black mask; no part of it is further off than 1.1 radii."""
    if shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}; expected one of {', '.join(SHAPES)}")
    pen = ImageDraw.Draw(mask)

    def at(x: float, y: float) -> tuple[float, float]:
        return center + x * radius, center + y * radius

    def disc(x: float, y: float, r: float, fill: int = 255) -> None:
        pen.ellipse([*at(x - r, y - r), *at(x + r, y + r)], fill=fill)

    if shape == "circle":
        disc(0, 0, 1)
    elif shape == "square":
        pen.rectangle([*at(-0.86, -0.86), *at(0.86, 0.86)], fill=255)
    elif shape == "triangle":
        pen.polygon([at(0, -0.95), at(1.05, 0.85), at(-1.05, 0.85)], fill=255)
    elif shape == "star":
        corners = []
        for k in range(10):
            angle, reach = math.pi * (k / 5 - 0.5), 1.1 if k % 2 == 0 else 0.45
            corners.append(at(reach * math.cos(angle), reach * math.sin(angle) + 0.08))
        pen.polygon(corners, fill=255)
    elif shape == "heart":
        disc(-0.5, -0.38, 0.52)
        disc(0.5, -0.38, 0.52)
        pen.polygon([at(-0.97, -0.15), at(-0.5, -0.5), at(0.5, -0.5), at(0.97, -0.15), at(0, 1)], fill=255)
    elif shape == "diamond":
        pen.polygon([at(0, -1.1), at(0.75, 0), at(0, 1.1), at(-0.75, 0)], fill=255)
    elif shape == "cross":
        pen.rectangle([*at(-0.33, -1), *at(0.33, 1)], fill=255)
        pen.rectangle([*at(-1, -0.33), *at(1, 0.33)], fill=255)
    elif shape == "ring":
        disc(0, 0, 1.03)
        disc(0, 0, 0.55, fill=0)
    elif shape == "moon":
        disc(-0.1, 0, 1.03)
        disc(0.38, -0.12, 0.82, fill=0)
    elif shape == "arrow":
        pen.polygon([at(1.1, 0), at(0.1, -0.9), at(0.1, 0.9)], fill=255)
        pen.rectangle([*at(-1.05, -0.32), *at(0.15, 0.32)], fill=255)
    elif shape == "hourglass":
        pen.polygon([at(-0.9, -1), at(0.9, -1), at(-0.9, 1), at(0.9, 1)], fill=255)
    elif shape == "leaf":
        # A leaf is where two discs overlap, from the bottom left to the top right.
        other = Image.new("L", mask.size, 0)
        ImageDraw.Draw(other).ellipse([*at(-1.62, -1.62), *at(0.78, 0.78)], fill=255)
        pen.ellipse([*at(-0.78, -0.78), *at(1.62, 1.62)], fill=255)
        mask.paste(ImageChops.multiply(mask, other))


# Every look that an object can have, in a fixed order: what the scorer compares a cell with.
LOOKS = tuple((shape, color, size) for shape in SHAPES for color in COLORS for size in SIZES)
