"""What only a GPU can show: graphs, streams, no waiting, no hidden allocation, the CPU's draws and the promises."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from probmoe_ext import ops
from tests.contract import assert_same
from tests.inputs import SET_NAMES, Band, exact_case, logit_sets
from tests.ops.test_accuracy import CASES, LARGE, PROMISE, assert_kept, compare

BANDS: list[Band] = [(8, 8), (6, 8)]
every_band = pytest.mark.parametrize("band", BANDS, ids=str)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)


def step(logits: Tensor, band: Band, seed: Tensor | None) -> tuple[Tensor, ...]:
    """Forward and backward of routing, with the other sampling and selecting operators beside it."""
    leaf = logits.detach().requires_grad_()
    weights, indices = ops.route_probmoe(leaf, band, training=True, seed=seed)
    (gradient,) = torch.autograd.grad(weights.float().square().sum(), leaf)
    with torch.no_grad():
        kept, best = ops.route_top_k(logits, band[1])
        marginals, value = ops.subset_marginals(logits, band), ops.subset_log_partition(logits, band)
    return weights.detach(), indices, gradient, kept, best, marginals, value


@pytest.fixture
def no_waiting(cuda: torch.device) -> Iterator[None]:
    """Make torch raise where the host would wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def assert_replays(
    logits: Tensor, seed: Tensor, call: Callable[[], tuple[Tensor, ...]], generator: torch.Generator
) -> None:
    """A capture of the call answers new logits and a new seed, both filled in place, as the call itself does."""
    side = torch.cuda.Stream(logits.device)
    side.wait_stream(torch.cuda.current_stream(logits.device))
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream(logits.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for value in (7, -3):
        seed.fill_(value)
        logits.copy_(torch.randn(logits.shape, generator=generator).to(logits.dtype))
        graph.replay()
        assert_same(captured, call(), f"replay with seed {value}")


@every_band
@every_dtype
def test_graph(cuda: torch.device, dtype: torch.dtype, band: Band) -> None:
    """A captured step replays on new logits and with a new seed, which is read on the device."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(300, 64, generator=generator).to(cuda, dtype)
    seed = torch.tensor(7, device=cuda)
    assert_replays(logits, seed, lambda: step(logits, band, seed), generator)


def test_graph_draws_anew(cuda: torch.device) -> None:
    """Without a seed, each replay takes the next one from torch's generator of the device."""
    logits = torch.zeros(300, 64, device=cuda)
    ops.route_probmoe(logits, 8, training=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, indices = ops.route_probmoe(logits, 8, training=True)
    graph.replay()
    first = indices.clone()
    graph.replay()
    assert not torch.equal(first, indices)


@every_band
def test_streams(cuda: torch.device, band: Band) -> None:
    """Two streams at once, each with its own logits: the bits of one after the other."""
    rows = [torch.randn(4096, 64, device=cuda) for _ in range(2)]
    seed = torch.tensor(5, device=cuda)
    want = [step(logits, band, seed) for logits in rows]
    torch.cuda.synchronize(cuda)
    streams = [torch.cuda.Stream(cuda) for _ in rows]
    got: list[tuple[Tensor, ...]] = []
    for _ in range(20):
        got = []
        for stream, logits in zip(streams, rows, strict=True):
            with torch.cuda.stream(stream):
                got.append(step(logits, band, seed))
    torch.cuda.synchronize(cuda)
    for a, b in zip(got, want, strict=True):
        assert_same(a, b, "on two streams")


def assert_allocations(cuda: torch.device, calls: dict[str, tuple[int, Callable[[], object]]]) -> None:
    """Each call allocates so many tensors."""
    for name, (outputs, call) in calls.items():
        before = torch.cuda.memory_stats(cuda)["allocation.all.allocated"]
        kept = call()
        assert torch.cuda.memory_stats(cuda)["allocation.all.allocated"] - before == outputs, name
        del kept


@every_band
@every_dtype
def test_nothing_waits_and_nothing_else_is_allocated(
    cuda: torch.device, no_waiting: None, dtype: torch.dtype, band: Band
) -> None:
    logits = torch.randn(64, 64, device=cuda).to(dtype)
    v, seed = torch.randn_like(logits), torch.full((), 3, dtype=torch.int64, device=cuda)
    members = ops.subset_sample(logits, band, seed=seed)
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "log_partition": (1, lambda: ops.subset_log_partition(logits, band)),
        "cardinality": (1, lambda: ops.subset_cardinality(logits, band)),
        "marginals": (1, lambda: ops.subset_marginals(logits, band)),
        "covariance_vp": (1, lambda: ops.subset_covariance_vp(logits, v, band)),
        "entropy": (1, lambda: ops.subset_entropy(logits, band)),
        "log_prob": (1, lambda: torch.ops.probmoe_ext.subset_log_prob(logits, members, *band)),
        "sample": (1, lambda: ops.subset_sample(logits, band, seed=seed)),
        "mode": (1, lambda: ops.subset_mode(logits, band)),
        "route_probmoe": (2, lambda: ops.route_probmoe(logits, band, training=True, seed=seed)),
        "route_top_k": (2, lambda: ops.route_top_k(logits, 8)),
    }
    assert_allocations(cuda, calls)


@every_dtype
def test_compile(cuda: torch.device, dtype: torch.dtype) -> None:
    logits, seed = torch.randn(64, 64, device=cuda).to(dtype), torch.tensor(11, device=cuda)
    compiled = torch.compile(lambda x, s: step(x, (6, 8), s), fullgraph=False)
    got, want = compiled(logits, seed), step(logits, (6, 8), seed)
    assert_same((got[1], got[4]), (want[1], want[4]), "compiled indices")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("num_experts", "band"), [(64, (8, 8)), (60, (4, 4)), (64, (6, 8)), (256, (8, 8)), (300, (4, 9))]
)
def test_draws_are_the_cpus(cuda: torch.device, num_experts: int, band: Band) -> None:
    """The same uniforms: decisions differ by rounding in fewer than 1e-5 of rows."""
    for spread in (1.0, 10.0):
        logits = spread * torch.randn(1 << 17, num_experts)
        there = ops.subset_sample(logits.to(cuda), band, seed=3).cpu()
        differing = int((there != ops.subset_sample(logits, band, seed=3)).any(-1).sum())
        assert differing <= 6, f"{differing} rows of {len(logits)}"  # one is expected; more than 6, once in 10^4


