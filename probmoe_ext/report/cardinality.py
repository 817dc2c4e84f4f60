"""How many experts tokens use: by layer, and by how frequent the token is (ProbMoE, Figures 5 and 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from probmoe_ext.report.chart import Cell, Chart, Item, Missing, Table, spread, unrecorded
from probmoe_ext.report.shapes import band_line, by_layer, layer_lines
from probmoe_ext.report.study import Group, Study
from probmoe_ext.report.style import LIGHT, house_style, legend, log_axis, look, panels, whole_ticks
from probmoe_ext.train.significance import Interval

FEW = 8
"""Tokens listed at either end."""

_NO_ANALYSIS = "Not recorded: no run has an analysis.json."


def cardinality(study: Study) -> Item:
    """Mean number of experts by layer, and the distribution of that number over the tokens of all layers."""
    title = "Experts a token, by layer"
    groups = [group for group in study.main if by_layer(group, lambda layer: layer.mean_k)]
    if not groups:
        return Missing("cardinality", title, _NO_ANALYSIS)
    used = {group.title: sizes(group) for group in groups}
    last = max((size for found in used.values() for size, share in enumerate(found) if share > 0), default=1)
    fixed: dict[int, list[str]] = {}
    for group in groups:
        if max(used[group.title], default=0) > 1 - 1e-9:
            fixed.setdefault(int(np.argmax(used[group.title])), []).append(group.title)
    varying = [group for group in groups if not any(group.title in titles for titles in fixed.values())]
    rows: list[list[Cell]] = []
    with house_style():
        figure, (left, right) = panels(2, (9.5, 3.9), width_ratios=(3, 2))
        drawn = layer_lines(left, varying, lambda layer: layer.mean_k)
        for size, titles in fixed.items():
            # All of them lie on one line, so one line it is.
            left.axhline(size, color=LIGHT["series-0"], linewidth=1.6, label=f"always {size} ({len(titles)} routers)")
        left.set_ylabel("mean experts a token")
        left.set_xlabel("layer")
        left.margins(y=0.12)
        for group in varying:
            right.plot(used[group.title][: last + 1], **look(group))
        whole_ticks(right, last + 1)
        right.set_xlabel("experts of a token")
        right.set_ylabel("share of tokens, all layers")
        right.set_ylim(bottom=0)
        legend(figure, left)
    for group in groups:
        for place, one in enumerate(by_layer(group, lambda layer: layer.mean_k)):
            if one is not None:
                rows.append([group.title, str(place), one.mean, one.low, one.high, one.count])
    shares = Table(
        "Share of tokens by their number of experts, all layers",
        [("router", ""), *((str(size), ".1%") for size in range(last + 1))],
        [[group.title, *found[: last + 1]] for group in groups if (found := used[group.title])],
    )
    columns = [("router", ""), ("layer", ""), ("mean", ".3f"), ("low", ".3f"), ("high", ".3f"), ("seeds", "d")]
    caption = (
        f"Left: mean number of experts a token uses on the held-out problems, by layer; "
        f"{spread(drawn) if drawn else 'the same for all tokens'}. "
        "Right: how that number is distributed over tokens and layers."
    )
    absent = unrecorded([group.title for group in study.main if group not in groups], "Experts a token")
    same = [f"Always {size}: {', '.join(titles)}." for size, titles in fixed.items()]
    absent = (*same, *absent)
    return Chart("cardinality", title, caption, figure, [Table("Mean experts a token", columns, rows), shares], absent)


def sizes(group: Group) -> list[float]:
    """Share of tokens with 0, 1, 2, … experts, mean over layers and seeds."""
    found = [layer.cardinality for run in group.runs if run.analysis for layer in run.analysis.layers]
    length = max(map(len, found), default=0)
    padded = [one + [0.0] * (length - len(one)) for one in found if one]
    return [sum(column) / len(padded) for column in zip(*padded, strict=True)]


def tokens_of(group: Group) -> dict[str, tuple[float, float]]:
    """Count and mean number of experts of each token, mean over the seeds that saw it."""
    seen: dict[str, list[tuple[int, float]]] = {}
    for run in group.runs:
        for token, count, mean in run.analysis.tokens if run.analysis else ():
            seen.setdefault(token, []).append((count, mean))
    return {
        token: (sum(count for count, _ in ones) / len(ones), sum(mean for _, mean in ones) / len(ones))
        for token, ones in seen.items()
    }


def frequency(study: Study) -> Item:
    """The number of experts of a token against how often it occurs."""
    title = "Experts against token frequency"
    recorded = {group.title: found for group in study.main if (found := tokens_of(group))}
    if not recorded:
        return Missing("frequency", title, "Not recorded: no analysis.json with token counts.")
    varying = [group for group in study.main if group.title in recorded and _varies(recorded[group.title])]
    fixed = [title for title in recorded if title not in {group.title for group in varying}]
    if not varying:
        return Missing(
            "frequency", title, "Nothing to show: every router here uses the same number of experts for all tokens."
        )
    rows: list[list[Cell]] = []
    extremes: list[list[Cell]] = []
    with house_style():
        figure, (axes,) = panels(1, (7.5, 3.9))
        for group in varying:
            found = recorded[group.title]
            bins = binned(found)
            bands = [Interval(mean, low, high, size) for _, mean, low, high, size in bins]
            band_line(axes, group, [count for count, *_ in bins], bands)
            rows += [[group.title, *one] for one in bins]
            order = sorted(found, key=lambda token: found[token][1])
            extremes += [
                [group.title, words, visible(token), found[token][1], found[token][0]]
                for words, some in (("fewest", order[:FEW]), ("most", order[: -FEW - 1 : -1]))
                for token in some
            ]
        log_axis(axes, "x")
        axes.set_xlabel("occurrences of the token in the held-out problems")
        axes.set_ylabel("mean experts a token")
        legend(figure, axes)
    columns = [
        ("router", ""),
        ("occurrences", ",.1f"),
        ("mean", ".3f"),
        ("10 %", ".3f"),
        ("90 %", ".3f"),
        ("tokens", "d"),
    ]
    ends = [("router", ""), ("experts", ""), ("token", ""), ("mean", ".3f"), ("occurrences", ",.0f")]
    tables = [
        Table("Mean experts a token, by occurrences", columns, rows),
        Table("Tokens with the fewest and the most experts", ends, extremes),
    ]
    ranks = ", ".join(f"{rank_correlation(recorded[group.title]):+.2f} ({group.title})" for group in varying)
    total = max(len(recorded[group.title]) for group in varying)
    caption = (
        f"Mean number of experts, over layers and seeds, of the {total} most frequent tokens, in bins that double; "
        "the band holds the middle 80 % of a bin's tokens. Spearman's rank correlation of the two: "
        f"{ranks}.".replace("-", "−")
    )
    notes = [f"The same number for all tokens: {', '.join(fixed)}."] if fixed else []
    absent = [group.title for group in study.main if group.title not in recorded]
    return Chart("frequency", title, caption, figure, tables, [*notes, *unrecorded(absent, "Token counts")])


def binned(found: dict[str, tuple[float, float]]) -> list[tuple[float, float, float, float, int]]:
    """Geometric mean count, mean, 10 % and 90 % quantile of the number of experts, and tokens of each bin."""
    bins: dict[int, list[tuple[float, float]]] = {}
    for count, mean in found.values():
        bins.setdefault(int(math.log2(max(1.0, count))), []).append((max(1.0, count), mean))
    rows = []
    for _, ones in sorted(bins.items()):
        means = [mean for _, mean in ones]
        low, high = np.quantile(means, [0.1, 0.9])
        centre = math.exp(sum(math.log(count) for count, _ in ones) / len(ones))
        rows.append((centre, sum(means) / len(means), float(low), float(high), len(ones)))
    return rows


def rank_correlation(found: dict[str, tuple[float, float]]) -> float:
    """Spearman's, of count and number of experts."""
    counts, means = zip(*found.values(), strict=True)
    return float(stats.spearmanr(counts, means).statistic) if len(set(counts)) > 1 and len(set(means)) > 1 else 0.0


def visible(token: str) -> str:
    """A token whose blanks can be seen."""
    return token.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")


def _varies(found: dict[str, tuple[float, float]]) -> bool:
    means: Sequence[float] = [mean for _, mean in found.values()]
    return max(means) - min(means) > 1e-6
