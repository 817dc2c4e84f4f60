"""How figures look: colours that hold on white and on black, and for colour-blind readers; a marker and a dash each."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import NullFormatter

from probmoe_ext.report.study import Group

LIGHT = {
    "ink": "#1b1f24",
    "muted": "#59636e",
    "grid": "#dde2e7",
    "surface": "#fefefe",
    "series-0": "#3d393a",
    "series-1": "#383ec1",
    "series-2": "#cf8000",
    "series-3": "#4c847d",
    "series-4": "#93007e",
    "series-5": "#73640a",
    "series-6": "#0097f6",
}
"""Colours on white, by role; no two are equal, so that a colour in an SVG says which role it plays."""

DARK = {
    "ink": "#e6e9ec",
    "muted": "#a4adb7",
    "grid": "#333a42",
    "surface": "#14171b",
    "series-0": "#c4c0c0",
    "series-1": "#59809a",
    "series-2": "#ac6800",
    "series-3": "#67b47b",
    "series-4": "#c080f9",
    "series-5": "#f3e889",
    "series-6": "#98f7fe",
}
"""The same roles on a dark page."""

HEAT = "cividis"
"""Rises evenly in lightness for every kind of colour vision."""

_MARKERS = "osD^vPX*h"
_DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
_SETTINGS: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.edgecolor": LIGHT["muted"],
    "axes.labelcolor": LIGHT["muted"],
    "axes.titlecolor": LIGHT["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.7,
    "text.color": LIGHT["ink"],
    "text.parse_math": False,
    "xtick.color": LIGHT["muted"],
    "ytick.color": LIGHT["muted"],
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.hashsalt": "probmoe_ext",
}


@contextmanager
def house_style() -> Iterator[None]:
    """Draw and save with the settings of this module; titles are text, never formulas."""
    with matplotlib.rc_context(_SETTINGS):
        yield


def panels(columns: int, size: tuple[float, float], **settings: Any) -> tuple[Figure, list[Axes]]:
    """A figure with axes side by side."""
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.08, wspace=0.02))
    return figure, list(figure.subplots(1, columns, squeeze=False, **settings)[0])


def look(group: Group) -> dict[str, Any]:
    """Colour, marker and dash of a group, for ``Axes.plot``."""
    colours = sum(name.startswith("series-") for name in LIGHT) - 1
    place = group.style
    colour = LIGHT["series-0" if place == 0 else f"series-{(place - 1) % colours + 1}"]
    return {
        "color": colour,
        "marker": _MARKERS[place % len(_MARKERS)],
        "linestyle": _DASHES[0 if place == 0 else (place - 1) % len(_DASHES)],
        "markersize": 5,
        "markeredgecolor": LIGHT["surface"],
        "markeredgewidth": 0.5,
    }


def legend(figure: Figure, axes: Axes, columns: int = 4) -> None:
    """The legend of one panel, under the whole figure."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=min(columns, max(1, len(labels))), handlelength=3)


def log_axis(axes: Axes, which: Literal["x", "y"]) -> None:
    """A logarithmic scale with plain numbers at the powers of ten; matplotlib's own labels are formulas."""
    getattr(axes, f"set_{which}scale")("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def whole_ticks(axes: Axes, count: int) -> None:
    """Whole numbers from 0 to below `count` under an axis, a dozen at most."""
    step = next(step for step in itertools.chain((1, 2, 4, 5, 8, 10), itertools.count(20, 20)) if count / step <= 12)
    axes.set_xticks(range(0, count, step))
