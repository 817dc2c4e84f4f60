"""Tokens that are padding: how the routers of a model learn which ones, so that no loss and no statistic counts them.

A gate sees hidden states ``[T, H]`` and no mask. The mask of a batch is therefore kept in a cell that all gates of a
model hold (:class:`~probmoe_ext.routers.base.TokenMask`): no global variable, and seen from the threads in which
autograd replays a checkpointed layer. It is filled from the ``attention_mask`` that the model is called with, as long
as somebody wants it (a router with a loss, a monitor); where that is not possible, :func:`padding_mask` fills it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from probmoe_ext.hf.layers import find_layers
from probmoe_ext.routers import Router
from probmoe_ext.routers.base import TokenMask

CELL = "token_mask_cell"


@contextmanager
def padding_mask(model: nn.Module, mask: torch.Tensor) -> Iterator[None]:
    """Say which tokens count while a model runs, forward and backward: the others are padding.

    Needed only where the model is not called with a 2-D ``attention_mask``: for a 4-D mask, packed sequences, tokens
    of a prompt that should not count. It goes before what the model is called with::

        with padding_mask(model, keep):
            model(input_ids, attention_mask=four_dimensional, labels=labels).loss.backward()

    Args:
        model: A model with mixture-of-experts layers, swapped or not.
        mask: ``[batch, length]``, or all tokens of the batch in a row, bool or 0/1; true for tokens that count.
    """
    cells = _acquire(model)
    before = [(cell.value, cell.given) for cell in cells]
    try:
        for cell in cells:
            cell.value, cell.given = mask.flatten().bool(), True
        yield
    finally:
        for cell, (value, given) in zip(cells, before, strict=True):
            cell.value, cell.given = value, given
        _release(model, cells)


class PaddingCarrier:
    """Fills the cells of a model from its ``attention_mask``: hooks before and after its forward pass.

    In training the mask stays until the next forward pass, for layers that the backward pass replays.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.cells = _acquire(model)
        names = list(inspect.signature(model.forward).parameters)
        self.place = names.index("attention_mask") if "attention_mask" in names else len(names)
        self.handles = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after),
        ]

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note which tokens count."""
        mask = args[self.place] if len(args) > self.place else kwargs.get("attention_mask")
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs.get("inputs_embeds")
        flat = None
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and isinstance(tokens, torch.Tensor):
            # With a cache the mask covers what came before, too.
            flat = mask[:, mask.shape[1] - tokens.shape[1] :].flatten().bool()
        for cell in self.cells:
            if not cell.given:
                cell.value = flat

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        """Forget it, if nothing will be replayed."""
        if not model.training:
            for cell in self.cells:
                if not cell.given:
                    cell.value = None

    def remove(self) -> None:
        """Take the hooks away, and the cells if nobody else wants them."""
        for handle in self.handles:
            handle.remove()
        _release(self.model, self.cells)


def mask_of(gate: nn.Module, tokens: int) -> torch.Tensor | None:
    """Which of the tokens that a gate sees count, ``[T]`` bool; ``None``: all.

    Raises:
        ValueError: If the mask is for another number of tokens.
    """
    cell: TokenMask | None = getattr(gate, CELL, None)
    if cell is None or cell.value is None:
        return None
    if cell.value.numel() != tokens:
        raise ValueError(
            f"the padding mask has {cell.value.numel()} values, and the router sees {tokens} tokens; "
            "use padding_mask(model, mask) with a value for each token"
        )
    return cell.value


def _places(model: nn.Module) -> list[nn.Module]:
    gates = [layer.gate for layer in find_layers(model)]
    return [*gates, *(module for module in model.modules() if isinstance(module, Router))]


def _acquire(model: nn.Module) -> list[TokenMask]:
    """The cells of the gates of a model, made if there are none."""
    made, found = TokenMask(), {}
    for place in _places(model):
        if getattr(place, CELL, None) is None:
            setattr(place, CELL, made)
        cell: TokenMask = getattr(place, CELL)
        found[id(cell)] = cell
    for cell in found.values():
        cell.users += 1
    return list(found.values())


def _release(model: nn.Module, cells: list[TokenMask]) -> None:
    for cell in cells:
        cell.users -= 1
    for place in _places(model):
        held: TokenMask | None = place.__dict__.get(CELL)
        if held is not None and held.users <= 0:
            delattr(place, CELL)
