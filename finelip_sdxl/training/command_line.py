"""The command line of a recipe: common flags, presets in TOML files, checks, and the program around it.

Nothing heavy is imported before training, so that wrong flags are refused at once. Beside `flags/`, no other module of
`finelip_sdxl.training` knows flags.
"""

from __future__ import annotations

import argparse
import difflib
import os
import shutil
import sys
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finelip_sdxl.console import COUNT as COUNT  # for the scripts of the miniature
from finelip_sdxl.console import number, with_flags
from finelip_sdxl.files import check_writable, stopped_by_signals
from finelip_sdxl.texts import read_text

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.utils import KwargsHandler

MODELS = ("best", "last", "after-text")  # names of the recipes' models, beside checkpoints/
PRESETS = Path(__file__).parent / "presets"
MOST_STEPS = 9_999_999  # names of checkpoints have seven digits
# Errors of the library name its arguments; a recipe's user has flags.
FLAG_OF_ARGUMENT = {"skip_missing": "--skip-missing-images"}
# Flags of every recipe that may change when a run goes on: they do not change the training.
FREE_RUN_FLAGS = {
    "config",
    "output_dir",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "gradient_checkpointing",
    "cpu",
    "report_to",
}


FlagGroup = argparse.ArgumentParser | argparse._ArgumentGroup


# Types of flags


