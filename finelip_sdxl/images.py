"""PNG files with the parameters of their pictures, and grids of pictures with labels."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo, PngStream

from finelip_sdxl.files import written_whole

MAX_BYTES, MAX_CHUNKS = 64 * 2**20, 20_000  # limits of a PNG to read; a chunk of pixels has 8 KiB or more

INFOTEXT_KEY, OWN_KEY = "parameters", "finelip_sdxl"  # keys of the texts in a PNG

MIN_SIDE = 256  # pixels of a picture's side in a grid; smaller ones leave no room for labels

_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_INK, _GRAY = (24, 24, 27), (95, 95, 102)
# A1111's names of samplers, by Diffusers' classes of the same method.
_SAMPLERS = {
    "DDIMScheduler": "DDIM",
    "DPMSolverMultistepScheduler": "DPM++ 2M",
    "DPMSolverSDEScheduler": "DPM++ SDE",
    "DPMSolverSinglestepScheduler": "DPM++ 2S",
    "EulerAncestralDiscreteScheduler": "Euler a",
    "EulerDiscreteScheduler": "Euler",
    "HeunDiscreteScheduler": "Heun",
    "LCMScheduler": "LCM",
    "LMSDiscreteScheduler": "LMS",
    "UniPCMultistepScheduler": "UniPC",
}


def to_image(pixels: Any) -> Image.Image:
    """A picture from the pixels that a pipeline returns, by Diffusers' own conversion, after a check for NaN.

    Args:
        pixels: (3, height, width) from 0 to 1, as from `output_type="pt"`.

    Raises:
        ValueError: a pixel is NaN.

    Examples:
        >>> import torch
        >>> to_image(torch.ones(3, 8, 8)).getpixel((0, 0))
        (255, 255, 255)
    """
    from diffusers.image_processor import VaeImageProcessor

    lost = int(pixels.isnan().any(dim=0).sum())
    if lost:
        height, width = pixels.shape[-2:]
        raise ValueError(
            f"{lost:,} of the picture's {height * width:,} pixels are not a number (NaN): numbers grew too large, or"
            " the weights are damaged. If this was half precision, draw in float32 or bfloat16 (`dtype`): SDXL's VAE"
            " overflows in float16 unless its config has `force_upcast`. If not, lower the guidance scale and the"
            " weights in the prompt, or load the model again."
        )
    images: list[Image.Image] = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(pixels[None]))
    return images[0]


def save_png(image: Image.Image, file: str | os.PathLike[str], parameters: dict[str, Any]) -> None:
    """Write a PNG with the parameters of its picture.

    Its texts are the prompt under `prompt`, the main parameters under `parameters` in A1111's format, which other
    programs read, and all parameters as JSON under `finelip_sdxl`.

    Args:
        image: the picture.
        file: the file, written completely or not at all.
        parameters: parameters of the picture, of JSON's types, with the prompt as `"prompt"`.

    Raises:
        OSError: the file cannot be written.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     save_png(Image.new("RGB", (8, 8)), f"{folder}/a.png", {"prompt": "a red star", "steps": 20})
        ...     read_parameters(f"{folder}/a.png")
        {'prompt': 'a red star', 'steps': 20}
    """
    info = PngInfo()
    texts = {"prompt": parameters["prompt"], INFOTEXT_KEY: infotext(parameters), OWN_KEY: json.dumps(parameters)}
    for key, text in texts.items():
        info.add_itxt(key, text.replace("\0", "\N{REPLACEMENT CHARACTER}"))  # a null byte ends a text in a PNG
    with written_whole(Path(file)) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def save_compact(image: Image.Image, file: str | os.PathLike[str]) -> None:
    """Write a picture for a document: a PNG with a palette of 256 colors, which is less than half as large.

    Raises:
        OSError: the file cannot be written to.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_compact(Image.new("RGB", (8, 8), "red"), Path(folder, "red.png"))
        ...     Image.open(Path(folder, "red.png")).mode
        'P'
    """
    with written_whole(Path(file)) as temporary:
        # Not dithered: it makes noise of what is flat, and the file large.
        image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(temporary, format="PNG", optimize=True)


def infotext(parameters: dict[str, Any]) -> str:
    """Parameters in A1111's format: the prompt, the negative prompt, and a line of further settings.

    Args:
        parameters: as for `save_png`.

    Examples:
        >>> print(infotext({"prompt": "a red star", "negative_prompt": "text", "steps": 20, "sampler": "Euler"}))
        a red star
        Negative prompt: text
        Steps: 20, Sampler: Euler, Version: finelip-sdxl
    """
    size = [parameters.get(side) for side in ("width", "height")]
    named = {
        "Steps": parameters.get("steps"),
        "Sampler": parameters.get("sampler"),
        "CFG scale": parameters.get("guidance_scale"),
        "Seed": parameters.get("seed"),
        "Size": "x".join(map(str, size)) if all(size) else None,
        "Model": parameters.get("base"),
        "Version": f"finelip-sdxl {parameters.get('finelip_sdxl', '')}".strip(),
    }
    lines = [parameters["prompt"]]
    if parameters.get("negative_prompt"):
        lines.append(f"Negative prompt: {parameters['negative_prompt']}")
    lines.append(", ".join(f"{name}: {_infotext_value(value)}" for name, value in named.items() if value is not None))
    return "\n".join(lines)


def sampler_name(scheduler: Any) -> str:
    """A1111's name of a Diffusers scheduler, or its own name if A1111 has none.

    Examples:
        >>> from diffusers import EulerAncestralDiscreteScheduler
        >>> sampler_name(EulerAncestralDiscreteScheduler())
        'Euler a'
    """
    name = type(scheduler).__name__
    return _SAMPLERS.get(name, name.removesuffix("Scheduler"))


def read_parameters(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The parameters in a PNG that this package wrote. Its pixels are not decoded.

    Args:
        file: a PNG of up to 64 MiB.

    Returns:
        The parameters that were passed to `save_png`. The file may have been edited: check values before use.

    Raises:
        ValueError: the file does not exist, is too large or has too many chunks, is no PNG or a damaged one, or holds
            no parameters of this package.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{path.name} does not exist or is not a file: pass a PNG that FineLIP-SDXL wrote.")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(
            f"{path.name} has {path.stat().st_size:,} bytes; expected at most {MAX_BYTES:,}: pass a PNG as FineLIP-SDXL"
            " wrote it."
        )
    texts = _png_texts(path)
    text = texts.get(OWN_KEY, texts.get(INFOTEXT_KEY))  # the oldest pictures have the JSON under the second key
    if text is None:
        raise ValueError(
            f"{path.name} holds no parameters, since FineLIP-SDXL did not write it, or another program removed them:"
            " pass another PNG."
        )
    try:
        parameters = json.loads(text)
    except (ValueError, RecursionError):  # other programs write plain text, for example
        parameters = None
    if not isinstance(parameters, dict) or not isinstance(parameters.get("prompt"), str):
        raise ValueError(
            f"{path.name} holds parameters of another program; expected a JSON object with a prompt: pass a PNG that"
            " FineLIP-SDXL wrote."
        )
    return parameters


def label_grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str = "",
    captions: Sequence[Sequence[str]] | None = None,
) -> Image.Image:
    """One picture of many: rows and columns with labels, below a title.

    Pictures with a side of less than 256 pixels are enlarged, others keep their size. The size of labels follows the
    pictures. Long lines are broken, so nothing is left out. Letters that Pillow's font lacks, such as Chinese ones,
    become boxes.

    Args:
        rows: pictures, all of one size, equally many in each row.
        row_labels: labels of the rows, at their left.
        column_labels: labels of the columns, above them.
        title: text above the grid, such as the prompt.
        captions: texts below the pictures, one for each.

    Returns:
        The grid, in RGB.

    Raises:
        ValueError: no pictures, pictures of several sizes, or too few or too many labels or captions.

    Examples:
        >>> star = Image.new("RGB", (96, 96), "red")
        >>> grid = label_grid([[star, star]], ["seed 0"], ["Stock SDXL", "FineLIP-SDXL"], title="a red star")
        >>> grid.width > 2 * 256
        True
    """
    _check_grid(rows, row_labels, column_labels, captions)
    width, height = _enlarged(rows[0][0].size)
    side = min(width, height)
    gap = side // 16
    large, small = _font(side / 17), _font(side / 20)
    beside = [_Text.wrapped(label, large, width // 2, _INK) for label in row_labels]
    above = [_Text.wrapped(label, large, width, _INK) for label in column_labels]
    below = [[_Text.wrapped(text, small, width, _GRAY) for text in row] for row in captions or [[]] * len(rows)]

    label_width = max(label.width for label in beside)
    left = gap + (label_width + gap if label_width else 0)
    lefts = [left + column * (width + gap) for column in range(len(column_labels))]
    heading = _Text.wrapped(title, small, lefts[-1] + width - gap, _INK)
    top = gap + sum(room + gap // 2 for room in (heading.height, max(label.height for label in above)) if room)
    tops = [top]
    for row in below:
        room = max((text.height for text in row), default=0)
        tops.append(tops[-1] + height + (room + gap // 3 if room else 0) + gap)

    grid = Image.new("RGB", (lefts[-1] + width + gap, tops[-1]), "white")
    pen = ImageDraw.Draw(grid)
    heading.draw(pen, gap, gap, "l")
    for x, label in zip(lefts, above, strict=True):
        label.draw(pen, x + width // 2, top - gap // 2 - label.height, "m")
    for y, label, pictures, texts in zip(tops[:-1], beside, rows, below, strict=True):
        label.draw(pen, gap + label_width, y + (height - label.height) // 2, "r")
        for x, picture in zip(lefts, pictures, strict=True):
            grid.paste(picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), (x, y))
        for x, text in zip(lefts, texts, strict=False):  # no texts without captions
            text.draw(pen, x + width // 2, y + height + gap // 3, "m")
    return grid


def _infotext_value(value: Any) -> str:
    """A value for the line of settings: quoted if it holds a separator."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if set(text) & set(",:\n") else text


