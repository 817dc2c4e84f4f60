"""What a router costs, as ratios to top-k (ProbMoE, arXiv 2606.01509, Figure 7)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes

from probmoe_ext.report.chart import Cell, Chart, Item, Missing, Table, spread, unrecorded
from probmoe_ext.report.scores import height
from probmoe_ext.report.shapes import dot_rows
from probmoe_ext.report.study import Group, Study
from probmoe_ext.report.style import LIGHT, house_style, panels
from probmoe_ext.train.significance import Interval, mean_interval

MEASURES = {
    "tokens_per_second": ("Training tokens/s", "more is better", ",.0f", 1.0),
    "step_seconds": ("Step time, ms", "less is better", ",.1f", 1e3),
    "wall_seconds": ("Wall clock, s", "less is better", ",.0f", 1.0),
    "peak_memory_bytes": ("Peak memory, MiB", "less is better", ",.0f", 2.0**-20),
    "evaluation_tokens_per_second": ("Generated tokens/s", "more is better", ",.0f", 1.0),
}
"""Heading, which way is better, format and factor of each number of `runs.COSTS`."""


def ratio(study: Study, group: Group, name: str) -> Interval | None:
    """The geometric mean over the seeds of a number divided by top-k's of the same seed.

    Returns:
        Student's interval is that of the logarithms. Where no seed is common to both it is the ratio of the means,
        without an interval; None where one of the two has no number.
    """
    baseline = study.baseline(group)
    if baseline is None:
        return None
    theirs = {run.seed: run.cost[name] for run in baseline.runs if run.cost.get(name, 0) > 0}
    ours = {run.seed: run.cost[name] for run in group.runs if run.cost.get(name, 0) > 0}
    if not ours or not theirs:
        return None
    common = [seed for seed in ours if seed in theirs]
    if not common:
        return Interval(sum(ours.values()) / len(ours) / (sum(theirs.values()) / len(theirs)), None, None, len(ours))
    logs = mean_interval([math.log(ours[seed] / theirs[seed]) for seed in common])
    low, high = (None if end is None else math.exp(end) for end in (logs.low, logs.high))
    return Interval(math.exp(logs.mean), low, high, logs.count)


def _close_up(panel: Axes, drawn: Sequence[Interval]) -> None:
    """Show the means well: what two seeds leave of an interval of logarithms may reach very far."""
    panel.margins(x=0.12)
    left, right = panel.get_xlim()
    means = [1.0, *(one.mean for one in drawn)]
    panel.set_xlim(max(left, 0.6 * min(means)), min(right, 1.5 * max(means)))


def cost(study: Study) -> Item:
    """Each measure of each group as a ratio to top-k, with the numbers themselves in the table."""
    title = "Cost as a ratio to top-k"
    recorded = [name for name in MEASURES if any(name in run.cost for run in study.runs)]
    if not recorded:
        return Missing("cost", title, "Not recorded: no cost.json and no summary.json with times.")
    groups = [group for group in study.main if any(run.cost for run in group.runs)]
    rows: list[list[Cell]] = []
    ratios = {name: [ratio(study, group, name) for group in groups] for name in recorded}
    for place, group in enumerate(groups):
        for name in recorded:
            heading, _, form, factor = MEASURES[name]
            values = [run.cost[name] for run in group.runs if name in run.cost]
            if values:
                one = ratios[name][place]
                ends: list[Cell] = [None] * 3 if one is None else [one.mean, one.low, one.high]
                rows.append(
                    [group.title, heading, format(factor * sum(values) / len(values), form), *ends, len(values)]
                )
    columns = [("router", ""), ("measure", ""), ("mean", ""), ("ratio", ".2f"), ("low", ".2f"), ("high", ".2f")]
    table = Table("Cost, and its ratio to top-k", [*columns, ("seeds", "d")], rows)
    devices = sorted({run.device for group in groups for run in group.runs if run.device})
    where = f" on {', '.join(devices)}" if devices else ""
    compared = [name for name in recorded if any(ratios[name])]
    absent = unrecorded([group.title for group in study.main if group not in groups], "Cost")
    lacking = [MEASURES[name][0].split(",")[0].lower() for name in MEASURES if name not in recorded]
    if lacking:
        absent = (*absent, f"Not recorded: {', '.join(lacking)}.")
    if not compared:
        caption = f"Cost of each router{where}, mean over its seeds; there is no top-k run to compare with."
        return Chart("cost", "Cost", caption, None, [table], absent)
    with house_style():
        figure, axes = panels(len(compared), (2.2 + 1.9 * len(compared), height(len(groups)) + 0.2), sharey=True)
        for panel, name in zip(axes, compared, strict=True):
            panel.axvline(1, color=LIGHT["muted"], linewidth=1)
            dot_rows(panel, groups, ratios[name])
            panel.set_title(MEASURES[name][0].split(",")[0])
            panel.set_xlabel(f"ratio; {MEASURES[name][1]}")
            _close_up(panel, [one for one in ratios[name] if one is not None])
            panel.xaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    drawn = [one for name in compared for one in ratios[name] if one is not None]
    caption = (
        f"Each measure divided by that of top-k in the same comparison{where}: geometric {spread(drawn)} "
        "(of the logarithms), cut off where it leaves the panel."
        if any(one.low is not None for one in drawn)
        else f"Each measure divided by that of top-k in the same comparison{where}: {spread(drawn)}."
    )
    return Chart("cost", title, caption, figure, [table], absent)
