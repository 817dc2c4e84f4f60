"""Times the operators on a GPU: ``python -m benchmarks.gpu --json benchmarks/results/NAME.json``.

Each case runs turn by turn with its peer in one process: eagerly, and as replays of a CUDA graph, between CUDA events;
reported are medians and the ratio of medians, beside what is wanted of them. Without a GPU (``--device cpu``) the same
code runs at whatever size is asked for, timed by the clock: a check of the program, not of the kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probmoe_ext import ops

from . import gumbel
from .measure import machine

Run = Callable[[], object]
Band = int | tuple[int, int]


@dataclass(frozen=True)
class Case:
    """What is timed against what, and the largest ratio that is wanted (None: only recorded)."""

    name: str
    ours: Run
    peer: Run
    peer_name: str
    target: float | None = None
    microseconds: float | None = None  # of ours, as graph replays


# ---- routing --------------------------------------------------------------------------------------------------------


def _backward(forward: Callable[[Tensor], Tensor], logits: Tensor) -> Run:
    leaf = logits.clone().requires_grad_()
    upstream = torch.randn_like(forward(leaf))
    return lambda: torch.autograd.grad(forward(leaf), leaf, upstream)


def routing_cases(rows: int, device: torch.device) -> list[Case]:
    """The operators against softmax + topk, bfloat16 logits."""

    def logits_of(experts: int) -> Tensor:
        return torch.randn(rows, experts, device=device).bfloat16()

    def conventional(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
        return torch.topk(torch.softmax(logits, -1), k, -1)

    def probmoe(logits: Tensor, k: Band) -> tuple[Tensor, Tensor]:
        return ops.route_probmoe(logits, k, training=True, seed=seed)

    seed = torch.tensor(1, device=device)
    small, large = logits_of(64), logits_of(256)
    plain = "softmax + topk"
    both = f"{plain}, forward + backward"
    leaf, (weights, indices) = small.clone(), probmoe(small, 8)
    backward = torch.ops.probmoe_ext.route_probmoe_backward
    return [
        Case("route_probmoe", lambda: probmoe(small, 8), lambda: conventional(small, 8), plain, 1.0, 12.0),
        Case(
            "route_probmoe_backward",
            lambda: backward(weights, leaf, indices, 8, 8, False, True),
            lambda: conventional(small, 8),
            f"{plain} forward",
            None,
            15.0,
        ),
        Case(
            "route_probmoe, forward + backward",
            _backward(lambda x: probmoe(x, 8)[0], small),
            _backward(lambda x: conventional(x, 8)[0], small),
            both,
            1.0,
        ),
        Case("route_top_k", lambda: ops.route_top_k(small, 8), lambda: conventional(small, 8), plain, 0.3),
        Case(
            "route_probmoe [6, 8], forward + backward",
            _backward(lambda x: probmoe(x, (6, 8))[0], small),
            _backward(lambda x: probmoe(x, 8)[0], small),
            "route_probmoe 8, forward + backward",
            1.3,
        ),
        Case(
            "route_probmoe E = 256, forward + backward",
            _backward(lambda x: probmoe(x, 8)[0], large),
            _backward(lambda x: probmoe(x, 8)[0], small),
            "route_probmoe E = 64, forward + backward",
            5.0,
        ),
        Case("subset_marginals", lambda: ops.subset_marginals(small, 8), lambda: torch.softmax(small, -1), "softmax"),
        Case(
            "subset_log_partition",
            lambda: ops.subset_log_partition(small, 8),
            lambda: torch.logsumexp(small, -1),
            "logsumexp",
        ),
        Case("subset_entropy", lambda: ops.subset_entropy(small, 8), lambda: torch.softmax(small, -1), "softmax"),
    ]


# ---- the Gumbel family ----------------------------------------------------------------------------------------------


def gumbel_cases(rows: int, device: torch.device) -> list[Case]:
    """Ordered draws, their law and their relaxations against the same in torch operators, bfloat16 logits."""
    logits, seed = torch.randn(rows, 64, device=device).bfloat16(), torch.tensor(1, device=device)
    temperature = gumbel.TEMPERATURE
    order, _ = ops.gumbel_top_k(logits, 8, seed=seed)
    keys, upstream = torch.randn(rows, 64, device=device), torch.randn_like(logits)
    backward = torch.ops.probmoe_ext.relaxed_top_k_backward

    def draw() -> object:
        return torch.topk(logits.float() - torch.empty_like(logits, dtype=torch.float32).exponential_().log(), 8, -1)

    def gates() -> object:
        noise = torch.empty_like(logits, dtype=torch.float32).uniform_(1e-7, 1 - 1e-7).logit()
        return torch.sigmoid((logits.float() + noise) / temperature).to(logits.dtype)

    def rounds(x: Tensor) -> Tensor:
        return gumbel.relaxed_by_rounds(x.float(), 8)

    def relaxed(x: Tensor) -> Tensor:
        return ops.relaxed_top_k(x, 8, temperature, seed=seed)

    by_rounds = "the rounds in torch operators"
    return [
        Case("gumbel_top_k", lambda: ops.gumbel_top_k(logits, 8, seed=seed), draw, "noise + topk"),
        Case(
            "plackett_luce_log_prob, forward + backward",
            _backward(lambda x: ops.plackett_luce_log_prob(x, order), logits),
            _backward(lambda x: gumbel.log_prob(x.float(), order), logits),
            "gather + logcumsumexp, forward + backward",
        ),
        Case("relaxed_top_k", lambda: relaxed(logits), lambda: rounds(logits), by_rounds),
        Case(
            "relaxed_top_k_backward",
            lambda: backward(upstream, keys, 8, temperature),
            lambda: rounds(logits),
            f"{by_rounds}, forward",
        ),
        Case(
            "relaxed_top_k, forward + backward",
            _backward(relaxed, logits),
            _backward(rounds, logits),
            f"{by_rounds}, forward + backward",
            0.2,
        ),
        Case("gumbel_sigmoid", lambda: ops.gumbel_sigmoid(logits, temperature, seed=seed), gates, "noise + sigmoid"),
    ]


# ---- the Gamma and Dirichlet family, DirMoE -------------------------------------------------------------------------


def law_cases(rows: int, device: torch.device) -> list[Case]:
    """The Gamma and Dirichlet family against torch's, float32; DirMoE against conventional routing, bfloat16 logits."""
    alpha, other = (torch.rand(rows, 64, device=device) * 2 + 0.1 for _ in range(2))
    logits = torch.randn(rows, 64, device=device).bfloat16()
    heads = torch.full((rows, 1), 2.0, device=device), torch.full((rows, 1), 0.25, device=device)
    seed = torch.tensor(1, device=device)

    def draw(concentration: Tensor) -> Tensor:
        return ops.dirichlet_sample(concentration, seed)

    def torch_draw(concentration: Tensor) -> Tensor:
        return torch.distributions.Dirichlet(concentration, validate_args=False).rsample()

    def torch_kl() -> Tensor:
        p, q = (torch.distributions.Dirichlet(c, validate_args=False) for c in (alpha, other))
        return torch.distributions.kl_divergence(p, q)

    def dirmoe(x: Tensor) -> Tensor:
        numbers: dict[str, Any] = {"temperature": 0.5, "concentration": 2.0, "prior": (1.5, 2.0, 0.25)}
        return ops.route_dirmoe(x, *heads, 8, training=True, seed=seed, **numbers)[0]

    def conventional(x: Tensor) -> Tensor:
        return torch.topk(torch.softmax(x, -1), 8, -1).values

    return [
        Case(
            "log_gamma_sample", lambda: ops.log_gamma_sample(alpha, seed), lambda: torch._standard_gamma(alpha), "torch"
        ),
        Case(
            "standard_gamma_grad",
            lambda: ops.standard_gamma_grad(alpha, other),
            lambda: torch._standard_gamma_grad(alpha, other),
            "torch",
        ),
        Case("dirichlet_sample", lambda: draw(alpha), lambda: torch_draw(alpha), "torch", 1.0),
        Case(
            "dirichlet_sample, forward + backward",
            _backward(draw, alpha),
            _backward(torch_draw, alpha),
            "torch, forward + backward",
            1.0,
        ),
        Case("dirichlet_kl", lambda: ops.dirichlet_kl(alpha, other), torch_kl, "torch"),
        Case("route_dirmoe", lambda: dirmoe(logits), lambda: conventional(logits), "softmax + topk"),
        Case(
            "route_dirmoe, forward + backward",
            _backward(dirmoe, logits),
            _backward(conventional, logits),
            "softmax + topk, forward + backward",
        ),
    ]


