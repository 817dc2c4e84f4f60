"""Samples have the law they claim, and depend on nothing but logits, seed and row number."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from probmoe_ext import ops, reference
from tests import oracle
from tests.inputs import Band, logit_sets

DRAWS = 20_000
# All tests of this file together reject a right sampler with this probability (were the seeds not fixed).
FAILURE_RATE = 1e-6
LAWS: list[tuple[str, Band]] = [
    (name, band)
    for band in [(3, 3), (1, 4), (0, 6), (6, 6), (0, 1)]
    for name in ("spread 1", "constant", "ties", "half masked", "spread 10")
]
NUM_TESTS = 2 * len(LAWS) + 8


def chi_square_p_value(counts: Tensor, probabilities: Tensor) -> float:
    """Pearson's test; cells that expect fewer than five are pooled into one."""
    expected = probabilities.double() * counts.sum()
    assert not counts[probabilities == 0].any(), "a subset of probability 0 was drawn"
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    if len(counts) < 2:
        return 1.0
    if expected[-1] < 5:
        counts = torch.cat([counts[:-2], counts[-2:].sum()[None]])
        expected = torch.cat([expected[:-2], expected[-2:].sum()[None]])
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(degrees, statistic / 2)) if len(counts) > 1 else 1.0


def subset_counts(indices: Tensor, num_experts: int, band: Band) -> Tensor:
    """How often each subset of the band's enumeration occurs among `indices` ``[N, k_max]``."""
    z = oracle.subsets(num_experts, *band)
    codes = (z.long() * 2 ** torch.arange(num_experts)).sum(-1)
    drawn = torch.bincount(oracle.indicator_codes(indices, num_experts), minlength=2**num_experts)
    assert drawn.sum() == drawn[codes].sum(), "a subset outside the band was drawn"
    return drawn[codes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "band"), LAWS, ids=str)
def test_law(name: str, band: Band, dtype: torch.dtype) -> None:
    logits = logit_sets(1, 6, band, dtype)[name]
    indices = ops.subset_sample(logits.expand(DRAWS, -1), band, seed=17)
    _, probabilities = oracle.probabilities(logits[0], band)
    assert chi_square_p_value(subset_counts(indices, 6, band), probabilities) > FAILURE_RATE / NUM_TESTS


def test_neighbouring_rows_are_independent() -> None:
    logits = logit_sets(1, 4, (2, 2), torch.float32)["spread 1"]
    indices = ops.subset_sample(logits.expand(2 * DRAWS, -1), 2, seed=23)
    codes = oracle.indicator_codes(indices, 4).reshape(-1, 2)
    z, probabilities = oracle.probabilities(logits[0], (2, 2))
    cells = (z.long() * 2 ** torch.arange(4)).sum(-1)
    pairs = torch.bincount(codes[:, 0] * 16 + codes[:, 1], minlength=256)[(cells[:, None] * 16 + cells).flatten()]
    joint = (probabilities[:, None] * probabilities).flatten()
    assert chi_square_p_value(pairs, joint) > FAILURE_RATE / NUM_TESTS


def test_seeds_are_independent() -> None:
    """One row under many consecutive seeds follows the law as many rows under one seed do."""
    logits = logit_sets(1, 5, (2, 2), torch.float32)["spread 1"]
    indices = torch.cat([ops.subset_sample(logits, 2, seed=seed) for seed in range(4000)])
    _, probabilities = oracle.probabilities(logits[0], (2, 2))
    assert chi_square_p_value(subset_counts(indices, 5, (2, 2)), probabilities) > FAILURE_RATE / NUM_TESTS


@pytest.mark.parametrize("band", [(8, 8), (6, 8), (32, 32)], ids=str)
@pytest.mark.parametrize("name", ["spread 1", "spread 10"])
def test_marginals_at_real_size(name: str, band: Band) -> None:
    """Every expert's frequency is within the normal bound for 64 comparisons."""
    logits = logit_sets(1, 64, band, torch.float32)[name]
    indices = ops.subset_sample(logits.expand(DRAWS, -1), band, seed=29)
    frequency = torch.bincount(indices.flatten(), minlength=65)[:64].double() / DRAWS
    m = reference.subset_marginals(logits.double(), band)[0]
    deviation = (frequency - m).abs() * DRAWS**0.5
    # 8 standard deviations, plus Poisson room for experts that are hardly ever drawn.
    assert (deviation <= 8 * (m * (1 - m)).clamp(min=0).sqrt() + 16 / DRAWS**0.5).all()


