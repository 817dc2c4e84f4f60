"""The parameters of routers by themselves: to freeze them, to give them a learning rate, to see what is trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from torch import nn

from probmoe_ext.hf.layers import find_layers, moe_layers

Model = TypeVar("Model", bound=nn.Module)

GROUPS = (
    ("shared experts", ("shared_expert",)),
    ("attention", ("attn", "attention")),
    ("embeddings and head", ("embed", "lm_head")),
    ("norms", ("norm",)),
)
"""Groups by what occurs in a name; routers and experts are known by their modules."""
ADAPTERS = ("lora_", ".modules_to_save.")


def router_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the routers that are trained: the gates', the routers' own, and those of adapters on either.

    For an optimizer with a learning rate of their own::

        router = router_parameters(model)
        ids = set(map(id, router))
        others = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
        torch.optim.AdamW([{"params": router, "lr": 1e-4}, {"params": others}], lr=1e-5)

    Args:
        model: A model with mixture-of-experts layers, swapped or not.

    Returns:
        Each parameter with ``requires_grad`` once, in the model's order.

    Raises:
        ValueError: If the model has no mixture-of-experts layer.
    """
    return [parameter for parameter in _all_router_parameters(model) if parameter.requires_grad]


def freeze_router(model: Model) -> Model:
    """Stop training the routers, in place: the experts then adapt to a routing that stays.

    Args:
        model: A model with mixture-of-experts layers, swapped or not.

    Returns:
        ``model``, in which no parameter of :func:`router_parameters` requires a gradient.

    Raises:
        ValueError: If the model has no mixture-of-experts layer.
    """
    for parameter in _all_router_parameters(model):
        parameter.requires_grad_(False)
    return model


def parameter_table(model: nn.Module) -> str:
    """How many parameters of each group are trained, as a table in Markdown.

    Args:
        model: Any model, with or without adapters.

    Returns:
        Rows for the routers, the experts, the shared experts, attention, embeddings and head, norms, and the rest, each
        with all parameters, the trained ones, and those of the trained ones that belong to adapters (LoRA, or a copy
        in ``modules_to_save``).
    """
    places = {id(p): "routers" for layer in find_layers(model) for p in layer.holder.parameters()}
    for layer in find_layers(model):
        places |= {id(p): "experts" for p in layer.block.get_submodule("experts").parameters()}
    names = ["routers", "experts", *(group for group, _ in GROUPS), "other"]
    counts = {name: [0, 0, 0] for name in names}
    for path, parameter in model.named_parameters():
        known = next((group for group, words in GROUPS if any(word in path for word in words)), "other")
        row = counts[places.get(id(parameter), known)]
        row[0] += parameter.numel()
        if parameter.requires_grad:
            row[1] += parameter.numel()
            row[2] += parameter.numel() * any(word in path for word in ADAPTERS)
    rows = [(name, *count) for name, count in counts.items() if count[0]]
    rows.append(("all", *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
    lines = ["| parameters | all | trained | of these, adapters |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {a:,} | {b:,} | {c:,} |" for name, a, b, c in rows)])


def _all_router_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    seen: set[int] = set()
    for layer in moe_layers(model):
        for parameter in layer.holder.parameters():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter
