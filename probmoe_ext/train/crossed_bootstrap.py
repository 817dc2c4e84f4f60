"""The paired bootstrap where every seed answers the same problems: both are drawn."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from probmoe_ext.train.significance import LEVEL, Paired

RESAMPLES = 10_000
_CELLS = 4_000_000
"""Numbers held at once while resampling: 32 MB."""


def crossed_bootstrap(
    a: npt.ArrayLike, b: npt.ArrayLike, *, resamples: int = RESAMPLES, level: float = LEVEL, seed: int = 0
) -> Paired:
    """Bootstrap the mean difference of scores that are paired by seed and by problem.

    Each resample draws seeds and problems with replacement, independently of each other, and takes the mean difference
    over the drawn rows and columns: the pigeonhole bootstrap (Owen 2007, doi 10.1214/07-AOAS122), which errs on the
    wide side. So the interval speaks of other seeds and other problems at once. With one seed only problems are drawn,
    and it says nothing of other seeds.

    Args:
        a: ``[seeds, problems]``, the score of each problem, such as 0 and 1.
        b: of the same shape, the same seeds and problems in the same order.
        resamples: number of bootstrap samples.
        level: coverage of the interval.
        seed: seeds the draws; the same arguments give the same result.

    Raises:
        ValueError: shapes that differ or hold nothing.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.ndim != 2 or first.shape != second.shape or not first.size:
        raise ValueError(
            f"a and b must be [seeds, problems] of one shape and not empty, got {first.shape} and {second.shape}"
        )
    difference = first - second
    seeds, problems = difference.shape
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    chunk = max(1, _CELLS // problems)
    for start in range(0, resamples, chunk):
        count = min(chunk, resamples - start)
        rows = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=count)
        columns = generator.multinomial(problems, np.full(problems, 1 / problems), size=count)
        means[start : start + count] = ((rows @ difference) * columns).sum(axis=1) / (seeds * problems)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    # Sums of the same numbers in another order: what is zero but for rounding counts for both sides.
    aside = min(int((means <= 1e-12).sum()), int((means >= -1e-12).sum()))
    p = min(1.0, 2 * (aside + 1) / (resamples + 1))
    return Paired(float(difference.mean()), float(low), float(high), p, seeds * problems)
