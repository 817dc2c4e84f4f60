"""Intervals and the paired bootstrap against closed forms."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from probmoe_ext.train.significance import mean_interval, paired_bootstrap


def test_interval_of_two_values_is_that_of_the_cauchy_distribution() -> None:
    # With one degree of freedom the quantile is tan(pi (p - 1/2)).
    found = mean_interval([1.0, 4.0])
    half = math.tan(math.pi * (0.975 - 0.5)) * 1.5
    assert (found.mean, found.count) == (2.5, 2)
    assert found.low == pytest.approx(2.5 - half, rel=1e-12)
    assert found.high == pytest.approx(2.5 + half, rel=1e-12)
    assert found.half == pytest.approx(half, rel=1e-12)


def test_interval_of_three_values() -> None:
    # With two degrees of freedom the quantile of q is x sqrt(2 / (1 - x^2)), x = 2 q - 1.
    x = 0.8
    half = x * math.sqrt(2 / (1 - x * x)) * 1.0 / math.sqrt(3)
    assert mean_interval([1.0, 2.0, 3.0], level=0.8).half == pytest.approx(half, rel=1e-12)


def test_one_value_has_no_interval() -> None:
    found = mean_interval([0.25])
    assert (found.mean, found.low, found.high, found.half) == (0.25, None, None, None)


def test_bootstrap_of_signs_is_a_binomial() -> None:
    # 36 pairs differ by +1 and 28 by -1: a resample's mean is (2 X - 64) / 64 with X binomial(64, 36/64).
    a, b = [1.0] * 36 + [0.0] * 28, [0.0] * 36 + [1.0] * 28
    law = stats.binom(64, 36 / 64)
    found = paired_bootstrap(a, b, resamples=400_000)
    assert (found.difference, found.pairs) == (8 / 64, 64)
    assert found.low == pytest.approx((2 * law.ppf(0.025) - 64) / 64, abs=1e-12)
    assert found.high == pytest.approx((2 * law.ppf(0.975) - 64) / 64, abs=1e-12)
    assert found.p == pytest.approx(2 * law.cdf(32), abs=5e-3)


def test_bootstrap_keeps_the_pairing() -> None:
    # The same difference in each pair is certain, however far the scores lie apart.
    found = paired_bootstrap([3.0, 103.0, -7.0], [1.0, 101.0, -9.0], resamples=999)
    assert (found.difference, found.low, found.high) == (2.0, 2.0, 2.0)
    assert found.p == pytest.approx(2 / 1000)
    # In the other direction all but the sign stays.
    other = paired_bootstrap([1.0, 101.0, -9.0], [3.0, 103.0, -7.0], resamples=999)
    assert (other.difference, other.p) == (-2.0, found.p)


def test_no_difference() -> None:
    found = paired_bootstrap([1.0, 0.0], [1.0, 0.0])
    assert (found.difference, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_the_seed_decides() -> None:
    a, b = [0.1, 0.9, 0.4, 0.7], [0.2, 0.3, 0.5, 0.1]
    assert paired_bootstrap(a, b) == paired_bootstrap(a, b)
    assert paired_bootstrap(a, b, seed=1) != paired_bootstrap(a, b)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one number"):
        mean_interval([])
    with pytest.raises(ValueError, match=r"got 1\.0"):
        mean_interval([1.0, 2.0], level=1.0)
    with pytest.raises(ValueError, match="got 1 and 2"):
        paired_bootstrap([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="resamples must be at least 1"):
        paired_bootstrap([1.0], [1.0], resamples=0)
