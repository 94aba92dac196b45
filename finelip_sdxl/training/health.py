"""A check of every step of a run: has it diverged?"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

MOST_SKIPPED = 100  # skipped steps in a row; fp16 halves its scale of 65,536 in each, so none overflows by then


class Health:
    """Ends a diverged run, in all processes at once, before anything of it is saved."""

    def __init__(self) -> None:
        self.skipped = 0

    def check(self, step: int, loss: float, broken: float, skipped: bool) -> None:
        """Checks that a step has not diverged.

        Args:
            step: number of the step, from 1.
            loss: mean loss of all processes.
            broken: number of parameters that are not finite, see `count_broken`.
            skipped: whether the optimizer skipped the step. With fp16 it does so if gradients overflow: the weights do
                not change, and the scale becomes smaller.

        Raises:
            ValueError: the loss or the weights are not finite, or too many steps in a row are skipped.
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
                f"{problem}: training has diverged, and nothing of this is saved. Train again in another folder with a"
                " lower learning rate, or with a lower limit on the norm of gradients."
            )


def count_broken(parameters: Iterable[Tensor]) -> Tensor:
    """Returns the number of tensors that hold a number that is not finite.

    Examples:
        >>> count_broken([torch.tensor([1.0, float("nan")]), torch.ones(3)])
        tensor(1.)
    """
    return torch.stack([~parameter.detach().isfinite().all() for parameter in parameters]).sum().float()
