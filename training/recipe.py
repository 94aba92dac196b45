"""What the training recipes share: flags, what is checked and recorded, and the parts of a loop that goes on."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, KwargsHandler
from torch import Tensor
from transformers.utils import logging as transformers_logging

from finelip_sdxl.files import check_writable

# Flags of every recipe that may change when a run goes on: what it learns from one batch is the same with any of them.
FREE_RUN_FLAGS = {"out", "save_every", "keep", "gradient_checkpointing", "cpu", "report_to"}


# Flags


def add_run_flags(parser: argparse.ArgumentParser, out: Path, models: str) -> Any:
    """Add the group "the run", with what a `RunFolder` needs, and give it for flags of the recipe's own.

    Args:
        out: the folder if none is given.
        models: what the run writes there beside its checkpoints.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_accelerator_flags(add_run_flags(parser, Path("runs/new"), models="last/ model"))
        >>> parser.parse_args(["--keep", "3"])  # doctest: +NORMALIZE_WHITESPACE, +ELLIPSIS
        Namespace(out=...Path('runs/new'), save_every=100, keep=3, mixed_precision='no', gradient_checkpointing=False,
            cpu=False, report_to='none')
    """
    group = parser.add_argument_group("the run")
    add, count = group.add_argument, number(int, positive=True)
    add("--out", type=Path, default=out, metavar="FOLDER", help=f"{models}, checkpoints/ to go on from: a run that "
        "finds some goes on (default: %(default)s)")  # fmt: skip
    add("--save-every", type=count, default=100, metavar="STEPS", help="between checkpoints (default: %(default)s)")
    add("--keep", type=count, default=2, metavar="N", help="checkpoints that are kept (default: %(default)s)")
    return group


def add_accelerator_flags(group: Any) -> None:
    """Add what `build_accelerator` needs, and gradient checkpointing, to the group that `add_run_flags` gave."""
    add = group.add_argument
    add("--mixed-precision", choices=("no", "bf16", "fp16"), default="no", help="(default: %(default)s)")
    add("--gradient-checkpointing", action="store_true", help="compute activations twice to save memory")
    add("--cpu", action="store_true", help="use no GPU")
    add("--report-to", choices=("none", "tensorboard", "wandb"), default="none", help="(default: %(default)s)")


def add_preset(
    group: Any, name: str, kind: Callable, metavar: str, text: str, presets: Sequence[dict[str, Any]]
) -> None:
    """Add a flag whose default depends on what is trained: its help shows each preset's, and `fill_in` sets it.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> presets = {"batch_size": 64}, {"batch_size": 40}
        >>> add_preset(parser, "batch-size", int, "PAIRS", "of each step", presets)
        >>> options = parser.parse_args([])
        >>> fill_in(options, presets[1])
        >>> options.batch_size
        40
    """
    defaults = " / ".join(f"{preset[name.replace('-', '_')]:g}" for preset in presets)
    group.add_argument(f"--{name}", type=kind, metavar=metavar, help=f"{text} ({defaults})")


def fill_in(options: argparse.Namespace, preset: dict[str, Any]) -> None:
    """Set what was not given."""
    for name, value in preset.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def number(kind: type, positive: bool = False) -> Callable[[str], float]:
    """What reads a flag's number, and refuses what is below 0, or also 0.

    Example:
        >>> number(int, positive=True)("8")
        8
        >>> number(float)("-1")
        Traceback (most recent call last):
        argparse.ArgumentTypeError: expected a number of at least 0 instead of -1
    """

    def read(text: str) -> float:
        with contextlib.suppress(ValueError):
            if math.isfinite(value := kind(text)) and (value > 0 or (value == 0 and not positive)):
                return value
        whole, range_ = "whole number" if kind is int else "number", "above 0" if positive else "of at least 0"
        raise argparse.ArgumentTypeError(f"expected a {whole} {range_} instead of {text}")

    return read


# Before the first step


def check_run(arguments: argparse.Namespace) -> None:
    """What is known to go wrong with the flags of a run, before anything is loaded.

    Raises:
        ValueError: if fp16 is to train on the CPU, the tracker is not installed, or the folder is a file.
        OSError: if the folder cannot be written to.
    """
    # Accelerate takes it, and trains nothing.
    if arguments.mixed_precision == "fp16" and uses_cpu(arguments):
        raise ValueError("--mixed-precision fp16 needs a GPU: on the CPU pass bf16, or no.")
    tracker = arguments.report_to
    if tracker != "none" and find_spec(tracker) is None:
        raise ValueError(f"--report-to {tracker} needs a package that is not installed: pip install {tracker}.")
    if arguments.out.exists() and not arguments.out.is_dir():
        raise ValueError(f"--out {arguments.out} is a file: pass the name of a folder.")
    check_writable(arguments.out)


def uses_cpu(arguments: argparse.Namespace) -> bool:
    return arguments.cpu or not torch.accelerator.is_available()


def build_accelerator(arguments: argparse.Namespace, handlers: Sequence[KwargsHandler] = ()) -> Accelerator:
    """From --cpu, --mixed-precision, --accumulation, --report-to and --out."""
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=3))  # the others wait while one process evaluates
    return Accelerator(
        cpu=uses_cpu(arguments),
        mixed_precision=arguments.mixed_precision,
        gradient_accumulation_steps=arguments.accumulation,
        log_with=None if arguments.report_to == "none" else arguments.report_to,
        project_dir=str(arguments.out),
        kwargs_handlers=[*handlers, patience],
    )


def fixed_settings(arguments: argparse.Namespace, free: Collection[str], processes: int) -> dict[str, Any]:
    """What must stay as it is when a run goes on; of names, the last part, since folders may be moved.

    Args:
        free: flags of the recipe's own that may change, beside `FREE_RUN_FLAGS`.

    Example:
        >>> arguments = argparse.Namespace(base="models/clip", seed=0, epochs=6, out=Path("runs/clip"))
        >>> fixed_settings(arguments, free={"epochs"}, processes=1)
        {'base': 'clip', 'seed': 0, 'processes': 1}
    """
    free = FREE_RUN_FLAGS.union(free)
    fixed = {name: value for name, value in vars(arguments).items() if name not in free and value is not None}
    fixed["processes"] = processes
    return {name: Path(value).name if isinstance(value, str | Path) else value for name, value in fixed.items()}


def forget_stretch(config: Any) -> None:
    """Take from a text encoder's config that it is stock's, stretched: a promise that no training keeps."""
    for name in ("stretched_from", "stretch_keep", "stretch_factor"):
        if hasattr(config, name):
            delattr(config, name)


# Of the loop


def schedule(step: int, warmup: int, steps: int) -> float:
    """Linear warm-up, then half a cosine to 0; a factor of the peak learning rate.

    Example:
        >>> [round(schedule(step, warmup=2, steps=6), 3) for step in range(6)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def endless(batches: Any, set_epoch: Callable[[int, int], None], first: int) -> Iterator[Any]:
    """Batches without end, epoch after epoch, from number `first` on.

    Args:
        batches: of one epoch; its length is that of a whole one.
        set_epoch: is told the number of each epoch before it begins, and its first batch, which is not 0 where a run
            goes on.

    Example:
        >>> from itertools import islice
        >>> from finelip_sdxl.data import EpochBatches
        >>> order = EpochBatches(size=6, group_size=1, batch_size=2, seed=0)
        >>> whole = list(islice(endless(order, order.set_epoch, first=0), 8))
        >>> whole[4:] == list(islice(endless(order, order.set_epoch, first=4), 4))
        True
    """
    epoch, done = divmod(first, len(batches))
    while True:
        set_epoch(epoch, done)
        yield from batches
        epoch, done = epoch + 1, 0


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch with its tensors, also those of dicts in it, on the device."""
    return {
        name: value.to(device)
        if isinstance(value, Tensor)
        else to_device(value, device)
        if isinstance(value, dict)
        else value
        for name, value in batch.items()
    }


# Around it


def run_recipe(
    script: str,
    train: Callable[[argparse.Namespace], Any],
    parse: Callable[[Sequence[str] | None], argparse.Namespace],
    arguments: Sequence[str] | None,
) -> None:
    """A recipe as a program: libraries are quiet, and what is wrong with its input ends it in one line.

    Args:
        script: its file name, which such a line begins with.
        arguments: those of the command line, or None to take them from there.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        train(parse(arguments))
    except KeyboardInterrupt:
        sys.exit(f"{script}: stopped; the same command goes on from the last checkpoint")
    except (ValueError, OSError, ImportError) as error:
        message = str(error).strip()
        if "Original Traceback" in message:  # from a process that prepares data; the error itself is the last line
            message = message.splitlines()[-1].partition(": ")[2]
        sys.exit(f"{script}: error: {' '.join(message.split())}")
