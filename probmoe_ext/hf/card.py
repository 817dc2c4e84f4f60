"""The section of a model card that says how a model routes and how it is loaded."""

from __future__ import annotations

import re

from torch import nn

from probmoe_ext.hf.entry import BAND
from probmoe_ext.hf.swap import routing_of

CARD = "README.md"
BEGIN, END = "<!-- probmoe_ext: begin -->", "<!-- probmoe_ext: end -->"


def model_card(model: nn.Module, name: str = "path/or/name") -> str:
    """Describe the routing of a model, and how to load it, as a section in Markdown.

    Args:
        model: A model after :func:`probmoe_ext.hf.swap_router`.
        name: What to write for the model's folder or name on the hub.

    Returns:
        The section, between two comments by which it is found and replaced later; empty if nothing was swapped.
    """
    routing = routing_of(model)
    if not routing:
        return ""
    from probmoe_ext import __version__

    groups: dict[str, list[int]] = {}
    for one in routing.values():
        k = one["k"] if isinstance(one["k"], int) else f"{one['k'][0]} to {one['k'][1]}"
        options = ", ".join(f"`{option}={value!r}`" for option, value in one["options"].items()) or "none"
        groups.setdefault(f"| `{one['router']}` | {k} | {options} |", []).append(one["layer"])
    lines = [f"{row} {_ranges(layers)} |" for row, layers in groups.items()]
    state = [name for name in model.state_dict() if ".probmoe." in name]
    if not state:
        plain = (
            "In evaluation this is the model's own top-k routing, so any software that runs the base model runs this "
            "checkpoint, with the same results."
        )
    else:
        what = "keeps the size of the band" if all(one.endswith(f".{BAND}") for one in state) else "keeps the routers"
        plain = (
            f"`AutoModel*.from_pretrained` loads the base model with its own top-k routing and reports the tensors "
            f"`*.probmoe.*`, in which this checkpoint {what}, as unexpected."
        )
    return "\n".join(
        [
            BEGIN,
            "## Routing",
            "",
            "The mixture-of-experts layers of this model are routed by "
            f"[probmoe_ext](https://pypi.org/project/probmoe_ext/) {__version__}.",
            "",
            "| router | experts per token | options | layers |",
            "|---|---|---|---|",
            *lines,
            "",
            "```python",
            "import probmoe_ext",
            "",
            f'model = probmoe_ext.from_pretrained("{name}")',
            "```",
            "",
            plain,
            END,
        ]
    )


def with_section(card: str, model: nn.Module) -> str:
    """A model card with the section of a model in the place of an earlier one, or at its end."""
    section = model_card(model)
    without = re.sub(rf"\n*{re.escape(BEGIN)}.*?{re.escape(END)}\n*", "\n", card, flags=re.DOTALL)
    if not section:
        return without
    if not without.strip():
        without = "---\nlibrary_name: transformers\ntags:\n- mixture-of-experts\n- probmoe\n---\n"
    return f"{without.rstrip()}\n\n{section}\n"


def _ranges(numbers: list[int]) -> str:
    """``0–2, 5`` for ``[0, 1, 2, 5]``."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}–{last}" for first, last in runs)
