"""Rows brought to scale: the tilt, the inclusion probabilities, and the two tables of the linear-domain recursion.

With odds ``w = exp(r)`` and any real tilt ``t``, ``e_j(w) = exp(j t) e_j(w exp(-t))``; dividing by the product of
``1 + w exp(-t)`` turns elementary symmetric polynomials into the probabilities of a Poisson-binomial count. Choosing
``t`` so that the expected count is the wanted one keeps everything inside range without logarithms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Beyond this distance from every logit, inclusion is certain (or impossible) to the last bit of a float64.
_FAR = 40.0
# Halvings of a bracket a few thousand wide down to the spacing of float64.
_HALVINGS = 64


@dataclass(frozen=True)
class TiltedRows:
    """A batch of rows at scale. Only `x`, `p` and `q` carry gradients: no result depends on the choice of the tilt.

    Attributes:
        x: ``[..., E]`` logits minus tilt.
        p: ``[..., E]`` probability of including each expert, ``sigmoid(x)``.
        q: ``[..., E]`` its complement, computed as ``sigmoid(-x)``.
        tilt: ``[..., 1]``.
        pivot: ``[..., 1]`` the size that the weights count from.
        weights: ``[..., b + 1]``, for a count j in ``[a, b]`` ``exp(tilt * (j - pivot))``, at most 1; 0 outside.
    """

    x: Tensor
    p: Tensor
    q: Tensor
    tilt: Tensor
    pivot: Tensor
    weights: Tensor


def check_band(k: int | tuple[int, int], num_experts: int) -> tuple[int, int]:
    """Return ``(k_min, k_max)``, or raise if that is no band of sizes for `num_experts` experts."""
    k_min, k_max = (k, k) if isinstance(k, int) else k
    if not 0 <= k_min <= k_max <= num_experts:
        raise ValueError(f"k must satisfy 0 <= k_min <= k_max <= {num_experts} (the number of experts), got {k!r}")
    return k_min, k_max


def check_unmasked(logits: Tensor, k_min: int) -> Tensor:
    """Return how many experts each row leaves unmasked, ``[...]``, or raise if a row has fewer than `k_min`."""
    available = (logits != -torch.inf).sum(-1)
    if (available < k_min).any():
        row = int((available.flatten() < k_min).nonzero()[0])
        raise ValueError(
            f"logits must leave at least k_min = {k_min} experts unmasked in every row, "
            f"row {row} leaves {int(available.flatten()[row])}"
        )
    return available


def compute_dtype(logits: Tensor) -> Tensor:
    """Return the logits in the dtype that they are computed in, or raise if they are not floating-point."""
    if not logits.is_floating_point():
        raise TypeError(f"logits must be a floating-point tensor, got {logits.dtype}")
    if logits.dim() == 0:
        raise ValueError("logits must have a last dimension of experts, got a scalar")
    return logits if logits.dtype == torch.float64 else logits.float()


def poison(logits: Tensor) -> Tensor:
    """Make a row all NaN if it holds a NaN or ``+inf``: there is no distribution to speak of."""
    bad = (logits.isnan() | (logits == torch.inf)).any(-1, keepdim=True)
    return torch.where(bad, torch.nan, logits)


def _solve_tilt(logits: Tensor, k_min: int, k_max: int) -> tuple[Tensor, Tensor]:
    """Return tilt and pivot: the expected count is brought to the point of the band nearest to the untilted one."""
    masked = logits == -torch.inf
    available = check_unmasked(logits, k_min)
    low = torch.where(masked, torch.inf, logits).amin(-1, keepdim=True) - _FAR
    high = logits.amax(-1, keepdim=True) + _FAR
    low, high = (torch.where(available.unsqueeze(-1) > 0, bound, 0) for bound in (low, high))
    natural = torch.sigmoid(logits).sum(-1, keepdim=True)
    target = natural.clamp(k_min, k_max)
    for _ in range(_HALVINGS):
        middle = low + (high - low) / 2
        too_many = torch.sigmoid(logits - middle).sum(-1, keepdim=True) > target
        low, high = torch.where(too_many, middle, low), torch.where(too_many, high, middle)
    inside = (natural == target) & (k_min < k_max)
    return torch.where(inside, 0, high), torch.where(natural < k_max, k_min, k_max).to(logits.dtype)


def tilt_rows(logits: Tensor, k_min: int, k_max: int) -> TiltedRows:
    """Solve the tilt of every row of float32 or float64 logits and return the rows at scale."""
    logits = poison(logits)
    with torch.no_grad():
        if logits.shape[-1] == 0:
            tilt = pivot = logits.new_zeros((*logits.shape[:-1], 1))
        else:
            tilt, pivot = _solve_tilt(logits, k_min, k_max)
        sizes = torch.arange(k_max + 1, dtype=logits.dtype, device=logits.device)
        exponent = torch.where(sizes == pivot, 0, tilt * (sizes - pivot))
        weights = torch.where(sizes >= k_min, torch.exp(exponent), 0)
    x = logits - tilt
    return TiltedRows(x, torch.sigmoid(x), torch.sigmoid(-x), tilt, pivot, weights)


def prefix_table(rows: TiltedRows) -> Tensor:
    """Return ``A[..., i, j]`` = probability that j of the first i experts are in, for i in 0..E and j in 0..b."""
    width = rows.weights.shape[-1]
    row = F.pad(torch.ones_like(rows.tilt), (0, width - 1))
    table = [row]
    for p, q in zip(rows.p.split(1, -1), rows.q.split(1, -1), strict=True):
        row = row * q + F.pad(row[..., :-1], (1, 0)) * p
        table.append(row)
    return torch.stack(table, dim=-2)


def suffix_table(rows: TiltedRows) -> Tensor:
    """Return ``B[..., i, c]`` = expected weight of the final count, given c among the first i; i in 0..E, c in 0..b."""
    row = rows.weights.expand(*rows.tilt.shape[:-1], -1)
    table = [row]
    for p, q in zip(reversed(rows.p.split(1, -1)), reversed(rows.q.split(1, -1)), strict=True):
        row = row * q + F.pad(row[..., 1:], (0, 1)) * p
        table.append(row)
    return torch.stack(table[::-1], dim=-2)
