"""What a section of the report is made of: figures with their tables, and what says why there is none."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO, StringIO
from pathlib import Path

from matplotlib.figure import Figure

from probmoe_ext.files import write_bytes, write_text
from probmoe_ext.report.records import printable
from probmoe_ext.report.style import house_style
from probmoe_ext.report.vector import inline_svg
from probmoe_ext.train.significance import Interval

Cell = str | float | None
FORMATS = ("svg", "png")
MISSING = "–"


@dataclass(frozen=True)
class Table:
    """Numbers behind a figure.

    Attributes:
        caption: what the rows are.
        columns: heading and format specification of each column; an empty one is text.
        rows: a cell for each column; None is what was not recorded.
    """

    caption: str
    columns: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[Cell]]

    def text(self, cell: Cell, specification: str) -> str:
        """A cell as the page shows it."""
        if cell is None:
            return MISSING
        if isinstance(cell, str):
            return cell
        return format(cell, specification).replace("-", "−").replace("%", " %") if specification else str(cell)

    def csv(self) -> str:
        """The table with its numbers as they are."""
        out = StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([heading for heading, _ in self.columns])
        writer.writerows([["" if cell is None else cell for cell in row] for row in self.rows])
        return out.getvalue()


@dataclass(frozen=True)
class Chart:
    """A figure of the report.

    Attributes:
        name: stem of its files and its place in the page.
        title: a few words.
        caption: one sentence: what is shown, n, and what the interval is.
        figure: None for a table alone.
        tables: the first one is also written as CSV.
        notes: what else must be said, such as what some runs did not record.
    """

    name: str
    title: str
    caption: str
    figure: Figure | None
    tables: Sequence[Table]
    notes: Sequence[str] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        """Lay the figure out, once for all formats."""
        if self.figure is not None:
            with house_style():
                self.figure.draw_without_rendering()
            self.figure.set_layout_engine("none")

    def inline(self) -> str:
        """The figure as SVG for the page, in the page's own colours and type."""
        with house_style():
            return "" if self.figure is None else inline_svg(self.figure, self.name, self.title)

    def save(self, folder: Path, formats: Sequence[str] = FORMATS) -> list[Path]:
        """Write the figure in each format, and the first table as CSV.

        Returns:
            The files.
        """
        files = [folder / f"{self.name}.csv"]
        write_text(files[0], printable(self.tables[0].csv()))
        for suffix in formats if self.figure is not None else ():
            assert self.figure is not None
            buffer = BytesIO()
            with house_style():
                metadata = {"Date": None} if suffix == "svg" else None
                self.figure.savefig(buffer, format=suffix, dpi=200, facecolor="white", metadata=metadata)
            files.append(folder / f"{self.name}.{suffix}")
            write_bytes(files[-1], buffer.getvalue())
        return files


@dataclass(frozen=True)
class Missing:
    """A figure that cannot be drawn, and the one line that says why."""

    name: str
    title: str
    reason: str


Item = Chart | Missing


def spread(intervals: Sequence[Interval]) -> str:
    """How many seeds stand behind a figure, and what its intervals are: the end of a caption."""
    counts = sorted({interval.count for interval in intervals})
    if counts[-1] == 1:
        return "one seed each, so no interval"
    seeds = f"{counts[0]}–{counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    return f"mean over {seeds} seeds, with Student’s 95 % interval for that mean"


def unrecorded(titles: Sequence[str], what: str) -> tuple[str, ...]:
    """The note on groups that lack what the others have."""
    return (f"{what} not recorded for: {', '.join(titles)}.",) if titles else ()
