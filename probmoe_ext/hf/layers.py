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
        index: The number of the decoder layer (the last number in the path of the block).
        path: Where the gate is in the model, ``"model.layers.3.mlp.gate"``.
        gate: The router module, with a weight ``[E, H]``; inside of what an adapter may have wrapped around it.
        experts: The module that evaluates the experts, likewise.
        place: The path of ``holder``; that of ``gate`` but for wrappers.
        holder: The block's own child, which is ``gate`` or the outermost wrapper around it.
        block: The module that calls both.
        others: Further gates in the wrapper of the gate, not in use now (``modules_to_save`` keeps the original).
    """

    index: int
    path: str
    gate: nn.Module
    experts: nn.Module
    place: str
    holder: nn.Module
    block: nn.Module
    others: tuple[nn.Module, ...] = ()


def moe_layers(model: nn.Module, layers: Iterable[int] | None = None) -> list[MoELayer]:
    """The mixture-of-experts layers of a model, in order.

    A layer is any module with a child ``experts`` beside a child ``gate`` or ``router`` that holds one 2-D weight.
    Adapters of PEFT around either are looked through.

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
            if name not in children:
                continue
            inside, gate, others = _unwrap(children[name])
            if gate_weight(gate) is not None:
                numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", path)
                index = int(numbers[-1]) if numbers else 0
                place = f"{path}.{name}" if path else name
                _, experts, _ = _unwrap(children["experts"])
                yield MoELayer(index, ".".join((place, *inside)), gate, experts, place, children[name], block, others)
                break


def shape_of(tensor: Any) -> torch.Size:
    """The shape of a whole parameter, on a process that holds a part of it, or none; ``()`` for what is no tensor.

    DeepSpeed's ZeRO-3 leaves an empty tensor and keeps the shape beside it (``ds_shape``).
    """
    shape: torch.Size = getattr(tensor, "ds_shape", getattr(tensor, "shape", torch.Size()))
    return shape


def gate_weight(gate: nn.Module) -> str | None:
    """The name of the ``[E, H]`` weight in a gate: ``weight``, or the only 2-D weight of its children.

    ``None`` if there is no such tensor, or more than one that could be meant.
    """
    if len(shape_of(getattr(gate, "weight", None))) == 2:
        return "weight"
    found = [
        name for name, one in gate.named_parameters() if len(shape_of(one)) == 2 and not name.startswith("probmoe.")
    ]
    return found[0] if len(found) == 1 and found[0].endswith(".weight") else None


def _unwrap(module: nn.Module) -> tuple[list[str], nn.Module, tuple[nn.Module, ...]]:
    """Look through PEFT's wrappers: the names on the way, the module in use, and others in its place."""
    inside: list[str] = []
    others: list[nn.Module] = []
    while True:
        children = module._modules
        base, original, copies = (children.get(one) for one in ("base_layer", "original_module", "modules_to_save"))
        if base is not None:
            inside.append("base_layer")
            module = base
        elif original is not None and isinstance(copies, nn.ModuleDict):
            active = [name for name in getattr(module, "active_adapters", ()) if name in copies]
            inside += ["modules_to_save", active[0]] if active else ["original_module"]
            held = [original, *copies.values()]
            module = copies[active[0]] if active else original
            others += [one for one in held if one is not module]
        else:
            return inside, module, tuple(others)
