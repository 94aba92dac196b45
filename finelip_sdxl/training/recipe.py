"""What the training recipes share: flags, what is checked and recorded, and the parts of a loop that goes on."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, KwargsHandler
from torch import Tensor
from transformers.utils import logging as transformers_logging

from finelip_sdxl.files import check_writable, stopped_by_signals
from finelip_sdxl.training.run_folder import MODELS

# Flags of every recipe that may change when a run goes on: what it learns from one batch is the same with any of them.
FREE_RUN_FLAGS = {
    "output_dir",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "gradient_checkpointing",
    "cpu",
    "report_to",
}


MOST = 10**9  # of any number that no other bound is given for


MOST_STEPS = 9_999_999  # that the names of checkpoints have room for


MOST_SKIPPED = 100  # steps in a row: as often, fp16 halves a scale of 65,536 to one that nothing overflows at


# Flags


def add_run_flags(parser: argparse.ArgumentParser, out: Path, models: str) -> Any:
    """Add the group "the run", with what a `RunFolder` needs, and give it for flags of the recipe's own.

    Args:
        out: the folder if none is given.
        models: what the run writes there beside its checkpoints.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> add_accelerator_flags(add_run_flags(parser, Path("runs/new"), models="last/ model"))
        >>> parser.parse_args(["--checkpoints-total-limit", "3"])  # doctest: +NORMALIZE_WHITESPACE, +ELLIPSIS
        Namespace(output_dir=...Path('runs/new'), checkpointing_steps=100, checkpoints_total_limit=3, mixed_precision='no', gradient_checkpointing=False,
            cpu=False, report_to='none')
    """
    group = parser.add_argument_group("the run")
    add = group.add_argument
    add("--output-dir", type=path, default=out, metavar="FOLDER", help=f"{models}, checkpoints/ to go on from: a run that "
        "finds some goes on (default: %(default)s)")  # fmt: skip
    add(
        "--checkpointing-steps",
        type=STEPS,
        default=100,
        metavar="STEPS",
        help="between checkpoints (default: %(default)s)",
    )
    add(
        "--checkpoints-total-limit",
        type=KEEP,
        default=2,
        metavar="N",
        help="checkpoints that are kept (default: %(default)s)",
    )
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


def number(
    kind: type,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float = MOST,
    below: float | None = None,
) -> Callable[[str], Any]:
    """What reads a flag's number, and refuses what is no number or out of bounds.

    Args:
        kind: int or float.
        least: the lowest that is taken.
        above: in place of `least`, what all that are taken lie above.
        most: the highest that is taken.
        below: in place of `most`, what all that are taken lie below.

    Example:
        >>> number(int, above=0)("8")
        8
        >>> number(float, least=0, below=1)("1")
        Traceback (most recent call last):
        argparse.ArgumentTypeError: expected a number below 1 instead of 1
    """
    name = "whole number" if kind is int else "number"

    def read(text: str) -> Any:
        value = math.nan
        with contextlib.suppress(ValueError):
            value = kind(text)
        bounds = {
            f"above {above}": above is None or value > above,
            f"of at least {least}": least is None or value >= least,
            f"below {below}": below is None or value < below,
            f"of at most {most:,}": value <= most,
        }
        for bound, is_met in bounds.items():
            if not is_met:
                raise argparse.ArgumentTypeError(f"expected a {name} {bound} instead of {text:.60}")
        return value

    return read


def path(text: str) -> Path:
    """What reads a flag's file or folder; nothing would be the folder where one stands."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a path instead of nothing")
    return Path(text)


# What the flags of both recipes take.
COUNT, AMOUNT, SHARE = number(int, above=0), number(float, least=0), number(float, least=0, most=1)


BATCH = number(int, above=0, most=65_536)


STEPS, STEPS_OR_NONE = number(int, above=0, most=MOST_STEPS), number(int, least=0, most=MOST_STEPS)


SEED = number(int, least=0, most=2**32 - 1)  # NumPy takes no other


KEEP = number(int, above=0, most=10_000)


# Before the first step


def check_run(arguments: argparse.Namespace) -> None:
    """What is known to go wrong with the flags of a run, before anything is loaded.

    Raises:
        ValueError: if fp16 is to train on the CPU, the tracker is not installed, or --output-dir is no folder for a run.
        OSError: if the folder cannot be written to.
    """
    # Accelerate takes it, and trains nothing.
    if arguments.mixed_precision == "fp16" and uses_cpu(arguments):
        raise ValueError("--mixed-precision fp16 needs a GPU: on the CPU pass bf16, or no.")
    tracker = arguments.report_to
    if tracker != "none" and find_spec(tracker) is None:
        raise ValueError(f"--report-to {tracker} needs a package that is not installed: pip install {tracker}.")
    out = arguments.output_dir
    if os.path.lexists(out) and not out.is_dir():
        raise ValueError(f"--output-dir {out} is a file: pass the name of a folder.")
    if out.resolve().parent == out.resolve():
        raise ValueError(f"--output-dir {out} is the root of all folders: pass one of the run's own.")
    for place in (out / "checkpoints", *(out / name for name in MODELS)):
        if os.path.lexists(place) and (not place.is_dir() or (place.is_symlink() and place.name in MODELS)):
            raise ValueError(f"{place} is no folder, but a run saves one there: move it, or pass another --output-dir.")
    check_writable(out)


