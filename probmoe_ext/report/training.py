"""What routing did while it trained, from the monitor's file (docs/monitoring.md has the formulas)."""

from __future__ import annotations

from probmoe_ext.report.chart import Cell, Chart, Item, Missing, Table, spread, unrecorded
from probmoe_ext.report.shapes import band_line
from probmoe_ext.report.study import Group, Study
from probmoe_ext.report.style import house_style, legend, panels
from probmoe_ext.train.significance import Interval, mean_interval

MEASURES = {
    "mean_k": ("Experts a token", "mean"),
    "load_entropy": ("Evenness of the load", "1 is even"),
    "exploration": ("Exploration", "share outside of top-k"),
    "drift": ("Drift of the gate", "share of its first top-k lost"),
}


def training(study: Study) -> Item:
    """A panel for each measure against the step."""
    title = "Routing while training"
    groups = [group for group in study.main if any(run.routing for run in group.runs)]
    names = [name for name in MEASURES if any(history(group, name) for group in groups)]
    if not names:
        return Missing("training-routing", title, "Not recorded: no routing.jsonl.")
    rows: list[list[Cell]] = []
    drawn: list[Interval] = []
    with house_style():
        figure, axes = panels(len(names), (2.75 * len(names), 3.6))
        for panel, name in zip(axes, names, strict=True):
            for group in groups:
                found = history(group, name)
                if not found:
                    continue
                steps, ones = [step for step, _ in found], [one for _, one in found]
                band_line(panel, group, steps, ones, markers=5)
                drawn += ones
                rows.append([group.title, MEASURES[name][0], ones[0].mean, ones[-1].mean, ones[-1].low, ones[-1].high])
            panel.set_title(MEASURES[name][0])
            panel.set_ylabel(MEASURES[name][1])
            panel.set_xlabel("step")
            panel.locator_params(axis="x", nbins=5)
        legend(figure, axes[0])
    columns = [("router", ""), ("measure", ""), ("first", ".4f"), ("last", ".4f"), ("low", ".4f"), ("high", ".4f")]
    caption = f"Means over the layers on the training batches since the previous log: {spread(drawn)} (band)."
    absent = unrecorded([group.title for group in study.main if group not in groups], "Routing while training")
    return Chart("training-routing", title, caption, figure, [Table("First and last log", columns, rows)], absent)


def history(group: Group, name: str) -> list[tuple[int, Interval]]:
    """A metric at the steps that all seeds reported."""
    logs = [{step: found[name] for step, found in run.routing if name in found} for run in group.runs if run.routing]
    steps = sorted(set.intersection(*map(set, logs))) if logs else []
    return [(step, mean_interval([one[step] for one in logs])) for step in steps]
