"""What training and evaluation ask of any data set of images and captions."""

from __future__ import annotations

import re
import reprlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from PIL import Image

from .regions import Region

MAX_CAPTION = 100_000  # characters, where 248 tokens are some 1,200: a longer one comes of a file that is broken


class UnreadableImageError(OSError):
    """An image that is missing or broken; the message names it."""


class CaptionDataset(ABC):
    """Images and their captions, in a fixed order.

    Attributes:
        group_size: consecutive images that training puts into one batch, since they are hard negatives of each other.
        left_out: a sentence that counts what was left out and names the first; empty if nothing was.
    """

    group_size: int = 1
    left_out: str = ""

    @abstractmethod
    def __len__(self) -> int:
        """Number of images."""

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """One image, RGB.

        Raises:
            UnreadableImageError: if it is missing or broken.
        """

    def image_file(self, index: int) -> Path | None:
        """Where one image lies; None for images that do not lie in files of their own."""
        return None

    @abstractmethod
    def captions(self, index: int) -> tuple[str, ...]:
        """The captions of one image, at least one."""

    def short_caption(self, index: int) -> str:
        """A caption that stock's 77 tokens hold: here the first sentence, which sums up in most long captions."""
        return split_sentences(self.captions(index)[0])[0]

    def regions(self, index: int) -> tuple[Region, ...]:
        """Phrases of the first caption and where in the image they point; none, unless the data set knows them."""
        return ()


def caption_fault(caption: Any) -> str | None:
    """What is wrong with a caption that was read from somewhere, as the end of a sentence; None if nothing is.

    Example:
        >>> caption_fault("A fox."), caption_fault(["A fox."]), caption_fault(" ")
        (None, "is ['A fox.'], where text was expected", 'is empty')
    """
    if not isinstance(caption, str):
        return f"is {reprlib.repr(caption)}, where text was expected"
    if not caption.strip():
        return "is empty"
    if len(caption) > MAX_CAPTION:
        return f"has {len(caption):,} characters, where {MAX_CAPTION:,} are the most that is read"
    return half_character(caption)


def half_character(text: str) -> str | None:
    """As `caption_fault`, of a surrogate, such as `\\ud800` in JSON, that lacks the other half."""
    half = re.search("[\ud800-\udfff]", text)
    return None if half is None else f"holds \\u{ord(half[0]):04x}, which is half of a character"


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, at least one, without the white space between them.

    Example:
        >>> split_sentences("A fox sleeps. The moon is 3.5 hours old! Is it?")
        ['A fox sleeps.', 'The moon is 3.5 hours old!', 'Is it?']
    """
    return re.split(r"(?<=[.!?])\s+", text.strip())