def cases_of(rows: int, device: torch.device) -> list[Case]:
    """All operators'."""
    return [*routing_cases(rows, device), *gumbel_cases(rows, device), *law_cases(rows, device)]


# ---- a whole layer --------------------------------------------------------------------------------------------------


def _grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Rows of x, sorted by expert, times that expert's matrix ``[in, out]``; ``ends`` as cumulative counts."""
    if x.is_cuda:
        return F.grouped_mm(x, weight, offs=ends.int())
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([part @ w for part, w in zip(x.split(counts), weight, strict=True)])


class Layer(nn.Module):
    """An OLMoE layer: a linear gate, a router, and SwiGLU experts over rows sorted by expert."""

    def __init__(
        self, hidden: int, width: int, experts: int, router: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(experts, hidden) / hidden**0.5)
        self.up = nn.Parameter(torch.randn(experts, hidden, 2 * width) / hidden**0.5)
        self.down = nn.Parameter(torch.randn(experts, width, hidden) / width**0.5)
        self.router = router

    def forward(self, x: Tensor) -> Tensor:
        """``[T, hidden]`` to the same."""
        experts = len(self.gate)
        weights, indices = self.router(x @ self.gate.t())
        slots = indices.flatten()
        order = torch.argsort(slots, stable=True)
        counts = torch.bincount(slots, minlength=experts + 1)[: experts + 1]
        if self.router.dynamic:  # type: ignore[attr-defined]
            order = order[: len(slots) - int(counts[experts])]  # unused slots carry index E, and come last
        ends = counts[:experts].cumsum(0)
        token = order // indices.shape[-1]
        gated, linear = _grouped(x[token], self.up, ends).chunk(2, -1)
        out = _grouped(F.silu(gated) * linear, self.down, ends) * weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add(0, token, out)