@pytest.mark.parametrize("dtype", PROMISE, ids=str)
@pytest.mark.parametrize(("num_experts", "band"), [*CASES, *(case[:2] for case in LARGE)], ids=str)
def test_promise(cuda: torch.device, num_experts: int, band: Band, dtype: torch.dtype) -> None:
    """Fifty digits, on every set of logits."""
    names = {case[:2]: case[2] for case in LARGE}.get((num_experts, band), SET_NAMES)
    for name in names:
        logits64, v64, exact = exact_case(num_experts, band, name)
        logits, v = logits64.to(cuda, dtype), v64.to(cuda, dtype)
        log_z = float(ops.subset_log_partition(logits, band))
        marginals = ops.subset_marginals(logits, band)[0].double().cpu()
        product = ops.subset_covariance_vp(logits, v, band)[0].double().cpu()
        truth = (exact.log_z, exact.marginals, exact.covariance_vp)
        assert_kept(compare(log_z, marginals, product, *truth, v64), dtype, name)


@every_band
@every_dtype
def test_poisoned_rows(cuda: torch.device, dtype: torch.dtype, band: Band) -> None:
    """NaN, +inf and too few experts: NaN in that row alone, indices in range, nothing raised."""
    logits = logit_sets(5, 64, band, torch.float32)["spread 1"].to(cuda, dtype)
    logits[0, 3], logits[1, 7], logits[2, band[0] - 1 :] = torch.nan, torch.inf, -torch.inf
    seed = torch.tensor(1, device=cuda)
    for output in step(logits, band, seed):
        if output.is_floating_point():
            assert output[:3].isnan().flatten(1).all() if output.dim() > 1 else output[:3].isnan().all()
            assert output[3:].isfinite().all()
        else:
            assert ((output >= 0) & (output <= 64)).all()


def test_launches_for_the_sanitizer(cuda: torch.device) -> None:
    """Every kernel once, at sizes with tails: what compute-sanitizer is run on."""
    for num_experts, band in [(64, (8, 8)), (60, (4, 4)), (40, (9, 12)), (13, (2, 5)), (300, (3, 5))]:
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            sets = logit_sets(1, num_experts, band, torch.float32)
            logits = torch.cat(list(sets.values())).to(cuda, dtype)
            step(logits, band, torch.tensor(9, device=cuda))
            indices = ops.subset_sample(logits, band, seed=1)
            leaf = logits.detach().requires_grad_()
            total = ops.subset_cardinality(leaf, band).square().sum() + ops.subset_entropy(leaf, band).sum()
            total = total + ops.subset_log_prob(leaf, indices, band).clamp(min=-1e3).sum()
            torch.autograd.grad(total, leaf)
            ops.subset_mode(logits, band)
    torch.cuda.synchronize(cuda)
