"""The command `export`: an SDXL to files for programs that do not know this package."""

import argparse
import os

from finelip_sdxl.cli.convert import open_base
from finelip_sdxl.cli.options import Commands, add_base, add_command, add_loading
from finelip_sdxl.cli.output import folder, free_folder, parts
from finelip_sdxl.console import quiet_transformers
from finelip_sdxl.files import check_file, check_writable, written_folder

FORMATS = ("diffusers", "comfyui")


def add_parser(commands: Commands) -> None:
    text = "save an SDXL with text encoders of 248 positions for programs that do not know this package"
    command = add_command(commands, "export", export, text)
    command.add_argument("out", help="directory to write")
    add_base(command)
    text = "layout to write: a repository for stock Diffusers, or clip_l.safetensors and clip_g.safetensors"
    command.add_argument("--format", choices=FORMATS, default=FORMATS[0], help=f"{text} (default: %(default)s)")
    command.add_argument("--overwrite", action="store_true", help="replace existing files of the same names")
    add_loading(command, dtype=None, dtype_help="float32, or float16 for comfyui")


def export(options: argparse.Namespace) -> None:
    """Write files that other programs open without this package, and print their names."""
    if options.format == "comfyui":
        _export_comfyui(options)
    else:
        _export_diffusers(options)


def _export_diffusers(options: argparse.Namespace) -> None:
    out = free_folder(options)
    pipe = open_base(options, options.dtype or "float32", short_prompt_encoder="long")  # stock has no second pair

    from finelip_sdxl.pipelines.export import stock_pipeline

    stock = stock_pipeline(pipe)
    with written_folder(out, parts if options.overwrite else None) as folder:
        stock.save_pretrained(folder)
    print(out)


def _export_comfyui(options: argparse.Namespace) -> None:
    quiet_transformers()
    from finelip_sdxl.pipelines.export import COMFYUI_FILES, save_comfyui

    out = folder(options)  # likely ComfyUI's folder of text encoders: other files in it stay
    if os.path.lexists(out) and not os.path.isdir(out):
        raise ValueError(f"{out} is a file: pass the name of a directory.")
    check_writable(out)
    for file in COMFYUI_FILES.values():
        if os.path.lexists(out / file) and not options.overwrite:
            raise ValueError(f"{out / file} exists: pass --overwrite to replace it, or another directory.")
        check_file(out / file)
    pipe = open_base(options, options.dtype or "float16", short_prompt_encoder="long", unet=None, vae=None)
    print(*save_comfyui(pipe, out), sep="\n")
