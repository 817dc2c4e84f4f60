"""Tokens that are padding: how the routers of a model learn which ones, so that no loss and no statistic counts them.

A gate sees hidden states ``[T, H]`` and no mask. The mask of a batch is therefore kept in a cell that all gates of a
model hold (:class:`~probmoe_ext.routers.context.Batch`). It is filled from the ``attention_mask`` that the model is
called with, as long as somebody wants it (a router with a loss, a monitor); where that is not possible,
:func:`padding_mask` fills it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from probmoe_ext.hf.context import acquire, batch_of, release


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
    cells = acquire(model)
    before = [(cell.mask, cell.given) for cell in cells]
    try:
        for cell in cells:
            cell.mask, cell.given = mask.flatten().bool(), True
        yield
    finally:
        for cell, (value, given) in zip(cells, before, strict=True):
            cell.mask, cell.given = value, given
        release(model, cells)


def mask_of(gate: nn.Module, tokens: int) -> torch.Tensor | None:
    """Which of the tokens that a gate (or router) sees count, ``[T]`` bool; ``None``: all.

    Raises:
        ValueError: If the mask is for another number of tokens.
    """
    cell = batch_of(gate)
    if cell is None or cell.mask is None:
        return None
    if cell.mask.numel() != tokens:
        raise ValueError(
            f"the padding mask has {cell.mask.numel()} values, and the router sees {tokens} tokens; "
            "use padding_mask(model, mask) with a value for each token"
        )
    return cell.mask
