"""The command `export`: an SDXL to files for programs that do not know this package."""

import argparse
import json
import logging
import os
from contextlib import suppress

from finelip_sdxl.cli.convert import open_base
from finelip_sdxl.cli.options import Commands, add_base_and_folder, add_command, add_loading, config_source
from finelip_sdxl.cli.output import folder, free_folder, parts
from finelip_sdxl.files import check_file, check_writable, written_folder
from finelip_sdxl.names import resolve

FORMATS = ("diffusers", "comfyui")
COMFYUI_LAYERS = {"text_encoder": 12, "text_encoder_2": 32}
_NOT_LOADED = "ComfyUI will not load these files"

logger = logging.getLogger(__name__)


def add_parser(commands: Commands) -> None:
    text = "save an SDXL with text encoders of 248 positions for programs that do not know this package"
    command = add_command(commands, "export", export, text)
    add_base_and_folder(command)
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
    out = folder(options)  # likely ComfyUI's folder of text encoders: other files in it stay
    if os.path.lexists(out) and not os.path.isdir(out):
        raise ValueError(f"{out} is a file: pass the name of a directory.")
    check_writable(out)
    for file in ("clip_l.safetensors", "clip_g.safetensors"):
        if os.path.lexists(out / file) and not options.overwrite:
            raise ValueError(f"{out / file} exists: pass --overwrite to replace it, or another directory.")
        check_file(out / file)
    _check_layers(options)
    pipe = open_base(options, options.dtype or "float16", short_prompt_encoder="long", unet=None, vae=None)
    from finelip_sdxl.pipelines import export as exporting

    exporting.logger.addFilter(_is_new)
    try:
        print(*exporting.save_comfyui(pipe, out), sep="\n")
    finally:
        exporting.logger.removeFilter(_is_new)


def _check_layers(options: argparse.Namespace) -> None:
    """Warn of a model that ComfyUI cannot load, by its configs: before minutes of loading and gigabytes of files."""
    described = config_source(options)
    if described is None:  # a single file without configs here: `save_comfyui` looks at the weights
        return
    place, layers = resolve(described), {}
    for encoder, depth in COMFYUI_LAYERS.items():
        if (file := place.find("config.json", encoder, is_optional=True)) is not None:
            with suppress(ValueError, AttributeError):  # a damaged config is refused when it is loaded
                layers[encoder] = json.loads(file.read_bytes()).get("num_hidden_layers", depth)
    if any(COMFYUI_LAYERS[encoder] != depth for encoder, depth in layers.items()):
        depths = " and ".join(map(str, layers.values()))
        logger.warning(
            "%s: it knows only the text encoders of real SDXLs, with 12 and 32 layers, and recognizes clip_g by its"
            " layer 30, but these have %s layers.",
            _NOT_LOADED,
            depths,
        )


def _is_new(record: logging.LogRecord) -> bool:
    """Whether a message of the library has not been said by `_check_layers`."""
    return _NOT_LOADED not in record.msg
