"""Intervals of figures by the bootstrap: the prompts of a run, drawn again with replacement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A figure with its 95 % interval.

    Attributes:
        value: the figure.
        low, high: ends of the interval; None for too few prompts.
        count: number of prompts that the figure is of.
    """

    value: float
    low: float | None
    high: float | None
    count: int

    def to_dict(self) -> dict[str, Any]:
        """Returns a dict for JSON."""
        return asdict(self)


def bootstrap_counts(prompts: int, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Returns how often each prompt is in each resample, (resamples, prompts); a row adds up to `prompts`.

    Examples:
        >>> bootstrap_counts(4, resamples=2).sum(axis=1).tolist()
        [4, 4]
    """
    return np.random.default_rng(seed).multinomial(prompts, np.full(prompts, 1 / prompts), size=resamples)


def interval_of(value: float, resampled: Sequence[float] | np.ndarray, count: int) -> Interval:
    """Returns the interval between the percentiles of a figure's resamples.

    Args:
        value: the figure.
        resampled: the figure of each resample. If more than 5 % of them are not finite, as with two or three pictures
            for a figure of pairs, there is no interval: the others are too few and too much alike.
        count: number of prompts.
    """
    resampled = np.asarray(resampled, dtype=float)
    is_finite = np.isfinite(resampled)
    if count < 2 or is_finite.mean() < LEVEL:
        return Interval(float(value), None, None, count)
    resampled = resampled[is_finite]
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high), count)


def mean_interval(values: Sequence[float | None]) -> Interval | None:
    """Returns the mean of a figure over prompts with its interval; None if no prompt has one.

    Args:
        values: a figure for each prompt; None for prompts without one, which do not count.

    Examples:
        >>> found = mean_interval([0.2, None, 0.4])
        >>> round(found.value, 2), round(found.low, 2), round(found.high, 2), found.count
        (0.3, 0.2, 0.4, 2)
    """
    known = np.array([value for value in values if value is not None], dtype=float)
    if not len(known):
        return None
    return interval_of(known.mean(), bootstrap_counts(len(known)) @ known / len(known), len(known))
