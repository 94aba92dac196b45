"""Files and folders that commands write, and the parameters in a picture's file."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finelip_sdxl.files import check_file, check_writable
from finelip_sdxl.miniature.notice import REAL_SDXL, notice
from finelip_sdxl.options import ENCODING, LOADED
from finelip_sdxl.prompts.plan import EncoderPlan
from finelip_sdxl.prompts.vocabulary import MINIATURE

if TYPE_CHECKING:
    import torch

    from finelip_sdxl.comparison.settings import Settings
    from finelip_sdxl.pipelines import LongPromptMixin


def folder(options: argparse.Namespace) -> Path:
    if not options.out.strip():
        raise ValueError("The directory to write has an empty name: pass one, such as long-sdxl.")
    return Path(options.out)


def free_folder(options: argparse.Namespace) -> Path:
    """The folder for a pipeline, checked: it is writable, and free or may be replaced."""
    out = folder(options)
    place = Path(os.path.realpath(out))
    if os.path.ismount(place):
        raise ValueError(f"{out} is where a disk is mounted, which cannot be replaced: pass a directory in it.")
    check_writable(place.parent)  # first: it also puts back a folder that a killed run moved aside
    if not os.path.lexists(place):
        check_writable(place)  # its name may be too long
    elif not options.overwrite:
        raise ValueError(f"{out} exists: pass --overwrite to replace it, or another directory.")
    else:
        parts(place)
    return out


def parts(saved: Path) -> set[str]:
    """The names of a saved pipeline's own parts in its folder. All other files there are somebody else's.

    Raises:
        ValueError: no pipeline is saved there.
    """
    problem = "has no model_index.json"
    with suppress(OSError):
        try:
            index = json.loads((saved / "model_index.json").read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            index = None
        if isinstance(index, dict):
            return {"model_index.json", *index}
        problem = "has a damaged model_index.json"
    raise ValueError(f"{saved} is not a saved pipeline (it {problem}), so it is not overwritten.")


def output_file(option: str, name: str) -> Path:
    file = Path(name)
    if os.path.isdir(file):
        raise ValueError(f"{option} {name} is a directory: pass the name of a file.")
    check_file(file)
    return file


def image_files(out: str, count: int, flag: str = "--out") -> list[Path]:
    file = Path(out)
    if file.suffix.lower() != ".png" or os.path.isdir(file):
        raise ValueError(f"{flag} {out} must be the name of a PNG file, such as picture.png.")
    files = [file] if count == 1 else [file.with_stem(f"{file.stem}-{number}") for number in range(1, count + 1)]
    for file in files:
        check_file(file)
    return files


def print_notice(prompt: str, plans: Iterable[EncoderPlan]) -> None:
    """Print that the miniature draws, and what it does not know of the prompt, if the plans count in its tokens."""
    if any(plan.vocabulary == MINIATURE for plan in plans):
        print(*notice(prompt, f"--base {REAL_SDXL}"), sep="\n", flush=True)


def picture_parameters(
    options: argparse.Namespace, settings: Settings, dtype: torch.dtype, pipe: LongPromptMixin
) -> dict[str, Any]:
    """The parameters of a drawn picture, the same for every command. No path of this machine is among them.

    Args:
        settings: the settings that the picture was drawn with, its seed apart.
    """
    from finelip_sdxl.images import sampler_name
    from finelip_sdxl.provenance import public_name

    sources = {name: getattr(options, name) for name in ("base", *LOADED)}
    return {
        "prompt": settings.prompt,
        "negative_prompt": options.negative_prompt,
        "steps": settings.steps,
        "sampler": sampler_name(pipe.scheduler),
        "guidance_scale": settings.guidance_scale,
        **{name: source and public_name(source) for name, source in sources.items()},
        "conditioning_adapter_scale": options.conditioning_adapter_scale,
        **{name: getattr(pipe, name) for name in ENCODING},
        "dtype": str(dtype).removeprefix("torch."),
        "finelip_sdxl": version("finelip-sdxl"),
    }
