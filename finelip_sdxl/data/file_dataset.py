"""Data sets in memory: images in files, or lines of text, and their captions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .caption_dataset import CaptionDataset, UnreadableImageError, caption_fault
from .images import read_image

Record = tuple[Path, list[str]]  # the file of an image, and its captions


class FileDataset(CaptionDataset):
    """Images in files, whose paths and captions are in memory.

    Args:
        records: the path of each image and its captions.
        name: name of the data set, for messages.
        skip_missing: leave out images with missing files; `left_out` then counts them.

    Raises:
        FileNotFoundError: `skip_missing` leaves out all images.
        ValueError: there is no image, or an image has no caption, or one that is no text or too long.

    Examples:
        >>> FileDataset([(Path("fox.jpg"), ["A fox\\nsleeps.", "It is night."])]).captions(0)
        ('A fox sleeps.', 'It is night.')
    """

    def __init__(self, records: Iterable[Record], name: str = "The data set", skip_missing: bool = False) -> None:
        # One buffer in place of millions of strings: counting references to these would copy them into each worker.
        buffer, ends = bytearray(), [0]
        missing, first = 0, Path()
        for path, captions in records:
            if skip_missing and not path.is_file():
                missing, first = missing + 1, first if missing else path
                continue
            _check_captions(captions, path, name)
            captions = [" ".join(caption.split()) for caption in captions]
            buffer += json.dumps([str(path), *captions]).encode()
            ends.append(len(buffer))
        if missing:
            total = missing + len(ends) - 1
            self.left_out = f"{missing:,} of {total:,} images of {name} are not there and are left out; first {first}."
            if missing == total:
                raise FileNotFoundError(f"None of the {total:,} images of {name} is there; the first would be {first}.")
        if len(ends) == 1:
            raise ValueError(f"{name} has no images in this split.")
        self._buffer, self._ends = bytes(buffer), np.array(ends)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def image(self, index: int) -> Image.Image:
        path = self._record(index)[0]
        return read_image(Path(path), path)

    def image_file(self, index: int) -> Path | None:
        return Path(self._record(index)[0])

    def captions(self, index: int) -> tuple[str, ...]:
        return tuple(self._record(index)[1:])

    def _record(self, index: int) -> list[str]:
        if not 0 <= index < len(self):
            raise IndexError(f"Image {index} was asked for, but there are {len(self)}.")
        record: list[str] = json.loads(self._buffer[self._ends[index] : self._ends[index + 1]])
        return record


class LineDataset(FileDataset):
    """Captions without images, for training on texts alone; a record holds a line's place instead of an image's file.

    Examples:
        >>> LineDataset([(Path("captions.txt, line 3"), ["A fox sleeps."])]).captions(0)
        ('A fox sleeps.',)
    """

    def image(self, index: int) -> Image.Image:
        raise UnreadableImageError(f"{self._record(index)[0]}, has no image: the file holds texts only.")


def _check_captions(captions: Sequence[Any], path: Path, name: str) -> None:
    faults = [fault for caption in captions or () if (fault := caption_fault(caption))]
    if not captions or "is empty" in faults:
        raise ValueError(f"{name} has no caption, or an empty one, for {path}: add it or leave the image out.")
    if faults:
        raise ValueError(f"The caption of {path} in {name} {faults[0]}: correct it or leave the image out.")
