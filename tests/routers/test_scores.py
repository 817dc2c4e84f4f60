"""Weights made of other scores than the softmax of the logits: the same formulas, with the scores in its place."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from probmoe_ext.hf.choice import ChoiceRule
from probmoe_ext.routers import Router, make_router

E, T = 6, 40
normalizes = pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])


def gradients(router: Router, logits: torch.Tensor, scores: bool, g: torch.Tensor) -> list[torch.Tensor]:
    logits = logits.clone().requires_grad_()
    hidden = torch.zeros(len(logits), 1)
    torch.manual_seed(5)
    weights, indices = router(hidden, logits, logits.softmax(-1)) if scores else router(hidden, logits)
    (gradient,) = torch.autograd.grad((weights * g).sum(), logits)
    return [weights.detach(), indices, gradient]


@normalizes
@pytest.mark.parametrize("k", [3, (1, 4)], ids=str)
@pytest.mark.parametrize("options", [{}, {"backward": "ste"}, {"forward": "topk"}], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_softmax_scores_are_the_usual_routing(k, options, normalize: bool, training: bool) -> None:
    router = make_router("probmoe", num_experts=E, k=k, normalize=normalize, **options).train(training)
    logits, g = torch.randn(T, E) * 2, torch.randn(T, router.width)
    for one, other in zip(gradients(router, logits, True, g), gradients(router, logits, False, g), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


@normalizes
def test_top_k_with_softmax_scores_is_top_k(normalize: bool) -> None:
    router = make_router("topk", num_experts=E, k=3, normalize=normalize)
    logits, g = torch.randn(T, E), torch.randn(T, 3)
    for one, other in zip(gradients(router, logits, True, g), gradients(router, logits, False, g), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-6)


@normalizes
@pytest.mark.parametrize("band", [(2, 2), (1, 3)], ids=str)
def test_sigmoid_scores_by_enumeration(band: tuple[int, int], normalize: bool) -> None:
    router = make_router("probmoe", num_experts=E, k=band, normalize=normalize).train()
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    weights, indices = router(torch.zeros(T, 1), logits, torch.sigmoid(logits))
    g = torch.randn_like(weights)
    (ours,) = torch.autograd.grad((weights * g).sum(), logits)

    subsets = [one for size in range(band[0], band[1] + 1) for one in combinations(range(E), size)]
    hot = torch.zeros(len(subsets), E, dtype=torch.float64)
    for row, one in zip(hot, subsets, strict=True):
        row[list(one)] = 1
    marginals = torch.softmax(logits @ hot.T, -1) @ hot
    z = torch.nn.functional.one_hot(indices, E + 1)[..., :E].sum(1).double()
    u = ((z - marginals).detach() + marginals) * torch.sigmoid(logits)
    dense = u / u.sum(-1, keepdim=True) if normalize else u
    expected = torch.nn.functional.pad(dense, (0, 1)).gather(-1, indices)
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=1e-12)
    (theirs,) = torch.autograd.grad((expected * g).sum(), logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_correction_keeps_its_order_and_is_nothing_when_even(score) -> None:
    rule = ChoiceRule(score, corrected=True)
    logits = torch.randn(T, E, dtype=torch.float64)
    even, scores = rule.choice(logits, torch.full((E,), 7.0))
    torch.testing.assert_close(even, logits)
    correction = torch.randn(E, dtype=torch.float64) * 3
    choice, same = rule.choice(logits, correction)
    assert same.equal(scores)
    assert choice.argsort(-1).equal((scores + correction).argsort(-1))
    assert rule.choice(logits, correction + 5)[0].allclose(choice)
    extreme, _ = rule.choice(logits * 100, correction)
    assert extreme.isfinite().all()


def test_groups_mask_what_lies_outside() -> None:
    logits = torch.tensor([[1.0, 0.0, 3.0, -9.0, 2.0, 2.5]])
    for best, kept in ((1, [2, 3]), (2, [4, 5])):
        choice, scores = ChoiceRule("sigmoid", groups=(3, 1), best_of_group=best).choice(logits, None)
        assert choice.isfinite().nonzero()[:, 1].tolist() == kept
        assert choice[0, kept].equal(logits[0, kept])
        assert scores.equal(logits.sigmoid())


@normalizes
def test_scores_that_underflow_give_no_nan(normalize: bool) -> None:
    for name in ("topk", "probmoe"):
        router = make_router(name, num_experts=E, k=2, normalize=normalize).train()
        logits = torch.full((3, E), -200.0, requires_grad=True)
        weights, _ = router(torch.zeros(3, 1), logits, torch.sigmoid(logits))
        assert weights.equal(torch.zeros(3, 2))
        weights.sum().backward()
        assert logits.grad.isfinite().all()
