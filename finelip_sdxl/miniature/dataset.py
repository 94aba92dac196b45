"""Scenes of the miniature world as a data set: pictures with long captions, drawn and written on demand."""

from __future__ import annotations

from functools import lru_cache

from PIL import Image

from finelip_sdxl.data.caption_dataset import CaptionDataset
from finelip_sdxl.data.regions import Region

from .captions import Caption, long_caption, short_caption
from .drawing import draw_scene
from .world import Scene, make_family


class MiniatureScenes(CaptionDataset):
    """Scenes in families of five. A family shares four objects, and its long captions describe these first.

    77 tokens hold about three of these objects, so an encoder of 77 tokens cannot tell the five scenes apart.

    Args:
        split: `"train"` or `"test"`, with different scenes, or any other word for further scenes.
        size: number of scenes.

    Examples:
        >>> scenes = MiniatureScenes("test", size=10)
        >>> len(scenes), scenes.image(0).size, len(scenes.captions(0))
        (10, (192, 192), 1)
    """

    group_size = 5
    shared_objects = 4

    def __init__(self, split: str, size: int) -> None:
        self.split, self.size = split, size

    def __len__(self) -> int:
        return self.size

    def image(self, index: int) -> Image.Image:
        return draw_scene(self.scene(index))

    def captions(self, index: int) -> tuple[str, ...]:
        return (self.caption(index).text,)

    def short_caption(self, index: int) -> str:
        return short_caption(self.scene(index), f"{self.split} {index}").text

    def regions(self, index: int) -> tuple[Region, ...]:
        """Each mention of an object, with the object's cell. Links with two or more candidates have a weight of 4: they
        are rare, and an encoder learns them last."""
        objects = self.scene(index).objects
        regions = []
        for mention in self.caption(index).mentions:
            thing = objects[mention.index]
            regions.append(
                Region(
                    start=mention.start,
                    end=mention.end,
                    box=_cell(mention.index),
                    label=f"{thing.place} {thing.shape} {thing.color}",  # not every phrase names the size
                    weight=4.0 if mention.kind == "linked" and mention.candidates >= 2 else 1.0,
                )
            )
        return tuple(regions)

    def scene(self, index: int) -> Scene:
        """The scene in the picture."""
        return _family(self.split, index // self.group_size)[0][index % self.group_size]

    def caption(self, index: int) -> Caption:
        """The long caption with its mentions."""
        return _caption(self.split, index)


# A pair needs its scene and caption several times, and the five scenes of a family, next to each other, one family.


@lru_cache(maxsize=128)
def _family(split: str, number: int) -> tuple[list[Scene], list[int]]:
    return make_family(f"{split} {number}", MiniatureScenes.group_size, MiniatureScenes.shared_objects)


@lru_cache(maxsize=128)
def _caption(split: str, index: int) -> Caption:
    scenes, shared = _family(split, index // MiniatureScenes.group_size)
    return long_caption(scenes[index % MiniatureScenes.group_size], f"{split} {index}", first=shared)


def _cell(index: int) -> tuple[float, float, float, float]:
    row, column = divmod(index, 3)
    return column / 3, row / 3, (column + 1) / 3, (row + 1) / 3
