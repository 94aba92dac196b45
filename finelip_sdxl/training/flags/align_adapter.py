"""The flags of training/align_adapter.py, with defaults from presets, and their checks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from finelip_sdxl.console import Parser, number
from finelip_sdxl.options import DATA_KINDS
from finelip_sdxl.training.command_line import (
    AMOUNT,
    BATCH,
    MOST_STEPS,
    SHARE,
    STEPS_OR_NONE,
    add_accelerator_flags,
    add_config_flag,
    add_preset_flag,
    add_run_flags,
    check_run,
    parse_flags,
    path,
    preset_path,
)
from finelip_sdxl.training.flags.of_sdxl import (
    add_base_flags,
    add_image_flags,
    add_optimizer_flags,
    check_base_and_data,
)

SDXL, MINIATURE = preset_path("align_adapter", "sdxl"), preset_path("align_adapter", "miniature")


def parse(arguments: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="align_adapter.py",
        usage="%(prog)s [--base SDXL] [--finelip CLIP] [--finelip-2 CLIP] [--captions KIND:PATH] [flags]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    hidden_dim, rank = number(int, above=0, most=16_384), number(int, above=0, most=1024)
    resolution, guidance = number(int, above=0, most=4096), number(float, least=0, most=100)
    decay = number(float, least=0, below=1)
    shown = partial(add_preset_flag, presets=(SDXL, MINIATURE))
    default = "(default: %(default)s)"

    group = parser.add_argument_group("models (two defaults: SDXL's / the miniature's)")
    add = group.add_argument
    add_config_flag(group, (SDXL, MINIATURE))
    add_base_flags(group, role="; its encoders teach")
    add("--finelip", metavar="CLIP", help="FineLIP or Long-CLIP for the first encoder: hub id, directory or checkpoint "
        "file (default: the base's encoder, stretched; for the miniature miniature-finelip-1)")  # fmt: skip
    add("--finelip-2", metavar="CLIP", help="the same for the second encoder (for the miniature miniature-finelip-2)")
    add("--method", choices=("adapter", "lora"), default="adapter", help=f"method of alignment {default}")
    shown(group, "--hidden-dim", hidden_dim, "N", "width of the adapter's hidden layers")
    shown(group, "--rank", rank, "N", "rank of the LoRA")

    group = parser.add_argument_group("data (two defaults: SDXL's / the miniature's)")
    add = group.add_argument
    add("--captions", metavar="KIND:PATH", help=f"images with captions: {DATA_KINDS}; for stage 1 alone also "
        "txt:FILE with a caption a line (default for the miniature: miniature:2000)")  # fmt: skip
    add_image_flags(group)
    add("--short-share", type=SHARE, default=0.4, metavar="SHARE", help="share of short captions in a batch: without "
        f"them, short prompts get worse {default}")  # fmt: skip
    shown(group, "--resolution", resolution, "PIXELS", "side of the square that is cut from the middle of each image")

    group = parser.add_argument_group("optimization (two defaults: SDXL's / the miniature's)")
    add = group.add_argument
    shown(group, "--text-steps", STEPS_OR_NONE, "N", "steps of stage 1; 0 leaves it out")
    shown(group, "--image-steps", STEPS_OR_NONE, "N", "steps of stage 2; 0 leaves it out")
    shown(group, "--batch-size", BATCH, "CAPTIONS", "captions of each process and step")
    shown(group, "--learning-rate", AMOUNT, "X", "peak learning rate of both stages")
    add_optimizer_flags(group)
    add("--ema-decay", type=decay, default=0.995, metavar="X", help="decay of the average of weights, the result "
        f"{default}")  # fmt: skip

    run = add_run_flags(parser, Path("runs/alignment"), models="the results last/ and, of two stages, after-text/")
    add = run.add_argument
    add("--validate-every", type=STEPS_OR_NONE, default=100, metavar="STEPS", help="steps between drawings of the "
        f"validation prompts, stock and aligned, in validation/ and TensorBoard; 0 for none {default}")  # fmt: skip
    add("--validation-prompts", type=path, metavar="FILE", help="text file with a prompt a line (default: the first "
        "four captions)")  # fmt: skip
    shown(run, "--guidance-scale", guidance, "X", "guidance scale of validation pictures, SDXL's / the miniature's")
    add_accelerator_flags(run)
    options = parse_flags(parser, arguments, choose_presets)
    if options.captions is None:
        parser.error(f"--base {options.base} needs --captions, such as sharegpt4v:captions.json")
    return options


def choose_presets(options: argparse.Namespace) -> tuple[Path, ...]:
    """Returns the preset for flags that were not given: the miniature's, or SDXL's."""
    return (MINIATURE,) if options.base == "miniature" else (SDXL,)


def check(arguments: argparse.Namespace) -> None:
    """Checks which flags go together, before anything is loaded."""
    check_run(arguments)
    steps = arguments.text_steps + arguments.image_steps
    if not steps:
        raise ValueError("--text-steps and --image-steps are both 0: give one of the stages steps.")
    if steps > MOST_STEPS:
        raise ValueError(f"--text-steps and --image-steps are {steps:,} in all; expected at most {MOST_STEPS:,}.")
    if arguments.batch_size < 2 or not 0 < arguments.short_share < 1:
        raise ValueError(
            f"--batch-size is {arguments.batch_size} and --short-share {arguments.short_share:g}: each batch needs long"
            " and short captions, so pass at least 2, and a share between 0 and 1."
        )
    if arguments.captions.startswith("txt:") and arguments.image_steps:
        raise ValueError(f"{arguments.captions} has no images: pass --image-steps 0 to align by texts alone.")
    check_base_and_data(arguments, "finelip", "finelip_2")
    if arguments.validation_prompts is not None and not arguments.validation_prompts.is_file():
        raise FileNotFoundError(
            f"--validation-prompts {arguments.validation_prompts} does not exist, or is no file: pass a text file."
        )
