"""The subset family: cardinality-constrained subsets of experts (conditional Bernoulli), exact; its sums and moments.

``P(S) = exp(sum of logits over S) / Z`` on the subsets with ``k_min <= |S| <= k_max``. Derivatives close on themselves:
``log_partition -> marginals -> covariance_vp``. Each result equals its closed form up to rounding: no relaxation, no
clamp.
Sources: Chen, Dempster & Liu, "Weighted finite population sampling to maximize entropy", Biometrika 81 (1994); ProbMoE,
arXiv 2606.01509, section 3.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C  # noqa: F401  (registers the operators)
from .arguments import Cardinality, apply_mask, check_band, check_like, check_logits, launch
from .registration import keep, refuse_derivative, register
from .subset_third import third_derivative


def save_logits(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits, ctx.k_min, ctx.k_max = inputs
    keep(ctx, logits)


def per_row(logits: Tensor, k_min: int, k_max: int) -> Tensor:
    return logits.new_empty(logits.shape[:-1])


def _per_expert(logits: Tensor, k_min: int, k_max: int) -> Tensor:
    return logits.new_empty(logits.shape)


def k_hot(indices: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    """The 0/1 vectors ``[..., E]`` of index lists ``[..., K]``; unused slots (index E) count for nothing."""
    columns = torch.zeros((*indices.shape[:-1], num_experts + 1), dtype=dtype, device=indices.device)
    return columns.scatter(-1, indices, 1.0)[..., :num_experts]


# ---- log partition ------------------------------------------------------------------------------------------------


def _log_partition_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (logits,) = ctx.saved_tensors
    return grad.unsqueeze(-1) * marginals(logits, ctx.k_min, ctx.k_max), None, None


def _log_partition_jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
    (logits,) = ctx.saved_tensors
    return (marginals(logits, ctx.k_min, ctx.k_max) * tangent).sum(-1)


_log_partition = register("subset_log_partition", per_row, _log_partition_backward, save_logits, _log_partition_jvp)


def subset_log_partition(logits: Tensor, k: Cardinality, *, mask: Tensor | None = None) -> Tensor:
    """Logarithm of the partition function, ``log Z``, ``Z`` the sum of ``e_j(exp(logits))`` over the sizes of the band.

    Args:
        logits: ``[..., E]``, floating; -inf masks an expert out.
        k: The size, or ``(k_min, k_max)``, ``0 <= k_min <= k_max <= E``.
        mask: bool, broadcastable with ``logits``: True keeps an expert, False is a logit of -inf. A TypeError if it is
            not bool, a ValueError if it does not fit.

    Returns:
        ``[...]``, in nats, computed in double precision. Twice differentiable: its gradient is
        :func:`subset_marginals`.

    Raises:
        TypeError: ``logits`` is no floating tensor, or ``k`` no int or pair of ints.
        ValueError: ``k`` is out of range, or a row has fewer than ``k_min`` unmasked experts (the message names it).
    """
    check_logits(logits)
    logits = apply_mask(logits, mask)
    return launch(_log_partition, logits, *check_band(k, logits.shape[-1]))


# ---- cardinality --------------------------------------------------------------------------------------------------


def _cardinality_fake(logits: Tensor, k_min: int, k_max: int) -> Tensor:
    return logits.new_empty((*logits.shape[:-1], k_max - k_min + 1))


def _cardinality_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (logits,) = ctx.saved_tensors
    return _cardinality_vjp(grad, logits, ctx.k_min, ctx.k_max), None, None


def _cardinality_jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
    (logits,) = ctx.saved_tensors
    sizes = ctx.k_max - ctx.k_min + 1
    # The Jacobian row by row: one vector-Jacobian product for each size.
    units = torch.eye(sizes, dtype=logits.dtype, device=logits.device)
    units = units.reshape(sizes, *(1 for _ in logits.shape[:-1]), sizes).expand(sizes, *logits.shape[:-1], sizes)
    rows = _cardinality_vjp(units, logits.expand(sizes, *logits.shape), ctx.k_min, ctx.k_max)
    return (rows * tangent).sum(-1).movedim(0, -1)


_cardinality = register("subset_cardinality", _cardinality_fake, _cardinality_backward, save_logits, _cardinality_jvp)
_cardinality_vjp = register(
    "subset_cardinality_backward",
    lambda grad, logits, k_min, k_max: logits.new_empty(logits.shape),
    refuse_derivative("subset_cardinality is once differentiable"),
)


def subset_cardinality(logits: Tensor, k: Cardinality, *, mask: Tensor | None = None) -> Tensor:
    """Distribution of the subset's size, ``P(|S| = j) = e_j / Z`` for ``j = k_min, ..., k_max``.

    Args:
        logits: ``[..., E]``, floating; -inf masks an expert out.
        k: The size, or ``(k_min, k_max)``.
        mask: bool, broadcastable with ``logits``: True keeps an expert, False is a logit of -inf. A TypeError if it is
            not bool, a ValueError if it does not fit.

    Returns:
        ``[..., k_max - k_min + 1]`` probabilities; rows sum to 1. Once differentiable.

    Raises:
        TypeError: ``logits`` is no floating tensor, or ``k`` no int or pair of ints.
        ValueError: ``k`` is out of range, or a row has fewer than ``k_min`` unmasked experts.
    """
    check_logits(logits)
    logits = apply_mask(logits, mask)
    return launch(_cardinality, logits, *check_band(k, logits.shape[-1]))


# ---- marginals and their covariance -------------------------------------------------------------------------------


def _marginals_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (logits,) = ctx.saved_tensors
    return covariance_vp(logits, grad, ctx.k_min, ctx.k_max), None, None


def _save_both(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    logits, v, ctx.k_min, ctx.k_max = inputs
    ctx.set_materialize_grads(False)
    keep(ctx, logits, v)


def _marginals_jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
    (logits,) = ctx.saved_tensors
    return covariance_vp(logits, tangent, ctx.k_min, ctx.k_max)


def _covariance_backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None, None, None]:
    logits, v = ctx.saved_tensors
    grad_logits = grad_v = None
    if grad is not None and ctx.needs_input_grad[0]:
        grad_logits = third_derivative(logits, v, grad, ctx.k_min, ctx.k_max)
    if grad is not None and ctx.needs_input_grad[1]:
        grad_v = covariance_vp(logits, grad, ctx.k_min, ctx.k_max)
    return grad_logits, grad_v, None, None


def _covariance_jvp(ctx: Any, logits_tangent: Tensor | None, v_tangent: Tensor | None, *_: None) -> Tensor:
    logits, v = ctx.saved_tensors
    tangent = torch.zeros_like(logits)
    if logits_tangent is not None:
        # T(v, t): the third derivative of log Z is symmetric, too.
        tangent = third_derivative(logits, v, logits_tangent, ctx.k_min, ctx.k_max)
    if v_tangent is not None:
        tangent = tangent + covariance_vp(logits, v_tangent, ctx.k_min, ctx.k_max)
    return tangent


marginals = register("subset_marginals", _per_expert, _marginals_backward, save_logits, _marginals_jvp)
covariance_vp = register(
    "subset_covariance_vp",
    lambda logits, v, k_min, k_max: logits.new_empty(logits.shape),
    _covariance_backward,
    _save_both,
    _covariance_jvp,
)


def subset_marginals(logits: Tensor, k: Cardinality, *, mask: Tensor | None = None) -> Tensor:
    """Inclusion probabilities ``m_i = P(i in S)``, the gradient of ``log Z``.

    Args:
        logits: ``[..., E]``, floating; -inf masks an expert out (its marginal is 0).
        k: The size, or ``(k_min, k_max)``.
        mask: bool, broadcastable with ``logits``: True keeps an expert, False is a logit of -inf. A TypeError if it is
            not bool, a ValueError if it does not fit.

    Returns:
        ``[..., E]`` in [0, 1]; rows sum to the expected size. The vector-Jacobian product is exact
        (:func:`subset_covariance_vp`; the Jacobian is symmetric).

    Raises:
        TypeError: ``logits`` is no floating tensor, or ``k`` no int or pair of ints.
        ValueError: ``k`` is out of range, or a row has fewer than ``k_min`` unmasked experts.
    """
    check_logits(logits)
    logits = apply_mask(logits, mask)
    return launch(marginals, logits, *check_band(k, logits.shape[-1]))


def subset_covariance_vp(logits: Tensor, v: Tensor, k: Cardinality, *, mask: Tensor | None = None) -> Tensor:
    """Covariance-vector product ``C v`` with ``C_ij = P(i, j in S) - m_i m_j``, in O(E k) and without the matrix.

    Args:
        logits: ``[..., E]``, floating; -inf masks an expert out.
        v: Same shape, the vector.
        k: The size, or ``(k_min, k_max)``.
        mask: bool, broadcastable with ``logits``: True keeps an expert, False is a logit of -inf. A TypeError if it is
            not bool, a ValueError if it does not fit.

    Returns:
        ``[..., E]``. Differentiable: in ``v`` by itself, in ``logits`` (a third derivative of log Z) in plain torch.

    Raises:
        TypeError: ``logits`` or ``v`` is no floating tensor, or ``k`` no int or pair of ints.
        ValueError: Shapes or devices differ, ``k`` is out of range, or a row has fewer than ``k_min`` unmasked experts.
    """
    check_logits(logits)
    logits = apply_mask(logits, mask)
    check_like(v, logits, "v")
    return launch(covariance_vp, logits, v, *check_band(k, logits.shape[-1]))
