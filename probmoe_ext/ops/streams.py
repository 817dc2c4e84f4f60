"""Independent draws on processes whose generators are in the same state.

Training launchers seed every process alike, and draws are counted by row: without more, row t of each process would
get the same uniforms. So a seed that is drawn from torch's generator is shifted by the number of the process's stream.
Seeds that a caller gives are used as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ODD = 0x9E3779B97F4A7C15 - (1 << 64)
"""2^64 divided by the golden ratio, odd: multiples by different numbers below 2^64 differ, as wrapped int64."""

_chosen: int | None = None


def set_sample_stream(stream: int | None) -> None:
    """Choose the stream of this process's draws; processes that see the same tokens must have the same one.

    Args:
        stream: A number below 2^31; 0 draws as a single process does. ``None``, as from the start, is the rank in the
            default group of ``torch.distributed``, which is right where each process has a batch of its own (data
            parallelism, FSDP, ZeRO). Where processes share a batch (tensor, expert or context parallelism) it must be
            the number of the batch, for example ``rank // tp_size``; :func:`probmoe_ext.hf.swap_router` does so
            for models that transformers split.

    Raises:
        TypeError: If ``stream`` is no int.
        ValueError: If it is out of range.
    """
    global _chosen
    if stream is not None:
        if isinstance(stream, bool) or not isinstance(stream, int):
            raise TypeError(f"stream must be None or an int, not {stream!r}")
        if not 0 <= stream < 1 << 31:
            raise ValueError(f"stream must be at least 0 and below 2^31, not {stream}")
    _chosen = stream


def sample_stream() -> int:
    """The stream of this process's draws, see :func:`set_sample_stream`."""
    if _chosen is not None:
        return _chosen
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return 0


def spread_seed(seed: Tensor) -> Tensor:
    """The seed of this process's stream: ``seed + stream * odd``, modulo 2^64."""
    stream = sample_stream()
    return seed if stream == 0 else seed + (stream * _ODD + (1 << 63)) % (1 << 64) - (1 << 63)
