"""Captions of scenes in varied English, with the place of every mention of an object.

Two kinds of sentence describe an object. A *plain* one names its place, shape and color. A *linked* one takes the color
from an object named earlier ("a ring of the same color as the star"), so both sentences are needed to know it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .world import BACKGROUNDS, COLORS, PLACES, SHAPES, SIZES, Scene, SceneObject

SHORT_OBJECTS = (3, 8)
LONG_OBJECTS = (8, 9)
LONG_WORDS = (200, 246)

_SENTENCES = (
    "{Thing} is in the {place}{tail}.",
    "In the {place} there is {thing}{tail}.",
    "The {place} holds {thing}{tail}.",
    "{Thing} stands in the {place}{tail}.",
    "{Thing} can be seen in the {place}{tail}.",
    "In the {place} sits {thing}{tail}.",
)
_WORDY_SENTENCES = (
    *_SENTENCES,
    "Look at the {place} of the picture and you will find {thing}{tail}.",
    "There is {thing} to be found in the {place} of the picture{tail}.",
    "Somebody has put {thing} in the {place}{tail}.",
    "What fills the {place} of this picture is {thing}{tail}.",
    "When the eye moves on to the {place}, it meets {thing}{tail}.",
)
_LINKS = (
    "of the same color as the {other}",
    "that has the color of the {other}",
    "painted in the color of the {other}",
    "whose color is that of the {other}",
)
_TAILS = (
    ", drawn with a clean and steady edge",
    ", as calm and still as everything around it",
    ", and nothing else comes near it",
    ", with some air on every side",
    ", flat and without any shadow",
    ", like a thing from a book for children",
    ", plain but easy to like",
    ", filled evenly from edge to edge",
    ", just where one would expect it",
)
_BACKGROUNDS = (
    "The background is {background}.",
    "Everything lies on {background}.",
    "All of it is set before {background}.",
)
_BACKGROUND_WORDS = {
    "paper": ("white paper", "paper"),
    "sand": ("pale sand", "sand"),
    "mist": ("gray mist", "mist"),
    "night": ("the dark of night", "night"),
}
_FILLERS = (
    "The whole picture is quiet.",
    "Nothing here moves, and the light is even.",
    "It is a simple picture, made with care.",
    "One could look at it for a long time.",
    "The picture tells no story, it only shows what is there.",
    "Each thing keeps to its own part of the picture.",
    "There is a good deal of order in all of this.",
    "Take your time and go through it piece by piece.",
)
# Words of places with their synonyms.
PLACE_WORDS = {"top": ("top", "upper"), "bottom": ("bottom", "lower")}


class _Deck:
    """Deals all its cards in random order before it begins again, so a caption hardly repeats itself."""

    def __init__(self, cards: Sequence[str], rng: random.Random) -> None:
        self._cards, self._rng, self._left = cards, rng, list[str]()

    def deal(self) -> str:
        if not self._left:
            self._left = self._rng.sample(self._cards, len(self._cards))
        return self._left.pop()


@dataclass(frozen=True)
class Mention:
    """An object named in a caption.

    Attributes:
        kind: `"plain"` or `"linked"` for a sentence that describes the object, `"reference"` for the noun in a linked
            sentence that points back ("the star").
        index: the object's index in `Scene.objects`.
        start, end: the mention's first and one past its last character in the caption; a sentence ends with its period.
        candidates: number of different colors in the caption before this mention.
        size_named: whether the sentence names the object's size.
    """

    kind: str
    index: int
    start: int
    end: int
    candidates: int
    size_named: bool = False


@dataclass(frozen=True)
class Caption:
    """A text about a scene, and its mentions of objects in the order of the text."""

    text: str
    mentions: tuple[Mention, ...]

    @property
    def described(self) -> tuple[Mention, ...]:
        """The plain and linked mentions, one for each described object."""
        return tuple(mention for mention in self.mentions if mention.kind != "reference")


def short_caption(scene: Scene, name: str) -> Caption:
    """A caption of 3 to 8 objects and at most 75 words and marks, so it fits in 77 tokens.

    Examples:
        >>> from finelip_sdxl.miniature.world import make_scene
        >>> len(count_words(short_caption(make_scene("unseen-0"), "unseen-0").text)) <= 75
        True
    """
    rng = random.Random(f"short caption {name}")
    while True:
        wordiness = rng.choice((0.0, 0.0, 0.3, 1.0))
        caption = _describe(scene, rng, rng.randint(*SHORT_OBJECTS), wordiness, linkage=0.85)
        if len(count_words(caption.text)) <= 75:
            return caption


def long_caption(scene: Scene, name: str, first: Sequence[int] = ()) -> Caption:
    """A caption of 8 or 9 objects and 200 to 246 words and marks: too long for 77 tokens, and not for 248.

    Args:
        scene: the scene to describe.
        name: name of the caption; equal scenes and names have equal captions on every machine.
        first: indices of the objects to describe first, in this order.

    Examples:
        >>> from finelip_sdxl.miniature.world import make_scene
        >>> 200 <= len(count_words(long_caption(make_scene("unseen-0"), "unseen-0").text)) <= 246
        True
    """
    rng = random.Random(f"long caption {name}")
    while True:
        caption = _describe(scene, rng, rng.randint(*LONG_OBJECTS), wordiness=1.0, linkage=0.65, first=first)
        if LONG_WORDS[0] <= len(count_words(caption.text)) <= LONG_WORDS[1]:
            return caption


def count_words(text: str) -> list[str]:
    """The words and marks of a caption; each is one token of the miniature's tokenizer."""
    return re.findall(r"\w+|[^\w\s]", text)


