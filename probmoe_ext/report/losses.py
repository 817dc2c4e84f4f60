"""Loss by router: while training, and on what was held out."""

from __future__ import annotations

from collections.abc import Callable

from probmoe_ext.report.chart import Cell, Chart, Item, Missing, Table, spread, unrecorded
from probmoe_ext.report.runs import Run
from probmoe_ext.report.scores import height
from probmoe_ext.report.shapes import band_line, dot_rows
from probmoe_ext.report.study import Group, Study
from probmoe_ext.report.style import house_style, legend, log_axis, panels
from probmoe_ext.train.significance import Interval, mean_interval

POINTS = 120
"""Of a curve; more logs than that are averaged."""

KINDS: dict[str, Callable[[Run], float | None]] = {
    "held-out training problems": lambda run: run.heldout_loss,
    "test problems": lambda run: run.test_loss,
}


def curve(group: Group) -> list[tuple[float, Interval]]:
    """Step and training loss over the seeds, at the steps that all of them logged; averaged to `POINTS`."""
    logs = [dict(run.losses) for run in group.runs if run.losses]
    steps = sorted(set.intersection(*map(set, logs))) if logs else []
    steps = [step for step in steps if all(abs(one[step]) < float("inf") for one in logs)]
    width = -(-len(steps) // POINTS)
    found = []
    for start in range(0, len(steps), max(1, width)):
        part = steps[start : start + width]
        values = [sum(one[step] for step in part) / len(part) for one in logs]
        found.append((sum(part) / len(part), mean_interval(values)))
    return found


def training_loss(study: Study) -> Item:
    """Training loss against the step."""
    title = "Loss while training"
    curves = {group.title: found for group in study.main if (found := curve(group))}
    if not curves:
        return Missing("training-loss", title, "Not recorded: no metrics.jsonl with a loss.")
    rows: list[list[Cell]] = []
    drawn: list[Interval] = []
    with house_style():
        figure, (axes, end) = panels(2, (10, 4.2))
        for group in study.main:
            if group.title not in curves:
                continue
            found = curves[group.title]
            steps, ones = [step for step, _ in found], [one for _, one in found]
            for panel, start in ((axes, 0), (end, len(ones) // 2)):
                band_line(panel, group, steps[start:], ones[start:], markers=6)
            drawn += ones
            for place in sorted({0, len(found) // 4, len(found) // 2, 3 * len(found) // 4, len(found) - 1}):
                one = ones[place]
                rows.append([group.title, steps[place], one.mean, one.low, one.high, one.count])
        means = [one.mean for one in drawn]
        if min(means) > 0 and max(means) / min(means) > 12:
            log_axis(axes, "y")
        for panel, words in ((axes, "All steps"), (end, "The second half")):
            panel.set_xlabel("step")
            panel.set_title(words)
        axes.set_ylabel("loss, nats a token")
        legend(figure, axes)
    columns = [("router", ""), ("step", ".0f"), ("loss", ".4f"), ("low", ".4f"), ("high", ".4f"), ("seeds", "d")]
    table = Table("Training loss at five steps", columns, rows)
    merged = any(len(run.losses) > POINTS for group in study.main for run in group.runs)
    caption = (
        "Training loss on the answers' tokens"
        + (f", logs averaged to {POINTS} points" if merged else "")
        + f": {spread(drawn)} (band)."
    )
    absent = unrecorded([group.title for group in study.main if group.title not in curves], "Training loss")
    return Chart("training-loss", title, caption, figure, [table], absent)


def heldout_loss(study: Study) -> Item:
    """Loss on the held-out slice of the training data, and on the test problems."""
    title = "Loss on held-out problems"
    kinds = {words: of for words, of in KINDS.items() if any(of(run) is not None for run in study.runs)}
    if not kinds:
        return Missing("heldout-loss", title, "Not recorded: no run held problems out or was evaluated.")
    groups = [group for group in study.groups if any(group.values(of) for of in kinds.values())]
    rows: list[list[Cell]] = []
    drawn: list[Interval] = []
    with house_style():
        figure, axes = panels(len(kinds), (2.2 + 3.2 * len(kinds), height(len(groups))), sharey=True)
        for panel, (words, of) in zip(axes, kinds.items(), strict=True):
            found = [group.interval(of) for group in groups]
            dot_rows(panel, groups, found, [group.values(of) for group in groups])
            panel.set_title(words[0].upper() + words[1:])
            panel.set_xlabel("loss, nats a token")
            for group, one in zip(groups, found, strict=True):
                if one is not None:
                    drawn.append(one)
                    rows.append([group.title, words, one.mean, one.low, one.high, one.count])
    columns = [("router", ""), ("problems", ""), ("loss", ".4f"), ("low", ".4f"), ("high", ".4f"), ("seeds", "d")]
    caption = (
        f"Loss on the reference answers after training: {spread(drawn)}; a small stroke is one seed."
        if drawn
        else "Loss on the reference answers after training: not a finite number in any group."
    )
    absent = unrecorded([group.title for group in study.groups if group not in groups], "Held-out loss")
    return Chart("heldout-loss", title, caption, figure, [Table("Loss after training", columns, rows)], absent)
