"""Models that the library split over processes: what their routers have to know."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from probmoe_ext.ops import set_sample_stream


def processes_per_batch(model: nn.Module) -> int:
    """How many processes see the same batch, by the library's tensor- or expert-parallel plan; 1 without one."""
    for module in model.modules():
        size: Any = getattr(module, "_tp_size", None)
        if isinstance(size, int) and size > 1:
            return size
    return 1


def share_draws(model: nn.Module) -> None:
    """Let the processes that see the same batch choose the same experts.

    By themselves processes draw independently (:func:`probmoe_ext.ops.set_sample_stream`). Here the stream becomes the
    number of the batch; the generators of these processes must be seeded alike, which is checked as they are now.
    """
    size = processes_per_batch(model)
    if size == 1 or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    # Tensor parallelism is the innermost dimension of the library's mesh.
    set_sample_stream(torch.distributed.get_rank() // size)
    seeds: list[int | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(seeds, torch.initial_seed())
    first = torch.distributed.get_rank() // size * size
    if len(set(seeds[first : first + size])) > 1:
        warnings.warn(
            f"processes {first} to {first + size - 1} share their batches, and must choose the same experts: "
            "call torch.manual_seed with the same number on each before training",
            stacklevel=3,
        )
