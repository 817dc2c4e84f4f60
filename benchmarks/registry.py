"""What is timed: for each operator, a closure that runs it on given logits, and its peer.

A peer is what a user would run instead today, or ours at another size: a speed is always a ratio of two closures timed
in the same run, turn by turn. To add an entry, append a :class:`Benchmark` to ``_ALL``; its first four fields suffice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from probmoe_ext import ops, reference

from . import gumbel, published
from .peers import (
    Make,
    Run,
    Size,
    forward_only,
    gumbel_softmax_topk,
    largest,
    marginals_by_circuit,
    multinomial,
    routed_through,
    simple_indicator,
    softmax_topk,
    with_backward,
)

TURN = 10e-3
"""Seconds: closures run several times a turn, so that neither the clock's reading nor what the other one left in caches
and branch predictors counts, and a pool of threads that was put to sleep does not either."""


@dataclass(frozen=True)
class Case:
    """The size of a measurement: T rows of E standard normal logits times ``spread``."""

    rows: int = 4096
    experts: int = 64
    k: Size = 8
    spread: float = 1.0
    threads: int = 1


@dataclass(frozen=True)
class Benchmark:
    """One operator against one peer: ``ours(logits, k)`` and ``peer(logits, k)`` each make the closure to time.

    Attributes:
        name: the operator's, and after a colon what distinguishes a second comparison of it.
        ours: the operator.
        peer: what it is compared with.
        peer_name: in words.
        tests: what must be green before it is timed.
        suite: where ``python -m benchmarks.run`` measures it by default.
        target: the ratio of the medians that ours shall not exceed.
        turn: seconds that a turn lasts at least, calls that are shorter being repeated; 0 is one call a turn.
    """

    name: str
    ours: Make
    peer: Make
    peer_name: str
    tests: tuple[str, ...] = ("tests/ops",)
    suite: tuple[Case, ...] = (Case(rows=512),)
    target: float | None = None
    turn: float = TURN


SIZES = tuple(
    Case(rows, experts, k, threads=threads)
    for threads in (1, 2)
    for rows in (512, 4096, 16384)
    for experts, k in ((64, 8), (60, 4), (128, 8), (256, 8))
)
SMALL = tuple(case for case in SIZES if case.rows == 512)
DECODING = (Case(1), Case(8), Case(64))
SWEEPS = {
    "E": tuple(Case(512, experts=e) for e in (16, 32, 64, 128, 256)),
    "k": tuple(Case(512, k=k) for k in (1, 2, 4, 8, 16, 32)),
    "T": tuple(Case(t) for t in (1, 8, 64, 512, 4096, 16384)),
}
"""What the plot draws the cost against, one axis at a time."""


def _probmoe(logits: Tensor, k: Size) -> Tensor:
    return ops.route_probmoe(logits, k, training=True)[0]


def _top_k(logits: Tensor, k: Size) -> Tensor:
    return ops.route_top_k(logits, largest(k))[0]


def _softmax_topk_weights(logits: Tensor, k: Size) -> Tensor:
    return softmax_topk(logits, k)[0]


def _subset(name: str) -> Benchmark:
    ours, plain = getattr(ops, f"subset_{name}"), getattr(reference, f"subset_{name}")
    return Benchmark(f"subset_{name}", forward_only(ours), forward_only(plain), "plain torch")


def _with_second(
    name: str, second: Callable[[Tensor, Size], Tensor], ours: Callable[..., object], plain: Callable[..., object]
) -> Benchmark:
    """An operator of ``(logits, second, k)``; the second argument is made beforehand."""

    def make(function: Callable[..., object]) -> Make:
        def bound(logits: Tensor, k: Size) -> Run:
            other = second(logits, k)
            return lambda: function(logits, other, k)

        return bound

    return Benchmark(name, make(ours), make(plain), "plain torch")


def _by_parts(function: Callable[[Tensor, Size], Tensor], rows: int) -> Make:
    """Some rows at a time: the peer's tables for all rows at once would not fit the memory of a small machine."""
    return lambda logits, k: lambda: torch.cat([function(part, k) for part in logits.split(rows)])


