"""Checks of each step that a run has not diverged."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

MOST_SKIPPED = 100  # steps in a row: as often, fp16 halves a scale of 65,536 to one that nothing overflows at


class Health:
    """Ends a run that has diverged, in all processes at once, before anything of it is saved."""

    def __init__(self) -> None:
        self.skipped = 0

    def check(self, step: int, loss: float, broken: float, skipped: bool) -> None:
        """Checks that a step was one of training.

        Args:
            step: its number, from 1.
            loss: the mean over all processes.
            broken: more than 0 if weights are not finite, see `count_broken`.
            skipped: whether the optimizer left the step out. With fp16 it does so where gradients overflow: the weights
                stay as they were, and a smaller scale follows.

        Raises:
            ValueError: if the loss or the weights are not finite, or too many steps in a row are left out.
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
                f"{problem}: training has diverged, and nothing of this is saved. Train anew in another folder with a"
                " lower learning rate, or with a lower limit on the norm of gradients."
            )


def count_broken(parameters: Iterable[Tensor]) -> Tensor:
    """Returns how many of some tensors hold a number that is not finite.

    Example:
        >>> count_broken([torch.tensor([1.0, float("nan")]), torch.ones(3)])
        tensor(1.)
    """
    return torch.stack([~parameter.detach().isfinite().all() for parameter in parameters]).sum().float()
