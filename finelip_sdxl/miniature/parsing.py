"""The objects that a text describes, found without the scene: the inverse of `captions.py`.

A sentence is parsed by its words and not by its form, so it also works for prompts that people type. `is_of_world`
says whether the miniature knows a text at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product

from .captions import PLACE_WORDS, vocabulary
from .world import COLORS, PLACES, SHAPES, SIZES


@dataclass(frozen=True)
class DescribedObject:
    """An object as a text describes it.

    Attributes:
        place, shape, color: as in `SceneObject`.
        size: None if the text does not name it.
        linked: whether the text takes the color from an object named earlier.
        start, end: the first and one past the last character of the object's sentence, or of its part of a sentence
            with several objects.
    """

    place: str
    shape: str
    color: str
    size: str | None
    linked: bool
    start: int
    end: int


def parse_description(text: str) -> tuple[DescribedObject, ...]:
    """The objects that a text in the miniature's language describes, in the order of the text.

    Text without an object's shape, color and place is skipped: fillers, links to an object whose color was not named
    before, and words from outside this world.

    Args:
        text: any text, such as a typed prompt.

    Examples:
        >>> text = "A red star is in the upper left. The center holds a small ring that has the color of the star."
        >>> for thing in parse_description(text):
        ...     print(thing.place, thing.size, thing.color, thing.shape, thing.linked)
        top left None red star False
        center small red ring True
        >>> parse_description("A portrait of a cat, oil on canvas")
        ()
    """
    described: list[DescribedObject] = []
    colors: dict[str, str | None] = {}
    for sentence in _SENTENCE.finditer(text):
        described += _read_sentence(text, *sentence.span(), colors)
    return tuple(described)


def is_of_world(text: str) -> bool:
    """Whether a text is of the miniature's world: it has no other words, or it describes an object with few others.

    Few is one in eight. A text of spaces alone is of every world.

    Examples:
        >>> is_of_world("a red star"), is_of_world("Draw a red star in the top left")
        (True, True)
        >>> is_of_world("a cat on a sofa"), is_of_world("A knight with a red heart in the center of a shield")
        (False, False)
    """
    words, foreign = _find_words(text), foreign_words(text)
    if not words or not foreign:
        return bool(words) or not text.strip()
    return 8 * len(foreign) <= len(words) and bool(parse_description(text))


def foreign_words(text: str) -> list[str]:
    """The words of a text that the miniature does not know, in their order, repeated ones too.

    Examples:
        >>> foreign_words("A cat under a red star")
        ['cat', 'under']
    """
    return [word for word in _find_words(text) if word.lower() not in _known_words()]


def _find_words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text)


@cache
def _known_words() -> frozenset[str]:
    """The words of captions, and further spellings that `parse_description` takes."""
    texts = [*vocabulary(), *_PLACES, "colour"]
    return frozenset(word.lower() for text in texts for word in _find_words(text))


def _read_sentence(text: str, start: int, end: int, colors: dict[str, str | None]) -> list[DescribedObject]:
    """The objects of a sentence. `colors` holds the color of each shape so far, or None; the sentence's are added."""
    words = list(_WORDS.finditer(text, start, end))
    nouns = [word for word in words if word["shape"]]
    places = [word for word in words if word["place"]]
    hues = [word for word in words if word["noun_color"] or word["color"] or word["reference"]]
    if all(noun["noun_color"] for noun in nouns):
        hues = nouns  # other colors belong to unknown things, such as a blue sky
    # The first noun goes with the first color and the first place, and so on. If one is missing, the pairs are unclear.
    if len(nouns) != len(hues):
        return []
    described = []
    for k, (noun, hue) in enumerate(zip(nouns, hues, strict=True)):
        shape, size = noun["shape"].lower(), noun["size"] and noun["size"].lower()
        linked = hue["reference"] is not None
        color = colors.get(hue["reference"].lower()) if linked else (hue["noun_color"] or hue["color"]).lower()
        colors[shape] = color
        if len(places) != len(nouns):
            continue
        place = _PLACES[" ".join(re.split(r"[\s-]+", places[k]["place"].lower()))]
        part_end = end if k == len(nouns) - 1 else max(word.end() for word in (noun, hue, places[k]))
        if color is not None:
            described.append(DescribedObject(place, shape, color, size, linked, start, part_end))
        joint = _JOINT.match(text, part_end)
        start = joint.end() if joint else part_end
    return described


def _any_of(words: Iterable[str]) -> str:
    """A pattern for any of these words, the longest first, so "center left" comes before "center"."""
    pattern = "|".join(sorted(words, key=len, reverse=True)).replace(" ", r"(?:\s+|-)")
    return rf"\b(?a:{pattern})\b"  # ASCII, since "ı" would match "i" otherwise


_SYNONYMS = {**PLACE_WORDS, "middle": ("middle", "center", "centre"), "center": ("center", "middle", "centre")}
# All names of places, with synonyms, and with their words in any order.
_PLACES = {
    " ".join(order): place
    for place in PLACES
    for words in product(*(_SYNONYMS.get(word, (word,)) for word in place.split()))
    for order in permutations(words)
}
_SENTENCE = re.compile(r"[^\s.!?;](?:[^.!?;]*[^\s.!?;])?[.!?;]?")
# Between two objects of one sentence.
_JOINT = re.compile(r"[\s,:-]+(?:and\s+)?")
_COLOR, _SIZE = _any_of(COLORS), _any_of(SIZES)
_SHAPE = _any_of(SHAPES) + "(?!-)"  # "heart-shaped" is no heart
_WORDS = re.compile(
    rf"\bcolou?r\s+(?:as|of|is\s+that\s+of)\s+(?:the\s+)?(?:(?:{_SIZE}|{_COLOR})\s+)*(?P<reference>{_SHAPE})"
    rf"|(?:(?P<size>{_SIZE}),?\s+)?(?:(?P<noun_color>{_COLOR}),?\s+)?(?P<shape>{_SHAPE})"
    rf"|(?P<color>{_COLOR})"
    rf"|(?P<place>{_any_of(_PLACES)})",
    re.IGNORECASE,
)
