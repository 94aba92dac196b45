"""Processes that share the pictures of a run, as `accelerate launch` and `torchrun` start them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_PATIENCE = timedelta(days=7)  # a process may have far more to draw than another


@dataclass(frozen=True)
class Processes:
    """The processes of a run.

    Attributes:
        process: number of this process.
        processes: number of all.
        device: the device of this process; None leaves the choice.
        wait: waits for all processes.
    """

    process: int = 0
    processes: int = 1
    device: torch.device | None = None
    wait: Callable[[], None] = lambda: None

    @property
    def is_main(self) -> bool:
        """Whether this is the process that scores and reports."""
        return self.process == 0


def open_processes(device: str | None) -> Processes:
    """The processes that a launcher has started; without a launcher, this one alone.

    Args:
        device: the device that the user asked for, the same in all processes; None for an accelerator for each.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Processes()
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu", timeout=_PATIENCE)
    return Processes(state.process_index, state.num_processes, state.device, state.wait_for_everyone)
