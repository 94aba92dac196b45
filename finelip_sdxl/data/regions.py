"""Phrases of a caption and the parts of the image that they name, for data sets with such pairs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Region:
    """A phrase of a caption and the part of the image that it names.

    Attributes:
        start, end: the phrase's first and past-the-last character in the caption.
        box: left, top, right and bottom edge of the part, as shares of the image's width and height, 0 to 1.
        label: name of the content; parts of equal label look alike, and are no negatives of each other.
        weight: the phrase's weight in a mean over phrases.
    """

    start: int
    end: int
    box: tuple[float, float, float, float]
    label: str
    weight: float = 1.0


def follow_regions(regions: Iterable[Region], before: str, after: str) -> list[Region]:
    """Returns the regions of a shortened caption, with their new characters; regions of lost sentences are left out.

    Args:
        regions: the regions of `before`, each within one sentence.
        before: the whole caption.
        after: some of its sentences, unchanged.

    Examples:
        >>> star = Region(start=13, end=20, box=(0, 0, 1, 1), label="star")
        >>> follow_regions([star], "It is quiet. A star is here. A fox sleeps.", "A star is here.")
        [Region(start=0, end=7, box=(0, 0, 1, 1), label='star', weight=1.0)]
    """
    if before == after:
        return list(regions)
    sentences = [match.span() for match in re.finditer(r"\S.*?(?:[.!?](?=\s|$)|$)", before, flags=re.DOTALL)]
    kept = []
    for region in regions:
        start, end = next(span for span in sentences if span[0] <= region.start < span[1])
        place = after.find(before[start:end])
        if place >= 0:
            kept.append(replace(region, start=region.start - start + place, end=region.end - start + place))
    return kept
