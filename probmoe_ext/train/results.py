"""What came of a comparison: means with intervals over the seeds and paired differences, from the files of its runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from probmoe_ext.files import read_json
from probmoe_ext.train.comparison import Comparison, Run
from probmoe_ext.train.crossed_bootstrap import crossed_bootstrap
from probmoe_ext.train.run import ANALYSIS_FILE, COST_FILE, is_done, samples_of
from probmoe_ext.train.scoring import SCORERS
from probmoe_ext.train.significance import LEVEL, Interval, mean_interval
from probmoe_ext.train.tables import markdown_table

BASELINE = "topk"
MAIN = ("b.exact_match", "a.strict_match", "c.numeric")
"""The score that is compared: the first of these that was asked for."""
OF_LAYERS = ("entropy", "mass", "experts_99")


def results_of(comparison: Comparison) -> dict[str, Any]:
    """The numbers of all finished runs.

    Returns:
        ``score`` (the compared one), ``baseline`` (label of the first top-k router, or None), ``routers``: for each its
        ``seeds``, ``scores`` and ``measures`` as means with Student's 95 % interval over the seeds; ``pairs``: for each
        two routers the difference of the score on the same problems under the same seeds, bootstrapped over seeds and
        problems (`crossed_bootstrap`), and, ``by_seed``, Student's interval of the differences of the seeds.
    """
    finished = [run for run in comparison.runs() if is_done(run)]
    labels = [one.label for one in comparison.contestants]
    by_label = {label: [run for run in finished if run.contestant.label == label] for label in labels}
    score = next(key for key in (*MAIN, *SCORERS) if key[0] in comparison.evaluation.protocols)
    correct = {label: {run.train.seed: _correct(run, score) for run in runs} for label, runs in by_label.items()}
    baselines = [one.label for one in comparison.contestants if one.train.router == BASELINE]
    start = None if comparison.start is None else read_json(comparison.start.folder / "eval" / "scores.json")
    return {
        "name": comparison.name,
        "level": LEVEL,
        "score": score,
        "baseline": baselines[0] if baselines else None,
        "start": None if start is None else {key: one["value"] for key, one in start["scores"].items()},
        "routers": [
            {"label": one.label, "title": one.title, **_measured(by_label[one.label])} for one in comparison.contestants
        ],
        "pairs": [
            {"a": a, "b": b, **found}
            for a in labels
            for b in labels
            if a != b and (found := _difference(correct[a], correct[b])) is not None
        ],
    }


def _measured(runs: Sequence[Run]) -> dict[str, Any]:
    scores: dict[str, list[float]] = {}
    measures: dict[str, list[float]] = {}
    for run in runs:
        evaluated = read_json(run.folder / "eval" / "scores.json")
        for key, one in evaluated["scores"].items():
            scores.setdefault(key, []).append(one["value"])
        for key, value in _measures(run.folder, evaluated, run).items():
            if value is not None:
                measures.setdefault(key, []).append(float(value))
    return {
        "seeds": [run.train.seed for run in runs],
        "scores": {key: _interval(values) for key, values in scores.items()},
        "measures": {key: _interval(values) for key, values in measures.items()},
    }


def _measures(folder: Path, evaluated: dict[str, Any], run: Run) -> dict[str, float | None]:
    analysis, cost = read_json(folder / ANALYSIS_FILE) or {}, read_json(folder / COST_FILE) or {}
    layers = analysis.get("layers", [])
    found = {"loss": evaluated["statistics"]["loss"]}
    found.update({key: analysis.get(key) for key in ("mean_k", "load_entropy", "dead_experts")})
    found.update({key: sum(one[key] for one in layers) / len(layers) for key in OF_LAYERS if layers})
    largest = max((len(one["cardinality"]) - 1 for one in layers), default=None)
    k = run.train.k
    allowed = k if isinstance(k, int) else k[1] if k else largest
    found["share_of_k"] = None if not (layers and allowed) else analysis["mean_k"] / allowed
    found.update({key: cost.get(key) for key in ("step_seconds", "tokens_per_second", "wall_seconds")})
    found.update({key: cost.get(key) for key in ("peak_memory_bytes", "evaluation_tokens_per_second")})
    return found


def _interval(values: Sequence[float]) -> dict[str, Any]:
    return {**dataclasses.asdict(mean_interval(values)), "values": list(values)}


def _correct(run: Run, score: str) -> list[float]:
    return [float(sample["scores"][score]["correct"]) for sample in samples_of(run.folder, score)]


def _difference(a: dict[int, list[float]], b: dict[int, list[float]]) -> dict[str, Any] | None:
    """The difference of two routers over the seeds that both have."""
    shared = [seed for seed in a if seed in b]
    if not shared:
        return None
    found = crossed_bootstrap([a[seed] for seed in shared], [b[seed] for seed in shared])
    by_seed = [sum(a[seed]) / len(a[seed]) - sum(b[seed]) / len(b[seed]) for seed in shared]
    return {**dataclasses.asdict(found), "seeds": len(shared), "by_seed": dataclasses.asdict(mean_interval(by_seed))}


def results_text(found: dict[str, Any]) -> str:
    """The results as Markdown tables."""
    done = [one for one in found["routers"] if one["seeds"]]
    if not done:
        return "no run is finished"
    keys = [key for key in SCORERS if key in done[0]["scores"]]
    scores = [
        [
            one["title"],
            str(len(one["seeds"])),
            *(_percent(one["scores"][key]) for key in keys),
            _pm(one["measures"].get("loss"), 4),
        ]
        for one in done
    ]
    routing = [
        [
            one["title"],
            _pm(one["measures"].get("mean_k"), 2),
            _percent(one["measures"].get("share_of_k"), 0),
            *(_pm(one["measures"].get(key), digits) for key, digits in (("load_entropy", 3), ("dead_experts", 1))),
            *(_pm(one["measures"].get(key), digits) for key, digits in zip(OF_LAYERS, (2, 3, 2), strict=True)),
        ]
        for one in done
    ]
    start = f" Before fine-tuning: {100 * found['start'][found['score']]:.1f} %." if found["start"] else ""
    parts = [
        f"# {found['name']}",
        f"Mean ± half of Student's {100 * LEVEL:.0f} % interval over the seeds.{start}",
        markdown_table(["router", "seeds", *(SCORERS[key][0] for key in keys), "loss"], scores),
    ]
    against = _against(found, done)
    if against:
        parts += [
            f"{SCORERS[found['score']][0]} less that of {found['baseline']}, in points: the paired bootstrap's 95 % "
            "interval, which draws seeds and problems, and Student's over the differences of the seeds.",
            markdown_table(["router", "difference", "bootstrap", "p", "over seeds"], against),
        ]
    parts += [
        "Routing in evaluation mode on the held-out problems: active experts a token, also as a share of the most that "
        "k allows; load entropy (1 is even); experts that no token uses, over all layers; entropy of the softmax "
        "(nats), its mass on the chosen experts, and the experts that hold 99 % of it.",
        markdown_table(
            ["router", "active", "of k", "load entropy", "unused", "entropy", "mass", "experts for 99 %"], routing
        ),
        "Cost of training, and its ratio to top-k.",
        markdown_table(["router", "ms a step", "ratio", "tokens/s", "peak memory, MB", "seconds"], _costs(found, done)),
    ]
    return "\n\n".join(parts)


def _against(found: dict[str, Any], done: list[dict[str, Any]]) -> list[list[str]]:
    rows = []
    pairs = {(pair["a"], pair["b"]): pair for pair in found["pairs"]}
    for one in done:
        pair = pairs.get((one["label"], found["baseline"]))
        if pair is not None:
            seeds = pair["by_seed"]
            ends = "–" if seeds["low"] is None else f"{100 * seeds['low']:+.1f} to {100 * seeds['high']:+.1f}"
            bootstrap = f"{100 * pair['low']:+.1f} to {100 * pair['high']:+.1f}"
            rows.append([one["title"], f"{100 * pair['difference']:+.1f}", bootstrap, f"{pair['p']:.2g}", ends])
    return rows


def _costs(found: dict[str, Any], done: list[dict[str, Any]]) -> list[list[str]]:
    base: dict[str, Any] = next((one["measures"] for one in done if one["label"] == found["baseline"]), {})
    rows = []
    for one in done:
        own = one["measures"]
        step, first = own.get("step_seconds"), base.get("step_seconds")
        rows.append(
            [
                one["title"],
                _pm(step, 0, 1000),
                "–" if step is None or first is None else f"{step['mean'] / first['mean']:.2f}",
                _pm(own.get("tokens_per_second"), 0),
                _pm(own.get("peak_memory_bytes"), 0, 1e-6),
                _pm(own.get("wall_seconds"), 0),
            ]
        )
    return rows


def _pm(one: dict[str, Any] | None, digits: int, scale: float = 1.0) -> str:
    if one is None:
        return "–"
    half = Interval(one["mean"], one["low"], one["high"], one["count"]).half
    error = "" if half is None else f" ± {half * scale:.{digits}f}"
    return f"{one['mean'] * scale:.{digits}f}{error}"


def _percent(one: dict[str, Any] | None, digits: int = 1) -> str:
    return "–" if one is None else f"{_pm(one, digits, 100)} %"
