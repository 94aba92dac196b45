"""Date, machine and command of figures: a line above a table, or entries of a JSON file."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Sequence
from datetime import UTC, date, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def report_header(day: str | None = None, device: str | None = None) -> str:
    """Date, machine and version of torch in one line.

    Args:
        day: the day or days of the figures (default: today).
        device: further hardware beside the CPU's cores, such as the name of a GPU.

    Examples:
        >>> report_header("2026-11-27", "1 threads")  # doctest: +ELLIPSIS
        '2026-11-27, ... cores, 1 threads, torch ...'
    """
    parts = [day or date.today().isoformat(), platform.machine(), f"{os.cpu_count()} cores", device]
    return ", ".join([*filter(None, parts), f"torch {version('torch')}"])


def report_entries(command: str, device: torch.device) -> dict[str, Any]:
    """Command, date, machine and versions, for a JSON file.

    Args:
        command: the command line, as `command_line` returns it.
        device: the `torch.device` that computed the figures.
    """
    import torch

    packages = ("finelip-sdxl", "torch", "transformers")
    return {
        "command": command,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "architecture": platform.machine(),
            "cpu_cores": os.cpu_count(),
            "device": str(device),
            "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        },
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
    }


def command_line(program: str, arguments: Sequence[str]) -> str:
    """A command, quoted for a shell.

    Examples:
        >>> command_line("finelip-sdxl", ["tokens", "a red star"])
        "finelip-sdxl tokens 'a red star'"
    """
    return shlex.join([*program.split(), *arguments])
