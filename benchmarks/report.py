"""Results in words, tables and pictures: ``python -m benchmarks.report results.json [page.md ...]``.

A page gets the table between ``<!-- benchmarks: summary -->`` (one line for each target) or
``<!-- benchmarks: all -->`` (every line) and ``<!-- benchmarks: end -->``; what stands outside the markers stays.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from .measure import ROOT

PAGE = ROOT / "docs" / "benchmarks.md"
BETWEEN = re.compile(r"(<!-- benchmarks: (summary|all) -->\n).*?(<!-- benchmarks: end -->)", re.DOTALL)
HEADER = f"{'benchmark':<40}{'T':>6}{'E':>5}{'k':>5}{'spread':>7}{'threads':>8}{'us/row':>10}{'peer':>10}{'ratio':>9}"

Result = dict[str, Any]


def size(result: Result) -> str:
    """k, or the band."""
    return str(result["k"]) if isinstance(result["k"], int) else "–".join(map(str, result["k"]))


def verdict(result: Result) -> str:
    """The target and whether the ratio meets it; empty without one."""
    if result["target"] is None:
        return ""
    return f"≤ {result['target']:.3g} {'pass' if result['reached'] else 'FAIL'}"


def line(result: Result) -> str:
    """One result for the terminal."""
    return (
        f"{result['name']:<40}{result['T']:>6}{result['E']:>5}{size(result):>5}{result['spread']:>7g}"
        f"{result['threads']:>8}{result['ours']['median_us_per_row']:>10.4f}"
        f"{result['peer']['median_us_per_row']:>10.4f}{result['ratio']:>9.4f}  {verdict(result)}"
    )


def provenance(document: dict[str, Any]) -> str:
    """What produced the figures."""
    of = document["machine"]
    return (
        f"{of['processor']} ({of['instruction_set']}, {of['cores']} cores), torch {of['torch']}, "
        f"commit {of['commit']}, float32, tests {document['tests']}, load {of['load']}; `python -m benchmarks.run`."
    )


def summary_table(document: dict[str, Any]) -> str:
    """For each benchmark with a target: the range of its ratios, where the worst is, how many cases meet the target."""
    rows = ["| operator | against | ratio | worst at | target | reached |", "|---|---|---|---|---|---|"]
    named: dict[str, list[Result]] = {}
    for result in document["results"]:
        if result["target"] is not None:
            named.setdefault(result["name"], []).append(result)
    for name, results in named.items():
        best, worst = (f(results, key=lambda r: r["ratio"]) for f in (min, max))
        span = f"{best['ratio']:.3g}" if len(results) == 1 else f"{best['ratio']:.3g} – {worst['ratio']:.3g}"
        where = f"T = {worst['T']}, (E, k) = ({worst['E']}, {size(worst)}), {threads(worst)}"
        reached = sum(r["reached"] for r in results)
        rows.append(
            f"| `{name}` | {worst['peer_name']} | {span} | {where} | ≤ {worst['target']:.3g} "
            f"| {reached} of {len(results)} |"
        )
    return "\n".join(rows)


def threads(result: Result) -> str:
    """In words."""
    return "1 thread" if result["threads"] == 1 else f"{result['threads']} threads"


def full_table(document: dict[str, Any]) -> str:
    """Every result, with the 20th and 80th percentiles."""
    rows = [
        "| operator | T | E | k | spread | threads | µs a row | peer, µs a row | peer | ratio | target |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in document["results"]:
        ours, peer = (f"{s['median_us_per_row']:.3g} ({s['p20']:.3g}–{s['p80']:.3g})" for s in (r["ours"], r["peer"]))
        rows.append(
            f"| `{r['name']}` | {r['T']} | {r['E']} | {size(r)} | {r['spread']:g} | {r['threads']} | {ours} | {peer} "
            f"| {r['peer_name']} | {r['ratio']:.3g} | {verdict(r)} |"
        )
    return "\n".join(rows)


def write_between_markers(page: Path, document: dict[str, Any]) -> int:
    """Replaces the tables of a page by those of ``document``; how many there were."""
    tables = {"summary": summary_table, "all": full_table}

    def table(found: re.Match[str]) -> str:
        return f"{found[1]}{provenance(document)}\n\n{tables[found[2]](document)}\n{found[3]}"

    text, count = BETWEEN.subn(table, page.read_text())
    if count:
        page.write_text(text)
    return count


def publish(document: dict[str, Any], results: Path) -> None:
    """The plot beside the results, if matplotlib is there, and the tables of ``docs/benchmarks.md`` and the README."""
    try:
        from . import plot
    except ModuleNotFoundError as missing:
        print(
            f"benchmarks: no plot, {missing.name} is not installed (pip install 'probmoe_ext[test]')", file=sys.stderr
        )
    else:
        plot.cost(document, results.parent / "cost.svg")
    for page in (PAGE, ROOT / "README.md"):
        write_between_markers(page, document)


def main(argv: list[str]) -> int:
    """Prints the summary of a results file, or writes it into the pages given."""
    if not argv:
        print(__doc__, file=sys.stderr)
        return 2
    document = json.loads(Path(argv[0]).read_text())
    if len(argv) == 1:
        print(provenance(document), summary_table(document), sep="\n\n")
    for page in argv[1:]:
        if not write_between_markers(Path(page), document):
            print(f"{page} has no '<!-- benchmarks: summary|all -->' ... '<!-- benchmarks: end -->'", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