def _on_threads(make: Make, threads: int) -> Make:
    def bound(logits: Tensor, k: Size) -> Run:
        inner = make(logits, k)

        def run() -> None:
            torch.set_num_threads(threads)
            inner()

        return run

    return bound


def _against_itself(name: str, make: Make) -> tuple[Benchmark, ...]:
    """What a band, far spread logits, twice the experts, twice the k and a second thread change."""

    def narrower(logits: Tensor, k: Size) -> Run:
        return make(logits[:, : logits.shape[-1] // 2].contiguous(), k)

    def smaller(logits: Tensor, k: Size) -> Run:
        return make(logits, largest(k) // 2)

    def calmer(logits: Tensor, k: Size) -> Run:
        return make(logits / 20, k)

    def exact(logits: Tensor, k: Size) -> Run:
        return make(logits, largest(k))

    wide = tuple(Case(experts=e) for e in (64, 128, 256))
    return (
        Benchmark(f"{name}:band", make, exact, "exact k", suite=(Case(k=(6, 8)),), target=1.3),
        Benchmark(f"{name}:spread", make, calmer, "a twentieth the spread", suite=(Case(spread=20.0),), target=2.0),
        Benchmark(f"{name}:experts", make, narrower, "half the experts", suite=wide, target=2 * 1.15),
        Benchmark(
            f"{name}:k", make, smaller, "half the k", suite=tuple(Case(k=k) for k in (8, 16, 32)), target=2 * 1.15
        ),
        Benchmark(
            f"{name}:threads",
            _on_threads(make, 2),
            _on_threads(make, 1),
            "one thread",
            suite=(Case(),),
            target=1 / 1.8,
        ),
    )


_FORWARD, _BACKWARD = forward_only(_probmoe), with_backward(_probmoe)
_TOP_K, _TOP_K_BACKWARD = forward_only(_top_k), with_backward(_top_k)
_PEER, _PEER_BACKWARD = forward_only(softmax_topk), with_backward(_softmax_topk_weights)
_SOFTMAX_TOPK = "softmax + topk"
_CHAIN = with_backward(lambda logits, k: published.route_by_chain(logits, largest(k))[0])
_CIRCUIT = with_backward(lambda logits, k: published.route_by_differentiated_circuit(logits, largest(k))[0])
_WALKED_CIRCUIT = with_backward(lambda logits, k: published.route_by_walked_circuit(logits, largest(k))[0])
_LEAN_LOG_SPACE = with_backward(routed_through(reference.subset_marginals_log_space))
_LEAN_CIRCUIT = with_backward(routed_through(marginals_by_circuit))

_ALL = (
    Benchmark("route_probmoe", _FORWARD, _PEER, _SOFTMAX_TOPK, suite=SIZES, target=0.20),
    Benchmark("route_probmoe_backward", _BACKWARD, _PEER_BACKWARD, _SOFTMAX_TOPK, suite=SIZES, target=0.38),
    Benchmark("route_top_k", _TOP_K, _PEER, _SOFTMAX_TOPK, suite=SIZES, target=0.10),
    Benchmark("route_top_k_backward", _TOP_K_BACKWARD, _PEER_BACKWARD, _SOFTMAX_TOPK, suite=(Case(),)),
    Benchmark("route_probmoe:cold", _FORWARD, _PEER, _SOFTMAX_TOPK, suite=SMALL, turn=0),
    Benchmark("route_probmoe_backward:cold", _BACKWARD, _PEER_BACKWARD, _SOFTMAX_TOPK, suite=SMALL, turn=0),
    Benchmark("route_probmoe:decoding", _FORWARD, _PEER, _SOFTMAX_TOPK, suite=DECODING, target=2.5),
    Benchmark("route_top_k:decoding", _TOP_K, _PEER, _SOFTMAX_TOPK, suite=DECODING, target=2.5),
    Benchmark("route_probmoe_backward:decoding", _BACKWARD, _PEER_BACKWARD, _SOFTMAX_TOPK, suite=DECODING, target=1.6),
    Benchmark(
        "route_top_k_backward:decoding", _TOP_K_BACKWARD, _PEER_BACKWARD, _SOFTMAX_TOPK, suite=DECODING, target=1.6
    ),
    Benchmark(
        "route_probmoe_backward:log_space",
        _BACKWARD,
        _CHAIN,
        "published log-space dynamic program",
        suite=(Case(512), Case(4096)),
        target=1 / 150,
    ),
    Benchmark(
        "route_probmoe_backward:circuit",
        _BACKWARD,
        _CIRCUIT,
        "published circuit, differentiated",
        suite=(Case(512), Case(4096)),
        target=1 / 1000,
    ),
    Benchmark(
        "route_probmoe_backward:walked_circuit",
        _BACKWARD,
        _WALKED_CIRCUIT,
        "published circuit, walked up and down",
        suite=(Case(512), Case(4096)),
        target=1 / 1000,
    ),
    Benchmark(
        "route_probmoe_backward:lean_log_space",
        _BACKWARD,
        _LEAN_LOG_SPACE,
        "log-space dynamic program, one pass, Gumbel draw",
        suite=(Case(512), Case(4096)),
    ),
    Benchmark(
        "route_probmoe_backward:lean_circuit",
        _BACKWARD,
        _LEAN_CIRCUIT,
        "circuit as a tree of sizes, one pass, Gumbel draw",
    ),
    Benchmark("route_probmoe_backward:gumbel", _BACKWARD, with_backward(gumbel_softmax_topk), "Gumbel-softmax top-k"),
    Benchmark(
        "route_probmoe_backward:sweep",
        _BACKWARD,
        _PEER_BACKWARD,
        _SOFTMAX_TOPK,
        suite=tuple(dict.fromkeys((*SWEEPS["E"], *SWEEPS["k"], *SWEEPS["T"]))),
    ),
    Benchmark(
        "route_probmoe_backward:sweep_log_space",
        _BACKWARD,
        _CHAIN,
        "published log-space dynamic program",
        suite=tuple(dict.fromkeys((*SWEEPS["E"], *SWEEPS["k"]))),
    ),
    *_against_itself("route_probmoe", _FORWARD),
    *_against_itself("route_probmoe_backward", _BACKWARD),
    Benchmark(
        "subset_sample",
        forward_only(lambda logits, k: ops.subset_sample(logits, k, seed=1)),
        forward_only(multinomial),
        "softmax + multinomial",
    ),
    _subset("log_partition"),
    _subset("cardinality"),
    _subset("marginals"),
    _subset("entropy"),
    _subset("mode"),
    _with_second(
        "subset_covariance_vp",
        lambda logits, k: torch.randn_like(logits),
        ops.subset_covariance_vp,
        reference.subset_covariance_vp,
    ),
    _with_second("subset_log_prob", ops.subset_mode, ops.subset_log_prob, reference.subset_log_prob),
    _with_second("subset_kl", lambda logits, k: logits + torch.randn_like(logits), ops.subset_kl, reference.subset_kl),
    Benchmark(
        "subset_pairwise",
        forward_only(ops.subset_pairwise),
        _by_parts(reference.subset_pairwise, 64),
        "plain torch, 64 rows at a time",
    ),
    Benchmark(
        "subset_indicator",
        with_backward(lambda logits, k: ops.subset_indicator(logits, k, seed=1)),
        with_backward(simple_indicator),
        "SIMPLE in log space, forward + backward",
    ),
)


def _law(
    name: str,
    function: Callable[..., Tensor],
    peer: Callable[..., Tensor],
    peer_name: str,
    target: float | None = None,
) -> Benchmark:
    """A function of concentrations exp(logits)."""

    def make(function: Callable[..., Tensor]) -> Make:
        def bound(logits: Tensor, k: int) -> Run:
            alpha = logits.exp()
            return lambda: function(alpha)

        return bound

    return Benchmark(name, make(function), make(peer), peer_name, suite=(Case(),), target=target)


def _law_backward(
    name: str, function: Callable[..., Tensor], peer: Callable[..., Tensor], peer_name: str, target: float
) -> Benchmark:
    return Benchmark(
        name,
        with_backward(lambda logits, k: function(logits.exp())),
        with_backward(lambda logits, k: peer(logits.exp())),
        peer_name,
        suite=(Case(),),
        target=target,
    )


def _law_pair(name: str, peer: Callable[[Tensor, Tensor], Tensor], peer_name: str, value: bool) -> Benchmark:
    """A function of concentrations, and of a point of the simplex or other concentrations."""

    def make(function: Callable[[Tensor, Tensor], Tensor]) -> Make:
        def bound(logits: Tensor, k: int) -> Run:
            other = torch.softmax(logits.flip(-1), -1) if value else logits.flip(-1).exp()
            alpha = logits.exp()
            return lambda: function(alpha, other)

        return bound

    return Benchmark(name, make(getattr(ops, name)), make(peer), peer_name)


def _torch_dirichlet(alpha: Tensor) -> Tensor:
    return torch.distributions.Dirichlet(alpha, validate_args=False).rsample()


def _dirmoe(function: Callable[..., object]) -> Make:
    def bound(logits: Tensor, k: int) -> Run:
        hi, lo = torch.full_like(logits[:, :1], 2.0), torch.full_like(logits[:, :1], 0.1)
        numbers = {"temperature": 0.5, "concentration": 1.0, "prior": (1.0, 2.0, 0.1)}
        return lambda: function(logits, hi, lo, k, training=True, seed=1, **numbers)

    return bound


_LAWS = (
    _law(
        "log_gamma_sample",
        ops.log_gamma_sample,
        lambda alpha: torch._standard_gamma(alpha).log(),
        "torch._standard_gamma, log",
    ),
    Benchmark(
        "standard_gamma_grad",
        lambda logits, k: (lambda alpha, g: lambda: ops.standard_gamma_grad(alpha, g))(
            logits.exp(), torch._standard_gamma(logits.exp())
        ),
        lambda logits, k: (lambda alpha, g: lambda: torch._standard_gamma_grad(alpha, g))(
            logits.exp(), torch._standard_gamma(logits.exp())
        ),
        "torch._standard_gamma_grad",
        suite=(Case(),),
        target=0.2,
    ),
    _law("dirichlet_sample", ops.dirichlet_sample, torch._sample_dirichlet, "torch._sample_dirichlet", 0.25),
    _law_backward("dirichlet_sample_backward", ops.dirichlet_sample, _torch_dirichlet, "torch Dirichlet.rsample", 0.2),
    _law_pair(
        "dirichlet_log_prob",
        lambda alpha, theta: torch.distributions.Dirichlet(alpha, validate_args=False).log_prob(theta),
        "torch Dirichlet.log_prob",
        value=True,
    ),
    _law(
        "dirichlet_entropy",
        ops.dirichlet_entropy,
        lambda alpha: torch.distributions.Dirichlet(alpha, validate_args=False).entropy(),
        "torch Dirichlet.entropy",
    ),
    _law_pair(
        "dirichlet_kl",
        lambda p, q: torch.distributions.kl_divergence(
            torch.distributions.Dirichlet(p, validate_args=False), torch.distributions.Dirichlet(q, validate_args=False)
        ),
        "torch kl_divergence",
        value=False,
    ),
    Benchmark("route_dirmoe", _dirmoe(ops.route_dirmoe), _dirmoe(reference.route_dirmoe), "plain torch"),
    Benchmark(
        "gumbel_top_k",
        forward_only(gumbel.drawn),
        gumbel.multinomial_of_softmax,
        "torch.multinomial, no replacement",
        suite=(Case(),),
        target=0.25,
    ),
    Benchmark(
        "relaxed_top_k",
        forward_only(gumbel.relaxed),
        forward_only(gumbel.relaxed_by_rounds),
        "the rounds in torch operators",
    ),
    Benchmark(
        "relaxed_top_k_backward",
        with_backward(gumbel.relaxed),
        with_backward(gumbel.relaxed_by_rounds),
        "the rounds in torch operators, forward + backward",
        suite=(Case(),),
        target=0.2,
    ),
    Benchmark(
        "plackett_luce_log_prob",
        gumbel.of_a_draw(ops.plackett_luce_log_prob),
        gumbel.of_a_draw(gumbel.log_prob),
        "torch operators",
    ),
    Benchmark(
        "gumbel_sigmoid",
        forward_only(gumbel.sigmoid),
        forward_only(gumbel.relaxed_bernoulli),
        "torch RelaxedBernoulli.rsample",
    ),
)

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in (*_ALL, *_LAWS)}
