"""The flags of training/align_adapter.py, with defaults from presets, and their checks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from finelip_sdxl.console import Parser, number
from finelip_sdxl.names import check_models, data_place
from finelip_sdxl.options import DATA_KINDS
from finelip_sdxl.picture_sizes import check_side, read_side_factor
from finelip_sdxl.training.command_line import (
    AMOUNT,
    BATCH,
    MOST_STEPS,
    SEED,
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
    gamma, decay = number(float, above=0), number(float, least=0, below=1)
    shown = partial(add_preset_flag, presets=(SDXL, MINIATURE))
    default = "(default: %(default)s)"

    group = parser.add_argument_group("models (two defaults: SDXL's / the miniature's)")
    add = group.add_argument
    add_config_flag(group, (SDXL, MINIATURE))
    add("--base", default="miniature", metavar="SDXL", help="hub id, directory or single file (.safetensors) of any "
        "SDXL; its encoders teach (default: %(default)s, the small one that comes with the package)")  # fmt: skip
    add("--base-config", metavar="NAME", help="hub id or directory of configs and tokenizers for a single file as base "
        "(default: Diffusers' choice on the hub)")  # fmt: skip
    add("--variant", metavar="NAME", help="variant of the base's files, such as fp16")
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
    add("--images", type=path, metavar="FOLDER", help="folder of the images, if they are not beside the captions")
    add("--skip-missing-images", action="store_true", help="leave out, and count, images whose files are not there")
    add("--short-share", type=SHARE, default=0.4, metavar="SHARE", help="share of short captions in a batch: without "
        f"them, short prompts get worse {default}")  # fmt: skip
    shown(group, "--resolution", resolution, "PIXELS", "side of the square that is cut from the middle of each image")
    add("--precomputed", type=path, metavar="FOLDER", help="folder of latents and text states, which runs can share "
        "(default: precomputed/ in --output-dir)")  # fmt: skip

    group = parser.add_argument_group("optimization (two defaults: SDXL's / the miniature's)")
    add = group.add_argument
    shown(group, "--text-steps", STEPS_OR_NONE, "N", "steps of stage 1; 0 leaves it out")
    shown(group, "--image-steps", STEPS_OR_NONE, "N", "steps of stage 2; 0 leaves it out")
    shown(group, "--batch-size", BATCH, "CAPTIONS", "captions of each process and step")
    shown(group, "--learning-rate", AMOUNT, "X", "peak learning rate of both stages")
    add("--gradient-accumulation-steps", type=BATCH, default=1, metavar="N", help=f"batches in a step {default}")
    add("--weight-decay", type=AMOUNT, default=1e-2, metavar="X", help=f"weight decay of AdamW {default}")
    add("--max-grad-norm", type=AMOUNT, default=1.0, metavar="X", help=f"limit on the gradient norm; 0 for none "
        f"{default}")  # fmt: skip
    add("--snr-gamma", type=gamma, metavar="X", help="gamma of min-SNR weights for timesteps, usually 5 (default: "
        "equal weights)")  # fmt: skip
    add("--ema-decay", type=decay, default=0.995, metavar="X", help="decay of the average of weights, the result "
        f"{default}")  # fmt: skip
    add("--seed", type=SEED, default=0, metavar="N", help=f"seed of weights, order and noise {default}")

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
    check_side("resolution", arguments.resolution, read_side_factor(arguments.base))
    if arguments.captions.startswith("txt:") and arguments.image_steps:
        raise ValueError(f"{arguments.captions} has no images: pass --image-steps 0 to align by texts alone.")
    is_file = Path(arguments.base).is_file()
    if arguments.base_config is not None and not is_file:
        raise ValueError(
            f"--base-config {arguments.base_config} goes with a single file, but --base {arguments.base} is none: leave"
            " it out."
        )
    if arguments.variant is not None and is_file:
        raise ValueError(
            f"--variant {arguments.variant} goes with a directory or hub id, but --base {arguments.base} is a single"
            " file: leave it out."
        )
    models = {name: getattr(arguments, name) for name in ("base", "base_config", "finelip", "finelip_2")}
    check_models(models, sdxls=("base", "base_config"), folders=("base_config",))
    data_place(arguments.captions, arguments.images)
    if arguments.validation_prompts is not None and not arguments.validation_prompts.is_file():
        raise FileNotFoundError(
            f"--validation-prompts {arguments.validation_prompts} does not exist, or is no file: pass a text file."
        )
