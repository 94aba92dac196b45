"""Date, machine and command of figures: a line above a table, or entries of a JSON file; and a process's memory."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, date, datetime
from importlib.metadata import version
from pathlib import Path
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


def most_memory() -> int:
    """The most memory that this process has had so far, in bytes; files that it has mapped count where they were read.

    Examples:
        >>> most_memory() > 2**20
        True
    """
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, where `getrusage` begins with the peak of the process that started this one
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].removesuffix("kB")) * 2**10
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 2**10)