def path(text: str) -> Path:
    """A flag's type: a file or folder. An empty text is refused: it would stand for the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a path instead of nothing")
    return Path(text)


AMOUNT, SHARE = number(float, least=0), number(float, least=0, most=1)
BATCH = number(int, above=0, most=65_536)
STEPS, STEPS_OR_NONE = number(int, above=0, most=MOST_STEPS), number(int, least=0, most=MOST_STEPS)
SEED = number(int, least=0, most=2**32 - 1)  # NumPy takes no other
KEEP = number(int, above=0, most=10_000)


# Flags of every recipe


def add_config_flag(group: FlagGroup, presets: Sequence[Path]) -> None:
    """Adds the flag `--config` for a file with values of flags; `parse_flags` reads it."""
    shipped = " or ".join(preset.name for preset in presets)
    folder = str(presets[0].parent).replace("%", "%%")  # argparse formats help texts
    group.add_argument("--config", type=path, metavar="FILE", help="TOML file with values of flags, such as a copy of "
        f"a preset; flags override it (presets: {shipped} in {folder})")  # fmt: skip


def add_run_flags(parser: argparse.ArgumentParser, output_dir: Path, models: str) -> argparse._ArgumentGroup:
    """Adds the group "the run", for a `RunFolder`, and returns it for flags of the recipe's own.

    Args:
        parser: parser of the recipe.
        output_dir: the default folder.
        models: the models that the run writes there beside its checkpoints, for the help text.

    Examples:
        >>> parser = argparse.ArgumentParser()
        >>> add_accelerator_flags(add_run_flags(parser, Path("runs/new"), models="last/ model"))
        >>> parser.parse_args(["--checkpoints-total-limit", "3"])  # doctest: +NORMALIZE_WHITESPACE, +ELLIPSIS
        Namespace(output_dir=...Path('runs/new'), checkpointing_steps=100, checkpoints_total_limit=3,
            mixed_precision='no', gradient_checkpointing=False, cpu=False, report_to='none')
    """
    group = parser.add_argument_group("the run")
    add = group.add_argument
    add("--output-dir", type=path, default=output_dir, metavar="FOLDER", help=f"folder for {models}, and "
        "checkpoints/; a run that finds checkpoints goes on from them (default: %(default)s)")  # fmt: skip
    add("--checkpointing-steps", type=STEPS, default=100, metavar="STEPS", help="steps between checkpoints (default: "
        "%(default)s)")  # fmt: skip
    add("--checkpoints-total-limit", type=KEEP, default=2, metavar="N", help="number of checkpoints to keep (default: "
        "%(default)s)")  # fmt: skip
    return group


def add_accelerator_flags(group: FlagGroup) -> None:
    """Adds the flags of `build_accelerator`, and gradient checkpointing, to the group from `add_run_flags`."""
    add = group.add_argument
    add("--mixed-precision", choices=("no", "bf16", "fp16"), default="no", help="precision of the computation "
        "(default: %(default)s)")  # fmt: skip
    add("--gradient-checkpointing", action="store_true", help="compute activations twice, to save memory")
    add("--cpu", action="store_true", help="train on the CPU, also where there is a GPU")
    add("--report-to", choices=("none", "tensorboard", "wandb"), default="none", help="tracker of losses and figures "
        "(default: %(default)s)")  # fmt: skip


# Presets


def preset_path(recipe: str, name: str) -> Path:
    """Returns the file of a preset that ships with the package.

    Examples:
        >>> preset_path("train_finelip", "paper").name
        'paper.toml'
    """
    return PRESETS / recipe / f"{name}.toml"


def read_preset(file: Path) -> dict[str, Any]:
    """Reads a TOML file with values of flags, by the names of their options.

    Raises:
        ValueError: it is no TOML.
        OSError: it cannot be read.

    Examples:
        >>> read_preset(preset_path("align_adapter", "sdxl"))["text_steps"]
        1000
    """
    try:
        values = tomllib.loads(read_text(file))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file} is no TOML ({error}): correct it, or copy a preset.") from error
    return {name.replace("-", "_"): value for name, value in values.items()}


def add_preset_flag(
    group: FlagGroup, name: str, kind: Callable[[str], Any], metavar: str, text: str, presets: Sequence[Path]
) -> None:
    """Adds a flag with a default in each preset; its help shows all of them.

    Examples:
        >>> parser = argparse.ArgumentParser()
        >>> presets = [preset_path("train_finelip", name) for name in ("paper", "miniature")]
        >>> add_preset_flag(parser, "--batch-size", int, "PAIRS", "pairs in a batch", presets)
        >>> parser.format_help().splitlines()[-1].strip()
        '--batch-size PAIRS  pairs in a batch (default: 64 / 40)'
    """
    option = name.removeprefix("--").replace("-", "_")
    defaults = " / ".join(f"{read_preset(preset)[option]:g}" for preset in presets)
    group.add_argument(name, type=kind, metavar=metavar, help=f"{text} (default: {defaults})")


def parse_flags(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    choose_preset: Callable[[argparse.Namespace], Sequence[Path]],
) -> argparse.Namespace:
    """Parses a recipe's flags. Values come from the command line, else from the file of `--config`, else from presets.

    Args:
        parser: a parser with `--config`.
        arguments: the arguments; None for the command line's.
        choose_preset: a function that returns the presets for the parsed flags; the first one with a value counts.
    """
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--config")
    file = first.parse_known_args(arguments)[0].config
    try:
        if file is not None:
            parser.set_defaults(**_checked_values(parser, path(file)))
        options = parser.parse_args(arguments)
        for preset in choose_preset(options):
            for name, value in _checked_values(parser, preset).items():
                if getattr(options, name) is None:
                    setattr(options, name, value)
    except (ValueError, OSError, argparse.ArgumentTypeError) as error:
        parser.error(str(error))
    return options


def _checked_values(parser: argparse.ArgumentParser, file: Path) -> dict[str, Any]:
    """The values of a preset, after the checks of their flags."""
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    values = {}
    for name, value in read_preset(file).items():
        flag = name.replace("_", "-")
        if name not in actions:
            near = difflib.get_close_matches(name, actions, n=1, cutoff=0.0)
            raise ValueError(f"{file} sets {flag}, which is no flag: did you mean {near[0].replace('_', '-')}?")
        try:
            values[name] = _checked_value(actions[name], value)
        except argparse.ArgumentTypeError as error:
            raise ValueError(f"{file} sets {flag} to {value!r:.60}: {error}.") from error
    return values


def _checked_value(action: argparse.Action, value: Any) -> Any:
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise argparse.ArgumentTypeError("expected true or false")
        return value
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise argparse.ArgumentTypeError("expected a number or a text")
    if action.choices is not None and value not in action.choices:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(map(str, action.choices))}")
    return action.type(str(value)) if callable(action.type) else str(value)


# Before the first step


def check_run(arguments: argparse.Namespace) -> None:
    """Checks a run's flags, before anything is loaded.

    Raises:
        ValueError: fp16 is set for a CPU, the tracker is not installed, or the folder cannot hold a run.
        OSError: the folder cannot be written to.
    """
    # Accelerate accepts fp16 on a CPU, and then trains nothing.
    if arguments.mixed_precision == "fp16" and uses_cpu(arguments):
        raise ValueError("--mixed-precision fp16 needs a GPU: on the CPU pass bf16, or no.")
    tracker = arguments.report_to
    if tracker != "none" and find_spec(tracker) is None:
        raise ValueError(f"--report-to {tracker} needs a package that is not installed: pip install {tracker}.")
    folder: Path = arguments.output_dir
    if os.path.lexists(folder) and not folder.is_dir():
        raise ValueError(f"--output-dir {folder} is a file: pass the name of a folder.")
    if folder.resolve().parent == folder.resolve():
        raise ValueError(f"--output-dir {folder} is the root of all folders: pass a folder for this run alone.")
    for place in (folder / "checkpoints", *(folder / name for name in MODELS)):
        if os.path.lexists(place) and (not place.is_dir() or (place.is_symlink() and place.name in MODELS)):
            raise ValueError(f"{place} is no folder, but a run saves one there: move it, or pass another --output-dir.")
    check_writable(folder)


def uses_cpu(arguments: argparse.Namespace) -> bool:
    import torch

    return bool(arguments.cpu) or not torch.accelerator.is_available()


def build_accelerator(arguments: argparse.Namespace, handlers: Sequence[KwargsHandler] = ()) -> Accelerator:
    """Builds the accelerator for these flags."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

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
    """Returns the settings that must not change when a run goes on. Of paths only the last part counts.

    Args:
        arguments: the flags of the run.
        free: further flags of the recipe that may change, beside `FREE_RUN_FLAGS`.
        processes: number of processes.

    Examples:
        >>> arguments = argparse.Namespace(base="models/clip", seed=0, epochs=6, output_dir=Path("runs/clip"))
        >>> fixed_settings(arguments, free={"epochs"}, processes=1)
        {'base': 'clip', 'seed': 0, 'processes': 1}
    """
    free = FREE_RUN_FLAGS.union(free)
    fixed = {name: value for name, value in vars(arguments).items() if name not in free and value is not None}
    fixed["processes"] = processes
    return {name: Path(value).name if isinstance(value, str | Path) else value for name, value in fixed.items()}


