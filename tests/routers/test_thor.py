"""THOR: experts drawn uniformly, for whom the draw is shared, and the ways to evaluate."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from probmoe_ext.routers import make_router
from probmoe_ext.routers.context import Batch

B, L, E, D = 6, 5, 5, 3


def route(training: bool = True, k: int = 2, logits: torch.Tensor | None = None, **options: Any) -> Any:
    router = make_router("thor", num_experts=E, k=k, **options).train(training)
    router.batch = Batch(shape=(B, L))
    return router(torch.zeros(B * L, D), torch.randn(B * L, E) if logits is None else logits)


@pytest.mark.parametrize("k", [1, 2, E])
def test_every_subset_is_as_likely(k: int) -> None:
    router = make_router("thor", num_experts=E, k=k, draw="token")
    rows = 20000
    weights, indices = router(torch.zeros(rows, D), torch.randn(rows, E))
    assert (weights == 1 / k).all()
    subsets = [tuple(sorted(row)) for row in indices.tolist()]
    every = list(itertools.combinations(range(E), k))
    counts = torch.tensor([subsets.count(one) for one in every], dtype=torch.float64)
    assert counts.sum() == rows
    expected = rows / len(every)
    # A chi-square statistic with mean and half its variance len(every) - 1.
    free = len(every) - 1
    assert float(((counts - expected) ** 2 / expected).sum()) <= free + 5 * (2 * free) ** 0.5


@pytest.mark.parametrize(
    ("training", "options", "groups"),
    [
        (True, {}, 1),
        (True, {"draw": "sequence"}, B),
        (True, {"draw": "token"}, B * L),
        (False, {}, B * L),
        (False, {"inference": "sequence"}, B),
    ],
)
def test_a_draw_is_shared(training: bool, options: dict[str, Any], groups: int) -> None:
    differ = False
    for _ in range(4):
        weights, indices = route(training, **options)
        assert weights.shape == indices.shape == (B * L, 2)
        first = indices.view(groups, -1, 2)[:, :1]
        assert (indices.view(groups, -1, 2) == first).all()
        differ = differ or bool((first != first[:1]).any())
    assert differ == (groups > 1)
    assert not all(route(training, **options)[1].equal(indices) for _ in range(20))


def test_an_ensemble_averages_all_experts() -> None:
    weights, indices = route(False, inference="ensemble")
    assert weights.eq(1 / E).all()
    assert indices.equal(torch.arange(E).expand(B * L, E))
    masked = torch.randn(B * L, E).masked_fill(torch.arange(E) == 1, -torch.inf)
    weights, _ = route(False, inference="ensemble", logits=masked)
    assert weights[:, 1].eq(0).all()
    assert weights[:, 0].eq(1 / (E - 1)).all()


def test_masked_experts_are_not_drawn() -> None:
    masked = torch.randn(B * L, E)
    masked[: L * 2, :3] = -torch.inf
    masked[L * 2 :, 4] = -torch.inf
    for draw in ("batch", "sequence", "token"):
        weights, indices = route(logits=masked, draw=draw)
        assert masked.gather(-1, indices).isfinite().all()
        assert weights.eq(0.5).all()


@pytest.mark.parametrize(
    ("k", "options", "message"),
    [
        ((1, 2), {}, r"takes one k, got the band \(1, 2\)"),
        (1, {"draw": "layer"}, "draw of router 'thor' must be one of batch, sequence, token; got 'layer'"),
        (1, {"inference": "batch"}, "inference of router 'thor' must be one of token, sequence, ensemble; got 'batch'"),
    ],
)
def test_what_is_not_allowed(k: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_router("thor", num_experts=E, k=k, **options)
