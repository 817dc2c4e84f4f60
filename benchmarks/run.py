"""Times the operators against their peers: ``python -m benchmarks.run [names] --rows 4096 --shapes 64,8``.

The operators' tests run first; nothing is timed on red tests. Ours and the peer take turns, so that a slow moment of
the machine hits both; reported are medians, the 20th and 80th percentiles, and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import probmoe_ext

from .registry import BENCHMARKS, Run

ROOT = Path(__file__).parents[1]


def alternate(ours: Run, peer: Run, seconds: float) -> tuple[list[float], list[float]]:
    """Times in seconds of as many turns as fit, at least 15."""
    for _ in range(3):
        ours()
        peer()
    mine: list[float] = []
    theirs: list[float] = []
    end = time.perf_counter() + seconds
    while len(mine) < 15 or time.perf_counter() < end:
        for run, times in ((ours, mine), (peer, theirs)):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return mine, theirs


def percentiles(times: list[float], rows: int) -> dict[str, float]:
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return {
        "median_us_per_row": statistics.median(times) / rows * 1e6,
        "p20": cuts[1] / rows * 1e6,
        "p80": cuts[7] / rows * 1e6,
    }


def machine() -> dict[str, object]:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "processor": model,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip(),
        **probmoe_ext.build_info(),
    }


def main(argv: list[str] | None = None) -> int:
    """Runs the selected benchmarks and prints one line each."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(BENCHMARKS)}; all when none is given")
    parser.add_argument("--rows", default="4096", help="numbers of rows T, comma-separated (default: 4096)")
    parser.add_argument("--shapes", default="64,8", help="E,k pairs, semicolon-separated (default: 64,8)")
    parser.add_argument("--spread", type=float, default=1.0, help="standard deviation of the logits (default: 1)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each line (default: 1)")
    parser.add_argument("--no-tests", action="store_true", help="trust the operators without running their tests")
    parser.add_argument("--json", type=Path, help="also write the results there")
    options = parser.parse_args(argv)
    unknown = set(options.names) - set(BENCHMARKS)
    if unknown:
        parser.error(f"unknown benchmark {sorted(unknown)}; known: {', '.join(BENCHMARKS)}")
    chosen = [BENCHMARKS[name] for name in options.names or BENCHMARKS]
    if not options.no_tests:
        tests = sorted({test for benchmark in chosen for test in benchmark.tests})
        if subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=ROOT).returncode != 0:
            print("benchmarks: the tests are red, nothing is timed", file=sys.stderr)
            return 1
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    results = []
    print(f"{'operator':<24}{'T':>7}{'E':>5}{'k':>4}{'us/row':>10}{'peer us/row':>13}{'ratio':>8}  peer")
    for rows in map(int, options.rows.split(",")):
        for shape in options.shapes.split(";"):
            experts, k = map(int, shape.split(","))
            logits = torch.randn(rows, experts) * options.spread
            for benchmark in chosen:
                times = alternate(benchmark.ours(logits, k), benchmark.peer(logits, k), options.seconds)
                ours, peer = (percentiles(t, rows) for t in times)
                ratio = ours["median_us_per_row"] / peer["median_us_per_row"]
                print(
                    f"{benchmark.name:<24}{rows:>7}{experts:>5}{k:>4}{ours['median_us_per_row']:>10.4f}"
                    f"{peer['median_us_per_row']:>13.4f}{ratio:>8.3f}  {benchmark.peer_name}"
                )
                results.append(
                    {
                        "name": benchmark.name,
                        "T": rows,
                        "E": experts,
                        "k": k,
                        "spread": options.spread,
                        "ours": ours,
                        "peer": peer,
                        "peer_name": benchmark.peer_name,
                        "ratio": ratio,
                    }
                )
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
