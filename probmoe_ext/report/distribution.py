"""The distribution over experts, by layer: mass, entropy, experts for 99 % of the mass (ProbMoE, Figures 3 and 4)."""

from __future__ import annotations

from collections.abc import Callable

from probmoe_ext.report.chart import Cell, Chart, Item, Missing, Table, spread, unrecorded
from probmoe_ext.report.runs import Layer
from probmoe_ext.report.shapes import by_layer, layer_lines
from probmoe_ext.report.study import Study
from probmoe_ext.report.style import house_style, legend, panels
from probmoe_ext.train.significance import Interval

MEASURES: dict[str, tuple[str, Callable[[Layer], float | None]]] = {
    "mass of the chosen experts": ("share of the softmax", lambda layer: layer.mass),
    "entropy": ("nats", lambda layer: layer.entropy),
    "experts for 99 % of the mass": ("experts", lambda layer: layer.experts_99),
}
"""Name and unit of what is drawn against the layer."""


def distribution(study: Study) -> Item:
    """A panel for each measure, a line for each group."""
    title = "The distribution over experts, by layer"
    groups = [group for group in study.main if any(by_layer(group, of) for _, of in MEASURES.values())]
    if not groups:
        return Missing("distribution", title, "Not recorded: no run has an analysis.json.")
    rows: list[list[Cell]] = []
    drawn: list[Interval] = []
    with house_style():
        figure, axes = panels(len(MEASURES), (11, 3.7))
        for panel, (name, (unit, of)) in zip(axes, MEASURES.items(), strict=True):
            drawn += layer_lines(panel, groups, of)
            panel.set_title(name[0].upper() + name[1:])
            panel.set_ylabel(unit)
            for group in groups:
                for place, one in enumerate(by_layer(group, of)):
                    if one is not None:
                        rows.append([group.title, name, str(place), one.mean, one.low, one.high, one.count])
        legend(figure, axes[0])
    caption = (
        "Softmax of the router’s logits on the tokens of the held-out problems, by layer: how much of it the chosen "
        f"experts hold, its entropy, and how many experts hold 99 % of it; {spread(drawn)} (band)."
    )
    columns = [("router", ""), ("measure", ""), ("layer", ""), ("mean", ".4f"), ("low", ".4f"), ("high", ".4f")]
    table = Table("Mass, entropy and experts for 99 %", [*columns, ("seeds", "d")], rows)
    absent = unrecorded([group.title for group in study.main if group not in groups], "The distribution")
    return Chart("distribution", title, caption, figure, [table], absent)
