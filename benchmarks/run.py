"""Times the operators against their peers: ``python -m benchmarks.run 'route_*' --rows 512 --shapes "64,8;64,6-8"``.

The operators' tests run first; nothing is timed on red tests. Ours and the peer take turns; reported are medians, the
20th and 80th percentiles, and the ratio of the medians, beside the target where there is one. Without --rows, --shapes,
--spreads or --threads each benchmark runs at the sizes that it names itself.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any

from . import report
from .measure import ROOT, folder, machine, measure
from .peers import Size
from .registry import BENCHMARKS, Benchmark, Case


def size_of(text: str) -> Size:
    """``"8"`` or the band ``"6-8"``."""
    ends = [int(part) for part in text.split("-")]
    return ends[0] if len(ends) == 1 else (ends[0], ends[1])


def shapes_of(text: str) -> list[tuple[int, Size]]:
    """``"64,8;64,6-8"`` as pairs of E and k."""
    pairs = [pair.split(",") for pair in text.split(";")]
    return [(int(experts), size_of(k)) for experts, k in pairs]


def numbers(kind: type) -> Any:
    """A parser of comma-separated numbers."""

    def parse(text: str) -> list[Any]:
        return [kind(part) for part in text.split(",")]

    parse.__name__ = f"list of {kind.__name__}"
    return parse


def cases_of(benchmark: Benchmark, options: argparse.Namespace) -> list[Case]:
    """The product of the sizes asked for, or the benchmark's own."""
    asked = (options.rows, options.shapes, options.spreads, options.threads)
    if all(axis is None for axis in asked):
        return list(benchmark.suite)
    axes = [axis or default for axis, default in zip(asked, ([4096], [(64, 8)], [1.0], [1]), strict=True)]
    return [Case(rows, experts, k, spread, threads) for rows, (experts, k), spread, threads in product(*axes)]


def chosen(patterns: list[str], parser: argparse.ArgumentParser) -> list[Benchmark]:
    """The benchmarks of the given names, in the registry's order."""
    unknown = [p for p in patterns if not any(fnmatch(name, p) for name in BENCHMARKS)]
    if unknown:
        parser.error(f"unknown benchmark {', '.join(unknown)}; known: {', '.join(BENCHMARKS)}")
    return [b for name, b in BENCHMARKS.items() if not patterns or any(fnmatch(name, p) for p in patterns)]


def main(argv: list[str] | None = None) -> int:
    """Runs the selected benchmarks and prints one line each; 1 if the tests are red."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("names", nargs="*", help="names or patterns such as 'route_*'; all when none is given")
    parser.add_argument("--list", action="store_true", help="name the benchmarks and their peers, time nothing")
    parser.add_argument("--rows", type=numbers(int), help="numbers of rows T, comma-separated")
    parser.add_argument("--shapes", type=shapes_of, help="E,k pairs, semicolon-separated; k may be a band (64,6-8)")
    parser.add_argument("--spreads", type=numbers(float), help="standard deviations of the logits, comma-separated")
    parser.add_argument("--threads", type=numbers(int), help="numbers of threads, comma-separated")
    parser.add_argument("--seconds", type=float, default=0.6, help="time for each line (default: 0.6)")
    parser.add_argument("--no-tests", action="store_true", help="trust the operators without running their tests")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument(
        "--record", action="store_true", help="write results, plot and table of this machine into the repository"
    )
    options = parser.parse_args(argv)
    benchmarks = chosen(options.names, parser)
    if options.list:
        for benchmark in benchmarks:
            print(f"{benchmark.name:<40}against {benchmark.peer_name}")
        return 0
    if not options.no_tests:
        tests = sorted({test for benchmark in benchmarks for test in benchmark.tests})
        if subprocess.run([sys.executable, "-m", "pytest", "-q", *tests], cwd=ROOT).returncode != 0:
            print("benchmarks: the tests are red, nothing is timed", file=sys.stderr)
            return 1
    here = machine()
    results = []
    print(report.HEADER)
    for benchmark in benchmarks:
        for case in cases_of(benchmark, options):
            results.append(measure(benchmark, case, options.seconds))
            print(report.line(results[-1]), flush=True)
    document = {"machine": here, "tests": "not run" if options.no_tests else "green", "results": results}
    path = options.json or (folder(here) / f"{here['commit']}.json" if options.record else None)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=1) + "\n")
    if options.record:
        report.publish(document, path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
