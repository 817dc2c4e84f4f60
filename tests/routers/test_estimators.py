"""The hard choices with a soft gradient: straight-through, Gumbel-softmax and SIMPLE, by their formulas in float64.

Each is ``(stopgrad(z - soft) + soft) * weight`` at the chosen experts. Here the gradient is taken apart by the product
rule instead: what reaches ``soft`` is ``g * weight``, and what reaches ``weight`` is ``g * z``.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch

from probmoe_ext.routers import Router, make_router
from probmoe_ext.routers import gumbel_softmax as module

T, E, K, H = 10, 6, 3, 4
normalizes = pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
names = pytest.mark.parametrize("name", ["straight_through", "gumbel_softmax", "simple"])
ks = pytest.mark.parametrize("k", [1, K, E])
SEED = 11


def draw(name: str, k: int, **options: Any) -> tuple[Router, torch.Tensor, torch.Tensor, torch.Tensor]:
    router = make_router(name, num_experts=E, k=k, **options).train()
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    weights, indices = router(torch.zeros(T, H), logits)
    return router, logits, weights, indices


def hot(indices: torch.Tensor) -> torch.Tensor:
    z = torch.zeros(len(indices), E, dtype=torch.float64)
    for row, experts in zip(z, indices.tolist(), strict=True):
        row[experts] = 1
    return z


def by_the_product_rule(
    logits: torch.Tensor, z: torch.Tensor, soft: torch.Tensor, weight: torch.Tensor, g: torch.Tensor, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense values, and the gradient of ``sum(g * values)`` that the estimator gives the logits."""
    values = z * weight
    reaching = g * z
    if normalize:
        total = values.sum(-1, keepdim=True)
        # d(v_i / sum v) = dv_i / sum v - v_i / (sum v)^2 * sum dv: every expert has a part in the sum.
        reaching = (g * z - (g * values).sum(-1, keepdim=True) / total) / total
        values = values / total
    parts = []
    for part, cotangent in ((soft, reaching * weight.detach()), (weight, reaching * z)):
        parts.append(torch.autograd.grad(part, logits, cotangent.detach(), retain_graph=True)[0])
    return values.detach(), parts[0] + parts[1]


def check(
    router: Router,
    logits: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    soft: torch.Tensor,
    weight: torch.Tensor,
) -> None:
    g = torch.randn(T, E, dtype=torch.float64)
    values, gradient = by_the_product_rule(logits, hot(indices), soft, weight, g, router.options["normalize"])
    torch.testing.assert_close(weights.detach(), values.gather(-1, indices))
    (ours,) = torch.autograd.grad((weights * g.gather(-1, indices)).sum(), logits)
    torch.testing.assert_close(ours, gradient, rtol=1e-9, atol=1e-12)


def marginals_by_enumeration(logits: torch.Tensor, k: int) -> torch.Tensor:
    subsets = list(combinations(range(E), k))
    odds = torch.stack([logits[:, list(one)].sum(-1).exp() for one in subsets], -1)
    membership = hot(torch.tensor(subsets))
    return odds / odds.sum(-1, keepdim=True) @ membership


@normalizes
@ks
def test_straight_through(k: int, normalize: bool) -> None:
    router, logits, weights, indices = draw("straight_through", k, normalize=normalize)
    for row, experts in zip(logits.tolist(), indices.tolist(), strict=True):
        assert experts == sorted(range(E), key=lambda expert: -row[expert])[:k]
    s = logits.exp() / logits.exp().sum(-1, keepdim=True)
    check(router, logits, weights, indices, s, s)


@normalizes
@ks
def test_simple(k: int, normalize: bool) -> None:
    router, logits, weights, indices = draw("simple", k, normalize=normalize)
    m = marginals_by_enumeration(logits, k)
    check(router, logits, weights, indices, m, m if normalize else m / k)


@normalizes
@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
@ks
def test_gumbel_softmax(k: int, temperature: float, normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "make_seed", lambda seed, logits: torch.tensor(SEED))
    router, logits, weights, indices = draw("gumbel_softmax", k, temperature=temperature, normalize=normalize)
    # The noise, from the keys of all experts at the same seed.
    order, keys = module.gumbel_top_k(logits.detach(), E, torch.tensor(SEED))
    noise = torch.zeros_like(keys).scatter(-1, order, keys) - logits.detach()
    assert indices.equal((logits + noise).topk(k).indices)
    x, y = logits + noise, torch.zeros_like(logits)
    for _ in range(k):
        a = (x / temperature).softmax(-1)
        y = y + a
        x = x + torch.log1p(-a)
    check(router, logits, weights, indices, y, logits.softmax(-1))


