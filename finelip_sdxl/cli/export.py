"""The command `export`."""

import argparse
import os

from finelip_sdxl.cli.convert import open_base
from finelip_sdxl.cli.output import folder, free_folder, parts
from finelip_sdxl.console import quiet_transformers
from finelip_sdxl.files import check_file, check_writable, written_folder

FORMATS = ("diffusers", "comfyui")


def export(options: argparse.Namespace) -> None:
    """An SDXL, with or without a FineLIP, to files that hold nothing of this package and are opened without it."""
    if options.format == "comfyui":
        _export_comfyui(options)
    else:
        _export_diffusers(options)


def _export_diffusers(options: argparse.Namespace) -> None:
    out = free_folder(options)
    pipe = open_base(options, options.dtype or "float32", short_prompt_encoder="long")  # stock has no other way

    from finelip_sdxl.pipelines.export import stock_pipeline

    stock = stock_pipeline(pipe)
    with written_folder(out, parts if options.overwrite else None) as folder:
        stock.save_pretrained(folder)
    print(out)


def _export_comfyui(options: argparse.Namespace) -> None:
    quiet_transformers()
    from finelip_sdxl.pipelines.export import COMFYUI_FILES, save_comfyui

    out = folder(options)  # likely the folder where ComfyUI keeps text encoders, so others in it stay
    if os.path.lexists(out) and not os.path.isdir(out):
        raise ValueError(f"{out} is a file: pass the name of a directory.")
    check_writable(out)
    for file in COMFYUI_FILES.values():
        if os.path.lexists(out / file) and not options.overwrite:
            raise ValueError(f"{out / file} exists: pass --overwrite to replace it, or another directory.")
        check_file(out / file)
    pipe = open_base(options, options.dtype or "float16", short_prompt_encoder="long", unet=None, vae=None)
    print(*save_comfyui(pipe, out), sep="\n")
