"""The tables that need no figure: the result in one table, what was run, and how groups differ."""

from __future__ import annotations

import json
from typing import Any

from probmoe_ext.report.chart import Cell, Chart, Table
from probmoe_ext.report.cost import ratio
from probmoe_ext.report.pairing import against_baseline, main_scorer
from probmoe_ext.report.runs import Run
from probmoe_ext.report.scores import score_of
from probmoe_ext.report.study import PLACE_SETTINGS, Group, Study
from probmoe_ext.train.scoring import SCORERS
from probmoe_ext.train.significance import Interval


def result(study: Study) -> Chart:
    """One line for each group: accuracy, difference to top-k, loss, experts, evenness, speed."""
    key = main_scorer(study)
    rows: list[list[Cell]] = []
    for group in study.groups:
        against = None if key is None else against_baseline(study, group, key)
        speed = ratio(study, group, "step_seconds")
        used, largest = group.interval(active_experts), widest(group)
        rows.append(
            [
                group.title,
                len(group.runs),
                None if key is None else with_half(group.interval(score_of(key)), 100, ".1f"),
                None if against is None else f"{100 * against.paired.difference:+.1f}".replace("-", "−"),
                None
                if against is None
                else f"[{100 * against.paired.low:+.1f}, {100 * against.paired.high:+.1f}]".replace("-", "−"),
                with_half(group.interval(lambda run: run.test_loss), 1, ".3f"),
                with_half(used, 1, ".2f"),
                None if used is None or largest is None else used.mean / largest,
                with_half(group.interval(evenness), 1, ".3f"),
                None if speed is None else speed.mean,
            ]
        )
    columns = [
        ("router", ""),
        ("seeds", "d"),
        ("right, %", ""),
        ("− top-k", ""),
        ("95 % interval", ""),
        ("test loss", ""),
        ("experts", ""),
        ("of k", ".0%"),
        ("evenness", ""),
        ("step time", ".2f"),
    ]
    several = any(len(group.runs) > 1 for group in study.groups)
    score = "not evaluated" if key is None else f"by scorer {SCORERS[key][0]}"
    caption = (
        f"Each router on the test problems ({score}), in evaluation mode: mean over seeds, "
        + ("± half of Student’s 95 % interval for that mean" if several else "one seed, so no interval")
        + "; the difference to top-k in percentage points with the interval of a paired bootstrap over the same "
        "problems and seeds; loss in nats a token; mean experts a token, and as a share of the largest k allowed; "
        "evenness of the load (1 is even); step time divided by that of top-k."
    )
    return Chart("result", "The result in one table", caption, None, [Table("Result by router", columns, rows)])


def with_half(one: Interval | None, factor: float, form: str) -> str | None:
    """``43.1 ± 2.0``, without the second part for a single seed."""
    if one is None:
        return None
    mean = format(factor * one.mean, form).replace("-", "−")
    half = None if one.half is None else format(factor * one.half, form)
    # Seeds that agree in every digit shown need no spread.
    return mean if half is None or float(half) == 0 else f"{mean} ± {half}"


def active_experts(run: Run) -> float | None:
    """Mean number of experts a token in evaluation mode, from either file that has it."""
    recorded = run.analysis.mean_k if run.analysis else None
    return run.active_experts if recorded is None else recorded


def evenness(run: Run) -> float | None:
    """Entropy of the loads divided by log E, mean over the layers, from either file that has it."""
    recorded = run.analysis.load_entropy if run.analysis else None
    return run.load_entropy if recorded is None else recorded


def widest(group: Group) -> int | None:
    """The largest number of experts that a token may get; None if the settings do not say."""
    k = group.first.k
    return k[1] if isinstance(k, tuple) else k


def settings(study: Study) -> list[Table]:
    """The settings that differ between groups, and those that all share."""
    names = sorted({name for run in study.runs for name in run.config} - set(PLACE_SETTINGS))
    differing = [name for name in names if len({_text(run.config.get(name)) for run in study.runs}) > 1]
    shared = [name for name in names if name not in differing]
    rows: list[list[Cell]] = [
        [group.title, ", ".join(_seed(run) for run in group.runs), *(_values(group, name) for name in differing)]
        for group in study.groups
    ]
    first = study.runs[0].config
    return [
        Table("What differs", [("router", ""), ("seeds", ""), *((name, "") for name in differing)], rows),
        Table(
            "What all runs share", [("setting", ""), ("value", "")], [[name, _text(first.get(name))] for name in shared]
        ),
    ]


def provenance(study: Study) -> list[Table]:
    """Each run with its folder; machine and versions of each comparison."""
    runs: list[list[Cell]] = [
        [group.title, _seed(run), str(run.folder), run.device or None, _count(run.parameters)]
        for group in study.groups
        for run in group.runs
    ]
    columns = [("router", ""), ("seed", ""), ("folder", ""), ("device", ""), ("parameters", "")]
    tables = [Table("Runs", columns, runs)]
    for name, content in study.comparisons.items():
        config = content.get("config")
        facts: list[list[Cell]] = [
            [words, _text(content[words])] for words in ("machine", "versions") if words in content
        ]
        # The routers' own settings are those of the runs, which the tables above show.
        shown = config.items() if isinstance(config, dict) else ()
        facts += [[f"config: {key}", _text(one)] for key, one in shown if key != "routers"]
        tables.append(Table(f"Comparison {name}", [("", ""), ("", "")], facts))
    return tables


def _values(group: Group, name: str) -> str:
    return ", ".join(dict.fromkeys(_text(run.config.get(name)) for run in group.runs))


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_text(one)}" for key, one in value.items()) or "–"
    if value is None:
        return "–"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return value if isinstance(value, str) else json.dumps(value)


def _seed(run: Run) -> str:
    return "–" if run.seed is None else str(run.seed)


def _count(number: int | None) -> str | None:
    return None if number is None else f"{number:,}"