# The program


def run_recipe(
    script: str,
    train: Callable[[argparse.Namespace], Any],
    parse: Callable[[Sequence[str] | None], argparse.Namespace],
    arguments: Sequence[str] | None,
) -> None:
    """Runs a recipe as a program: wrong input, or a signal, ends it with one line.

    Args:
        script: file name of the recipe, for this line.
        train: the recipe, or a part of it, such as its checks.
        parse: a function that parses its flags.
        arguments: the arguments; None for the command line's.
    """
    options: argparse.Namespace | None = None
    try:
        with stopped_by_signals():
            options = parse(arguments)
            train(options)
    except KeyboardInterrupt:
        sys.exit(f"{script}: stopped; the same command goes on from the last checkpoint")
    except (ValueError, OSError, ImportError) as error:
        message = str(error).strip()
        if "Original Traceback" in message:  # from a worker that loads data; the error itself is the last line
            message = message.splitlines()[-1].partition(": ")[2]
        flags = {name: f"--{name.replace('_', '-')}" for name in vars(options or argparse.Namespace())}
        message = with_flags(message, {**flags, **FLAG_OF_ARGUMENT})
        sys.exit(f"{script}: error: {' '.join(message.split())}")


def say_disk_needs(accelerator: Accelerator, folder: Path, needed: Mapping[str, int]) -> None:
    """Prints before training how much room a run takes, and how much there is.

    Args:
        accelerator: the accelerator; its main process prints.
        folder: the folder of the run.
        needed: bytes by the kind of files.
    """
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    parts = ", ".join(f"{name} {in_words(size)}" for name, size in needed.items())
    total = sum(needed.values())
    accelerator.print(f"disk: about {in_words(total)} in {folder} ({parts}); {in_words(free)} are free", flush=True)
    if total > free:
        accelerator.print("This is more than is free: the run will stop when the disk is full. Make room.", flush=True)


def in_words(size: int) -> str:
    """Returns a size in the unit that suits it.

    Examples:
        >>> in_words(1_234_567), in_words(98_765_432_100)
        ('1 MB', '99 GB')
    """
    return f"{size / 1e9:,.{0 if size >= 1e10 else 1}f} GB" if size >= 1e9 else f"{max(size / 1e6, 1):,.0f} MB"


def end_run(accelerator: Accelerator, progress: Mapping[str, Any], results: Sequence[str]) -> None:
    """Prints the results of a run and leaves the other processes. The caller must hold no model any more.

    Args:
        accelerator: the accelerator of the run.
        progress: the progress, which stands in the last checkpoint's progress.json, too.
        results: lines that say where the result is, and the commands that use it.
    """
    accelerator.print("\n".join([f"done: {progress['step']:,} steps", *results]))
    # If the model holds the last reference to Gloo's group, both wait for each other without end.
    accelerator.free_memory()
    accelerator.end_training()
