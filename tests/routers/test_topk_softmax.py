"""The softmax of the chosen logits, against the formula of one token after the other."""

from __future__ import annotations

import pytest
import torch

from probmoe_ext.routers import make_router

T, E, H = 12, 6, 4


@pytest.mark.parametrize("k", [1, 3, E])
def test_values_and_gradient(k: int) -> None:
    router = make_router("topk_softmax", num_experts=E, k=k)
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    g = torch.randn(T, k, dtype=torch.float64)
    weights, indices = router(torch.zeros(T, H), logits)
    (gradient,) = torch.autograd.grad((weights * g).sum(), logits)
    for row, found, where, its_g, its_gradient in zip(logits.detach(), weights, indices, g, gradient, strict=True):
        order = sorted(range(E), key=lambda expert: -row[expert].item())[:k]
        exponentials = [row[expert].exp() for expert in order]
        expected = torch.stack([one / sum(exponentials) for one in exponentials])
        assert where.tolist() == order
        torch.testing.assert_close(found.detach(), expected)
        by_hand = torch.zeros(E, dtype=torch.float64)
        for i, expert in enumerate(order):  # the Jacobian of a softmax: w_i (1[i = j] - w_j)
            by_hand[expert] = expected[i] * (its_g[i] - (expected * its_g).sum())
        torch.testing.assert_close(its_gradient, by_hand)
    assert k > 1 or weights.eq(1).all()


def test_it_is_top_k_renormalised() -> None:
    logits = torch.randn(T, E)
    ours = make_router("topk_softmax", num_experts=E, k=3)
    theirs = make_router("topk", num_experts=E, k=3, normalize=True)
    for one, other in zip(ours(logits, logits), theirs(logits, logits), strict=True):
        assert one.equal(other)
    assert ours.top_k_in_evaluation() == theirs.top_k_in_evaluation() == (3, True)
    assert ours.options == {}


def test_given_experts() -> None:
    router = make_router("topk_softmax", num_experts=E, k=2)
    logits = torch.randn(T, E, requires_grad=True)
    weights, indices = router(logits, logits)
    torch.testing.assert_close(router.weights_for(logits, logits, indices), weights)
    given = torch.tensor([[0, 3], [E, 2], [E, E]]).repeat(T // 3, 1)
    weights = router.weights_for(logits, logits, given)
    torch.testing.assert_close(weights[0], logits[0, [0, 3]].softmax(-1))
    assert weights[1].tolist() == [0, 1]
    assert weights[2].tolist() == [0, 0]
    (gradient,) = torch.autograd.grad(weights.square().sum(), logits)
    assert gradient.isfinite().all()


def test_a_masked_expert_is_not_chosen() -> None:
    logits = torch.randn(T, E).index_fill(1, torch.tensor([1, 4]), -torch.inf)
    _, indices = make_router("topk_softmax", num_experts=E, k=4)(logits, logits)
    assert not torch.isin(indices, torch.tensor([1, 4])).any()


def test_no_band() -> None:
    with pytest.raises(ValueError, match=r"'topk_softmax' takes one k, got the band \(1, 2\)"):
        make_router("topk_softmax", num_experts=E, k=(1, 2))
