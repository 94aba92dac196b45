"""A color that the miniature has never seen, under a word that it does not know: something to fine-tune it on.

Import this before anything else of the miniature: what draws and scores reads the world's colors once.
"""

from __future__ import annotations

import dataclasses
import sys

from finelip_sdxl.miniature.world import COLORS, Scene, make_scene

if "finelip_sdxl.miniature.drawing" in sys.modules:
    raise ImportError("new_color must be imported before finelip_sdxl.miniature.drawing and what uses it.")

# The tokenizer spells the word in three pieces; the VAE, which stays as it is, keeps the color apart from all others.
NEW_COLOR = "stone"
COLORS[NEW_COLOR] = (140, 120, 110)


def make_new_scene(name: str) -> Scene:
    """A scene of the miniature world in which everything that had one of its colors has the new one."""
    scene = make_scene(name)
    replaced = scene.objects[0].color
    objects = tuple(
        dataclasses.replace(thing, color=NEW_COLOR) if thing.color == replaced else thing for thing in scene.objects
    )
    return dataclasses.replace(scene, objects=objects)
