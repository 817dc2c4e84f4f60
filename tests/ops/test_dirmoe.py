"""DirMoE routing beyond the contract: its limits, its sentences one by one, its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from probmoe_ext import ops, reference
from probmoe_ext.ops import fallback
from tests.contract import assert_near

NUMBERS: dict[str, Any] = {"temperature": 0.5, "concentration": 2.0, "prior": (1.5, 2.0, 0.25)}


def heads(rows: int, experts: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.randn(rows, experts, dtype=torch.float64)
    return logits.to(dtype), (torch.rand(rows, experts) * 3 + 1).to(dtype), (torch.rand(rows, 1) + 0.05).to(dtype)


@pytest.mark.parametrize(("experts", "k"), [(8, 1), (16, 2), (48, 3)])
def test_cold_gates_are_hard(experts: int, k: int) -> None:
    """Towards temperature 0 the gates are 0 or 1, and open experts, if there are k, are the ones that are kept."""
    logits, hi, lo = heads(500, experts)
    options: dict[str, Any] = NUMBERS | {"temperature": 1e-9, "training": True, "seed": 3}
    weights, indices, _, expected_k = ops.route_dirmoe(logits, hi, lo, k, **options)
    noise = reference.dirmoe.logistic(3, logits.shape, logits.device)
    is_open = logits + noise > 0
    torch.testing.assert_close(expected_k, is_open.sum(-1).double(), rtol=0, atol=1e-6)
    enough = is_open.sum(-1) >= k
    assert enough.double().mean() > 0.5 and is_open[enough].gather(-1, indices[enough]).all()
    assert weights.isfinite().all() and torch.allclose(weights.sum(-1), torch.ones(500, dtype=torch.float64))


@pytest.mark.parametrize("training", [True, False])
def test_no_divergence_from_an_equal_prior(training: bool) -> None:
    logits, _, _ = heads(50, 16)
    alike: dict[str, Any] = NUMBERS | {"concentration": 1.5}
    hi, lo = torch.full_like(logits, 2.0), torch.full_like(logits, 0.25)
    _, _, kl, _ = ops.route_dirmoe(logits, hi, lo, 3, training=training, seed=1, **alike)
    assert torch.equal(kl, torch.zeros(50, dtype=torch.float64))


@pytest.mark.parametrize("size", [1e-2, 1.0, 1e4])
@pytest.mark.parametrize("gap", [1e-3, 0.1, 10.0])
def test_divergence_keeps_its_digits(size: float, gap: float) -> None:
    """In float32 the error is some ulps of |p - q| and of 1, however large log Gamma is (at 1e4 its own is 0.008)."""
    ulp = torch.finfo(torch.float32).eps
    hi = (size * (1 + gap * torch.rand(40, 24))).requires_grad_()
    options: dict[str, Any] = {"temperature": 1.0, "concentration": 1.0, "prior": (1.0, size, size)}
    _, _, kl, _ = ops.route_dirmoe(torch.zeros(40, 24), hi, hi, 3, training=False, **options)
    (slope,) = torch.autograd.grad(kl.sum(), hi)
    q = hi.detach().double().requires_grad_()
    p = torch.full_like(q, torch.tensor(size).item())
    want = ops.dirichlet_kl(q, p)
    (true,) = torch.autograd.grad(want.sum(), q)
    moved = ((p - q).abs() * (1 + 1 / p)).sum(-1).detach()
    assert_near(kl, want, ulp * (4 * moved + 2), "divergence")  # the remainders are at most 1/24 for each of 24 experts
    terms = (p - q).abs() * torch.polygamma(1, q) + (p - q).sum(-1, keepdim=True).abs() / q.sum(-1, keepdim=True)
    assert_near(slope, true, 8 * ulp * terms.amax(-1, keepdim=True).detach(), "slope")


@pytest.mark.parametrize("normalize", [True, False])
def test_single_precision_follows_double(normalize: bool) -> None:
    """Gradients in float32 from the draws that float32 made, against the reference in float64 from the same."""
    logits, hi, lo = heads(400, 48, torch.float32)
    raw = torch.ops.probmoe_ext
    numbers = (8, 8, 0.5, 0.2, 0.3, 20.0, 1.0, True, normalize)
    weights, indices, kl, expected_k, noise, log_g = raw.route_dirmoe(
        logits, hi, lo.expand_as(hi).contiguous(), torch.tensor(2), *numbers
    )
    upstream = torch.randn_like(weights), torch.randn_like(kl), torch.randn_like(expected_k)
    got = raw.route_dirmoe_backward(*upstream, logits, hi, lo.expand_as(hi), indices, noise, log_g, *numbers)
    want = fallback.route_dirmoe_backward(
        *(x.double() for x in (*upstream, logits, hi, lo.expand_as(hi))),
        indices,
        noise.double(),
        log_g.double(),
        *numbers,
    )
    for a, b in zip(got, want, strict=True):
        assert ((a.double() - b).abs() <= 1e-5 * b.abs().amax(-1, keepdim=True).clamp(min=1e-3)).all()


def test_by_the_sentence() -> None:
    """The training formulas, done here with shares and products instead of logarithms."""
    logits, hi, lo = heads(300, 12)
    weights, indices, kl, expected_k = ops.route_dirmoe(logits, hi, lo, 4, training=True, seed=5, **NUMBERS)
    z = torch.sigmoid((logits + reference.dirmoe.logistic(5, logits.shape, logits.device)) / 0.5)
    q, p = 2.0 * (z * hi + (1 - z) * lo), 1.5 * (z * 2.0 + (1 - z) * 0.25)
    product = z * ops.dirichlet_sample(q, seed=5)
    r = product / product.sum(-1, keepdim=True)
    top, order = r.topk(4, -1)
    assert torch.equal(indices, order)
    torch.testing.assert_close(weights, top / top.sum(-1, keepdim=True))
    torch.testing.assert_close(kl, ops.dirichlet_kl(q, p))
    torch.testing.assert_close(expected_k, z.sum(-1))
    raw, same, _, _ = ops.route_dirmoe(logits, hi, lo, 4, training=True, normalize=False, seed=5, **NUMBERS)
    assert torch.equal(same, indices)
    torch.testing.assert_close(raw, top)


@pytest.mark.parametrize("k", [3, (1, 5), (0, 12)])
def test_inference_by_the_sentence(k: Any) -> None:
    logits, hi, lo = heads(300, 12)
    weights, indices, kl, expected_k = ops.route_dirmoe(logits, hi, lo, k, training=False, **NUMBERS)
    assert torch.equal(indices, ops.subset_mode(logits, k))
    z = torch.zeros(300, 13, dtype=torch.float64).scatter(-1, indices, 1.0)[:, :12]
    q = 2.0 * torch.where(z > 0, hi, lo)
    share = torch.cat([q * z, torch.zeros(300, 1, dtype=torch.float64)], -1).gather(-1, indices)
    torch.testing.assert_close(weights, share / share.sum(-1, keepdim=True).clamp(min=1e-300))
    torch.testing.assert_close(kl, ops.dirichlet_kl(q, 1.5 * torch.where(z > 0, 2.0, 0.25)))
    assert torch.equal(expected_k, z.sum(-1))


def test_closed_gates_are_never_kept() -> None:
    """-inf closes a gate for good; slots that no expert can fill hold E and weight 0."""
    logits, hi, lo = heads(100, 10)
    logits[:, 3:] = -torch.inf
    logits.requires_grad_()
    weights, indices, kl, expected_k = ops.route_dirmoe(logits, hi, lo, 5, training=True, seed=7, **NUMBERS)
    assert (indices[:, :3] < 3).all() and (indices[:, 3:] == 10).all() and (weights[:, 3:] == 0).all()
    assert (expected_k <= 3).all()
    (grad,) = torch.autograd.grad((weights * torch.arange(5)).sum() + kl.sum() + expected_k.sum(), logits)
    assert (grad[:, 3:] == 0).all() and (grad[:, :3] != 0).all() and grad.isfinite().all()


def test_expected_k_pulls_the_gates() -> None:
    """The penalty (sum z - k)^2 alone brings the expected number of active experts to k: its gradient is right."""
    logits = torch.full((256, 16), 1.0, dtype=torch.float64, requires_grad=True)
    alpha = torch.ones(256, 1, dtype=torch.float64)
    optimiser = torch.optim.SGD([logits], lr=0.3)
    for step in range(200):
        _, _, _, expected_k = ops.route_dirmoe(logits, 2 * alpha, alpha, 2, training=True, seed=step, **NUMBERS)
        optimiser.zero_grad()
        (0.5 * (expected_k - 2).square().sum()).backward()
        optimiser.step()
    assert abs(float(expected_k.detach().mean()) - 2) < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_broadcast(dtype: torch.dtype) -> None:
    """One concentration a token, or one for all, is the same as that number for each expert; gradients are summed."""
    logits, _, _ = heads(20, 8, dtype)
    for shape in ((20, 1), (1,), (8,)):
        hi = torch.full(shape, 2.0, dtype=dtype, requires_grad=True)
        wide = torch.full((20, 8), 2.0, dtype=dtype, requires_grad=True)
        results = [
            ops.route_dirmoe(logits, h, hi.detach() / 8, 3, training=True, seed=9, **NUMBERS) for h in (hi, wide)
        ]
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
        (short,), (full,) = (
            torch.autograd.grad(r[0][:, 0].float().sum() + r[2].float().sum(), h)
            for r, h in zip(results, (hi, wide), strict=True)
        )
        torch.testing.assert_close(short.float(), full.float().sum_to_size(shape), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"temperature": "1"}, TypeError, "temperature must be a number"),
        ({"concentration": -1.0}, ValueError, "concentration must be positive"),
        ({"prior": (1.0, 2.0)}, ValueError, "prior must be"),
        ({"prior": (1.0, 2.0, torch.inf)}, ValueError, r"prior\[2\] must be positive and finite"),
        ({"alpha_hi": torch.ones(3, 1)}, ValueError, r"alpha_hi must broadcast to .* \(2, 4\), not \(3, 1\)"),
        ({"alpha_lo": torch.ones(2, 4).long()}, TypeError, "alpha_lo must be float32"),
        ({"alpha_lo": 1.0}, TypeError, "alpha_lo must be a torch.Tensor"),
        ({"k": 5}, ValueError, "k must satisfy"),
        ({"seed": 1.5}, TypeError, "seed must be"),
        ({"gate_logits": torch.ones(2, 4).int()}, TypeError, "gate_logits must be float32"),
    ],
    ids=lambda x: str(next(iter(x))) if isinstance(x, dict) else "",
)
def test_errors(change: dict[str, Any], kind: type[Exception], words: str) -> None:
    arguments: dict[str, Any] = {
        "gate_logits": torch.zeros(2, 4),
        "alpha_hi": torch.ones(2, 4),
        "k": 2,
        "training": True,
    }
    arguments |= {"alpha_lo": torch.ones(2, 1)} | NUMBERS | change
    with pytest.raises(kind, match=words):
        ops.route_dirmoe(**arguments)


def test_too_few_gates() -> None:
    logits = torch.zeros(50, 8)
    logits[41, 1:] = -torch.inf
    with pytest.raises(ValueError, match=r"row 41 .* k_min = 2"):
        ops.route_dirmoe(logits, torch.ones(1), torch.ones(1), 2, training=False, **NUMBERS)