def _router(name: str, k: Band) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def route(logits: Tensor) -> tuple[Tensor, Tensor]:
        if name == "conventional":
            weights, indices = torch.topk(torch.softmax(logits.float(), -1), int(k), -1)  # type: ignore[arg-type]
            return weights.to(logits.dtype), indices
        # 64 random logits about 0 would all but fill the band: less 2.6, its three sizes are about as likely.
        return ops.route_probmoe(logits if isinstance(k, int) else logits - 2.6, k, training=True)

    route.dynamic = not isinstance(k, int)  # type: ignore[attr-defined]
    return route


def layer_results(rows: int, hidden: int, width: int, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """Forward + backward of a layer with each router: time, peak memory, mean active experts."""
    torch.manual_seed(0)
    x = torch.randn(rows, hidden, device=device).bfloat16().requires_grad_()
    upstream = torch.randn_like(x)
    layers = {}
    for name, router in {
        "conventional": _router("conventional", 8),
        "ProbMoE 8": _router("probmoe", 8),
        "ProbMoE [6, 8]": _router("probmoe", (6, 8)),
    }.items():
        torch.manual_seed(1)
        layers[name] = Layer(hidden, width, 64, router).to(device, torch.bfloat16)

    def run_of(layer: Layer) -> Run:
        return lambda: torch.autograd.grad(layer(x), [x, *layer.parameters()], upstream)

    runs = {name: run_of(layer) for name, layer in layers.items()}
    times = turns(list(runs.values()), seconds, device)
    results = []
    for (name, run), spent in zip(runs.items(), times, strict=True):
        peak = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            run()
            peak = torch.cuda.max_memory_allocated(device)
        with torch.no_grad():
            _, indices = layers[name].router(x @ layers[name].gate.t())
        active = float((indices < 64).sum(-1).float().mean())
        results.append({"router": name, "ms": statistics.median(spent) / 1e3, "peak_bytes": peak, "active": active})
    base = results[0]
    for result in results:
        result["time_ratio"] = result["ms"] / base["ms"]
        result["memory_ratio"] = result["peak_bytes"] / base["peak_bytes"] if base["peak_bytes"] else None
    # Dynamic k: the share of the experts' work that is saved must show in the time, by at least 60%.
    targets = [1.0, 1.01, 1 - 0.6 * (1 - results[2]["active"] / 8)]
    for result, target in zip(results, targets, strict=True):
        result["target"] = target
    return results


# ---- timing ---------------------------------------------------------------------------------------------------------


def elapsed(run: Run, repeats: int, device: torch.device) -> float:
    """Microseconds for one of `repeats` runs in a row."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats * 1e6
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats * 1e3


def turns(runs: list[Run], seconds: float, device: torch.device, repeats: int = 1) -> list[list[float]]:
    """Microseconds of each, turn by turn, at least ten turns."""
    for run in runs:
        for _ in range(3):
            run()
    times: list[list[float]] = [[] for _ in runs]
    end = time.perf_counter() + seconds
    while len(times[0]) < 10 or time.perf_counter() < end:
        for run, spent in zip(runs, times, strict=True):
            spent.append(elapsed(run, repeats, device))
    return times


def graphed(run: Run, device: torch.device) -> Run:
    """A replay of ten runs in one CUDA graph: the launch of the graph itself is shared by ten."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            run()
    return graph.replay


def operator_results(rows: int, device: torch.device, seconds: float) -> list[dict[str, Any]]:
    """One line a case and way of running."""
    results = []
    for case in cases_of(rows, device):
        ways = {"eager": ((case.ours, case.peer), 1)}
        if device.type == "cuda":
            ways["graph"] = ((graphed(case.ours, device), graphed(case.peer, device)), 10)
        for way, (runs, inside) in ways.items():
            ours, peer = (statistics.median(t) / inside for t in turns(list(runs), seconds, device, 20))
            wanted = case.microseconds if way == "graph" else None
            results.append(
                {
                    "name": case.name,
                    "way": way,
                    "T": rows,
                    "us": ours,
                    "peer_us": peer,
                    "peer": case.peer_name,
                    "ratio": ours / peer,
                    "target": case.target,
                    "target_us": wanted,
                    "met": (case.target is None or ours / peer <= case.target) and (wanted is None or ours <= wanted),
                }
            )
    return results


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| what | how | µs | peer | peer µs | ratio | target |", "|---|---|---|---|---|---|---|"]
    for r in results["operators"]:
        limits = [f"≤ {r['target']}×" if r["target"] else "", f"≤ {r['target_us']} µs" if r["target_us"] else ""]
        wanted = ", ".join(filter(None, limits)) + ("" if r["met"] else " **missed**")
        cells = (
            f"`{r['name']}`",
            r["way"],
            f"{r['us']:.2f}",
            r["peer"],
            f"{r['peer_us']:.2f}",
            f"{r['ratio']:.3f}",
            wanted,
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| layer | ms | time | memory | active experts | target |", "|---|---|---|---|---|---|"]
    for r in results["layer"]:
        memory = f"{r['memory_ratio']:.3f}" if r["memory_ratio"] else "–"
        cells = (
            r["router"],
            f"{r['ms']:.3f}",
            f"{r['time_ratio']:.3f}",
            memory,
            f"{r['active']:.2f}",
            f"≤ {r['target']:.3f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs everything, prints the table and writes the JSON beside it as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the program out (default: cuda)")
    parser.add_argument("--rows", type=int, default=16384, help="rows T (default: 16384)")
    parser.add_argument("--hidden", type=int, default=2048, help="hidden size of the layer (default: 2048)")
    parser.add_argument("--width", type=int, default=1024, help="width of an expert (default: 1024)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each line (default: 1)")
    parser.add_argument("--only", help="run this one case ten times and time nothing: for a profiler")
    parser.add_argument("--json", type=Path, help="write the results there, and the table beside it")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu tries the program out")
    torch.manual_seed(0)
    if options.only:
        cases = {case.name: case for case in cases_of(options.rows, device)}
        if options.only not in cases:
            parser.error(f"--only must be one of {', '.join(cases)}, not {options.only!r}")
        for _ in range(10):
            cases[options.only].ours()
        return 0
    results: dict[str, Any] = {"machine": machine()}
    if device.type == "cuda":
        results["machine"]["device"] = torch.cuda.get_device_name(device)
    results["operators"] = operator_results(options.rows, device, options.seconds)
    results["layer"] = layer_results(options.rows, options.hidden, options.width, device, options.seconds)
    print(table(results))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
        options.json.with_suffix(".md").write_text(table(results) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
