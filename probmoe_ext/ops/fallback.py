"""Operators on a GPU where this build has no kernel: the plain-torch reference, correct and slow.

A row costs a pass over the experts in Python-launched operations, so a forward pass takes milliseconds rather than
microseconds. Samples are the same as on the CPU, and everything built on the operators works. Unlike a kernel, the
reference looks at the data, which waits for the device and rules out CUDA graphs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _C, reference
from .subset import k_hot

COMPILED = (
    frozenset({"route_top_k", "route_top_k_backward"}) if _C.build_info()["cuda"] is not None else frozenset[str]()
)
"""Operators with CUDA kernels in this build; the rest fall back."""


def cardinality_backward(grad: Tensor, logits: Tensor, k_min: int, k_max: int) -> Tensor:
    """The vector-Jacobian product of the sizes' probabilities."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        (grad_logits,) = torch.autograd.grad(reference.subset_cardinality(leaf, (k_min, k_max)), leaf, grad)
    return grad_logits


def route_probmoe(
    logits: Tensor, seed: Tensor | None, k_min: int, k_max: int, sample: bool, normalize: bool, marginal: bool
) -> tuple[Tensor, Tensor]:
    """Weights and experts; the gradient is an operator of its own, so ``marginal`` is not needed here."""
    forward: Any = "sample" if sample else "topk"
    with torch.no_grad():
        return reference.route_probmoe(
            logits, (k_min, k_max), training=sample, normalize=normalize, forward=forward, backward="ste", seed=seed
        )


def route_probmoe_backward(
    grad_weights: Tensor, logits: Tensor, indices: Tensor, k_min: int, k_max: int, normalize: bool, marginal: bool
) -> Tensor:
    """``C (h s) + J_softmax^T (h z)``, h the upstream gradient on S (with ``normalize``, what reaches each expert)."""
    experts = logits.shape[-1]
    r = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    s = torch.softmax(r, dim=-1)
    slots = s.new_zeros((*s.shape[:-1], experts + 1))  # unused slots fall into the last column
    z = k_hot(indices, experts, s.dtype)
    h = slots.scatter(-1, indices, grad_weights.to(s.dtype))[..., :experts]
    if normalize:
        total = (z * s).sum(-1, keepdim=True)
        total = torch.where(total > 0, total, 1)
        h = (h - (h * s).sum(-1, keepdim=True) / total) / total
    direct = h * s * z
    grad = direct - s * direct.sum(-1, keepdim=True)
    if marginal:
        grad = grad + reference.subset_covariance_vp(r, h * s, (k_min, k_max))
    return grad.to(logits.dtype)


def _banded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reference function of ``(logits, ..., k)`` as an operator of ``(logits, ..., k_min, k_max)``."""

    def op(*args: Any) -> Any:
        *tensors, k_min, k_max = args
        with torch.no_grad():
            return function(*tensors, (k_min, k_max))

    return op


FALLBACKS: dict[str, Callable[..., Any]] = {
    **{
        f"subset_{name}": _banded(getattr(reference, f"subset_{name}"))
        for name in ("log_partition", "cardinality", "marginals", "covariance_vp", "entropy", "log_prob", "mode")
    },
    "subset_cardinality_backward": cardinality_backward,
    "subset_sample": lambda logits, seed, k_min, k_max: reference.subset_sample(logits, (k_min, k_max), seed),
    "route_top_k": lambda logits, k, normalize: route_probmoe(logits, None, k, k, False, normalize, False),
    "route_top_k_backward": lambda grad, logits, indices, normalize: route_probmoe_backward(
        grad, logits, indices, indices.shape[-1], indices.shape[-1], normalize, False
    ),
    "route_probmoe": route_probmoe,
    "route_probmoe_backward": route_probmoe_backward,
}
"""By raw operator, with its arguments."""


def _warning_once(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def op(*args: Any) -> Any:
        if not _warned:
            _warned.append(name)
            warnings.warn(
                f"probmoe_ext::{name} has no CUDA kernel in this build and runs as plain torch, correct but slow",
                stacklevel=2,
            )
        return function(*args)

    return op


_warned: list[str] = []


def register_fallbacks() -> None:
    """Registers, for CUDA tensors, every fallback whose operator has no kernel; called once, on import."""
    for name, function in FALLBACKS.items():
        if name not in COMPILED:
            torch.library.impl(f"probmoe_ext::{name}", "CUDA")(_warning_once(name, function))
