"""The flags of training/train_finelip.py, with defaults from presets, and their checks."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from finelip_sdxl.console import COUNT, Parser, number
from finelip_sdxl.names import check_models, data_place
from finelip_sdxl.options import (
    DATA_KINDS,
    LOSSES,
    MARGIN,
    NEGATIVE_SLOPE,
    POOLING,
    REFINED_SHARE,
    REFINEMENT,
    STOCK_POSITIONS,
    STRETCH_KEEP,
)
from finelip_sdxl.training.command_line import (
    AMOUNT,
    BATCH,
    SEED,
    SHARE,
    STEPS,
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

PAPER, MINIATURE = preset_path("train_finelip", "paper"), preset_path("train_finelip", "miniature")


def parse(arguments: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="train_finelip.py",
        usage="%(prog)s [--base CLIP] [--data KIND:PATH] [flags]",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    padding, margin = number(int, least=0, most=1000), number(float, least=0, most=10)
    kept, slope, part = number(int, least=0, most=STOCK_POSITIONS - 1), SHARE, number(float, above=0, most=1)
    workers = number(int, least=0, most=128)
    shown = partial(add_preset_flag, presets=(PAPER, MINIATURE))
    default = "(default: %(default)s)"

    group = parser.add_argument_group("model and data")
    add = group.add_argument
    add_config_flag(group, (PAPER, MINIATURE))
    add("--base", default="miniature-clip-1", metavar="CLIP", help="any CLIP: hub id, directory, checkpoint file, "
        f"miniature-clip-1 or miniature-clip-2 {default}")  # fmt: skip
    add("--stretch-keep", type=kept, default=STRETCH_KEEP, metavar="ROWS", help="leading rows of the positional table "
        f"that neither the stretch nor the training changes {default}")  # fmt: skip
    add("--new-positions", action="store_true", help="learn the whole positional table anew, from random rows")
    add("--refined-share", type=part, metavar="X", help="refined tokens as a share of an image's patches, for a base "
        f"without a token refinement (default: {REFINED_SHARE})")  # fmt: skip
    add("--refinement", choices=REFINEMENT, help="whose tokens are refined, for such a base; late interaction compares "
        "all tokens of the others (default: both)")  # fmt: skip
    add("--interaction-slope", type=slope, metavar="X", help="slope of late interaction's LeakyReLU; 1 for none "
        f"(default: the base's, or {NEGATIVE_SLOPE})")  # fmt: skip
    add("--interaction-pooling", choices=POOLING, help="each token's best partner, or the mean over all (default: the "
        "base's, or max)")  # fmt: skip
    add("--tokenizer", metavar="NAME", help="hub id or directory of tokenizer and image processor (default: the base)")
    add("--data", metavar="KIND:PATH", help=f"images with captions: {DATA_KINDS}, or webdataset:SHARDS (default for "
        "the miniature: miniature:20000)")  # fmt: skip
    add("--epoch-size", type=COUNT, metavar="PAIRS", help="pairs in an epoch of webdataset shards")
    add("--images", type=path, metavar="FOLDER", help="folder of the images, if they are not beside the data")
    add("--skip-missing-images", action="store_true", help="leave out, and count, images whose files are not there")
    add("--eval-data", metavar="KIND:PATH", help="data for retrieval as for --data, but no shards, or none (default: "
        "none; for the miniature miniature:500)")  # fmt: skip
    add("--eval-images", type=path, metavar="FOLDER", help="folder of the images of --eval-data, if they are not "
        "beside it")  # fmt: skip
    add("--drop-first", type=SHARE, default=0.0, metavar="P", help="probability of dropping a caption's first "
        f"sentence, its summary {default}")  # fmt: skip
    add("--sample-sentences", type=SHARE, default=0.0, metavar="P", help="probability of keeping only a random "
        f"part of a caption's sentences {default}")  # fmt: skip
    add("--prefix-padding", type=padding, default=0, metavar="TOKENS", help="most padding tokens before a "
        f"caption {default}")  # fmt: skip

    group = parser.add_argument_group("losses (two defaults: the paper's / the miniature's)")
    add = group.add_argument
    shown(group, "--triplet-weight", AMOUNT, "X", "weight of the triplet margin loss of late interaction")
    shown(group, "--contrastive-weight", AMOUNT, "X", "weight of CLIP's contrastive loss of the embeddings")
    shown(group, "--fine-contrastive-weight", AMOUNT, "X", "weight of the contrastive loss of late interaction")
    shown(group, "--region-weight", AMOUNT, "X", "weight of the loss of phrases against their regions, for data with "
        "regions (the miniature)")  # fmt: skip
    shown(group, "--distillation-weight", AMOUNT, "X", "weight of the distillation loss: distance from the base's "
        "states on short captions")  # fmt: skip
    add("--margin", type=margin, default=MARGIN, metavar="X", help=f"margin of the triplet margin loss {default}")
    add("--hardest", action="store_true", help="count a pair's hardest negative only")
    shown(group, "--loss-warmup-epochs", AMOUNT, "X", "epochs over which all losses grow linearly from 0")

    group = parser.add_argument_group("optimization (two defaults: the paper's / the miniature's)")
    add = group.add_argument
    shown(group, "--epochs", number(float, above=0), "X", "passes over the data")
    add("--max-steps", type=STEPS, metavar="N", help="optimizer steps, in place of --epochs")
    shown(group, "--batch-size", BATCH, "PAIRS", "pairs of each process and step; the paper has 512 in all")
    add("--gradient-accumulation-steps", type=BATCH, default=1, metavar="N", help="batches in a step; negatives come "
        f"from the same batch {default}")  # fmt: skip
    shown(group, "--learning-rate", AMOUNT, "X", "peak learning rate of CLIP")
    shown(group, "--refinement-learning-rate", AMOUNT, "X", "peak learning rate of the token refinement")
    shown(group, "--weight-decay", AMOUNT, "X", "weight decay of AdamW")
    shown(group, "--warmup-steps", STEPS_OR_NONE, "N", "steps of warm-up before the cosine")
    add("--max-grad-norm", type=AMOUNT, default=1.0, metavar="X", help=f"limit on the gradient norm; 0 for none "
        f"{default}")  # fmt: skip
    add("--seed", type=SEED, default=0, metavar="N", help=f"seed of weights, order and augmentation {default}")

    run = add_run_flags(parser, Path("runs/finelip"), models="the models best/ and last/")
    add = run.add_argument
    add("--eval-every", type=STEPS, default=100, metavar="STEPS", help=f"steps between evaluations {default}")
    add("--dataloader-num-workers", type=workers, default=0, metavar="N", help=f"number of processes that prepare data "
        f"{default}")  # fmt: skip
    add_accelerator_flags(run)
    options = parse_flags(parser, arguments, choose_presets)
    if options.data is None:
        parser.error(f"--base {options.base} needs --data, such as sharegpt4v:captions.json")
    options.eval_data = options.eval_data or "none"
    return options


def choose_presets(options: argparse.Namespace) -> tuple[Path, ...]:
    """Returns the presets for flags that were not given: the miniature's, or the paper's."""
    return (MINIATURE, PAPER) if options.base.startswith("miniature-") else (PAPER,)


def check(arguments: argparse.Namespace) -> None:
    """Checks which flags go together, before anything is loaded."""
    if not any(getattr(arguments, f"{name}_weight") for name in LOSSES):
        raise ValueError("All losses have weight 0: give one of them a weight, such as --triplet-weight 1.")
    if arguments.new_positions and arguments.stretch_keep != STRETCH_KEEP:
        raise ValueError(f"--stretch-keep {arguments.stretch_keep} goes with a stretch: leave out --new-positions.")
    is_stream = arguments.data.startswith("webdataset:")
    if arguments.epoch_size is not None and not is_stream:
        raise ValueError(f"--epoch-size goes with webdataset shards, but --data is {arguments.data}: leave it out.")
    if arguments.images is not None and is_stream:
        raise ValueError(f"--images {arguments.images} goes with files, but shards hold their images: leave it out.")
    if arguments.eval_images is not None and arguments.eval_data == "none":
        raise ValueError(f"--eval-images {arguments.eval_images} goes with --eval-data, which is none: leave it out.")
    check_run(arguments)
    check_models({"base": arguments.base, "tokenizer": arguments.tokenizer})
    if not is_stream:
        data_place(arguments.data, arguments.images)
    elif arguments.epoch_size is None:
        raise ValueError("Shards do not tell their number of pairs: pass --epoch-size.")
    if arguments.eval_data != "none":
        data_place(arguments.eval_data, arguments.eval_images)
