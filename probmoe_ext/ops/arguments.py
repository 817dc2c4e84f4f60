"""What an argument may be, checked before anything is launched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .streams import spread_seed

Cardinality: TypeAlias = "int | tuple[int, int]"

HALF_TYPES = (torch.bfloat16, torch.float16)
FLOAT_TYPES = (torch.float32, torch.float64, *HALF_TYPES)
DEVICES = ("cpu", "cuda", "meta")


def single(value: Tensor) -> Tensor:
    """Half precision as float32: what comes between the argument and the result must not be rounded to it."""
    return value.float() if value.dtype in HALF_TYPES else value


def nothing_watches(tensor: Tensor) -> bool:
    """Whether this is a call on a plain CPU tensor that no compiler, ``torch.func`` transform or mode looks at."""
    return (
        type(tensor) is Tensor
        and tensor.is_cpu
        and not is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
    )


def check_logits(logits: Tensor, name: str = "logits") -> None:
    """Raises unless ``logits`` is a floating tensor ``[..., E]`` with E >= 1 on a device that has kernels."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(logits).__name__}")
    if logits.dtype not in FLOAT_TYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, not {logits.dtype}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"{name} must have shape [..., E] with E >= 1 experts in the last dimension, not {tuple(logits.shape)}"
        )
    if not logits.is_cpu and logits.device.type not in DEVICES:
        raise ValueError(f"{name} must be on the CPU or a CUDA device, not on {logits.device}")


def check_band(k: Cardinality, num_experts: int) -> tuple[int, int]:
    """``(k_min, k_max)`` from ``k``, within ``0 <= k_min <= k_max <= num_experts``."""
    if type(k) is int:  # spares the usual case the walk through what else k may be
        k_min = k_max = k
    else:
        band = k if isinstance(k, tuple | list) else (k, k)
        if len(band) != 2 or any(isinstance(n, bool) or not isinstance(n, int | torch.SymInt) for n in band):
            raise TypeError(f"k must be an int or a pair of ints (k_min, k_max), not {k!r}")
        k_min, k_max = band
    if not 0 <= k_min <= k_max <= num_experts:
        raise ValueError(f"k must satisfy 0 <= k_min <= k_max <= E = {num_experts}, not {k!r}")
    return k_min, k_max


def apply_mask(value: Tensor, mask: Tensor | None, name: str = "logits", fill: float = -torch.inf) -> Tensor:
    """``value`` ``[..., E]``, broadcast with ``mask``, and ``fill`` where that is False.

    One pass before the operator, whose kernels know a logit of -inf as an expert that takes no part: a mask of its own
    would save that pass and the copy, and cost every kernel a second input.
    """
    if mask is None:
        return value
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        said = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"mask must be a bool tensor (True keeps the expert), not {said}")
    if mask.device != value.device:
        raise ValueError(f"mask is on {mask.device} and {name} on {value.device}, but must be together")
    try:
        shape = torch.broadcast_shapes(mask.shape, value.shape)
    except RuntimeError:
        shape = torch.Size()
    if shape[-1:] != value.shape[-1:]:
        raise ValueError(
            f"mask must have shape [..., E], broadcastable with that of {name}, {tuple(value.shape)}, "
            f"not {tuple(mask.shape)}"
        )
    return torch.where(mask, value, fill)


def check_like(other: Tensor, logits: Tensor, name: str, like: str = "logits") -> None:
    """Raises unless ``other`` is a floating tensor with the shape and device of ``logits``."""
    if not isinstance(other, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(other).__name__}")
    if other.dtype not in FLOAT_TYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, not {other.dtype}")
    if other.shape != logits.shape:
        raise ValueError(f"{name} must have the shape of {like} {tuple(logits.shape)}, not {tuple(other.shape)}")
    if other.device != logits.device:
        raise ValueError(f"{name} is on {other.device} and {like} on {logits.device}, but must be together")


def check_indices(indices: Tensor, logits: Tensor, k_max: int) -> None:
    """Raises unless ``indices`` is int64 ``[..., k_max]`` beside ``logits``."""
    if not isinstance(indices, Tensor):
        raise TypeError(f"indices must be a torch.Tensor, not {type(indices).__name__}")
    if indices.dtype != torch.int64:
        raise TypeError(f"indices must be int64, not {indices.dtype}")
    expected = (*logits.shape[:-1], k_max)
    if tuple(indices.shape) != expected:
        raise ValueError(f"indices must have shape {expected} (one slot for each of k_max), not {tuple(indices.shape)}")
    if indices.device != logits.device:
        raise ValueError(
            f"indices are on {indices.device} and logits on {logits.device}; they must be on the same device"
        )


def make_seed(seed: int | Tensor | None, logits: Tensor) -> Tensor:
    """The int64 scalar that keys the draws: fresh from torch's generator of the device, or the caller's."""
    if seed is None:
        return spread_seed(torch.randint(-(1 << 63), (1 << 63) - 1, (), dtype=torch.int64, device=logits.device))
    if isinstance(seed, bool) or not isinstance(seed, int | Tensor):
        raise TypeError(f"seed must be None, an int or an int64 tensor of one element, not {type(seed).__name__}")
    if isinstance(seed, int):
        if not -(1 << 63) <= seed < 1 << 63:
            raise ValueError(f"seed must fit a signed 64-bit integer, not {seed}")
        return torch.tensor(seed, dtype=torch.int64, device=logits.device)
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise TypeError(f"seed must be an int64 tensor of one element, not {seed.dtype} {tuple(seed.shape)}")
    if seed.device != logits.device:
        raise ValueError(f"seed is on {seed.device} and logits on {logits.device}, but must be together")
    return seed


def launch(op: Callable[..., Any], *args: Any) -> Any:
    """Calls an operator; what only the data can tell (a row, an index) is a ``ValueError`` too."""
    if is_compiling():
        return op(*args)
    try:
        return op(*args)
    except RuntimeError as error:
        text = str(error)
        if "fewer than k_min" not in text and "indices must lie in" not in text:
            raise
        raise ValueError(text.partition("\n")[0].removeprefix("probmoe_ext::").partition(": ")[2]) from None
