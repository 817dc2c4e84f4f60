"""Means with confidence intervals over seeds, and what a paired difference is given as."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval.

    Attributes:
        mean: the estimate.
        low: lower end; None for a single value.
        high: upper end; None for a single value.
        count: values behind it.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def half(self) -> float | None:
        """Half the width of the interval: what stands behind ``±``."""
        return None if self.high is None else self.high - self.mean


@dataclass(frozen=True)
class Paired:
    """A paired difference and how sure it is.

    Attributes:
        difference: mean of ``a - b``.
        low: lower end of the percentile interval.
        high: upper end.
        p: two-sided; the share of resamples on the other side of zero, doubled.
        pairs: number of pairs.
    """

    difference: float
    low: float
    high: float
    p: float
    pairs: int


def mean_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Mean of a few independent values, with Student's interval ``mean ± t s / sqrt(n)`` at ``n - 1`` degrees.

    Args:
        values: one number for each seed.
        level: coverage, above 0 and below 1.

    Raises:
        ValueError: no values, or a level out of range.
    """
    if not len(values):
        raise ValueError("values must hold at least one number, got none")
    _check_level(level)
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Interval(mean, None, None, 1)
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    half = float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * spread
    return Interval(mean, mean - half, mean + half, len(values))


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be above 0 and below 1, got {level}")
