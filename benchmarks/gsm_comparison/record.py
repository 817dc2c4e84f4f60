"""Copy what a report needs of a finished comparison, in a compact form that a repository can hold.

``python -m benchmarks.gsm_comparison.record runs/gsm-comparison benchmarks/gsm_comparison/recorded``

The copy has the layout of the original and is read by ``probmoe report`` like it. Left out are weights and tokenizers,
the texts of prompts and outputs (which problems were solved stays), the routing of single layers in training and four
in five lines of its means, the frequencies of tokens where every token has the same number of experts, and the single
decisions but for the first seed.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from probmoe_ext.files import read_json, read_lines, write_text
from probmoe_ext.train.analysis import rounded

WHOLE = ("train_config.json", "summary.json", "cost.json", "done.json", "eval/scores.json")
THINNED = 5
"""Of the routing in training every so-manieth line is kept."""
OF_A_LOG = ("step", "seconds", "loss", "grad_norm", "learning_rate", "step_seconds")


def record(comparison: Path, copy: Path) -> None:
    """Write the compact copy of the finished runs of a comparison; an earlier copy is replaced.

    Args:
        comparison: the folder that ``probmoe compare`` wrote.
        copy: the folder to write.
    """
    shutil.rmtree(copy, ignore_errors=True)
    content = read_json(comparison / "compare.json")
    finished = [run for run in content["runs"] if (comparison / run["folder"] / "done.json").is_file()]
    first = min((run["seed"] for run in finished), default=0)
    for run in finished:
        _copy_run(comparison / run["folder"], copy / run["folder"], decisions=run["seed"] == first)
    _write(copy / "compare.json", {**content, "runs": finished})
    _write(copy / "results.json", read_json(comparison / "results.json"))
    shutil.copyfile(comparison / "results.md", copy / "results.md")
    start = comparison / "start"
    for name in (*WHOLE, "eval-own/scores.json"):
        if (start / name).is_file():
            _write(copy / "start" / name, read_json(start / name))


def _copy_run(run: Path, copy: Path, decisions: bool) -> None:
    for name in WHOLE:
        _write(copy / name, read_json(run / name))
    _write_lines(run / "metrics.jsonl", copy / "metrics.jsonl", _log)
    _write_lines(run / "routing.jsonl", copy / "routing.jsonl", _means, every=THINNED)
    for samples in sorted((run / "eval").glob("samples-*.jsonl")):
        _write_lines(samples, copy / "eval" / samples.name, _mark)
    analysis = read_json(run / "analysis.json")
    same = all(max(layer["cardinality"]) == 1 for layer in analysis["layers"])
    _write(copy / "analysis.json", {**analysis, "tokens": [] if same else analysis["tokens"]})
    if decisions:
        _write(copy / "decisions.json", read_json(run / "decisions.json"))


def _means(line: dict[str, Any]) -> dict[str, Any]:
    return {key: line[key] for key in ("step", "mean")}


def _log(line: dict[str, Any]) -> dict[str, Any] | None:
    return {key: line[key] for key in OF_A_LOG if key in line} if "loss" in line else None


def _mark(line: dict[str, Any]) -> dict[str, Any]:
    marks = {key: {"correct": score["correct"]} for key, score in line["scores"].items() if key.startswith("b")}
    return {"index": line["index"], "scores": marks}


def _write_lines(
    source: Path, target: Path, part: Callable[[dict[str, Any]], dict[str, Any] | None], every: int = 1
) -> None:
    lines = read_lines(source)[every - 1 :: every]
    kept: Iterable[dict[str, Any]] = [one for line in lines if (one := part(line)) is not None]
    target.parent.mkdir(parents=True, exist_ok=True)
    write_text(target, "".join(_compact(line) + "\n" for line in kept))


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, _compact(content) + "\n")


def _compact(content: Any) -> str:
    return json.dumps(rounded(content), separators=(",", ":"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("comparison", type=Path, help="the folder that probmoe compare wrote")
    parser.add_argument("copy", type=Path, help="the folder to write")
    options = parser.parse_args()
    record(options.comparison, options.copy)
