"""Accuracy by router, and what its difference to top-k is worth."""

from __future__ import annotations

from collections.abc import Callable

from probmoe_ext.report.chart import Cell, Chart, Item, Missing, Table, spread, unrecorded
from probmoe_ext.report.pairing import against_baseline, scorers
from probmoe_ext.report.runs import Run
from probmoe_ext.report.shapes import dot_rows
from probmoe_ext.report.study import Study
from probmoe_ext.report.style import LIGHT, house_style, panels
from probmoe_ext.train.scoring import SCORERS
from probmoe_ext.train.significance import Interval


def height(rows: int) -> float:
    """Inches for a figure with so many rows of dots."""
    return 0.9 + 0.34 * rows


def counted(numbers: set[int], what: str) -> str:
    """``300 problems``, ``100–300 problems``."""
    low, high = min(numbers), max(numbers)
    return f"{low} {what}" if low == high else f"{low}–{high} {what}"


def accuracy(study: Study) -> Item:
    """The share of right answers of each group, for each scorer."""
    keys = scorers(study)
    if not keys:
        return Missing("accuracy", "Accuracy by router", "Not recorded: no run was evaluated (probmoe eval).")
    groups = [group for group in study.groups if any(run.scores for run in group.runs)]
    rows: list[list[Cell]] = []
    drawn: list[Interval] = []
    problems: set[int] = set()
    with house_style():
        figure, axes = panels(len(keys), (2.2 + 2.5 * len(keys), height(len(groups))), sharey=True)
        for panel, key in zip(axes, keys, strict=True):
            found = [group.interval(score_of(key)) for group in groups]
            dot_rows(panel, groups, found, [group.values(score_of(key)) for group in groups])
            panel.set_title(SCORERS[key][0])
            panel.set_xlabel("right answers")
            panel.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
            drawn += [one for one in found if one is not None]
            for group, one in zip(groups, found, strict=True):
                problems |= {run.scores[key].count for run in group.runs if key in run.scores}
                if one is not None:
                    rows.append([group.title, SCORERS[key][0], one.mean, one.low, one.high, one.count])
    table = Table(
        "Share of right answers",
        [("router", ""), ("score", ""), ("mean", ".1%"), ("low", ".1%"), ("high", ".1%"), ("seeds", "d")],
        rows,
    )
    caption = (
        f"Share of right answers on {counted(problems, 'test problems')} by scorer: {spread(drawn)}; "
        "a small stroke is one seed."
    )
    left_out = [group.title for group in study.groups if group not in groups]
    return Chart("accuracy", "Accuracy by router", caption, figure, [table], unrecorded(left_out, "Accuracy"))


def paired(study: Study) -> Item:
    """The difference to top-k in points, with the interval of the paired bootstrap."""
    title = "Difference to top-k"
    keys = scorers(study)
    found = {key: [(group, against_baseline(study, group, key)) for group in study.groups] for key in keys}
    groups = [
        group for place, group in enumerate(study.groups) if any(found[key][place][1] is not None for key in keys)
    ]
    if not groups:
        reason = (
            "Not available: it needs an evaluated top-k run and another one on the same problems with the same seed."
        )
        return Missing("paired", title, reason)
    rows: list[list[Cell]] = []
    seeds: set[int] = set()
    problems: set[int] = set()
    with house_style():
        figure, axes = panels(len(keys), (2.2 + 2.5 * len(keys), height(len(groups))), sharey=True)
        for panel, key in zip(axes, keys, strict=True):
            of = {group.title: one for group, one in found[key]}
            ones = [of[group.title] for group in groups]
            panel.axvline(0, color=LIGHT["muted"], linewidth=1)
            dot_rows(panel, groups, [None if one is None else _points(one.interval) for one in ones])
            panel.set_title(SCORERS[key][0])
            panel.set_xlabel("points more than top-k")
            for group, one in zip(groups, ones, strict=True):
                if one is not None:
                    seeds.add(one.seeds)
                    problems.add(one.problems)
                    points = _points(one.interval)
                    cells = [points.mean, points.low, points.high, one.paired.p, one.seeds, one.problems]
                    rows.append([group.title, SCORERS[key][0], *cells])
    columns = [("router", ""), ("score", ""), ("points", "+.1f"), ("low", "+.1f"), ("high", "+.1f"), ("p", ".4f")]
    table = Table("Difference to top-k in points", [*columns, ("seeds", "d"), ("problems", "d")], rows)
    caption = (
        f"Right answers in percentage points more than top-k on the same {counted(problems, 'problems')} with the same "
        f"{counted(seeds, 'seeds')}: the mean, and the 95 % percentile interval of a paired bootstrap, 10 000 draws "
        + ("of seeds and problems." if max(seeds) > 1 else "of problems, which says nothing of other seeds.")
    )
    alone = [group.title for group in study.groups if group not in groups and study.baseline(group) is not group]
    notes = [f"No top-k with the same seed and problems for: {', '.join(alone)}."] if alone else []
    notes.append("p is two-sided and not corrected for the number of comparisons.")
    return Chart("paired", title, caption, figure, [table], notes)


def score_of(key: str) -> Callable[[Run], float | None]:
    """What takes the mean score of a run."""
    return lambda run: run.scores[key].value if key in run.scores else None


def _points(one: Interval) -> Interval:
    low, high = (None if end is None else 100 * end for end in (one.low, one.high))
    return Interval(100 * one.mean, low, high, one.count)
