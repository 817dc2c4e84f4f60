"""The cost of a row against E, k and T, as SVG; needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot

from .registry import SWEEPS, Case

AXES = {"E": "experts E (k = 8, T = 512)", "k": "k (E = 64, T = 512)", "T": "rows T (E = 64, k = 8)"}
OURS = "route_probmoe_backward"
CURVES = (
    (f"{OURS}:sweep", "ours", "route_probmoe"),
    (f"{OURS}:sweep", "peer", "softmax + topk"),
    (f"{OURS}:sweep_log_space", "peer", "published log-space program"),
)


def points(document: dict[str, Any], name: str, side: str, axis: str) -> list[tuple[int, float, float, float]]:
    """Position, median and percentiles of one curve; empty where nothing was measured."""
    cases = set(SWEEPS[axis])
    found = {}
    for r in document["results"]:
        k = r["k"] if isinstance(r["k"], int) else tuple(r["k"])
        if r["name"] == name and Case(r["T"], r["E"], k, r["spread"], r["threads"]) in cases:
            found[r[axis]] = (r[side]["median_us_per_row"], r[side]["p20"], r[side]["p80"])
    return [(x, *found[x]) for x in sorted(found)]


def cost(document: dict[str, Any], path: Path) -> None:
    """Draws forward + backward against each axis; the bands are the 20th and 80th percentiles."""
    with pyplot.rc_context({"svg.hashsalt": "probmoe_ext", "font.size": 9}):
        figure, panels = pyplot.subplots(1, len(AXES), figsize=(11, 3.4), sharey=True)
        for panel, (axis, label) in zip(panels, AXES.items(), strict=True):
            for name, side, words in CURVES:
                curve = points(document, name, side, axis)
                if curve:
                    x, median, low, high = zip(*curve, strict=True)
                    (drawn,) = panel.plot(x, median, marker="o", markersize=3, label=words)
                    panel.fill_between(x, low, high, alpha=0.2, color=drawn.get_color(), linewidth=0)
            panel.set(xscale="log", yscale="log", xlabel=label)
            panel.xaxis.set_major_locator(matplotlib.ticker.LogLocator(base=2))
            panel.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:g}"))
            panel.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
            panel.grid(True, which="major", alpha=0.3)
        panels[0].set_ylabel("forward + backward, µs a row")
        panels[0].legend(frameon=False)
        of = document["machine"]
        figure.suptitle(
            f"{of['processor']} ({of['instruction_set']}), 1 thread, float32, torch {of['torch']}, "
            f"commit {of['commit']}",
            fontsize=8,
        )
        figure.tight_layout()
        figure.savefig(path, format="svg", metadata={"Date": None})
        pyplot.close(figure)
