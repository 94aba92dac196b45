"""The miniature's world with a word for a color that the miniature does not know: something to fine-tune it on.

The word stands in place of a color's own. The color itself is not new: the miniature's VAE, which stays as it is, keeps
its eight colors alone.

Import this before anything else of the miniature: what draws and scores reads the world's colors once.
"""

from __future__ import annotations

import dataclasses
import sys

from finelip_sdxl.miniature.world import COLORS, Scene, make_scene

if "finelip_sdxl.miniature.drawing" in sys.modules:
    raise ImportError("new_color must be imported before finelip_sdxl.miniature.drawing and what uses it.")

NEW_COLOR = "stone"  # the tokenizer spells it in three pieces
COLORS[NEW_COLOR] = COLORS.pop("purple")


def make_new_scene(name: str) -> Scene:
    """A scene in which everything that had one of its colors has the one of the new word."""
    scene = make_scene(name)
    replaced = scene.objects[0].color
    objects = tuple(
        dataclasses.replace(thing, color=NEW_COLOR) if thing.color == replaced else thing for thing in scene.objects
    )
    return dataclasses.replace(scene, objects=objects)
