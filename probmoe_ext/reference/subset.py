"""Subsets of experts under a cardinality constraint (the conditional Bernoulli law), in plain torch.

Definitions follow ProbMoE (arXiv 2606.01509, section 3) and Chen, Dempster and Liu (Biometrika 81, 1994). `logits` is
``[..., E]``; `k` an int or a pair ``(k_min, k_max)``; ``-inf`` masks an expert out. A row with NaN or ``+inf`` gives
NaN (and indices that stay in range); a row with fewer than k_min unmasked experts raises ValueError.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from probmoe_ext.reference.tilt import (
    TiltedRows,
    check_band,
    check_unmasked,
    compute_dtype,
    poison,
    prefix_table,
    suffix_table,
    tilt_rows,
)

Band = int | tuple[int, int]


def _tilted(logits: Tensor, k: Band) -> tuple[TiltedRows, int, int]:
    k_min, k_max = check_band(k, logits.shape[-1])
    return tilt_rows(compute_dtype(logits), k_min, k_max), k_min, k_max


def _sides(rows: TiltedRows) -> tuple[Tensor, Tensor]:
    """Return which experts are above the tilt, and ``softplus(x) - above * x``: no digits lost at large ``|x|``.

    The sign is constant, and never 0, so that the derivative ``sigmoid(x) - above`` is right at ``x = 0`` as well.
    """
    above = rows.x > 0
    sign = torch.where(above, 1.0, -1.0).to(rows.x.dtype)
    return above, -F.logsigmoid(sign * rows.x)


def _log_weight(rows: TiltedRows, last: Tensor) -> Tensor:
    return (last * rows.weights).sum(-1).log()


def subset_log_partition(logits: Tensor, k: Band) -> Tensor:
    """``log Z``, the logarithm of the sum over all allowed subsets of ``exp(sum of their logits)``; ``[...]``."""
    rows, *_ = _tilted(logits, k)
    above, excess = _sides(rows)
    log_weight = _log_weight(rows, prefix_table(rows)[..., -1, :])
    # sum of softplus(x) + pivot * tilt, with the logits above the tilt taken whole: their shift would cancel.
    base = torch.where(above, poison(compute_dtype(logits)), 0).sum(-1)
    leftover = ((rows.pivot.squeeze(-1) - above.sum(-1)) * rows.tilt.squeeze(-1)).detach()
    return (base + leftover + excess.sum(-1) + log_weight).to(logits.dtype)


def subset_cardinality(logits: Tensor, k: Band) -> Tensor:
    """``P(|S| = j)`` for j in k_min..k_max; ``[..., k_max - k_min + 1]``."""
    rows, k_min, _ = _tilted(logits, k)
    mass = (prefix_table(rows)[..., -1, :] * rows.weights)[..., k_min:]
    return (mass / mass.sum(-1, keepdim=True)).to(logits.dtype)


def _inclusion(rows: TiltedRows) -> tuple[Tensor, Tensor]:
    """Return ``P(i in S)`` and ``P(i not in S)``, both ``[..., E]`` and each a sum of positive terms."""
    prefix, suffix = prefix_table(rows), suffix_table(rows)
    total = (prefix[..., -1, :] * rows.weights).sum(-1, keepdim=True)
    before, after = prefix[..., :-1, :], suffix[..., 1:, :]
    included = rows.p * (before[..., :-1] * after[..., 1:]).sum(-1) / total
    excluded = rows.q * (before * after).sum(-1) / total
    return included, excluded


def subset_marginals(logits: Tensor, k: Band) -> Tensor:
    """``m_i = P(i in S)``, the gradient of `subset_log_partition`; ``[..., E]``."""
    rows, *_ = _tilted(logits, k)
    return _inclusion(rows)[0].to(logits.dtype)


def subset_covariance_vp(logits: Tensor, v: Tensor, k: Band) -> Tensor:
    """``C v`` with ``C_ij = P(i, j in S) - m_i m_j``, the Jacobian of the marginals; ``[..., E]``.

    The Jacobian is symmetric, so its product with `v` (same shape and dtype as `logits`) is one backward pass.
    """
    keep_graph = torch.is_grad_enabled() and (logits.requires_grad or v.requires_grad)
    with torch.enable_grad():
        r = compute_dtype(logits if logits.requires_grad else logits.detach().requires_grad_())
        (product,) = torch.autograd.grad(
            subset_marginals(r, k), r, v.to(r.dtype), create_graph=keep_graph, materialize_grads=True
        )
    # Autograd stops where NaN and +inf rows were set to NaN; the product must show them.
    spoilt = poison(r.detach()).isnan().any(-1, keepdim=True)
    return torch.where(spoilt, torch.nan, product).to(logits.dtype)


def subset_mode(logits: Tensor, k: Band) -> Tensor:
    """The most probable subset, by descending logit (ties: lower index first); int64 ``[..., k_max]``, unused slots E.

    It holds every positive logit, their number clamped to the band along the descending order.
    """
    num_experts = logits.shape[-1]
    k_min, k_max = check_band(k, num_experts)
    check_unmasked(logits, k_min)
    order = torch.sort(logits, dim=-1, descending=True, stable=True).indices[..., :k_max]
    size = (logits > 0).sum(-1, keepdim=True).clamp(k_min, k_max)
    return torch.where(torch.arange(k_max, device=logits.device) < size, order, num_experts)


def subset_indicator(indices: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    """The k-hot ``[..., E]`` of indices ``[..., K]``; the index E marks an unused slot."""
    counts = torch.zeros((*indices.shape[:-1], num_experts + 1), dtype=dtype, device=indices.device)
    return counts.scatter_add(-1, indices, torch.ones_like(indices, dtype=dtype))[..., :num_experts]


def subset_log_prob(logits: Tensor, indices: Tensor, k: Band) -> Tensor:
    """``log P(S)`` of the subsets given by int64 `indices` ``[..., k_max]`` (unused slots E); ``[...]``.

    ``-inf`` where the number of used slots is outside the band, an expert is masked out, or one is named twice.
    """
    rows, k_min, k_max = _tilted(logits, k)
    z = subset_indicator(indices, logits.shape[-1], rows.x.dtype)
    above, excess = _sides(rows)
    log_weight = _log_weight(rows, prefix_table(rows)[..., -1, :])
    size = z.sum(-1)
    # sum over S of r, minus log Z, after the terms that both share have been taken out.
    difference = z - above.to(z.dtype)
    moved = torch.where(difference != 0, difference * rows.x, 0).sum(-1)
    shift = (size - rows.pivot.squeeze(-1)) * rows.tilt.squeeze(-1)
    value = moved + shift - excess.sum(-1) - log_weight
    allowed = (size >= k_min) & (size <= k_max) & (z <= 1).all(-1)
    return torch.where(allowed | value.isnan(), value, -torch.inf).to(logits.dtype)


def subset_entropy(logits: Tensor, k: Band) -> Tensor:
    """``log Z - sum_i m_i r_i`` in nats, with ``0 * -inf = 0``; ``[...]``."""
    rows, _, k_max = _tilted(logits, k)
    above, excess = _sides(rows)
    included, excluded = _inclusion(rows)
    last = prefix_table(rows)[..., -1, :]
    finite = torch.where(rows.x == -torch.inf, 0, rows.x)
    # Written about the tilt and the likelier side of each expert: every term is small where the entropy is.
    moved = torch.where(above, excluded, -included) * finite
    mass = last * rows.weights
    sizes = torch.arange(k_max + 1, dtype=finite.dtype, device=finite.device)
    offset = (mass * (sizes - rows.pivot)).sum(-1) / mass.sum(-1)
    value = excess.sum(-1) + moved.sum(-1) + _log_weight(rows, last) - rows.tilt.squeeze(-1) * offset
    return value.to(logits.dtype)
