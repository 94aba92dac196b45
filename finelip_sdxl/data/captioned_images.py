"""What training and evaluation ask of any data set of images and captions."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from pathlib import Path
from typing import IO

from PIL import Image, ImageOps, UnidentifiedImageError

from .regions import Region


class UnreadableImageError(OSError):
    """An image that is missing or broken; the message names it."""


class CaptionedImages(ABC):
    """Images and their captions, in a fixed order.

    Attributes:
        group_size: consecutive images that training puts into one batch, since they are hard negatives of each other.
    """

    group_size: int = 1

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


def read_image(file: Path | IO[bytes], name: str) -> Image.Image:
    """An image as RGB, turned upright as its EXIF orientation says.

    Args:
        file: a path or an open file.
        name: of the image, for the message.

    Raises:
        UnreadableImageError: if it is missing or broken.
    """
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except UnidentifiedImageError as error:
        raise UnreadableImageError(f"{name} cannot be read (it is of no image format).") from error
    except Exception as error:  # broken files make Pillow's decoders raise almost anything
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise UnreadableImageError(f"{name} cannot be read ({reason}).") from error


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, at least one, without the white space between them.

    Example:
        >>> split_sentences("A fox sleeps. The moon is 3.5 hours old! Is it?")
        ['A fox sleeps.', 'The moon is 3.5 hours old!', 'Is it?']
    """
    return re.split(r"(?<=[.!?])\s+", text.strip())