def _png_texts(file: Path) -> dict[str, str]:
    """The texts of a PNG, anywhere in it, by their keywords. Other chunks are skipped."""
    with file.open("rb") as stream:
        if stream.read(len(_SIGNATURE)) != _SIGNATURE:
            raise ValueError(f"{file.name} is not a PNG: pass a PNG that FineLIP-SDXL wrote.")
        chunks = PngStream(stream)  # it limits the size of unpacked texts
        try:
            for _ in range(MAX_CHUNKS):
                kind, position, length = chunks.read()
                if kind == b"IEND":
                    return dict(chunks.im_text)
                if kind in (b"iTXt", b"tEXt", b"zTXt"):
                    chunks.crc(kind, chunks.call(kind, position, length))
                else:
                    stream.seek(length + 4, os.SEEK_CUR)  # the checksum has four bytes
        except (OSError, SyntaxError, ValueError, struct.error) as error:
            raise ValueError(f"{file.name} is a PNG that is damaged or cut short: pass the original file.") from error
    raise ValueError(f"{file.name} has more than {MAX_CHUNKS:,} chunks: pass a PNG as FineLIP-SDXL wrote it.")


@dataclass(frozen=True)
class _Text:
    """Lines of text and their size in pixels."""

    lines: tuple[str, ...]
    font: ImageFont.FreeTypeFont
    color: tuple[int, int, int]

    @classmethod
    def wrapped(cls, text: str, font: ImageFont.FreeTypeFont, width: int, color: tuple[int, int, int]) -> _Text:
        """Lines of up to `width` pixels, broken between words, or within words wider than a line."""
        length = cache(font.getlength)
        lines = list[str]()
        for paragraph in text.splitlines():
            line, used = "", 0.0
            for word in paragraph.split():
                pieces = [word] if length(word) <= width else list(word)
                for number, piece in enumerate(pieces):
                    space = " " if line and number == 0 else ""
                    if line and used + length(space + piece) > width:
                        lines.append(line)
                        line, used, space = "", 0.0, ""
                    line += space + piece
                    used += length(space + piece)
            lines.append(line)
        return cls(tuple(lines), font, color)

    @property
    def line_height(self) -> int:
        return round(1.25 * self.font.size)

    @property
    def width(self) -> int:
        return math.ceil(max(map(self.font.getlength, self.lines), default=0))

    @property
    def height(self) -> int:
        return len(self.lines) * self.line_height

    def draw(self, pen: ImageDraw.ImageDraw, x: int, y: int, anchor: str) -> None:
        """Draw the lines below `y`, with `x` at their left (`"l"`), middle (`"m"`) or right (`"r"`)."""
        for number, line in enumerate(self.lines):
            pen.text((x, y + number * self.line_height), line, fill=self.color, font=self.font, anchor=f"{anchor}a")


