"""The logarithm of a subset's probability, and its mean, the entropy: of the law of :mod:`probmoe_ext.ops.subset`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arguments import Cardinality, apply_mask, check_band, check_indices, check_logits, launch
from .registration import keep, register
from .subset import covariance_vp, k_hot, marginals, per_row, save_logits


def _entropy_gradient(ctx: Any) -> Tensor:
    (logits,) = ctx.saved_tensors
    # In double precision as the value: the direction is the logits, whose size multiplies the rounding of C.
    wide = logits.double()
    slope = covariance_vp(wide, wide.masked_fill(wide == -torch.inf, 0.0), ctx.k_min, ctx.k_max)
    return -slope.to(logits.dtype)


def _entropy_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return grad.unsqueeze(-1) * _entropy_gradient(ctx), None, None


def _entropy_jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
    return (_entropy_gradient(ctx) * tangent).sum(-1)


_entropy = register("subset_entropy", per_row, _entropy_backward, save_logits, _entropy_jvp)


def subset_entropy(logits: Tensor, k: Cardinality, *, mask: Tensor | None = None) -> Tensor:
    """Entropy ``-sum_S P(S) log P(S) = log Z - sum_i m_i r_i`` (with ``0 (-inf) = 0``), in nats.

    Args:
        logits: ``[..., E]``, floating; -inf masks an expert out.
        k: The size, or ``(k_min, k_max)``.
        mask: bool, broadcastable with ``logits``: True keeps an expert, False is a logit of -inf. A TypeError if it is
            not bool, a ValueError if it does not fit.

    Returns:
        ``[...]``, computed in double precision term by term, so that nothing cancels. Twice differentiable: its
        gradient is ``-C r``.

    Raises:
        TypeError: ``logits`` is no floating tensor, or ``k`` no int or pair of ints.
        ValueError: ``k`` is out of range, or a row has fewer than ``k_min`` unmasked experts.
    """
    check_logits(logits)
    logits = apply_mask(logits, mask)
    return launch(_entropy, logits, *check_band(k, logits.shape[-1]))


def _save_subset(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, indices, ctx.k_min, ctx.k_max = inputs
    keep(ctx, logits, indices, output)


def _log_prob_gradient(ctx: Any) -> tuple[Tensor, Tensor]:
    """``z - m``, and which subsets have a probability: of the others nothing is passed on."""
    logits, indices, log_prob = ctx.saved_tensors
    gradient = k_hot(indices, logits.shape[-1], logits.dtype) - marginals(logits, ctx.k_min, ctx.k_max)
    return gradient, (log_prob > -torch.inf) | log_prob.isnan()


def _log_prob_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    gradient, possible = _log_prob_gradient(ctx)
    return torch.where(possible, grad, 0.0).unsqueeze(-1) * gradient, None, None, None


def _log_prob_jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
    gradient, possible = _log_prob_gradient(ctx)
    return torch.where(possible, (gradient * tangent).sum(-1), 0.0)


_log_prob = register(
    "subset_log_prob",
    lambda logits, indices, k_min, k_max: logits.new_empty(logits.shape[:-1]),
    _log_prob_backward,
    _save_subset,
    _log_prob_jvp,
)


def subset_log_prob(logits: Tensor, indices: Tensor, k: Cardinality, *, mask: Tensor | None = None) -> Tensor:
    """Log-probability of a subset, ``sum of logits over S - log Z``.

    Args:
        logits: ``[..., E]``, floating; -inf masks an expert out.
        indices: int64 ``[..., k_max]``, distinct members of S in any order, unused slots at E.
        k: The size, or ``(k_min, k_max)``.
        mask: bool, broadcastable with ``logits``: True keeps an expert, False is a logit of -inf. A TypeError if it is
            not bool, a ValueError if it does not fit.

    Returns:
        ``[...]``, in nats, computed in double precision as a sum of terms of one sign; -inf, with gradient 0, for a
        size outside the band, a masked or a repeated expert. Twice differentiable, with gradient ``z - m``.

    Raises:
        TypeError: A tensor has the wrong dtype, or ``k`` is no int or pair of ints.
        ValueError: Shapes or devices differ, ``k`` is out of range, an index is outside 0..E, or a row has fewer than
            ``k_min`` unmasked experts.
    """
    check_logits(logits)
    logits = apply_mask(logits, mask)
    k_min, k_max = check_band(k, logits.shape[-1])
    check_indices(indices, logits, k_max)
    return launch(_log_prob, logits, indices, k_min, k_max)
