"""What a picture of the miniature has right: marks on the picture, and a list beside it."""

from __future__ import annotations

from html import escape

from PIL import Image

from finelip_sdxl.miniature.marking import mark_objects
from finelip_sdxl.miniature.parsing import DescribedObject
from finelip_sdxl.miniature.scoring import ObjectScore, score_objects

STYLE = """
.verdict { --right: #1a7f37; --wrong: #c02626; color: var(--body-text-color); font-size: 14px; line-height: 1.35; }
.dark .verdict { --right: #56d364; --wrong: #ff8f87; }
.verdict-list { margin: 0; padding: 0; list-style: none; }
.verdict-list li { display: flex; gap: 6px; margin: 0; padding: 2px 0; }
.verdict-number { flex: 0 0 1.4em; text-align: right; color: var(--muted); }
.verdict-right { color: var(--right); font-weight: 700; }
.verdict-wrong { color: var(--wrong); font-weight: 700; }
.verdict-why { color: var(--muted); }
"""


NOTHING_DESCRIBED = "The miniature knows no object of this prompt, so there is nothing to judge: click on an example."


def judge(image: Image.Image, described: tuple[DescribedObject, ...] | None) -> tuple[Image.Image, str, str]:
    """What a picture has right of the objects that its prompt describes.

    Args:
        image: a picture of the miniature, or of another model.
        described: from `finelip_sdxl.miniature.parsing.parse_description`; None for another model, of which nothing is
            known.

    Returns:
        The picture enlarged and marked, how many objects are right, and a list of them as HTML for `STYLE`; for another
        model the picture as it is and two empty texts.
    """
    if described is None:
        return image, "", ""
    if not described:
        return mark_objects(image, (), ()), "", f'<div class="verdict">{NOTHING_DESCRIBED}</div>'
    scores = score_objects(image, described)
    share = f"{sum(score.right for score in scores)} of {len(described)} right"
    entries = "".join(map(_entry, range(1, len(described) + 1), described, scores))
    details = f'<div class="verdict"><ol class="verdict-list">{entries}</ol></div>'
    return mark_objects(image, described, scores), share, details


def _entry(number: int, thing: DescribedObject, score: ObjectScore) -> str:
    sign, kind = ("✓", "right") if score.right else ("✗", "wrong")
    link = ", color by link" if thing.linked else ""
    what = escape(f"{thing.color} {thing.shape}, {thing.place}{link}")
    why = "" if score.right else f' <span class="verdict-why">({_what_is_wrong(score)})</span>'
    mark = f'<span class="verdict-{kind}" aria-label="{kind}">{sign}</span>'
    return f'<li><span class="verdict-number">{number}</span>{mark}<span>{what}{why}</span></li>'


def _what_is_wrong(score: ObjectScore) -> str:
    if not score.shape:
        return "not there"
    return "another color" if not score.color else "another place"
