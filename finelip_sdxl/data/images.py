"""Users' image files of any format, as RGB pictures of 8 bits."""

from __future__ import annotations

import io
import stat
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from .caption_dataset import UnreadableImageError

MAX_RATIO = 16  # of an image's sides; a square cut from the middle needs far less
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # of TIFF
# Pillow scales a PNG's pixels by these factors, but leaves the transparent gray or color unscaled.
_KEY_SCALES = {"L;2": 255 // 3, "L;4": 255 // 15, "RGB;16B": 1 / 256}
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND"}


def read_image(file: Path | bytes, name: str) -> Image.Image:
    """Returns an image as RGB of 8 bits a channel, on white where it is transparent, and upright by its EXIF data.

    16 bits a channel are scaled. Damaged texts, profiles and EXIF data are ignored.

    Args:
        file: a path, or a file's content.
        name: name of the image, for the message.

    Raises:
        UnreadableImageError: the image is missing or broken, no regular file, or of numbers without a known white.
    """
    name = name.encode(errors="backslashreplace").decode()  # on a disk it can be any bytes; these cannot be printed
    try:
        if isinstance(file, Path) and not stat.S_ISREG(file.stat().st_mode):  # a pipe or device may never end
            raise ValueError("it is no regular file")
        try:
            return _read(file)
        except Exception:
            # Pillow refuses a PNG whose text is too long or damaged, and an AVIF for its EXIF data.
            if (picture := _bare(file)) is None:
                raise
            return _read(picture)
    except UnidentifiedImageError as error:
        raise UnreadableImageError(f"{name} cannot be read (Pillow does not know its format).") from error
    except Exception as error:  # broken files make Pillow's decoders raise almost anything
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise UnreadableImageError(f"{name} cannot be read ({reason}).") from error


def middle(width: int, height: int) -> tuple[int, int, int, int]:
    """Returns left, top, right and bottom edge of an image's middle, no side more than 16 times as long as the other.

    For use before an image is scaled, and a square is cut from its middle: to scale all of an image of 20,000 by 1
    pixels would need gigabytes. Ordinary images stay whole.

    Examples:
        >>> middle(640, 480), middle(20_000, 1)
        ((0, 0, 640, 480), (9992, 0, 10008, 1))
    """
    longest = MAX_RATIO * min(width, height)
    across, down = ((side - longest) // 2 if side > longest else 0 for side in (width, height))
    return across, down, width - across, height - down


def _read(file: Path | bytes) -> Image.Image:
    with Image.open(io.BytesIO(file) if isinstance(file, bytes) else file) as image:
        _scale_color_key(image)
        image.load()  # this turns a TIFF upright, and updates its orientation
        orientation = _orientation(image)
        rgb = _on_white(image)
    # Other metadata is dropped: `exif_transpose` would write it again, and fail if it is damaged.
    rgb.info = {}
    rgb.getexif()[ExifTags.Base.Orientation] = orientation
    ImageOps.exif_transpose(rgb, in_place=True)
    return rgb


def _scale_color_key(image: ImageFile.ImageFile) -> None:
    """Scales the transparent gray or color of a PNG, if it has one, like its pixels."""
    if image.format == "PNG" and image.tile and (key := image.info.get("transparency")) is not None:
        scale = _KEY_SCALES.get(str(image.tile[0].args), 1)
        image.info["transparency"] = tuple(int(k * scale) for k in key) if isinstance(key, tuple) else key * scale


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged, in any way
        return 1


def _on_white(image: Image.Image) -> Image.Image:
    """Returns any image as RGB."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        image = _scaled_to_8_bits(image)
    if image.mode in ("I", "F"):
        kind = "integers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(f"its pixels are {kind} of 32 bits, mode {image.mode}, without a known value for white")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _scaled_to_8_bits(image: Image.Image) -> Image.Image:
    """Converts gray of 16 bits, or of 12 in a TIFF. (Pillow's own conversion cuts off all values above 255.)"""
    tags = getattr(image, "tag_v2", {})
    pixels = np.asarray(image)
    gray = (pixels >> (tags.get(_BITS_PER_SAMPLE, (16,))[0] - 8)).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        gray = 255 - gray
    scaled = Image.fromarray(gray)
    if (key := image.info.get("transparency")) is not None:
        scaled.putalpha(Image.fromarray(np.where(pixels == key, 0, 255).astype(np.uint8)))
    return scaled


def _bare(file: Path | bytes) -> bytes | None:
    """Returns a PNG or AVIF without texts, profiles and the like; None if the file is neither."""
    with io.BytesIO(file) if isinstance(file, bytes) else file.open("rb") as stream:
        start = stream.read(12)
        if start[4:] in (b"ftypavif", b"ftypavis"):
            return (start + stream.read()).replace(b"Exif", b"none", 1)  # the type of the EXIF item
        stream.seek(len(_PNG_START))
        return b"".join([_PNG_START, *_png_chunks(stream)]) if start.startswith(_PNG_START) else None


def _png_chunks(stream: IO[bytes]) -> Iterator[bytes]:
    """Yields the chunks that the picture needs."""
    while len(head := stream.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        if name not in _PNG_CHUNKS:
            stream.seek(length + 4, io.SEEK_CUR)
            continue
        content, checksum = stream.read(length), stream.read(4)
        if name != b"eXIf" or zlib.crc32(name + content).to_bytes(4, "big") == checksum:
            yield head + content + checksum
