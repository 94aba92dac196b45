"""Drawn pictures, read back from the files of a run."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from finelip_sdxl.data.caption_dataset import UnreadableImageError
from finelip_sdxl.data.images import read_image


def read_drawn(file: Path) -> Image.Image:
    """Returns a drawn picture.

    Raises:
        UnreadableImageError: it is missing or damaged; the message says what to do.
    """
    try:
        return read_image(file, str(file))
    except UnreadableImageError as error:
        reason = str(error).removesuffix(".")
        raise UnreadableImageError(f"{reason}: delete it, and run again to draw it again.") from error
