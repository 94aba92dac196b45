"""The command `convert`: an SDXL to a folder with long text encoders. `export` opens its base the same way."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from finelip_sdxl.cli.options import (
    Commands,
    add_adapter,
    add_base_and_folder,
    add_command,
    add_encoding,
    add_loading,
    config_source,
    loading_arguments,
)
from finelip_sdxl.cli.output import free_folder, parts
from finelip_sdxl.console import announce, quiet_diffusers
from finelip_sdxl.files import written_folder

if TYPE_CHECKING:
    from finelip_sdxl.pipelines import LongPromptMixin


def add_parser(commands: Commands) -> None:
    command = add_command(commands, "convert", convert, "save an SDXL with text encoders of 248 positions")
    add_base_and_folder(command)
    command.add_argument("--overwrite", action="store_true", help="replace an existing pipeline")
    add_loading(command, dtype="float32", dtype_help="%(default)s")
    add_adapter(command)
    add_encoding(command)


def convert(options: argparse.Namespace) -> None:
    """Write a folder for this package and for stock Diffusers, and print its name."""
    out = free_folder(options)
    pipe = open_base(options, options.dtype)
    with written_folder(out, parts if options.overwrite else None) as folder:
        pipe.save_pretrained(folder)
    print(out)


def open_base(options: argparse.Namespace, dtype: str, **arguments: Any) -> LongPromptMixin:
    """Open a base as this package's pipeline of its kind, with text encoders of 248 positions."""
    described = config_source(options)
    announce(f"Opening {options.base}…")
    quiet_diffusers()
    import diffusers
    import torch
    from diffusers import DiffusionPipeline

    from finelip_sdxl.pipelines import long_prompts
    from finelip_sdxl.pipelines.opening import open_pipeline

    # A single file does not name its pipeline; without configs it is taken for text to image.
    index = (
        {"_class_name": "StableDiffusionXLPipeline"} if described is None else DiffusionPipeline.load_config(described)
    )
    stock_name = str(index["_class_name"])
    try:
        pipeline_class = long_prompts(getattr(diffusers, stock_name, None))  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(
            f"{options.base} is a {stock_name}, but only SDXL pipelines can be converted or exported."
        ) from error
    arguments = {**loading_arguments(options), **arguments}
    return open_pipeline(pipeline_class, options.base, dtype=getattr(torch, dtype), **arguments)
