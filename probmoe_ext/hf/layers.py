"""Find the mixture-of-experts layers of a model by what they look like, not by a list of classes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

GATE_NAMES = ("gate", "router")


@dataclass(frozen=True)
class MoELayer:
    """A block with a router and its experts.

    Attributes:
        index: The number of the decoder layer (the last number in ``path``).
        path: Where the gate is in the model, ``"model.layers.3.mlp.gate"``.
        gate: The router module, with a ``weight`` ``[E, H]``.
        experts: The module that evaluates the experts.
    """

    index: int
    path: str
    gate: nn.Module
    experts: nn.Module


def moe_layers(model: nn.Module, layers: Iterable[int] | None = None) -> list[MoELayer]:
    """The mixture-of-experts layers of a model, in order.

    A layer is any module with a child ``experts`` beside a child ``gate`` or ``router`` whose ``weight`` is 2-D.

    Args:
        model: Any module.
        layers: Numbers of decoder layers, as in the names of their parameters; ``None`` for every layer with experts.

    Raises:
        TypeError: If ``model`` is no module, or ``layers`` holds something else than ints.
        ValueError: If there is no such layer (the message names the classes that are there), or one that was asked for
            is missing.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = list(find_layers(model))
    if not found:
        classes = sorted({type(module).__name__ for module in model.modules() if any(module.children())})
        raise ValueError(
            f"{type(model).__name__} has no mixture-of-experts layer: no module with a child `experts` beside a "
            f"`gate` (or `router`) that has a weight [experts, hidden]. Its modules are of the classes "
            f"{', '.join(classes) or type(model).__name__}"
        )
    if layers is None:
        return found
    wanted = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]
    if any(isinstance(index, bool) or not isinstance(index, int) for index in wanted):
        raise TypeError(f"layers must be ints, got {layers!r}")
    known = {layer.index for layer in found}
    missing = sorted(set(wanted) - known)
    if missing or not wanted:
        raise ValueError(
            f"layers must be among the mixture-of-experts layers of {type(model).__name__}, "
            f"{', '.join(map(str, sorted(known)))}; got {', '.join(map(str, missing)) or 'none'}"
        )
    return [layer for layer in found if layer.index in wanted]


def find_layers(model: nn.Module) -> Iterator[MoELayer]:
    """The mixture-of-experts layers of a model, if there are any."""
    for path, block in model.named_modules():
        children = dict(block.named_children())
        if "experts" not in children:
            continue
        for name in GATE_NAMES:
            gate = children.get(name)
            if gate is not None and len(shape_of(getattr(gate, "weight", None))) == 2:
                numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)
                index = int(numbers[-1]) if numbers else 0
                yield MoELayer(index, f"{path}.{name}" if path else name, gate, children["experts"])
                break


def shape_of(tensor: Any) -> torch.Size:
    """The shape of a whole parameter, on a process that holds a part of it, or none; ``()`` for what is no tensor.

    DeepSpeed's ZeRO-3 leaves an empty tensor and keeps the shape beside it (``ds_shape``).
    """
    shape: torch.Size = getattr(tensor, "ds_shape", getattr(tensor, "shape", torch.Size()))
    return shape
