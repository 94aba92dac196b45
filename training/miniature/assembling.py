"""The flags of the scripts that put trained parts into the package, and their check."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from finelip_sdxl.console import Parser
from finelip_sdxl.training.command_line import path


def parse(
    description: str | None, parts: Sequence[str], output_dir: Path, result: str, arguments: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parses the flags, and checks that the trained parts are there.

    Args:
        description: the script's docstring.
        parts: the folders in --runs that the script reads.
        output_dir: the default folder to write to.
        result: what the script writes there, for the help text.
        arguments: the arguments; None for the command line's.
    """
    flags = Parser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags.add_argument("--runs", type=path, default=Path("runs/miniature"), help="folder of the trained parts")
    flags.add_argument("--output-dir", type=path, default=output_dir, help=result)
    options = flags.parse_args(arguments)
    for part in parts:
        if not (options.runs / part).is_dir():
            flags.error(f"--runs {options.runs} has no {part}: train it first, as make.py does, or pass another folder")
    return options
