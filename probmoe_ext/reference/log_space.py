"""The log-space dynamic program that is in use elsewhere, restated to be measured against. Not for routing."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_FLOOR = -300.0
_ALMOST_CERTAIN = -1e-7


def subset_marginals_log_space(logits: Tensor, k: int) -> Tensor:
    """Marginals of exactly-k subsets by a log-space recursion with clamps; ``[..., E]``, for comparison only.

    ``log P(N = j)`` over Bernoulli(sigmoid(r)) variables grows expert by expert through `torch.logaddexp`. A table cell
    that cannot be reached holds -300 rather than ``-inf``, and ``log p`` is held below -1e-7 so that ``log(1 - p)``
    exists. The marginals are the derivative of ``log P(N = k)`` by ``log p`` at fixed ``log(1 - p)``. Large or shifted
    logits run into both clamps, and the second derivative of `torch.logaddexp` is wrong at ties: the accuracy table
    shows by how much.
    """
    with torch.enable_grad():
        r = logits if logits.requires_grad else logits.detach().requires_grad_()
        log_p, log_q = F.logsigmoid(r), torch.log(-torch.expm1(F.logsigmoid(r).clamp(max=_ALMOST_CERTAIN)))
        table = torch.full((*r.shape[:-1], k + 1), _FLOOR, dtype=r.dtype, device=r.device)
        table[..., 0] = 0
        for i in range(r.shape[-1]):
            stay = table + log_q[..., i : i + 1]
            come = F.pad(table[..., :-1], (1, 0), value=_FLOOR) + log_p[..., i : i + 1]
            table = torch.logaddexp(stay, come).clamp(min=_FLOOR)
        (marginals,) = torch.autograd.grad(table[..., k].sum(), log_p, create_graph=logits.requires_grad)
        return marginals
