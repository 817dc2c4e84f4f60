"""What all published forms share: ``log p`` and ``log(1 - p)``, and the weights from a draw and the marginals."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ALMOST_CERTAIN = -1e-7
"""The largest log p."""


def clamped_log_p(logits: Tensor) -> Tensor:
    """``log sigmoid(r)``, less than 0 so that ``log(1 - p)`` exists."""
    return F.logsigmoid(logits).clamp(max=ALMOST_CERTAIN)


def log_complement(log_p: Tensor) -> Tensor:
    """``log(1 - p)`` from ``log p``; of two forms, both evaluated everywhere, the one that is accurate for this p."""
    log_p = -log_p.abs()
    return torch.where(log_p > -math.log(2), torch.log(-torch.expm1(log_p)), torch.log1p(-torch.exp(log_p)))


def straight_through(logits: Tensor, z: Tensor, marginals: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Weights ``(stopgrad(z - m) + m) softmax(r)`` of all experts, gathered at the k experts that are in ``z``.

    Args:
        logits: ``[T, E]``.
        z: the draw, k ones a row, ``[T, E]``.
        marginals: ``[T, E]``.
        k: number of experts drawn.

    Returns:
        Weights and indices, ``[T, k]``.
    """
    softmax = torch.softmax(logits, -1)
    weights = ((z - marginals).detach() + marginals) * softmax
    indices = torch.topk(z, k, -1).indices
    return weights.gather(-1, indices), indices
