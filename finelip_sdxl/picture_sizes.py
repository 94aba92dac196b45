"""Sizes of pictures: their sides are multiples of the factor by which a model's VAE scales."""

from __future__ import annotations

from numbers import Integral
from pathlib import Path
from typing import Any

from finelip_sdxl.foreign_files import read_json
from finelip_sdxl.names import sdxl_path

SDXL_FACTOR = 8
"""The factor of SDXL's own VAE. Diffusers refuses all other sides, also for a VAE that scales by less."""


def check_side(name: str, pixels: Any, factor: int) -> None:
    """Refuse a side of a picture that is no multiple of a model's factor.

    Diffusers alone draws a smaller picture in silence where a VAE scales by more than SDXL's.

    Raises:
        ValueError: the message names the nearest smaller side.

    Examples:
        >>> check_side("width", 200, factor=16)
        Traceback (most recent call last):
        ValueError: `width` is 200; expected a multiple of 16, such as 192.
    """
    if not isinstance(pixels, Integral) or pixels < factor or pixels % factor:
        near = f", such as {max(int(pixels) // factor, 1) * factor}" if isinstance(pixels, Integral) else ""
        raise ValueError(f"`{name}` is {pixels!r:.60}; expected a multiple of {factor}{near}.")


def side_factor(pipe: Any) -> int:
    """The factor of a pipeline.

    Examples:
        >>> from finelip_sdxl import FineLIPSDXLPipeline
        >>> side_factor(FineLIPSDXLPipeline.from_pretrained("miniature"))
        16
    """
    factor: int = pipe.vae_scale_factor
    return max(SDXL_FACTOR, factor)


def read_side_factor(base: str) -> int:
    """The factor of an SDXL, from the config of its VAE alone, without PyTorch.

    Args:
        base: a folder, or `"miniature"`. A hub id or a single file is taken for an SDXL with its own VAE, and its
            pipeline checks again.

    Raises:
        OSError, ValueError: the config cannot be read.

    Examples:
        >>> read_side_factor("miniature"), read_side_factor("some/sdxl")
        (16, 8)
    """
    file = Path(sdxl_path(base)) / "vae" / "config.json"
    blocks = read_json(file).get("block_out_channels") if file.is_file() else None
    return max(SDXL_FACTOR, 2 ** (len(blocks) - 1)) if isinstance(blocks, list) and blocks else SDXL_FACTOR
