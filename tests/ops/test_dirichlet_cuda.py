"""What only a GPU can show of the Gamma and Dirichlet family and of DirMoE routing; beside test_cuda.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from probmoe_ext import ops
from tests.contract import assert_same, needs_fma
from tests.ops.test_cuda import assert_allocations, assert_replays, every_dtype, no_waiting  # noqa: F401  (a fixture)
from tests.ops.test_gamma import SLOPE, TOLERANCE

NUMBERS = {"temperature": 0.5, "concentration": 2.0, "prior": (1.5, 2.0, 0.25)}
both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def step(logits: Tensor, seed: Tensor | None) -> tuple[Tensor, ...]:
    """Every operator of the family, forward and backward, from the same numbers."""
    leaf = logits.detach().requires_grad_()
    alpha, other = leaf.exp() + 0.1, torch.softmax(leaf, -1) + 0.1
    log_g, theta = ops.log_gamma_sample(alpha, seed), ops.dirichlet_sample(alpha, seed)
    closed = ops.dirichlet_log_prob(alpha, other / other.sum(-1, keepdim=True))
    closed = closed + ops.dirichlet_entropy(alpha) + ops.dirichlet_kl(alpha, other)
    weights, indices, kl, expected_k = ops.route_dirmoe(leaf, alpha, other, 4, training=True, seed=seed, **NUMBERS)
    decided, best, *_ = ops.route_dirmoe(leaf, alpha, other, (2, 6), training=False, **NUMBERS)
    total = sum(o.float().square().sum() for o in (log_g, theta, closed, weights, kl, expected_k, decided))
    (gradient,) = torch.autograd.grad(total, leaf)
    outputs = (log_g, theta, closed, weights, indices, kl, expected_k, decided, best, gradient)
    return *(o.detach() for o in outputs), ops.standard_gamma_grad(alpha.detach(), other.detach())


@every_dtype
def test_graph(cuda: torch.device, dtype: torch.dtype) -> None:
    """A captured step replays on new numbers and with a new seed, which is read on the device."""
    generator, seed = torch.Generator().manual_seed(1), torch.tensor(7, device=cuda)
    logits = torch.randn(300, 64, generator=generator).to(cuda, dtype)
    assert_replays(logits, seed, lambda: step(logits, seed), generator)


def test_streams(cuda: torch.device) -> None:
    """Two streams at once: the bits of one after the other."""
    rows, seed = [torch.randn(4096, 64, device=cuda) for _ in range(2)], torch.tensor(5, device=cuda)
    want = [step(logits, seed) for logits in rows]
    torch.cuda.synchronize(cuda)
    streams, got = [torch.cuda.Stream(cuda) for _ in rows], []
    for stream, logits in zip(streams, rows, strict=True):
        with torch.cuda.stream(stream):
            got.append(step(logits, seed))
    torch.cuda.synchronize(cuda)
    for a, b in zip(got, want, strict=True):
        assert_same(a, b, "on two streams")


@both_precisions
@pytest.mark.usefixtures("no_waiting")
def test_nothing_waits_and_nothing_else_is_allocated(cuda: torch.device, dtype: torch.dtype) -> None:
    logits, hi, lo = (torch.rand(64, 64, device=cuda).to(dtype) + 0.5 for _ in range(3))
    seed = torch.full((), 3, dtype=torch.int64, device=cuda)
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "log_gamma_sample": (1, lambda: ops.log_gamma_sample(hi, seed)),
        "standard_gamma_grad": (1, lambda: ops.standard_gamma_grad(hi, lo)),
        "dirichlet_sample": (2, lambda: torch.ops.probmoe_ext.dirichlet_sample(hi, seed)),
        "dirichlet_log_prob": (1, lambda: ops.dirichlet_log_prob(hi, lo)),
        "dirichlet_entropy": (1, lambda: ops.dirichlet_entropy(hi)),
        "dirichlet_kl": (1, lambda: ops.dirichlet_kl(hi, lo)),
        "route_dirmoe": (
            6,
            lambda: torch.ops.probmoe_ext.route_dirmoe(
                logits, hi, lo, seed, 4, 4, 0.5, 2.0, 1.5, 2.0, 0.25, True, True
            ),
        ),
    }
    assert_allocations(cuda, calls)


@needs_fma
@both_precisions
def test_bits_are_the_cpus(cuda: torch.device, dtype: torch.dtype) -> None:
    """Draws of log g and their derivative over twelve decades of concentrations."""
    alpha = 10 ** (12 * torch.rand(1 << 14, 64, dtype=torch.float64) - 6).to(dtype)
    log_g = ops.log_gamma_sample(alpha, seed=3)
    assert torch.equal(ops.log_gamma_sample(alpha.to(cuda), seed=3).cpu(), log_g)
    there = SLOPE(torch.ones_like(alpha, device=cuda), alpha.to(cuda), log_g.to(cuda))
    assert torch.equal(there.cpu(), SLOPE(torch.ones_like(alpha), alpha, log_g))
    shares = ops.dirichlet_sample(alpha.to(cuda), seed=3).cpu()
    torch.testing.assert_close(shares, ops.dirichlet_sample(alpha, seed=3), rtol=8 * TOLERANCE[dtype], atol=0)


def test_routes_are_the_cpus(cuda: torch.device) -> None:
    """The same experts, in the same order, with the same shares."""
    logits, hi = torch.randn(1 << 14, 64, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for training in (True, False):
        here = ops.route_dirmoe(logits, hi, hi / 8, (2, 6), training=training, seed=3, **NUMBERS)
        there = ops.route_dirmoe(
            logits.to(cuda), hi.to(cuda), hi.to(cuda) / 8, (2, 6), training=training, seed=3, **NUMBERS
        )
        assert torch.equal(there[1].cpu(), here[1])
        for a, b in zip((there[0], *there[2:]), (here[0], *here[2:]), strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=1e-10, atol=1e-12)


def test_launches_for_the_sanitizer(cuda: torch.device) -> None:
    """Every kernel once, at sizes with tails: what compute-sanitizer is run on."""
    for num_experts in (7, 40, 64, 300):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            step(torch.randn(37, num_experts).to(cuda, dtype), torch.tensor(9, device=cuda))
    torch.cuda.synchronize(cuda)
