"""The schedule of a run: the learning rate of each step, and the batches of each epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol


def learning_rate_factor(step: int, warmup: int, steps: int) -> float:
    """Returns the share of the peak learning rate at a step: a linear warm-up, then half a cosine to 0.

    Examples:
        >>> [round(learning_rate_factor(step, warmup=2, steps=6), 3) for step in range(6)]
        [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


class Epoch(Protocol):
    """The batches of one epoch, with a length."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Any]: ...


def endless(batches: Epoch, set_epoch: Callable[[int, int], None], first: int) -> Iterator[Any]:
    """Yields batches without end, epoch after epoch, from number `first` on.

    Args:
        batches: one epoch; its length is the number of batches in a whole one.
        set_epoch: a function to call before each epoch, with its number and the number of its first batch, which is
            above 0 if a run goes on within an epoch.
        first: number of the first batch, counted over all epochs.

    Examples:
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
