"""Hooks that tell the routers of a model about the batch and the layer around them (see routers/context.py)."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from probmoe_ext.hf.gate import SwappedGate
from probmoe_ext.hf.layers import MoELayer, find_layers
from probmoe_ext.routers import Router
from probmoe_ext.routers.context import ATTENTION, BATCH_SHAPE, PREVIOUS_LOGITS, Batch, LayerContext

ON_GATE, ON_ROUTER = "probmoe_batch", "batch"
"""The attributes that hold the cell of the batch."""
CACHES = ("past_key_values", "cache")
"""What a model calls the keys and values of earlier tokens; the second since transformers 5.24."""


class BatchCarrier:
    """Fills the cells of a model from its arguments: hooks before and after its forward pass.

    In training they stay filled until the next forward pass, for layers that the backward pass replays.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.cells = acquire(model)
        routers = [module for module in model.modules() if isinstance(module, Router)]
        self.asked = any(BATCH_SHAPE in router.needs for router in routers)
        names = list(inspect.signature(model.forward).parameters)
        self.place = names.index("attention_mask") if "attention_mask" in names else len(names)
        self.handles = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after),
        ]

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the tokens, and which of them count."""
        mask = args[self.place] if len(args) > self.place else kwargs.get("attention_mask")
        tokens = args[0] if args else kwargs.get("input_ids")
        ids = tokens if isinstance(tokens, torch.Tensor) and tokens.dim() == 2 else None
        if tokens is None:
            tokens = kwargs.get("inputs_embeds")
        shape = None
        if isinstance(tokens, torch.Tensor) and tokens.dim() >= 2:
            shape = (tokens.shape[0], tokens.shape[1])
        flat = None
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and shape is not None:
            # With a cache the mask covers what came before, too.
            flat = mask[:, mask.shape[1] - shape[1] :].flatten().bool()
        cache = next((kwargs[name] for name in CACHES if kwargs.get(name) is not None), None)
        continues = self.asked and _continues(cache, mask, shape)
        for cell in self.cells:
            cell.token_ids, cell.shape, cell.continues = ids, shape, continues
            if not cell.given:
                cell.mask = flat

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        """Forget it, if nothing will be replayed."""
        if not model.training:
            for cell in self.cells:
                cell.token_ids = cell.shape = None
                if not cell.given:
                    cell.mask = None

    def remove(self) -> None:
        """Take the hooks away, and the cells if nobody else wants them."""
        for handle in self.handles:
            handle.remove()
        release(self.model, self.cells)


def _continues(cache: Any, mask: Any, shape: tuple[int, int] | None) -> bool:
    """Whether the tokens of a batch follow others, by a mask that is longer than they are, or else by the cache.

    A cache of fixed size keeps its length on the device, which the second way waits for.
    """
    if shape is None or cache is None:
        return False
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        return mask.shape[1] > shape[1]
    length = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
    return bool(length > 0)


class LayerCarrier:
    """Gives the routers of a model the cells of their layers, fills these, and tells routers that a pass begins."""

    def __init__(self, model: nn.Module) -> None:
        self.handles = [model.register_forward_pre_hook(self.before), model.register_forward_hook(self.after)]
        self.cells: list[LayerContext] = []
        previous = None
        for layer in find_layers(model):
            if not isinstance(layer.gate, SwappedGate):
                previous = None  # its logits are not known
                continue
            cell = LayerContext(previous=previous)
            self.cells.append(cell)
            for gate in (layer.gate, *layer.others):
                router: Any = gate.probmoe
                router.layer = cell
            if ATTENTION in layer.gate.probmoe.needs:
                attention = attention_of(model, layer)
                if attention is not None:
                    self.handles.append(attention.register_forward_hook(_Attention(cell)))
            previous = cell
        routers = [layer.gate.probmoe for layer in find_layers(model) if isinstance(layer.gate, SwappedGate)]
        for router in routers:
            if router.adapts:
                router.peers = tuple(routers)

    def before(self, model: nn.Module, args: Any) -> None:
        """Let routers update what they keep."""
        if model.training:
            for module in model.modules():
                if isinstance(module, Router) and module.adapts:
                    module.begin_pass()

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        """Forget what no replay will need."""
        if not model.training:
            for cell in self.cells:
                cell.logits = cell.attention = cell.residual = None

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()


class _Attention:
    """Notes the attention weights of a layer: the second result of its attention module."""

    def __init__(self, cell: LayerContext) -> None:
        self.cell = cell

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.cell.attention = output[1] if isinstance(output, tuple) and len(output) > 1 else None


def needs_batch(router: Router) -> bool:
    """Whether a router reads the cell of the batch."""
    return router.has_loss or bool(router.needs - {ATTENTION, PREVIOUS_LOGITS})


def needs_layer(router: Router) -> bool:
    """Whether a router reads the cell of its layer, or wants to know that a pass begins."""
    return router.adapts or bool(router.needs & {ATTENTION, PREVIOUS_LOGITS})


def check_context(model: nn.Module, layer: MoELayer, router: Router) -> None:
    """Check that a layer can give a router what it needs.

    Raises:
        ValueError: If the router needs attention weights, and the layer computes none.
    """
    if ATTENTION not in router.needs:
        return
    attention = attention_of(model, layer)
    if attention is None:
        raise ValueError(f"router {router.name!r} needs attention weights, and the layer of {layer.path} has none")
    way = getattr(getattr(attention, "config", None), "_attn_implementation", "eager")
    if way not in (None, "eager"):
        raise ValueError(
            f"router {router.name!r} needs attention weights, which the attention implementation {way!r} does not "
            'return: load the model with attn_implementation="eager"'
        )


def attention_of(model: nn.Module, layer: MoELayer) -> nn.Module | None:
    """The attention module beside the block of a layer, ``None`` without one."""
    block = layer.place.rpartition(".")[0]
    around = model.get_submodule(block.rpartition(".")[0])
    found = [child for name, child in around.named_children() if "attn" in name or "attention" in name]
    modules = [child for child in found if "Norm" not in type(child).__name__]
    return modules[0] if modules else None


def batch_of(place: nn.Module) -> Batch | None:
    """The cell of the batch in a gate or router, ``None`` if nobody wants it."""
    cell: Batch | None = getattr(place, ON_ROUTER if isinstance(place, Router) else ON_GATE, None)
    return cell


def acquire(model: nn.Module) -> list[Batch]:
    """The cells of the gates and routers of a model, made if there are none."""
    made, found = Batch(), {}
    for place, name in _places(model):
        if getattr(place, name, None) is None:
            setattr(place, name, made)
        cell: Batch = getattr(place, name)
        found[id(cell)] = cell
    for cell in found.values():
        cell.users += 1
    return list(found.values())


def release(model: nn.Module, cells: list[Batch]) -> None:
    """Let go of cells; those that nobody uses go."""
    for cell in cells:
        cell.users -= 1
    for place, name in _places(model):
        held: Batch | None = place.__dict__.get(name)
        if held is not None and held.users <= 0:
            delattr(place, name)


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for layer in find_layers(model):
        yield layer.gate, ON_GATE
    for module in model.modules():
        if isinstance(module, Router):
            yield module, ON_ROUTER
