"""Noisy top-k gating by the equations of its paper, one token after the other, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from probmoe_ext.routers import aux_losses, make_router, variation_loss
from probmoe_ext.routers.context import Batch

T, E, H = 9, 5, 4
ks = pytest.mark.parametrize("k", [1, 2, E])


def noisy(k: int, **options: Any) -> Any:
    router = make_router("noisy_topk", num_experts=E, k=k, hidden_size=H, **options).double().train()
    torch.nn.init.normal_(router.noise.weight)
    return router


def restated(router: Any, hidden: torch.Tensor, logits: torch.Tensor, noise: torch.Tensor, rows: list[int]) -> Any:
    """Weights of each token by expert, and both losses over some rows, from eq. 3-11."""
    k, tokens, importance, load = router.k_max, [], 0, 0
    for t in range(len(logits)):
        sigma = torch.log1p(torch.exp(router.noise.weight @ hidden[t])) + router.floor
        h = logits[t] + noise[t] * sigma
        keep = sorted(range(E), key=lambda i: -h[i].item())[:k]
        total = sum(h[i].exp() for i in keep)
        gates = torch.stack([h[i].exp() / total if i in keep else 0 * total for i in range(E)])
        probabilities = []
        for i in range(E):
            others = sorted((h[j] for j in range(E) if j != i), key=lambda value: -value.item())
            if len(others) < k:
                probabilities.append(torch.ones((), dtype=torch.float64))
            else:
                z = (logits[t, i] - others[k - 1]) / sigma[i]
                probabilities.append(0.5 * (1 + torch.erf(z / math.sqrt(2))))
        tokens.append((keep, gates))
        if t in rows:
            importance, load = importance + gates, load + torch.stack(probabilities)
    losses = []
    for sums in (importance, load):
        mean = sums.sum() / E
        losses.append(((sums - mean) ** 2).sum() / E / mean**2)
    return tokens, losses


@ks
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients(k: int, masked: bool) -> None:
    router = noisy(k, importance_weight=0.3, load_weight=0.7)
    rows = [0, 1, 4, 5, 8] if masked else list(range(T))
    if masked:
        router.batch = Batch(mask=torch.zeros(T, dtype=torch.bool).index_fill(0, torch.tensor(rows), True))
    hidden = torch.randn(T, H, dtype=torch.float64)
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(3)
    weights, indices = router(hidden, logits)
    torch.manual_seed(3)
    noise = torch.randn_like(logits)
    tokens, (importance, load) = restated(router, hidden, logits, noise, rows)
    g = torch.randn(T, E, dtype=torch.float64)
    target = 0.3 * importance + 0.7 * load
    for found, where, (keep, gates), its_g in zip(weights, indices, tokens, g, strict=True):
        assert where.tolist() == keep
        torch.testing.assert_close(found, gates[keep])
        target = target + (gates * its_g).sum()
    losses = aux_losses(router)
    torch.testing.assert_close(losses["importance"], 0.3 * importance.detach())
    torch.testing.assert_close(losses["load"], 0.7 * load.detach())
    inputs = (logits, router.noise.weight)
    ours = torch.autograd.grad((weights * g.gather(-1, indices)).sum(), inputs)
    for one, other in zip(ours, torch.autograd.grad(target, inputs), strict=True):
        torch.testing.assert_close(one, other)


@ks
def test_without_noise_it_is_top_k(k: int) -> None:
    router = noisy(k, floor=1e-9)
    router.noise.weight.data.fill_(-1000)
    hidden, logits = torch.ones(T, H).double(), torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    plain = make_router("topk_softmax", num_experts=E, k=k)
    weights, indices = router(hidden, logits)
    expected, order = plain(hidden, logits)
    assert indices.equal(order)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-6)
    weights.sum().backward()
    assert logits.grad.isfinite().all()
    for one, other in zip(router.eval()(hidden, logits), plain(hidden, logits), strict=True):
        assert one.equal(other)
    assert router.top_k_in_evaluation() == (k, True)


def test_it_starts_with_the_same_noise_everywhere() -> None:
    router = make_router("noisy_topk", num_experts=E, k=E, hidden_size=H, floor=0.01).train()
    logits = torch.zeros(4000, E)
    weights, indices = router(torch.randn(4000, H), logits)
    # k = E: the logarithm of the weights is the noise up to a constant of each token.
    noise = torch.zeros(4000, E).scatter(-1, indices, weights.detach().log())
    spread = (noise - noise.mean(-1, keepdim=True)).var(correction=0) * E / (E - 1)
    assert spread.sqrt().item() == pytest.approx(math.log(2) + 0.01, rel=0.03)


def test_masked_experts_have_no_load_and_no_nan() -> None:
    router = noisy(3).float()
    logits = torch.randn(T, E).index_fill(1, torch.tensor([0, 2]), -torch.inf).requires_grad_()
    weights, indices = router(torch.randn(T, H), logits)
    assert not torch.isin(indices, torch.tensor([0, 2])).any()
    weights.square().sum().backward()
    assert logits.grad[:, [1, 3, 4]].isfinite().all()
    assert router.noise.weight.grad.isfinite().all()


def test_the_variation_of_nothing_and_of_even_shares_is_zero() -> None:
    shares = torch.rand(T, E)
    assert variation_loss(shares, mask=torch.zeros(T)).item() == 0
    assert variation_loss(torch.ones(T, E)).item() == 0
    one = torch.zeros(T, E).index_fill(1, torch.tensor([2]), 1)
    assert variation_loss(one).item() == pytest.approx(E - 1)
    with pytest.raises(ValueError, match="mask must have one value for each of 9 tokens"):
        variation_loss(shares, mask=torch.ones(3))


@pytest.mark.parametrize(
    ("option", "value"),
    [("importance_weight", -1.0), ("load_weight", math.nan), ("floor", 0.0), ("floor", math.inf)],
)
def test_options_out_of_range(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{option} of router 'noisy_topk' must be"):
        make_router("noisy_topk", num_experts=E, k=2, hidden_size=H, **{option: value})
