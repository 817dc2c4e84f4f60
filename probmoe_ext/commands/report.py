"""``probmoe report``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from probmoe_ext.commands.arguments import add_command
from probmoe_ext.train.errors import UsageError

EXAMPLES = """\
examples:
  a page and figures from a comparison, written into its folder:
    probmoe report runs/compare
  two runs of probmoe train that probmoe eval has scored:
    probmoe report runs/tiny-olmoe-topk-k4 runs/tiny-olmoe-probmoe-k4 --output runs/report
  the page alone, under another title, with up to 20 MB of single routing decisions:
    probmoe report runs/compare --title "Small OLMoE on GSM8K" --formats none --decisions 20

docs/report.md says what each figure shows.
"""
FORMATS = {"svg,png": ("svg", "png"), "svg": ("svg",), "png": ("png",), "none": ()}


def register(commands: Any) -> None:
    """Add the command to the parser of ``probmoe``."""
    parser = add_command(commands, "report", "write a page and figures about finished runs", examples=EXAMPLES, run=run)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUNS",
        help="folder of a comparison, of a run, or with runs in it; runs that differ in the seed only are one router",
    )
    parser.add_argument(
        "--output", metavar="FOLDER", help="where index.html and figures/ go (default: report/ in the first RUNS)"
    )
    parser.add_argument("--title", metavar="TEXT", help="title of the page (default: the comparison's name)")
    parser.add_argument(
        "--formats",
        choices=list(FORMATS),
        default="svg,png",
        help="figures to write beside the page; it holds its own in any case (default: %(default)s)",
    )
    parser.add_argument(
        "--decisions",
        type=float,
        default=8.0,
        metavar="MEGABYTES",
        help="single routing decisions in the page at most; 0 leaves them out (default: %(default)g)",
    )


def run(options: argparse.Namespace) -> None:
    """Write the report, and say where it is and what it lacks."""
    if not 0 <= options.decisions <= 1000:
        raise UsageError(f"--decisions must be from 0 to 1000 megabytes, got {options.decisions:g}")
    paths = [Path(one) for one in options.runs]
    from probmoe_ext.report.write import write_report

    def progress(words: str) -> None:
        if not options.quiet:
            print(f"probmoe report: {words}", file=sys.stderr, flush=True)

    written = write_report(
        paths,
        Path(options.output) if options.output else paths[0] / "report",
        title=options.title,
        formats=FORMATS[options.formats],
        decisions=round(options.decisions * 1e6),
        progress=progress,
    )
    print(f"{written.page}, {len(written.figures)} files in {written.page.parent / 'figures'}")
    if written.missing:
        print(f"nothing recorded for: {', '.join(written.missing)}")