def uses_cpu(arguments: argparse.Namespace) -> bool:
    return arguments.cpu or not torch.accelerator.is_available()


def build_accelerator(arguments: argparse.Namespace, handlers: Sequence[KwargsHandler] = ()) -> Accelerator:
    """From --cpu, --mixed-precision, --gradient-accumulation-steps, --report-to and --output-dir."""
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=3))  # the others wait while one process evaluates
    return Accelerator(
        cpu=uses_cpu(arguments),
        mixed_precision=arguments.mixed_precision,
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        log_with=None if arguments.report_to == "none" else arguments.report_to,
        project_dir=str(arguments.output_dir),
        kwargs_handlers=[*handlers, patience],
    )


def fixed_settings(arguments: argparse.Namespace, free: Collection[str], processes: int) -> dict[str, Any]:
    """What must stay as it is when a run goes on; of names, the last part, since folders may be moved.

    Args:
        free: flags of the recipe's own that may change, beside `FREE_RUN_FLAGS`.

    Example:
        >>> arguments = argparse.Namespace(base="models/clip", seed=0, epochs=6, output_dir=Path("runs/clip"))
        >>> fixed_settings(arguments, free={"epochs"}, processes=1)
        {'base': 'clip', 'seed': 0, 'processes': 1}
    """
    free = FREE_RUN_FLAGS.union(free)
    fixed = {name: value for name, value in vars(arguments).items() if name not in free and value is not None}
    fixed["processes"] = processes
    return {name: Path(value).name if isinstance(value, str | Path) else value for name, value in fixed.items()}


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
        >>> from finelip_sdxl.data import ResumableBatchSampler
        >>> order = ResumableBatchSampler(size=6, group_size=1, batch_size=2, seed=0)
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


class Health:
    """Ends a run that has diverged, in all processes at once, before anything of it is saved."""

    def __init__(self) -> None:
        self.skipped = 0

    def check(self, step: int, loss: float, broken: float, skipped: bool) -> None:
        """See whether a step was one of training.

        Args:
            step: its number, from 1.
            loss: of all processes.
            broken: more than 0 if weights are not finite, see `count_broken`.
            skipped: whether the optimizer left the step out, as with fp16 where gradients overflow: then the weights
                are those of before, and a smaller scale follows.

        Raises:
            ValueError: if the loss or the weights are not finite, or steps are left out without end.
        """
        self.skipped = self.skipped + 1 if skipped else 0
        problem = None
        if broken:
            problem = f"Step {step}, of loss {loss:g}, made weights that are not finite"
        elif not math.isfinite(loss) and not skipped:
            problem = f"The loss of step {step} is {loss}"
        elif self.skipped >= MOST_SKIPPED:
            problem = f"The gradients of {MOST_SKIPPED} steps in a row, the last of them step {step}, are not finite"
        if problem is not None:
            raise ValueError(
                f"{problem}: training has diverged, and nothing of this is saved. Train anew in another --output-dir with a"
                " lower --learning-rate, or with gradients that --max-grad-norm limits."
            )


def count_broken(parameters: Iterable[Tensor]) -> Tensor:
    """How many of some tensors hold a number that is not finite."""
    return torch.stack([~parameter.detach().isfinite().all() for parameter in parameters]).sum().float()


def end(accelerator: Accelerator, progress: dict[str, Any]) -> None:
    """Print what came out of a run, of which nothing else is held any more, and leave the other processes."""
    accelerator.print(json.dumps(progress))
    # Where the model is the last that holds Gloo's group, both wait for each other without end.
    accelerator.free_memory()
    accelerator.end_training()


# Around it


def run_recipe(
    script: str,
    train: Callable[[argparse.Namespace], Any],
    parse: Callable[[Sequence[str] | None], argparse.Namespace],
    arguments: Sequence[str] | None,
) -> None:
    """A recipe as a program: libraries are quiet, and what is wrong with its input, or a signal, ends it in one line.

    Args:
        script: its file name, which such a line begins with.
        arguments: those of the command line, or None to take them from there.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with stopped_by_signals():
            train(parse(arguments))
    except KeyboardInterrupt:
        sys.exit(f"{script}: stopped; the same command goes on from the last checkpoint")
    except (ValueError, OSError, ImportError) as error:
        message = str(error).strip()
        if "Original Traceback" in message:  # from a process that prepares data; the error itself is the last line
            message = message.splitlines()[-1].partition(": ")[2]
        sys.exit(f"{script}: error: {' '.join(message.split())}")
