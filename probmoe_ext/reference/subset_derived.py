"""Pair probabilities, divergence and the differentiable draw of subsets, by their definitions in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from probmoe_ext.reference import subset
from probmoe_ext.reference.sample import subset_sample
from probmoe_ext.reference.tilt import check_band, compute_dtype


def subset_pairwise(logits: Tensor, k: int | tuple[int, int]) -> Tensor:
    """``P(i in S and j in S) = P(i in S) P(j in S | i in S)``, the marginals on the diagonal; ``[..., E, E]``.

    Given that i is in, the other experts follow the same law with one place less.
    """
    r = compute_dtype(logits)
    k_min, k_max = check_band(k, r.shape[-1])
    m = subset.subset_marginals(r, k).unsqueeze(-1)
    if k_max == 0:
        return (m * m.transpose(-1, -2)).to(logits.dtype)
    own = torch.eye(r.shape[-1], dtype=torch.bool, device=r.device)
    given = subset.subset_marginals(r.unsqueeze(-2).masked_fill(own, -torch.inf), (max(k_min - 1, 0), k_max - 1))
    return torch.where(own, m, m * given).to(logits.dtype)


def subset_kl(p_logits: Tensor, q_logits: Tensor, k: int | tuple[int, int]) -> Tensor:
    """``KL(P || Q) = log Z_Q - log Z_P + sum_i m^P_i (r^P_i - r^Q_i)``, with ``0 * -inf = 0``; ``[...]``.

    ``+inf`` where Q masks an expert that P does not: every unmasked expert is in some allowed subset, unless the only
    one is the empty subset.
    """
    p, q = compute_dtype(p_logits), compute_dtype(q_logits)
    _, k_max = check_band(k, p.shape[-1])
    masked_p, masked_q = p == -torch.inf, q == -torch.inf
    difference = torch.where(masked_p | masked_q, 0, p - q)
    mean_difference = (subset.subset_marginals(p, k) * difference).sum(-1)
    value = subset.subset_log_partition(q, k) - subset.subset_log_partition(p, k) + mean_difference
    impossible = (~masked_p & masked_q).any(-1) & ~value.isnan() & (k_max > 0)
    return torch.where(impossible, torch.inf, value).to(p_logits.dtype)


def subset_indicator(logits: Tensor, k: int | tuple[int, int], seed: int | Tensor | None = None) -> Tensor:
    """A drawn subset as 0/1 vector z: ``stop_gradient(z - m) + m``, with m the marginals; ``[..., E]``.

    Ahmed, Zeng, Niepert and Van den Broeck, "SIMPLE" (ICLR 2023), section 3. The value is z itself.
    """
    r = compute_dtype(logits)
    z = subset.subset_indicator(subset_sample(logits, k, seed), r.shape[-1], r.dtype)
    m = subset.subset_marginals(r, k)
    return (z + (m - m.detach())).to(logits.dtype)
