"""The bootstrap over seeds and problems: against the normal limit, what pairing does, and simulated coverage."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from probmoe_ext.train.crossed_bootstrap import crossed_bootstrap


def test_one_seed_is_the_bootstrap_of_the_differences() -> None:
    generator = np.random.default_rng(1)
    a, b = generator.random((1, 400)) < 0.6, generator.random((1, 400)) < 0.5
    found = crossed_bootstrap(a, b)
    difference = a[0].astype(float) - b[0]
    error = difference.std() / 20
    assert found.difference == pytest.approx(difference.mean())
    assert found.low == pytest.approx(difference.mean() - 1.96 * error, abs=0.006)
    assert found.high == pytest.approx(difference.mean() + 1.96 * error, abs=0.006)
    assert found.p == pytest.approx(2 * stats.norm.sf(difference.mean() / error), abs=0.01)
    assert found.pairs == 400


def test_no_difference_and_a_certain_one() -> None:
    same = np.tile([0.0, 1.0], (3, 50))
    found = crossed_bootstrap(same, same)
    assert (found.difference, found.low, found.high, found.p) == (0.0, 0.0, 0.0, 1.0)
    found = crossed_bootstrap(np.ones((3, 100)), np.zeros((3, 100)), resamples=999)
    assert (found.low, found.high, found.p) == (1.0, 1.0, pytest.approx(2 / 1000))


def test_pairing_narrows_and_seeds_that_disagree_widen() -> None:
    generator = np.random.default_rng(2)
    hard = generator.random(300)
    b = (hard < 0.5)[None].repeat(4, 0)
    a = (hard < 0.55)[None].repeat(4, 0)
    paired = crossed_bootstrap(a, b, resamples=2000)
    shuffled = crossed_bootstrap(generator.permuted(a, axis=1), b, resamples=2000)
    assert paired.high - paired.low < 0.5 * (shuffled.high - shuffled.low)
    uneven = a.copy()
    uneven[:2] = False
    wide = crossed_bootstrap(uneven, b, resamples=2000)
    assert wide.high - wide.low > 4 * (paired.high - paired.low)


def test_coverage_with_effects_of_seeds_and_problems() -> None:
    generator = np.random.default_rng(3)
    covered = 0
    for _ in range(120):
        chance = 0.5 + 0.2 * generator.standard_normal((1, 150)) + 0.03 * generator.standard_normal((5, 1))
        scores = generator.random((2, 5, 150)) < chance
        found = crossed_bootstrap(scores[0], scores[1], resamples=400)
        covered += found.low <= 0 <= found.high
    assert covered >= 0.9 * 120


def test_chunks_change_little_and_a_seed_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(4)
    a, b = generator.random((3, 60)), generator.random((3, 60))
    whole = crossed_bootstrap(a, b, seed=5)
    assert crossed_bootstrap(a, b, seed=5) == whole
    monkeypatch.setattr("probmoe_ext.train.crossed_bootstrap._CELLS", 60 * 999)
    parts = crossed_bootstrap(a, b, seed=5)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), abs=0.01)
    assert parts.difference == whole.difference


@pytest.mark.parametrize("shapes", [((2, 3), (2, 4)), ((3,), (3,)), ((0, 3), (0, 3)), ((2, 0), (2, 0))])
def test_refuses(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="of one shape and not empty"):
        crossed_bootstrap(np.zeros(shapes[0]), np.zeros(shapes[1]))
