"""Flags of the recipes that train an SDXL, beside those of every recipe: its base, images, and optimization."""

from __future__ import annotations

import argparse
from pathlib import Path

from finelip_sdxl.console import number
from finelip_sdxl.names import check_models, data_place
from finelip_sdxl.options import check_config
from finelip_sdxl.picture_sizes import check_side, read_side_factor
from finelip_sdxl.training.command_line import AMOUNT, BATCH, SEED, FlagGroup, path

_DEFAULT = "(default: %(default)s)"


def add_base_flags(group: FlagGroup, role: str = "") -> None:
    """Adds the flags of the SDXL.

    Args:
        group: group of flags.
        role: what it is good for, for the help text.
    """
    add = group.add_argument
    add("--base", default="miniature", metavar="SDXL", help="hub id, directory or single file (.safetensors) of any "
        f"SDXL{role} (default: %(default)s, the small one that comes with the package)")  # fmt: skip
    add("--base-config", metavar="NAME", help="hub id or directory of configs and tokenizers for a single file as base "
        "(default: Diffusers' choice on the hub)")  # fmt: skip
    add("--variant", metavar="NAME", help="variant of the base's files, such as fp16")


def add_image_flags(group: FlagGroup) -> None:
    """Adds the flags of images and of what is computed of them once."""
    add = group.add_argument
    add("--images", type=path, metavar="FOLDER", help="folder of the images, if they are not beside the captions")
    add("--skip-missing-images", action="store_true", help="leave out, and count, images whose files are not there")
    add("--precomputed", type=path, metavar="FOLDER", help="folder of latents and text states, which runs can share "
        "(default: precomputed/ in --output-dir)")  # fmt: skip


def add_optimizer_flags(group: FlagGroup) -> None:
    """Adds the flags of optimization that have one default."""
    add = group.add_argument
    add("--gradient-accumulation-steps", type=BATCH, default=1, metavar="N", help=f"batches in a step {_DEFAULT}")
    add("--weight-decay", type=AMOUNT, default=1e-2, metavar="X", help=f"weight decay of AdamW {_DEFAULT}")
    add("--max-grad-norm", type=AMOUNT, default=1.0, metavar="X", help=f"limit on the gradient norm; 0 for none "
        f"{_DEFAULT}")  # fmt: skip
    add("--snr-gamma", type=number(float, above=0), metavar="X", help="gamma of min-SNR weights for timesteps, usually "
        "5 (default: equal weights)")  # fmt: skip
    add("--seed", type=SEED, default=0, metavar="N", help=f"seed of weights, order and noise {_DEFAULT}")


def check_base_and_data(arguments: argparse.Namespace, *models: str) -> None:
    """Checks the flags of base, other models and data, before anything is loaded.

    Args:
        arguments: the flags.
        *models: those that name a model beside the base.

    Raises:
        ValueError: flags do not go together, or a name is none of a model or of data.
        OSError: a file or folder is not there.
    """
    check_side("resolution", arguments.resolution, read_side_factor(arguments.base))
    check_config(arguments.base, arguments.base_config)
    if arguments.variant is not None and Path(arguments.base).is_file():
        raise ValueError(
            f"--variant {arguments.variant} goes with a directory or hub id, but --base {arguments.base} is a single"
            " file: leave it out."
        )
    named = {name: getattr(arguments, name) for name in ("base", "base_config", *models)}
    check_models(named, sdxls=("base", "base_config"), folders=("base_config",))
    data_place(arguments.captions, arguments.images)
