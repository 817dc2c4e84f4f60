"""Two closures timed turn by turn, and where that was done."""

from __future__ import annotations

import itertools
import os
import platform
import re
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import probmoe_ext

from .peers import Run
from .registry import TURN, Benchmark, Case

ROOT = Path(__file__).parents[1]
LEAST_TURNS = 7
LEAST_ROWS = 16384
"""Inputs take turns until there are so many rows: a batch seen again and again is learnt by branch predictors."""


def _timed(run: Run, calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def alternate(ours: Run, peer: Run, seconds: float, turn: float = TURN) -> tuple[list[float], list[float]]:
    """Seconds a call, in turns of `turn` seconds, so that a slow moment of the machine hits both; 7 turns at least."""
    calls = []
    for run in (ours, peer):
        run()
        calls.append(max(1, int(turn / min(_timed(run, 1) for _ in range(2)))))
    times: tuple[list[float], list[float]] = ([], [])
    end = time.perf_counter() + seconds
    while len(times[0]) < LEAST_TURNS or time.perf_counter() < end:
        for run, count, record in zip((ours, peer), calls, times, strict=True):
            record.append(_timed(run, count))
    return times


def summary(times: list[float], rows: int) -> dict[str, float]:
    """Median and percentiles, in microseconds a row."""
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return {
        "median_us_per_row": statistics.median(times) / rows * 1e6,
        "p20": cuts[1] / rows * 1e6,
        "p80": cuts[7] / rows * 1e6,
    }


def _batches(rows: int) -> int:
    return max(1, min(32, LEAST_ROWS // rows))


def _in_turn(runs: list[Run]) -> Run:
    turns = itertools.cycle(runs)
    return lambda: next(turns)()


def measure(benchmark: Benchmark, case: Case, seconds: float) -> dict[str, Any]:
    """One line of the results: the case, both summaries, the ratio of the medians, and whether it meets the target."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        batches = [torch.randn(case.rows, case.experts) * case.spread for _ in range(_batches(case.rows))]
        ours, peer = ([make(logits, case.k) for logits in batches] for make in (benchmark.ours, benchmark.peer))
        times = alternate(_in_turn(ours), _in_turn(peer), seconds, benchmark.turn)
    finally:
        torch.set_num_threads(threads)
    mine, theirs = (summary(t, case.rows) for t in times)
    ratio = mine["median_us_per_row"] / theirs["median_us_per_row"]
    return {
        "name": benchmark.name,
        "T": case.rows,
        "E": case.experts,
        "k": case.k if isinstance(case.k, int) else list(case.k),
        "spread": case.spread,
        "threads": case.threads,
        "turns": len(times[0]),
        "ours": mine,
        "peer": theirs,
        "peer_name": benchmark.peer_name,
        "ratio": ratio,
        "target": benchmark.target,
        "reached": None if benchmark.target is None else ratio <= benchmark.target,
    }


def processor() -> str:
    """The CPU's model, as the system names it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = re.findall(r"model name\s*:\s*(.+)", cpuinfo.read_text())
        if names:
            return names[0].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Everything that a figure depends on."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "probmoe_ext", "csrc", "benchmarks")
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": git("rev-parse", "--short", "HEAD") + ("+changes" if changed else ""),
        **probmoe_ext.build_info(),
    }


def folder(of: dict[str, Any]) -> Path:
    """Where the results of a machine lie: one folder for each processor and instruction set."""
    words = re.sub(r"\W+", "-", f"{of['processor']} {of['instruction_set']}".lower()).strip("-")
    return ROOT / "benchmarks" / "results" / words