def _font(size: float) -> ImageFont.FreeTypeFont:
    font = cast(ImageFont.FreeTypeFont, ImageFont.load_default(round(size)))
    # The basic layout spaces letters evenly at small sizes, and equally on every machine.
    return font.font_variant(layout_engine=ImageFont.Layout.BASIC)


def _enlarged(size: tuple[int, int]) -> tuple[int, int]:
    """The size times the smallest whole number that makes no side shorter than `MIN_SIDE`."""
    factor = max(1, math.ceil(MIN_SIDE / min(size)))
    return size[0] * factor, size[1] * factor


def _check_grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    captions: Sequence[Sequence[str]] | None,
) -> None:
    if not rows or not column_labels:
        raise ValueError("The grid is empty: pass at least one row and one column of pictures.")
    sizes = sorted({picture.size for row in rows for picture in row})
    if len(sizes) > 1:
        given = " and ".join(f"{width} × {height}" for width, height in sizes)
        raise ValueError(f"The pictures of the grid have sizes {given}; expected one size: draw or resize them alike.")
    if len(row_labels) != len(rows):
        raise ValueError(f"The grid has {len(rows)} rows but {len(row_labels)} row labels: pass one for each.")
    for name, table in (("pictures", rows), ("captions", rows if captions is None else captions)):
        if len(table) != len(rows) or any(len(row) != len(column_labels) for row in table):
            raise ValueError(
                f"The {name} of the grid are {[len(row) for row in table]} in its rows; expected {len(rows)} rows of"
                f" {len(column_labels)}, one for each column label."
            )
