"""The parts of the site that are made when it is built: the help of every command, and equations.

`zensical.toml` names this module. A line `<!-- help: finelip-sdxl generate -->` in a page becomes what that command
prints with `--help`, from its parser; a fenced block `math` becomes MathML, which browsers draw without a script.
"""

from __future__ import annotations

import argparse
import io
import os
import re
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from latex2mathml.converter import convert
from markdown import Extension, Markdown
from markdown.preprocessors import Preprocessor

import finelip_sdxl

_LINE = re.compile(r"<!-- help: (?P<command>.+) -->")
_COLUMNS = "78"  # of the help, in characters: no more fit beside the site's menu
_REPOSITORY = Path(finelip_sdxl.__file__).parents[1]


def parser_of(program: str) -> Callable[[list[str]], Any]:
    """The function that parses the flags of a program.

    Args:
        program: `finelip-sdxl`, or the path of a script in the repository that has flags of its own.

    Raises:
        ValueError: it is neither.
    """
    if program == "finelip-sdxl":
        from finelip_sdxl.cli.main import _parser

        return _parser().parse_args
    if program == "training/train_finelip.py":
        from finelip_sdxl.training.flags import train_finelip

        return train_finelip.parse
    if program == "training/align_adapter.py":
        from finelip_sdxl.training.flags import align_adapter

        return align_adapter.parse
    if program == "training/train_lora.py":
        from finelip_sdxl.training.flags import train_lora

        return train_lora.parse
    if program == "demo/app.py":
        from demo.app import parse

        return parse
    raise ValueError(f"{program!r} has no parser here; expected finelip-sdxl, a recipe in training/ or demo/app.py.")


def help_of(command: str) -> str:
    """What a command prints with `--help`.

    Examples:
        >>> help_of("finelip-sdxl tokens").splitlines()[0][:40]
        'usage: finelip-sdxl tokens [-h] [--promp'
    """
    program, *words = command.split()
    printed = io.StringIO()
    expand = argparse.HelpFormatter._expand_help

    def without_paths(formatter: argparse.HelpFormatter, action: argparse.Action) -> str:
        """A flag's help before it is wrapped; that of the recipes says where this machine has their presets."""
        return expand(formatter, action).replace(f"{_REPOSITORY}{os.sep}", "")

    with (
        patch.object(argparse.HelpFormatter, "_expand_help", without_paths),
        patch.dict(os.environ, COLUMNS=_COLUMNS, NO_COLOR="1"),
        redirect_stdout(printed),
        suppress(SystemExit),  # by which argparse ends after its help
    ):
        parser_of(program)([*words, "--help"])
    return printed.getvalue()


def math(source: str, *_: Any, **__: Any) -> str:
    """An equation in LaTeX as a paragraph of MathML.

    Examples:
        >>> math("s^2")[:28]
        '<div class="math"><math xmln'
    """
    return f'<div class="math">{convert(source, display="block")}</div>'


class _Help(Preprocessor):
    def run(self, lines: list[str]) -> list[str]:
        made: list[str] = []
        for line in lines:
            found = _LINE.fullmatch(line.strip())
            made += ["```text", *help_of(found["command"]).splitlines(), "```"] if found else [line]
        return made


class _SiteExtension(Extension):
    def extendMarkdown(self, md: Markdown) -> None:
        md.preprocessors.register(_Help(md), "help", priority=50)  # before fenced blocks are parsed


def makeExtension(**options: Any) -> Extension:
    return _SiteExtension(**options)
