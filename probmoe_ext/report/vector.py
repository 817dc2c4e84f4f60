"""Figures as SVG inside a page: they take its colours and type, and share no name with each other."""

from __future__ import annotations

import re
from io import BytesIO
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

from probmoe_ext.report.style import LIGHT

_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
_ROLES = {colour: role for role, colour in LIGHT.items()}
_COLOUR = re.compile("|".join(LIGHT.values()), re.IGNORECASE)
_FAMILY = re.compile(r"'DejaVu Sans'[^;]*")
_LOCAL = re.compile(r"url\(#([^)]+)\)")


def inline_svg(figure: Figure, name: str, title: str) -> str:
    """A figure as an ``<svg>`` element.

    Colours that play a role become the page's custom properties (``var(--ink)``), text stays text in the page's font,
    and every id begins with `name`, so that several figures fit in one page.

    Args:
        figure: drawn with the colours of `style.LIGHT`.
        name: unique in the page.
        title: what a screen reader announces.
    """
    buffer = BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    ElementTree.register_namespace("", _SVG)
    ElementTree.register_namespace("xlink", _LINK)
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            # What the file says of itself, and rules that would reach the whole page.
            if child.tag in (f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"):
                parent.remove(child)
    for element in root.iter():
        for key, value in element.attrib.items():
            element.set(key, _adapt(key, value, name))
    width = float(root.attrib.pop("width").removesuffix("pt"))
    root.attrib.pop("height")
    # Wider than a narrow screen rather than too small to read there: the page lets the figure scroll in its place.
    root.set("style", f"max-width:{width * 4 / 3:.0f}px;min-width:{width:.0f}px")
    root.set("role", "img")
    root.set("aria-label", title)
    return ElementTree.tostring(root, encoding="unicode")


def _adapt(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key in ("href", f"{{{_LINK}}}href") and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    if key in ("style", "fill", "stroke"):
        value = _COLOUR.sub(lambda found: f"var(--{_ROLES[found[0].lower()]})", value)
        value = _FAMILY.sub("var(--sans)", value)
    return _LOCAL.sub(rf"url(#{name}-\1)", value)
