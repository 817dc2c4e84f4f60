"""What is timed: for each operator, a closure that runs it on given logits, and its peer.

A peer is what a user would run instead today. A speed is a ratio to the peer, timed in the same run, turn by turn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from probmoe_ext import ops, reference

Run = Callable[[], object]
Make = Callable[[Tensor, int], Run]


@dataclass(frozen=True)
class Benchmark:
    """One operator: ``ours(logits, k)`` and ``peer(logits, k)`` each make the closure to time."""

    name: str
    ours: Make
    peer: Make
    peer_name: str
    tests: tuple[str, ...] = field(default=("tests/ops",))


def _backward(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Run]:
    def make(logits: Tensor) -> Run:
        leaf = logits.clone().requires_grad_()
        upstream = torch.randn_like(forward(leaf))

        def run() -> None:
            leaf.grad = None
            forward(leaf).backward(upstream)

        return run

    return make


def _softmax_topk(logits: Tensor, k: int) -> Run:
    return lambda: torch.topk(torch.softmax(logits, -1), k, -1)


def _softmax_topk_backward(logits: Tensor, k: int) -> Run:
    return _backward(lambda x: torch.topk(torch.softmax(x, -1), k, -1).values)(logits)


def _reference(function: Callable[..., object]) -> Make:
    return lambda logits, k: lambda: function(logits, k)


def _subset(name: str) -> Benchmark:
    ours, plain = getattr(ops, f"subset_{name}"), getattr(reference, f"subset_{name}")
    return Benchmark(f"subset_{name}", _reference(ours), _reference(plain), "plain torch")


def _indices_benchmark() -> Benchmark:
    def make(function: Callable[..., object]) -> Make:
        def bound(logits: Tensor, k: int) -> Run:
            indices = ops.subset_mode(logits, k)
            return lambda: function(logits, indices, k)

        return bound

    return Benchmark("subset_log_prob", make(ops.subset_log_prob), make(reference.subset_log_prob), "plain torch")


def _divergence_benchmark() -> Benchmark:
    def make(function: Callable[..., object]) -> Make:
        def bound(logits: Tensor, k: int) -> Run:
            other = logits + torch.randn_like(logits)
            return lambda: function(logits, other, k)

        return bound

    return Benchmark("subset_kl", make(ops.subset_kl), make(reference.subset_kl), "plain torch")


def _by_parts(function: Callable[[Tensor, int], Tensor], rows: int) -> Make:
    """Some rows at a time: the peer's tables for all rows at once would not fit the memory of a small machine."""
    return lambda logits, k: lambda: torch.cat([function(part, k) for part in logits.split(rows)])


def _simple(logits: Tensor, k: int) -> Run:
    """SIMPLE as published: a k-hot draw whose gradient is that of log-space marginals (the draw here: multinomial)."""

    def forward(x: Tensor) -> Tensor:
        marginals = reference.subset_marginals_log_space(x, k)
        drawn = torch.multinomial(torch.softmax(x.detach(), -1), k)
        return torch.zeros_like(x).scatter(-1, drawn, 1.0) + marginals - marginals.detach()

    return _backward(forward)(logits)


def _vector_benchmark() -> Benchmark:
    def make(function: Callable[..., object]) -> Make:
        def bound(logits: Tensor, k: int) -> Run:
            v = torch.randn_like(logits)
            return lambda: function(logits, v, k)

        return bound

    return Benchmark(
        "subset_covariance_vp", make(ops.subset_covariance_vp), make(reference.subset_covariance_vp), "plain torch"
    )


def _seeded(function: Callable[..., object]) -> Make:
    return lambda logits, k: lambda: function(logits, k, seed=1)


def _multinomial(logits: Tensor, k: int) -> Run:
    return lambda: torch.multinomial(torch.softmax(logits, -1), k)


_ALL = (
    Benchmark(
        "route_probmoe",
        lambda logits, k: lambda: ops.route_probmoe(logits, k, training=True),
        _softmax_topk,
        "softmax + topk",
    ),
    Benchmark(
        "route_probmoe_backward",
        lambda logits, k: _backward(lambda x: ops.route_probmoe(x, k, training=True)[0])(logits),
        _softmax_topk_backward,
        "softmax + topk, forward + backward",
    ),
    Benchmark("route_top_k", lambda logits, k: lambda: ops.route_top_k(logits, k), _softmax_topk, "softmax + topk"),
    Benchmark("subset_sample", _seeded(ops.subset_sample), _multinomial, "softmax + multinomial"),
    _subset("log_partition"),
    _subset("cardinality"),
    _subset("marginals"),
    _subset("entropy"),
    _subset("mode"),
    _vector_benchmark(),
    _indices_benchmark(),
    Benchmark(
        "subset_pairwise",
        _reference(ops.subset_pairwise),
        _by_parts(reference.subset_pairwise, 64),
        "plain torch, 64 rows at a time",
    ),
    _divergence_benchmark(),
    Benchmark(
        "subset_indicator",
        lambda logits, k: _backward(lambda x: ops.subset_indicator(x, k, seed=1))(logits),
        _simple,
        "SIMPLE in plain torch, forward + backward",
    ),
)

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}