def _describe(
    scene: Scene, rng: random.Random, count: int, wordiness: float, linkage: float, first: Sequence[int] = ()
) -> Caption:
    """A caption of `count` objects, beginning with `first`.

    Args:
        wordiness: share of long sentences, and a factor of the number of fillers, 0 to 1.
        linkage: share of links among objects that can be linked, 0 to 1.
    """
    order = rng.sample(range(len(scene.objects)), count)
    order = [*first, *(k for k in order if k not in first)][:count]
    text, mentions, plain = "", list[Mention](), list[int]()
    forms = _Deck(_WORDY_SENTENCES, rng), _Deck(_SENTENCES, rng)
    tails, fillers = _Deck(_TAILS, rng), _Deck(_FILLERS, rng)

    def say(sentence: str) -> int:
        """Appends a sentence and returns the position of its first character."""
        nonlocal text
        text += (" " if text else "") + sentence
        return len(text) - len(sentence)

    if rng.random() < 0.6:
        background = rng.choice(_BACKGROUND_WORDS[scene.background])
        say(rng.choice(_BACKGROUNDS).format(background=background))
    for index in order:
        thing = scene.objects[index]
        if rng.random() < 0.15 * wordiness:
            say(fillers.deal())
        candidates = len({scene.objects[k].color for k in plain})
        others = [k for k in plain if scene.objects[k].color == thing.color]
        size_named = rng.random() < 0.5
        link = rng.choice(others) if others and rng.random() < linkage else None
        other = None if link is None else scene.objects[link].shape
        if rng.random() < wordiness:
            form, tail = forms[0].deal(), tails.deal() if rng.random() < 0.9 else ""
        else:
            form, tail = forms[1].deal(), ""
        sentence, reference = _sentence(thing, other, size_named, rng, form, tail)
        start = say(sentence)
        if link is None:
            plain.append(index)
        else:
            end = start + reference
            mentions.append(Mention("reference", link, end - len(scene.objects[link].shape), end, candidates))
        kind = "plain" if link is None else "linked"
        mentions.append(Mention(kind, index, start, len(text), candidates, size_named))
    return Caption(text, tuple(mentions))


def _sentence(
    thing: SceneObject, other: str | None, size_named: bool, rng: random.Random, form: str, tail: str
) -> tuple[str, int]:
    """One sentence about an object, and the end of the noun that points back (0 if there is none)."""
    size = f"{thing.size} " if size_named else ""
    if other is not None:
        noun = f"{size}{thing.shape} {rng.choice(_LINKS).format(other=f'[{other}]')}"
    elif rng.random() < 0.75:
        noun = f"{size}{thing.color} {thing.shape}"
    else:
        noun = f"{size}{thing.shape} in {thing.color}"
    phrase = f"{_article(noun)} {noun}"
    sentence = form.format(
        Thing=phrase[0].upper() + phrase[1:],
        thing=phrase,
        place=_place(thing.place, rng),
        tail=tail,
    )
    end = max(sentence.find("]") - 1, 0)
    return sentence.replace("[", "").replace("]", ""), end


def _place(place: str, rng: random.Random) -> str:
    words = [rng.choice(PLACE_WORDS.get(word, (word,))) for word in place.split()]
    return " ".join(words)


def _article(noun: str) -> str:
    return "an" if noun.startswith(("a", "e", "i", "o", "u", "hourglass")) else "a"


def vocabulary() -> Iterable[str]:
    """Texts with all words of captions, for the training of the tokenizer."""
    yield from (*PLACES, *SHAPES, *COLORS, *SIZES, *BACKGROUNDS, "a an upper lower")
    for texts in (_WORDY_SENTENCES, _LINKS, _TAILS, _BACKGROUNDS, _FILLERS, *_BACKGROUND_WORDS.values()):
        yield from (re.sub(r"\{\w+\}", " ", text) for text in texts)