def test_cold_gumbel_softmax_has_the_gradient_of_the_sampled_weights() -> None:
    _, logits, weights, indices = draw("gumbel_softmax", K, temperature=1e-5)
    g = torch.randn(T, K, dtype=torch.float64)
    (cold,) = torch.autograd.grad((weights * g).sum(), logits)
    (plain,) = torch.autograd.grad((logits.softmax(-1).gather(-1, indices) * g).sum(), logits)
    torch.testing.assert_close(cold, plain, rtol=1e-6, atol=1e-9)


def test_the_draws_have_the_laws_that_they_should() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5, -0.5, 0.2]).double().expand(20000, E)
    for name, first in (("gumbel_softmax", logits[0].softmax(-1)), ("simple", marginals_by_enumeration(logits[:1], 1))):
        _, indices = make_router(name, num_experts=E, k=1).train()(logits, logits)
        torch.testing.assert_close(hot(indices).mean(0), first.flatten(), rtol=0, atol=0.015)
    _, indices = make_router("simple", num_experts=E, k=K).train()(logits, logits)
    torch.testing.assert_close(hot(indices).mean(0), marginals_by_enumeration(logits[:1], K)[0], rtol=0, atol=0.015)


def test_simple_with_one_and_with_all_experts() -> None:
    _, logits, weights, indices = draw("simple", 1)
    torch.testing.assert_close(weights, logits.softmax(-1).gather(-1, indices))
    _, _, weights, _ = draw("simple", E)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / E))


@names
@normalizes
def test_evaluation(name: str, normalize: bool) -> None:
    router, logits, _, _ = draw(name, K, normalize=normalize)
    weights, indices = router.eval()(logits, logits)
    expected, order = logits.softmax(-1).topk(K)
    assert indices.equal(order)
    assert router.top_k_in_evaluation() == (None if name == "simple" else (K, normalize))
    if name == "simple":
        expected = marginals_by_enumeration(logits, K).gather(-1, order) / K
    torch.testing.assert_close(weights, expected / expected.sum(-1, keepdim=True) if normalize else expected)


@pytest.mark.parametrize("name", ["straight_through", "gumbel_softmax"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_scores_take_the_place_of_the_softmax(name: str, training: bool) -> None:
    router = make_router(name, num_experts=E, k=K).train(training)
    logits = torch.randn(T, E)
    weights, indices = router(logits, logits, logits.sigmoid())
    torch.testing.assert_close(weights, logits.sigmoid().gather(-1, indices))


@pytest.mark.parametrize("name", ["straight_through", "simple"])
def test_given_experts(name: str) -> None:
    router, logits, weights, indices = draw(name, K)
    g = torch.randn_like(weights)
    replayed = router.weights_for(logits, logits, indices)
    assert replayed.equal(weights)
    for one, other in zip(*(torch.autograd.grad((w * g).sum(), logits) for w in (weights, replayed)), strict=True):
        assert one.equal(other)
    assert router.weights_for(logits, logits, torch.full((T, 2), E)).eq(0).all()


@names
def test_masked_experts_are_never_chosen(name: str) -> None:
    router = make_router(name, num_experts=E, k=K).train()
    logits = torch.randn(200, E).index_fill(1, torch.tensor([0, 5]), -torch.inf).requires_grad_()
    weights, indices = router(logits, logits)
    assert not torch.isin(indices, torch.tensor([0, 5])).any()
    (gradient,) = torch.autograd.grad(weights.square().sum(), logits)
    assert gradient[:, 1:5].isfinite().all()


@names
def test_no_band(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name!r} takes one k, got the band"):
        make_router(name, num_experts=E, k=(1, 2))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_the_temperature_is_checked(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature of router 'gumbel_softmax' must be from 1e-6 to 1e6, got"):
        make_router("gumbel_softmax", num_experts=E, k=K, temperature=temperature)
