"""The flags of training/train_lora.py, with defaults from presets, and their checks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from finelip_sdxl.console import Parser, number
from finelip_sdxl.options import DATA_KINDS, LORA_LAYERS
from finelip_sdxl.training.command_line import (
    AMOUNT,
    BATCH,
    SHARE,
    STEPS,
    add_accelerator_flags,
    add_config_flag,
    add_preset_flag,
    add_run_flags,
    check_run,
    parse_flags,
    preset_path,
)
from finelip_sdxl.training.flags.of_sdxl import (
    add_base_flags,
    add_image_flags,
    add_optimizer_flags,
    check_base_and_data,
)

SDXL, MINIATURE = preset_path("train_lora", "sdxl"), preset_path("train_lora", "miniature")


def parse(arguments: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="train_lora.py",
        usage="%(prog)s [--base SDXL] [--captions KIND:PATH] [flags]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    rank, resolution = number(int, above=0, most=1024), number(int, above=0, most=4096)
    shown = partial(add_preset_flag, presets=(SDXL, MINIATURE))
    default = "(default: %(default)s)"

    group = parser.add_argument_group("models")
    add = group.add_argument
    add_config_flag(group, (SDXL, MINIATURE))
    add_base_flags(group)
    add("--finelip", metavar="CLIP", help="FineLIP or Long-CLIP for the first encoder: hub id, directory or checkpoint "
        "file (default: the base's encoder, stretched unless it has 248 positions)")  # fmt: skip
    add("--finelip-2", metavar="CLIP", help="the same for the second encoder")
    add("--conditioning-adapter", metavar="ADAPTER", help="directory or hub id of an adapter from "
        "training/align_adapter.py, or none (default: the base's own, unless a FineLIP is given)")  # fmt: skip

    group = parser.add_argument_group("the LoRA (two defaults: SDXL's / the miniature's)")
    add = group.add_argument
    shown(group, "--rank", rank, "N", "rank; alpha is the same number")
    add("--layers", choices=LORA_LAYERS, default="attention", help="the UNet's linear layers to change: those of "
        f"cross-attention, those of all attention, or all of its transformers {default}")  # fmt: skip
    add("--train-text-encoders", action="store_true", help="change the text encoders, too")

    group = parser.add_argument_group("data (two defaults: SDXL's / the miniature's)")
    add = group.add_argument
    add("--captions", metavar="KIND:PATH", help=f"images with captions: {DATA_KINDS}; of several captions the first "
        "counts (default for the miniature: miniature:2000)")  # fmt: skip
    add_image_flags(group)
    shown(group, "--resolution", resolution, "PIXELS", "side of square images; others are scaled and cut to the "
        "nearest of the sizes with as many pixels")  # fmt: skip
    add("--square", action="store_true", help="cut a square from the middle of every image")
    add("--caption-dropout", type=SHARE, default=0.1, metavar="P", help="probability of training on an image without "
        f"its caption, for guidance {default}")  # fmt: skip

    group = parser.add_argument_group("optimization (two defaults: SDXL's / the miniature's)")
    add = group.add_argument
    shown(group, "--steps", STEPS, "N", "optimizer steps")
    shown(group, "--batch-size", BATCH, "IMAGES", "images of each process and step")
    shown(group, "--learning-rate", AMOUNT, "X", "peak learning rate")
    add_optimizer_flags(group)

    run = add_run_flags(parser, Path("runs/lora"), models="the LoRA, last/, written with every checkpoint")
    add_accelerator_flags(run)
    options = parse_flags(parser, arguments, choose_presets)
    if options.captions is None:
        parser.error(f"--base {options.base} needs --captions, such as folder:pictures")
    return options


def choose_presets(options: argparse.Namespace) -> tuple[Path, ...]:
    """Returns the preset for flags that were not given: the miniature's, or SDXL's."""
    return (MINIATURE,) if options.base == "miniature" else (SDXL,)


def check(arguments: argparse.Namespace) -> None:
    """Checks which flags go together, before anything is loaded."""
    check_run(arguments)
    if arguments.captions.startswith("txt:"):
        raise ValueError(f"{arguments.captions} has no images: pass captions with images, such as folder:pictures.")
    adapter = () if arguments.conditioning_adapter == "none" else ("conditioning_adapter",)
    check_base_and_data(arguments, "finelip", "finelip_2", *adapter)
