"""How the work is spread over the experts of each layer."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.figure import Figure

from probmoe_ext.report.chart import Cell, Chart, Item, Missing, Table, unrecorded
from probmoe_ext.report.runs import Layer
from probmoe_ext.report.study import Study
from probmoe_ext.report.style import HEAT, LIGHT, house_style, whole_ticks

COLUMNS = 3
CAP = 4.0
"""Loads above so many times an even share get the last colour."""


def load(study: Study) -> Item:
    """A heat map of layer and expert for each group."""
    title = "Load of the experts"
    groups = [group for group in study.main if any(run.analysis for run in group.runs)]
    if not groups:
        return Missing("load", title, "Not recorded: no run has an analysis.json.")
    shown = [next(run for run in group.runs if run.analysis) for group in groups]
    maps = [np.array([relative(layer) for layer in run.analysis.layers]) for run in shown if run.analysis]
    top = min(CAP, max(float(one.max()) for one in maps))
    across = min(COLUMNS, len(maps))
    lines = -(-len(maps) // across)
    depth = max(len(one) for one in maps)
    with house_style():
        figure = Figure(
            figsize=(3.3 * across + 0.9, lines * (0.75 + min(2.6, max(0.9, 0.16 * depth)))), layout="constrained"
        )
        grid = figure.subplots(lines, across, squeeze=False).flatten()
        image = None
        for panel, group, of in zip(grid, groups, maps, strict=False):
            # No value between two experts means anything: the cells are drawn as they are.
            image = panel.imshow(of, cmap=HEAT, vmin=0, vmax=top, aspect="auto", interpolation="none")
            dead = np.argwhere(of == 0)
            panel.plot(dead[:, 1], dead[:, 0], "x", color=LIGHT["series-2"], markersize=4)
            panel.set_title(group.title)
            panel.grid(visible=False)
            whole_ticks(panel, of.shape[1])
            panel.set_yticks(range(0, len(of), max(1, len(of) // 8)))
        for panel in grid[len(maps) :]:
            panel.set_axis_off()
        for panel in grid[: len(maps)]:
            panel.set_xlabel("expert")
        for panel in grid[::across]:
            panel.set_ylabel("layer")
        assert image is not None
        bar = figure.colorbar(image, ax=grid.tolist(), shrink=0.8, pad=0.02, extend="max" if top == CAP else "neither")
        bar.set_label("load, 1 = even share")
        bar.outline.set_visible(False)
    rows: list[list[Cell]] = []
    for group, run in zip(groups, shown, strict=True):
        assert run.analysis is not None
        for place, layer in enumerate(run.analysis.layers):
            shares, unused = relative(layer), sum(share == 0 for share in layer.load)
            rows.append([group.title, str(place), max(shares), min(shares), evenness(layer), unused])
    seeds = sorted({run.seed for run in shown if run.seed is not None})
    words = f" of seed {seeds[0]}" if len(seeds) == 1 else ""
    caption = (
        f"Share of the used slots that each expert gets in each layer, divided by an even share, in one run{words} of "
        "each router (no mean over seeds, since experts need not correspond); a cross is an expert that no token used."
    )
    columns = [("router", ""), ("layer", ""), ("largest", ".2f"), ("smallest", ".2f"), ("evenness", ".3f")]
    table = Table("Load by layer, as multiples of an even share", [*columns, ("unused experts", "d")], rows)
    notes = ["Evenness is the entropy of the loads divided by log E: 1 if all experts get the same work."]
    absent = unrecorded([group.title for group in study.main if group not in groups], "Load")
    return Chart("load", title, caption, figure, [table], [*notes, *absent])


def relative(layer: Layer) -> list[float]:
    """Each expert's load, divided by an even share."""
    return [share * len(layer.load) for share in layer.load]


def evenness(layer: Layer) -> float:
    """The entropy of the loads divided by log E."""
    entropy = -sum(share * math.log(share) for share in layer.load if share > 0)
    return entropy / math.log(len(layer.load)) if len(layer.load) > 1 else 1.0
