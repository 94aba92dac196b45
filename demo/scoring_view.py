"""Right and wrong objects of the miniature's pictures: marks on the picture, and a list beside it."""

from __future__ import annotations

from PIL import Image

from demo.rendering import render
from finelip_sdxl.miniature.marking import mark_objects
from finelip_sdxl.miniature.parsing import DescribedObject
from finelip_sdxl.miniature.scoring import ObjectScore, score_objects


def judge(image: Image.Image, described: tuple[DescribedObject, ...] | None) -> tuple[Image.Image, str, str]:
    """Score a picture against the objects that its prompt describes.

    Args:
        image: a picture of the miniature, or of another model.
        described: the result of `finelip_sdxl.miniature.parsing.parse_description`; None for another model, whose
            pictures cannot be scored.

    Returns:
        The enlarged and marked picture, the number of right objects, and a list of them as HTML. For another model the
        unchanged picture and two empty texts.
    """
    if described is None:
        return image, "", ""
    if not described:
        return mark_objects(image, (), ()), "", render("verdict", entries=[])
    scores = score_objects(image, described)
    share = f"{sum(score.right for score in scores)} of {len(described)} right"
    details = render("verdict", entries=list(map(_entry, described, scores)))
    return mark_objects(image, described, scores), share, details


def _entry(thing: DescribedObject, score: ObjectScore) -> dict[str, str]:
    link = ", in the color of another object" if thing.linked else ""
    return {"thing": f"{thing.color} {thing.shape}, {thing.place}{link}", "fault": _fault(score)}


def _fault(score: ObjectScore) -> str:
    """The fault of an object; empty for a right one."""
    if score.right:
        return ""
    if not score.shape:
        return "not there"
    return "another color" if not score.color else "another place"
