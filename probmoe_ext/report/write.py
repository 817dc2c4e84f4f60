"""A report from folders of runs: what it has in it, and where its files go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from probmoe_ext.files import write_text
from probmoe_ext.report.ablation import ablation
from probmoe_ext.report.cardinality import cardinality, frequency
from probmoe_ext.report.chart import FORMATS, Chart, Item, Missing
from probmoe_ext.report.cost import cost
from probmoe_ext.report.decisions import collect
from probmoe_ext.report.distribution import distribution
from probmoe_ext.report.load import load
from probmoe_ext.report.losses import heldout_loss, training_loss
from probmoe_ext.report.page import Section, render
from probmoe_ext.report.scores import accuracy, paired
from probmoe_ext.report.study import Study, read_study
from probmoe_ext.report.summary import result
from probmoe_ext.report.training import training
from probmoe_ext.train.errors import UsageError

PAGE, FIGURES = "index.html", "figures"
DECISIONS = 8_000_000
"""Bytes of decisions in a page, unless told otherwise."""

SECTIONS: tuple[tuple[str, str, str, tuple[Callable[[Study], Item], ...]], ...] = (
    ("results", "Result", "", (result, accuracy, paired)),
    ("loss", "Loss", "", (training_loss, heldout_loss)),
    ("costs", "Cost", "", (cost,)),
    (
        "experts",
        "Experts a token",
        "A band of k lets each token use as many experts as its logits ask for.",
        (cardinality, frequency),
    ),
    ("distributions", "Distribution over experts", "", (distribution,)),
    ("ablations", "Ablation", "", (ablation,)),
    ("loads", "Load", "", (load,)),
    ("training", "Routing while training", "", (training,)),
)
"""Anchor, heading, words and figures of each section."""


@dataclass(frozen=True)
class Report:
    """What was written.

    Attributes:
        page: the HTML file.
        figures: the files beside it.
        missing: titles of the figures for which nothing was recorded.
        notes: on the decisions that were left out.
    """

    page: Path
    figures: list[Path]
    missing: list[str]
    notes: list[str]


def write_report(
    paths: Sequence[Path],
    output: Path,
    *,
    title: str | None = None,
    formats: Sequence[str] = FORMATS,
    decisions: int = DECISIONS,
    progress: Callable[[str], None] = lambda words: None,
) -> Report:
    """Read runs, and write ``index.html`` and the folder ``figures``.

    Args:
        paths: folders of comparisons or runs, see `study.read_study`.
        output: the folder to write to; made if need be. Files of an earlier report are replaced.
        title: of the page; None takes the comparison's name.
        formats: of the figures beside the page, among ``"svg"`` and ``"png"``; empty writes the page alone.
        decisions: bytes of single decisions in the page at most; 0 leaves them out.
        progress: is told what comes next.

    Raises:
        UsageError: a folder holds no run, or a file is damaged.
        OSError: the output cannot be written; files are whole or not there, and the page comes last.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output {str(output)!r} is a file; give a folder")
    progress("reading the runs")
    study = read_study(paths)
    found = collect(study, decisions)
    sections = []
    for name, heading, words, makers in SECTIONS:
        progress(heading.lower())
        sections.append(Section(name, heading, words, [make(study) for make in makers]))
    charts = [item for section in sections for item in section.items if isinstance(item, Chart)]
    missing = [item.title for section in sections for item in section.items if isinstance(item, Missing)]
    progress("the page")
    page = render(study, title or ", ".join(study.comparisons) or "Routers compared", sections, found, formats)
    files: list[Path] = []
    output.mkdir(parents=True, exist_ok=True)
    if formats:
        (output / FIGURES).mkdir(exist_ok=True)
        for chart in charts:
            progress(f"figure {chart.name}")
            files += chart.save(output / FIGURES, formats)
    write_text(output / PAGE, page)
    return Report(output / PAGE, files, missing, found.notes)
