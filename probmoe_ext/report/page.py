"""The page: sections, figures and tables through one template, with style and script inside of it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import jinja2
from markupsafe import Markup

from probmoe_ext import __version__
from probmoe_ext.report.chart import Item
from probmoe_ext.report.decisions import SCALE, Decisions
from probmoe_ext.report.records import printable
from probmoe_ext.report.study import Study
from probmoe_ext.report.style import DARK, LIGHT
from probmoe_ext.report.summary import provenance, settings


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        name: its anchor.
        title: its heading.
        words: a sentence or two under it.
        items: figures, tables, or why there is none.
    """

    name: str
    title: str
    words: str
    items: Sequence[Item]


def render(study: Study, title: str, sections: Sequence[Section], decisions: Decisions, formats: Sequence[str]) -> str:
    """The page as HTML.

    All that comes from runs is escaped. A content security policy keeps the page from any request, and from any script
    but the template's own.

    Args:
        study: the runs.
        title: of the page.
        sections: in order.
        decisions: for the browser.
        formats: of the figures that lie beside the page, to link to; empty if there are none.
    """
    folder = resources.files("probmoe_ext.report") / "templates"
    script = (folder / "page.js").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string((folder / "page.html").read_text(encoding="utf-8"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    seeds = sorted({run.seed for run in study.runs if run.seed is not None})
    page: str = template.render(
        title=title,
        version=__version__,
        # The template's own files, not the runs': they are what the policy lets through.
        style=Markup((folder / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        digest=digest,
        light=LIGHT,
        dark=DARK,
        sections=sections,
        study=study,
        seeds=seeds,
        decisions=decisions,
        document={"scale": SCALE, "runs": decisions.runs},
        settings=settings(study),
        provenance=provenance(study),
        files=bool(formats),
        formats=formats,
        inline=lambda chart: Markup(chart.inline()),
        is_chart=lambda item: hasattr(item, "tables"),
    )
    return printable(page)
