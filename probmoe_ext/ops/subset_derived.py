"""What follows from the subset family's operators: pair probabilities, divergence, and a differentiable draw.

Composed of :mod:`probmoe_ext.ops.subset`, whose derivatives, ``vmap`` rules and promises they inherit.
Sources: Chen, Dempster & Liu, "Weighted finite population sampling to maximize entropy", Biometrika 81 (1994); Ahmed,
Zeng, Niepert & Van den Broeck, "SIMPLE: a gradient estimator for k-subset sampling", ICLR 2023, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .arguments import Cardinality, apply_mask, check_band, check_like, check_logits, single
from .subset import k_hot, subset_marginals
from .subset_draws import subset_mode, subset_sample
from .subset_probability import subset_log_prob


def subset_pairwise(logits: Tensor, k: Cardinality, *, mask: Tensor | None = None) -> Tensor:
    """Joint inclusion probabilities ``P(i in S and j in S)``; ``P(i in S)`` on the diagonal.

    Off the diagonal it is ``m_i P(j in S | i in S)``, where the condition leaves the same law on the other experts and
    a band smaller by one. Nothing is subtracted, so that small probabilities keep their relative accuracy; the matrix
    less ``m m^T`` is the covariance. Cost O(E^2 k_max) a row.

    Args:
        logits: ``[..., E]``, floating; -inf masks an expert out (its row and column are 0).
        k: The size, or ``(k_min, k_max)``.
        mask: bool, broadcastable with ``logits``: True keeps an expert, False is a logit of -inf. A TypeError if it is
            not bool, a ValueError if it does not fit.

    Returns:
        ``[..., E, E]`` in [0, 1], exactly symmetric. Once differentiable.

    Raises:
        TypeError: ``logits`` is no floating tensor, or ``k`` no int or pair of ints.
        ValueError: ``k`` is out of range, or a row has fewer than ``k_min`` unmasked experts.
    """
    check_logits(logits)
    logits = apply_mask(logits, mask)
    k_min, k_max = check_band(k, logits.shape[-1])
    wide = single(logits)
    marginals = subset_marginals(wide, (k_min, k_max)).unsqueeze(-1)
    if k_max == 0:
        return (marginals * marginals.transpose(-1, -2)).to(logits.dtype)
    own = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    others = wide.unsqueeze(-2).masked_fill(own, -torch.inf)
    half = 0.5 * marginals * subset_marginals(others, (max(k_min - 1, 0), k_max - 1))
    # The triangles are equal up to rounding; their mean is symmetric to the last bit.
    return torch.where(own, marginals, half + half.transpose(-1, -2)).to(logits.dtype)


def _naming(name: str, function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Calls an operator whose errors about ``logits`` shall say ``name`` instead."""
    if torch.compiler.is_compiling():
        return function(*args)
    try:
        return function(*args)
    except ValueError as error:
        raise ValueError(str(error).replace("logits", name, 1)) from None


def subset_kl(p_logits: Tensor, q_logits: Tensor, k: Cardinality, *, mask: Tensor | None = None) -> Tensor:
    """Kullback-Leibler divergence ``KL(P || Q) = log Z_Q - log Z_P + sum_i m^P_i (r^P_i - r^Q_i)``, same band for both.

    Computed in double precision relative to P's mode M, as ``log P(M) - log Q(M) + sum_i (m^P_i - [i in M]) (r^P_i -
    r^Q_i)``: what the logits of P and Q share cancels before it is multiplied. For an exact size, where a shift of all
    logits means nothing, their mean difference is taken out too. ``0 (-inf)`` is 0.

    Args:
        p_logits: ``[..., E]``, floating; -inf masks an expert out.
        q_logits: Same shape, any floating dtype.
        k: The size, or ``(k_min, k_max)``.
        mask: bool, broadcastable with both: True keeps an expert, False is a logit of -inf. A TypeError if it is
            not bool, a ValueError if it does not fit.

    Returns:
        ``[...]``, in nats and in the dtype of ``p_logits``, at least 0; +inf, with gradient 0, where Q masks an expert
        that P does not (unless ``k_max`` is 0). The gradients are ``C^P (r^P - r^Q)`` and ``m^Q - m^P``; the latter
        can be differentiated again, by either argument.

    Raises:
        TypeError: An argument is no floating tensor, or ``k`` no int or pair of ints.
        ValueError: Shapes or devices differ, ``k`` is out of range, or a row of either has fewer than ``k_min``
            unmasked experts.
    """
    check_logits(p_logits)
    check_like(q_logits, p_logits, "q_logits")
    p_logits, q_logits = apply_mask(p_logits, mask, "p_logits"), apply_mask(q_logits, mask, "q_logits")
    k_min, k_max = band = check_band(k, p_logits.shape[-1])
    p, q = p_logits.double(), q_logits.double()
    mode = _naming("p_logits", subset_mode, p.detach(), band)
    masked_p, masked_q = p == -torch.inf, q == -torch.inf
    difference = torch.where(masked_p | masked_q, 0.0, p - q)
    marginals = subset_marginals(p, band)
    if k_min == k_max > 0:
        difference = difference - ((marginals * difference).sum(-1, keepdim=True) / k_max).detach()
    moved = ((marginals - k_hot(mode, p.shape[-1], p.dtype)) * difference).sum(-1)
    value = subset_log_prob(p, mode, band) - _naming("q_logits", subset_log_prob, q, mode, band) + moved
    value = value + (-value).clamp(min=0.0).detach()
    if k_max > 0:
        impossible = (~masked_p & masked_q).any(-1) & ~value.isnan()
        value = torch.where(impossible, torch.inf, value)
    return value.to(single(p_logits).dtype).to(p_logits.dtype)


def subset_indicator(
    logits: Tensor, k: Cardinality, seed: int | Tensor | None = None, *, mask: Tensor | None = None
) -> Tensor:
    """A draw of S as 0/1 vector ``z``, whose gradient is that of the marginals (SIMPLE, Ahmed et al. 2023).

    The value is exact. The gradient is an estimate: ``g`` reaches the logits as ``C g``, with ``C = dm/dr``, which is
    unbiased for a loss that is linear in ``z`` and biased for others.

    Args:
        logits: ``[..., E]``, floating; -inf masks an expert out.
        k: The size, or ``(k_min, k_max)``.
        seed: None draws one from torch's generator; an int or an int64 scalar tensor makes the call pure. The same seed
            gives the subset of :func:`subset_sample`.
        mask: bool, broadcastable with ``logits``: True keeps an expert, False is a logit of -inf. A TypeError if it is
            not bool, a ValueError if it does not fit.

    Returns:
        ``[..., E]`` of zeros and ones in the dtype of ``logits``; NaN in a row with NaN or +inf. Once
        differentiable.

    Raises:
        TypeError: ``logits`` is no floating tensor, ``k`` no int or pair of ints, ``seed`` no int64.
        ValueError: ``k`` is out of range, the seed is on another device, or a row has fewer than ``k_min`` unmasked
            experts.
    """
    check_logits(logits)
    logits = apply_mask(logits, mask)
    drawn = k_hot(subset_sample(logits.detach(), k, seed), logits.shape[-1], logits.dtype)
    marginals = subset_marginals(logits, k)
    return drawn + (marginals - marginals.detach())
