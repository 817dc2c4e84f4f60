"""What a difference between routers is worth: intervals over seeds, and a paired bootstrap."""

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


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], *, resamples: int = 20_000, level: float = LEVEL, seed: int = 0
) -> Paired:
    """Percentile bootstrap of the mean difference of paired scores (Efron and Tibshirani, 1993, chapter 13).

    Pairs are drawn as if they were independent. Where a pair is one problem under one seed, the problems of a seed
    share a model: this says how sure the difference is for these trained models, and `mean_interval` of the differences
    by seed how sure it is for another seed.

    Args:
        a: scores, one for each pair.
        b: scores of the same pairs.
        resamples: how many means are drawn.
        level: coverage of the interval.
        seed: seeds the draws; the same arguments give the same result.

    Raises:
        ValueError: no pairs, unequal lengths, or a number out of range.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"a and b must be equally long and not empty, got {len(a)} and {len(b)}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    _check_level(level)
    differences = np.subtract(a, b, dtype=np.float64)
    # A resample is a multinomial count of the distinct values, of which scores have few.
    values, counts = np.unique(differences, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(a), counts / len(a), size=resamples)
    means = drawn @ values / len(a)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    # With the estimate itself among them p is never 0 (Davison and Hinkley, 1997, section 4.2).
    aside = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p = min(1.0, 2 * (aside + 1) / (resamples + 1))
    return Paired(float(differences.mean()), float(low), float(high), p, len(a))


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be above 0 and below 1, got {level}")
