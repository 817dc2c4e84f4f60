"""The Gumbel family on a GPU: the CPU's bits, graphs, streams, no waiting, no hidden allocation."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from probmoe_ext import ops
from tests.contract import assert_same, needs_fma
from tests.inputs import logit_sets
from tests.ops.test_cuda import assert_allocations, assert_replays, every_dtype, no_waiting  # noqa: F401  (a fixture)

RAW = torch.ops.probmoe_ext
TEMPERATURE = 0.7


def step(logits: Tensor, k: int, seed: Tensor) -> tuple[Tensor, ...]:
    """Every operator of the family, forward and backward."""
    leaf = logits.detach().requires_grad_()
    indices, keys = ops.gumbel_top_k(leaf, k, seed=seed)
    value = ops.plackett_luce_log_prob(leaf, indices)
    relaxed = ops.relaxed_top_k(leaf, k, TEMPERATURE, seed=seed)
    gates = ops.gumbel_sigmoid(leaf, TEMPERATURE, seed=seed)
    outputs = (keys, value, relaxed, gates)
    grads = [torch.autograd.grad(o.float().square().sum(), leaf)[0] for o in outputs]
    return indices, *(o.detach() for o in outputs), *grads


@needs_fma
@every_dtype
@pytest.mark.parametrize(("num_experts", "k"), [(64, 8), (60, 4), (256, 8), (300, 9), (1024, 16), (13, 5)])
def test_bits_of_the_cpu(cuda: torch.device, num_experts: int, k: int, dtype: torch.dtype) -> None:
    """Keys, draws and gates, to the last bit."""
    rows = (1 << 22) // num_experts
    for spread in (1.0, 10.0):
        logits, seed = (spread * torch.randn(rows, num_experts)).to(dtype), torch.tensor(3)
        there, far = logits.to(cuda), seed.to(cuda)
        assert_same(tuple(t.cpu() for t in RAW.gumbel_top_k(there, far, k)), RAW.gumbel_top_k(logits, seed, k), "keys")
        gates = RAW.gumbel_sigmoid(there, far, TEMPERATURE).cpu()
        assert_same((gates,), (RAW.gumbel_sigmoid(logits, seed, TEMPERATURE),), "gates")
        keys = RAW.relaxed_top_k(there[:512], far, k, TEMPERATURE)[1].cpu()
        assert_same((keys,), (RAW.relaxed_top_k(logits[:512], seed, k, TEMPERATURE)[1],), "relaxed keys")


@every_dtype
def test_graph(cuda: torch.device, dtype: torch.dtype) -> None:
    """A captured step replays on new logits and with a new seed, which is read on the device."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(300, 64, generator=generator).to(cuda, dtype)
    seed = torch.tensor(7, device=cuda)
    assert_replays(logits, seed, lambda: step(logits, 8, seed), generator)


def test_streams(cuda: torch.device) -> None:
    """Two streams at once, each with its own logits: the bits of one after the other."""
    rows = [torch.randn(4096, 64, device=cuda) for _ in range(2)]
    seed = torch.tensor(5, device=cuda)
    want = [step(logits, 8, seed) for logits in rows]
    torch.cuda.synchronize(cuda)
    streams, got = [torch.cuda.Stream(cuda) for _ in rows], []
    for stream, logits in zip(streams, rows, strict=True):
        with torch.cuda.stream(stream):
            got.append(step(logits, 8, seed))
    torch.cuda.synchronize(cuda)
    for a, b in zip(got, want, strict=True):
        assert_same(a, b, "on two streams")


