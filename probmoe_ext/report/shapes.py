"""Shapes that many figures share: a row of dots for each group, a line with a band, such lines over the layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes

from probmoe_ext.report.runs import Layer
from probmoe_ext.report.study import Group
from probmoe_ext.report.style import LIGHT, look, whole_ticks
from probmoe_ext.train.significance import Interval, mean_interval


def dot_rows(
    axes: Axes,
    groups: Sequence[Group],
    intervals: Sequence[Interval | None],
    singles: Sequence[Sequence[float]] = (),
) -> None:
    """A row for each group, the first one on top: the mean, its interval as a bar, single seeds below it.

    Args:
        axes: where to draw.
        groups: name and colour of each row.
        intervals: of each group; None leaves its row empty.
        singles: the values of each group's seeds.
    """
    for row, (group, interval) in enumerate(zip(groups, intervals, strict=True)):
        colour = look(group)["color"]
        if singles and len(singles[row]) > 1:
            axes.plot(singles[row], [row + 0.26] * len(singles[row]), "|", color=colour, markersize=5, alpha=0.75)
        if interval is None:
            continue
        if interval.low is not None and interval.high is not None:
            axes.hlines(row, interval.low, interval.high, color=colour, linewidth=2.2, capstyle="round")
        axes.plot([interval.mean], [row], "o", color=colour, markersize=7, markeredgecolor=LIGHT["surface"])
    axes.set_yticks(range(len(groups)), [group.title for group in groups])
    axes.tick_params(axis="y", labelcolor=LIGHT["ink"])
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.locator_params(axis="x", nbins=5)
    axes.spines["left"].set_visible(False)


def by_layer(group: Group, of: Callable[[Layer], float | None]) -> list[Interval | None]:
    """A number of each layer, as mean over the seeds; empty if nothing was recorded."""
    layers = [[of(layer) for layer in run.analysis.layers] for run in group.runs if run.analysis]
    depth = min(map(len, layers), default=0)
    found = []
    for place in range(depth):
        values = [value for one in layers if (value := one[place]) is not None]
        found.append(mean_interval(values) if values else None)
    return found if any(found) else []


def band_line(
    axes: Axes, group: Group, places: Sequence[float], intervals: Sequence[Interval], markers: int = 1000
) -> None:
    """A group's means as a line, with the intervals as a band where there are any.

    Args:
        axes: where to draw.
        group: name, colour, marker and dash.
        places: on the x-axis.
        intervals: one for each place.
        markers: how many of the places are marked, about.
    """
    style = look(group)
    every = max(1, len(places) // markers)
    axes.plot(places, [one.mean for one in intervals], label=group.title, markevery=every, **style)
    low = [one.mean if one.low is None else one.low for one in intervals]
    high = [one.mean if one.high is None else one.high for one in intervals]
    if low != high:
        axes.fill_between(places, low, high, color=style["color"], alpha=0.14, linewidth=0)


def layer_lines(axes: Axes, groups: Sequence[Group], of: Callable[[Layer], float | None]) -> list[Interval]:
    """A line for each group over the layers, its interval as a band.

    Returns:
        The intervals that were drawn.
    """
    drawn: list[Interval] = []
    depth = 0
    for group in groups:
        found = [(place, one) for place, one in enumerate(by_layer(group, of)) if one is not None]
        if found:
            band_line(axes, group, [place for place, _ in found], [one for _, one in found])
            drawn += [one for _, one in found]
            depth = max(depth, found[-1][0] + 1)
    whole_ticks(axes, depth)
    axes.set_xlabel("layer")
    return drawn
