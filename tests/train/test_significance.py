"""Intervals against closed forms of Student's quantiles."""

from __future__ import annotations

import math

import pytest

from probmoe_ext.train.significance import mean_interval


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


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one number"):
        mean_interval([])
    with pytest.raises(ValueError, match=r"got 1\.0"):
        mean_interval([1.0, 2.0], level=1.0)