@every_dtype
@pytest.mark.usefixtures("no_waiting")
def test_nothing_waits_and_nothing_else_is_allocated(cuda: torch.device, dtype: torch.dtype) -> None:
    logits = torch.randn(64, 64, device=cuda).to(dtype)
    seed, grad = torch.full((), 3, dtype=torch.int64, device=cuda), torch.ones(64, device=cuda).to(dtype)
    _, order = RAW.gumbel_top_k(logits, seed, 8)
    _, noisy = RAW.relaxed_top_k(logits, seed, 8, TEMPERATURE)
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "gumbel_top_k": (2, lambda: RAW.gumbel_top_k(logits, seed, 8)),
        "gumbel_sigmoid": (1, lambda: RAW.gumbel_sigmoid(logits, seed, TEMPERATURE)),
        "plackett_luce_log_prob": (1, lambda: RAW.plackett_luce_log_prob(logits, order)),
        "plackett_luce_log_prob_backward": (1, lambda: RAW.plackett_luce_log_prob_backward(grad, logits, order)),
        "relaxed_top_k": (2, lambda: RAW.relaxed_top_k(logits, seed, 8, TEMPERATURE)),
        "relaxed_top_k_backward": (1, lambda: RAW.relaxed_top_k_backward(logits, noisy, 8, TEMPERATURE)),
    }
    assert_allocations(cuda, calls)


@every_dtype
def test_rows_without_an_answer(cuda: torch.device, dtype: torch.dtype) -> None:
    """NaN, +inf, too few experts, an index that is none: NaN in that row alone, indices in range, nothing raised."""
    logits = torch.randn(6, 64, device=cuda).to(dtype)
    logits[0, 3], logits[1, 7], logits[2, 7:] = torch.nan, torch.inf, -torch.inf
    seed, order = torch.tensor(1, device=cuda), torch.arange(8, device=cuda).repeat(6, 1)
    order[3, 2] = 64
    keys, drawn = RAW.gumbel_top_k(logits, seed, 8)
    relaxed, noisy = RAW.relaxed_top_k(logits, seed, 8, TEMPERATURE)
    for output in (keys, relaxed, noisy, RAW.relaxed_top_k_backward(logits, noisy, 8, TEMPERATURE)):
        assert output[:3].isnan().all() and output[3:].isfinite().all()
    assert (drawn[:3] == torch.arange(8, device=cuda)).all() and ((drawn >= 0) & (drawn < 64)).all()
    value, gradient = (
        RAW.plackett_luce_log_prob(logits, order),
        RAW.plackett_luce_log_prob_backward(logits[:, 0].contiguous(), logits, order),
    )
    assert value[[0, 1, 3]].isnan().all() and value[2] == -torch.inf and value[4:].isfinite().all()
    assert gradient[[0, 1, 3]].isnan().all() and (gradient[2] == 0).all() and gradient[4:].isfinite().all()


def test_rounds_in_the_scratch(cuda: torch.device) -> None:
    """More rounds than shared memory holds, for more rows than the scratch holds at a time."""
    keys, upstream = torch.randn(40, 600), torch.randn(40, 600)
    want = RAW.relaxed_top_k_backward(upstream.double(), keys.double(), 550, 0.8)
    got = RAW.relaxed_top_k_backward(upstream.to(cuda), keys.to(cuda), 550, 0.8).cpu()
    torch.testing.assert_close(got.double(), want, rtol=0, atol=5e-3 * float(want.abs().max()))


def test_compile(cuda: torch.device) -> None:
    logits, seed = torch.randn(64, 64, device=cuda), torch.tensor(11, device=cuda)
    got, want = torch.compile(lambda x, s: step(x, 8, s))(logits, seed), step(logits, 8, seed)
    assert_same((got[0],), (want[0],), "compiled indices")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


def test_launches_for_the_sanitizer(cuda: torch.device) -> None:
    """Every kernel once, at sizes with tails: what compute-sanitizer is run on."""
    for num_experts, k in [(64, 8), (60, 4), (40, 12), (13, 5), (300, 5), (200, 60)]:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            logits = torch.cat(list(logit_sets(1, num_experts, (k, k), torch.float32).values())).to(cuda, dtype)
            step(logits, k, torch.tensor(9, device=cuda))
    torch.cuda.synchronize(cuda)
