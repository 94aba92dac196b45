"""The interface of a data set of images and captions, and checks of a caption."""

from __future__ import annotations

import re
import reprlib
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from PIL import Image

from .regions import Region

MAX_CAPTION = 100_000  # characters; 248 tokens are some 1,200, so a longer caption comes from a broken file


class UnreadableImageError(OSError):
    """An image that is missing or broken; the message names it."""


class CaptionDataset(ABC):
    """Images and their captions, in a fixed order.

    Attributes:
        group_size: number of consecutive images that share a training batch, as hard negatives of each other.
        left_out: a sentence with the number of images that were left out, and the first of them; empty if none was.
    """

    group_size: int = 1
    left_out: str = ""

    @abstractmethod
    def __len__(self) -> int:
        """The number of images."""

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Returns one image, RGB.

        Raises:
            UnreadableImageError: it is missing or broken.
        """

    def image_file(self, index: int) -> Path | None:
        """Returns the file of one image; None for images without files of their own."""
        return None

    @abstractmethod
    def captions(self, index: int) -> tuple[str, ...]:
        """Returns the captions of one image, at least one."""

    def short_caption(self, index: int) -> str:
        """Returns a caption for stock's 77 tokens: by default the first sentence, often a summary of the others."""
        return split_sentences(self.captions(index)[0])[0]

    def regions(self, index: int) -> tuple[Region, ...]:
        """Returns phrases of the first caption and their parts of the image; by default none."""
        return ()


def caption_fault(caption: Any) -> str | None:
    """Returns a caption's fault, as the end of a sentence; None if it has none.

    Examples:
        >>> caption_fault("A fox."), caption_fault(["A fox."]), caption_fault(" ")
        (None, "is ['A fox.'], where text was expected", 'is empty')
    """
    if not isinstance(caption, str):
        return f"is {reprlib.repr(caption)}, where text was expected"
    if not caption.strip():
        return "is empty"
    if len(caption) > MAX_CAPTION:
        return f"has {len(caption):,} characters, where at most {MAX_CAPTION:,} were expected"
    return half_character(caption)


def half_character(text: str) -> str | None:
    """Returns the fault of a text with half a surrogate pair, such as `\\ud800` in JSON; None if it has none."""
    half = re.search("[\ud800-\udfff]", text)
    return None if half is None else f"holds \\u{ord(half[0]):04x}, which is half of a character"


def split_sentences(text: str) -> list[str]:
    """Returns the sentences of a text, at least one, without the white space between them.

    Examples:
        >>> split_sentences("A fox sleeps. The moon is 3.5 hours old! Is it?")
        ['A fox sleeps.', 'The moon is 3.5 hours old!', 'Is it?']
    """
    return re.split(r"(?<=[.!?])\s+", text.strip())
