"""ProbMoE's two choices apart: forward {sample, top-k} × backward {marginal, straight-through} (ProbMoE, Figure 2)."""

from __future__ import annotations

from probmoe_ext.report.chart import Cell, Chart, Item, Missing, Table, spread, unrecorded
from probmoe_ext.report.pairing import main_scorer
from probmoe_ext.report.scores import height, score_of
from probmoe_ext.report.shapes import dot_rows
from probmoe_ext.report.study import Group, Study
from probmoe_ext.report.style import house_style, panels
from probmoe_ext.train.scoring import SCORERS

FORWARD = {"sample": "sampled subset", "topk": "top-k"}
BACKWARD = {"marginal": "exact marginals", "ste": "straight-through"}


def cells(study: Study) -> dict[tuple[str, str], Group]:
    """The groups that make up the table, by forward and backward rule.

    They share the comparison, k, and all options but the two; of several such tables the fullest, then the first.
    """
    tables: dict[str, dict[tuple[str, str], Group]] = {}
    for group in study.groups:
        if group.first.router == "probmoe":
            options = {"forward": "sample", "backward": "marginal", **group.first.options}
            rules = (str(options.pop("forward")), str(options.pop("backward")))
            tables.setdefault(repr((group.source, group.first.k, sorted(options.items()))), {}).setdefault(rules, group)
    return max(tables.values(), key=len, default={})


def ablation(study: Study) -> Item:
    """Right answers and loss of the four."""
    title = "Ablation of ProbMoE"
    found = cells(study)
    if len(found) < 2:
        reason = "Not recorded: it needs ProbMoE with at least two of the forward and backward rules."
        return Missing("ablation", title, reason)
    order = [(forward, backward) for forward in FORWARD for backward in BACKWARD if (forward, backward) in found]
    groups = [Group(_name(*rules), found[rules].source, found[rules].runs, found[rules].style) for rules in order]
    key = main_scorer(study)
    measures = {"test loss, nats a token": lambda run: run.test_loss}
    if key is not None:
        measures = {f"right answers, {SCORERS[key][0]}": score_of(key), **measures}
    measures = {words: of for words, of in measures.items() if any(group.values(of) for group in groups)}
    if not measures:
        return Missing("ablation", title, "Not recorded: the ablation's runs were not evaluated.")
    rows: list[list[Cell]] = []
    drawn = []
    with house_style():
        figure, axes = panels(len(measures), (2.8 + 3.2 * len(measures), height(len(groups))), sharey=True)
        for panel, (words, of) in zip(axes, measures.items(), strict=True):
            intervals = [group.interval(of) for group in groups]
            dot_rows(panel, groups, intervals, [group.values(of) for group in groups])
            panel.set_xlabel(words)
            if words.startswith("right"):
                panel.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
            for rules, one in zip(order, intervals, strict=True):
                if one is not None:
                    drawn.append(one)
                    numbers = [one.mean, one.low, one.high, one.count]
                    rows.append([FORWARD[rules[0]], BACKWARD[rules[1]], words, *numbers])
    columns = [("forward", ""), ("backward", ""), ("measure", ""), ("mean", ".4f"), ("low", ".4f"), ("high", ".4f")]
    table = Table("ProbMoE by forward and backward rule", [*columns, ("seeds", "d")], rows)
    caption = (
        f"ProbMoE with its forward and backward rules changed one at a time, {groups[0].first.title} and its variants: "
        f"{spread(drawn)}; a small stroke is one seed."
    )
    absent = [
        _name(forward, backward) for forward in FORWARD for backward in BACKWARD if (forward, backward) not in found
    ]
    return Chart("ablation", title, caption, figure, [table], unrecorded(absent, "Runs were"))


def _name(forward: str, backward: str) -> str:
    return f"{FORWARD[forward]} + {BACKWARD[backward]}"