@pytest.mark.parametrize("band", [(8, 8), (3, 8), (0, 0), (60, 60)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_equals_reference(band: Band, dtype: torch.dtype) -> None:
    """Decision by decision the same as the plain-torch statement of the scheme, but for roundings."""
    sets = logit_sets(800 if band[1] <= 8 else 50, 60, band, dtype)
    logits = torch.cat([sets[name] for name in ("spread 1", "spread 10", "constant", "ties", "masked to k_min")])
    differing = (ops.subset_sample(logits, band, seed=31) != reference.subset_sample(logits, band, seed=31)).any(-1)
    assert differing.double().mean() <= 1e-4


@pytest.mark.parametrize("name", ["spread 100", "plus or minus 2000", "one 87 above", "shifted by 100"])
@pytest.mark.parametrize("band", [(8, 8), (2, 8)], ids=str)
def test_equals_reference_far_out(name: str, band: Band) -> None:
    logits = logit_sets(1000, 64, band, torch.float32)[name]
    want = reference.subset_sample(logits.double(), band, seed=37)
    differing = (ops.subset_sample(logits, band, seed=37) != want).any(-1)
    # float64 uniforms go on where those of float32 end: 8 decisions, each off with a probability of a few 2**-24.
    assert differing.double().mean() <= 1e-3


@pytest.mark.parametrize("band", [(8, 8), (4, 8)], ids=str)
def test_float32_agrees_with_float64(band: Band) -> None:
    logits = logit_sets(20_000, 64, band, torch.float32)["spread 1"]
    differing = (ops.subset_sample(logits, band, seed=41) != ops.subset_sample(logits.double(), band, seed=41)).any(-1)
    assert differing.double().mean() < 1e-4


@pytest.mark.parametrize("band", [(8, 8), (4, 8)], ids=str)
def test_depends_on_row_number_only(band: Band, with_threads: Callable[[int, Callable[[], Any]], Any]) -> None:
    """Threads, batch shape and what follows in the batch change nothing."""
    logits = logit_sets(999, 32, band, torch.float32)["spread 1"]
    one, two = (with_threads(n, lambda: ops.subset_sample(logits, band, seed=43)) for n in (1, 2))
    assert torch.equal(one, two)
    for count in (1, 2, 15, 16, 17, 500):
        assert torch.equal(ops.subset_sample(logits[:count], band, seed=43), one[:count])
    assert torch.equal(ops.subset_sample(logits.reshape(3, 333, 32), band, seed=43).reshape(999, -1), one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["spread 1", "spread 100"])
@pytest.mark.parametrize(("experts", "band"), [(12, (1, 4)), (64, (8, 8)), (300, (30, 40))])
def test_samples_are_numbered_sample_by_sample(experts: int, band: Band, name: str, dtype: torch.dtype) -> None:
    """Draw s of row t is that of row s T + t: a batch that repeats the rows gives the same, whatever computes it."""
    logits = logit_sets(37, experts, band, dtype)[name]
    drawn = ops.subset_sample(logits, band, seed=59, num_samples=5)
    assert torch.equal(drawn.flatten(end_dim=1), ops.subset_sample(logits.repeat(5, 1), band, seed=59))
    deep = ops.subset_sample(logits[:36].reshape(2, 18, experts), band, seed=59, num_samples=5)
    assert torch.equal(deep.flatten(1, 2), ops.subset_sample(logits[:36], band, seed=59, num_samples=5))
    assert torch.equal(deep[0], ops.subset_sample(logits[:36].reshape(2, 18, experts), band, seed=59))


def test_form() -> None:
    """Ascending, unused slots last, sizes inside the band."""
    logits = logit_sets(500, 10, (1, 6), torch.float32)["spread 1"]
    indices = ops.subset_sample(logits, (1, 6), seed=47)
    assert indices.shape == (500, 6) and indices.dtype == torch.int64
    for left, right in pairwise(indices.unbind(-1)):
        assert ((left < right) | ((left == 10) & (right == 10))).all()
    sizes = (indices < 10).sum(-1)
    assert sizes.min() >= 1 and len(sizes.unique()) == 6


def test_seed_forms() -> None:
    """An int is its scalar tensor; None follows torch.manual_seed, and moves on."""
    logits = logit_sets(50, 16, (4, 4), torch.float32)["constant"]
    for seed in (0, 5, -1, 2**63 - 1, -(2**63)):
        by_int = ops.subset_sample(logits, 4, seed=seed)
        assert torch.equal(by_int, ops.subset_sample(logits, 4, seed=torch.tensor(seed)))
        assert torch.equal(by_int, reference.subset_sample(logits, 4, seed=seed))
    torch.manual_seed(3)
    first, second = ops.subset_sample(logits, 4), ops.subset_sample(logits, 4)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(ops.subset_sample(logits, 4), first)
    before = torch.get_rng_state()
    ops.subset_sample(logits, 4, seed=1)
    assert torch.equal(torch.get_rng_state(), before), "a given seed must leave torch's generator alone"


@pytest.mark.parametrize("band", [(4, 4), (2, 5)], ids=str)
def test_route_probmoe_draws_the_same(band: Band) -> None:
    logits = logit_sets(300, 16, band, torch.float32)["spread 1"]
    for options in ({}, {"normalize": True}, {"backward": "ste"}):
        _, indices = ops.route_probmoe(logits, band, training=True, seed=53, **options)
        assert torch.equal(indices, ops.subset_sample(logits, band, seed=53))
