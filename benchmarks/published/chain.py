"""The published dynamic program: experts one after the other, a table of log-probabilities after each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import FLOOR
from benchmarks.published.weights import clamped_log_p, log_complement, straight_through


def route_by_chain(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Draws k experts and weighs them by the published dynamic program (`models/OLMoE/v1/ProbMoE_V1_olmoe_exact.py`).

    Its steps: the table of states from the logits and a draw from it, recorded by autograd though nothing is
    differentiated through them; the same table again, whose derivative is the marginals; the straight-through weights.
    Left out: casts to float32 and back, the look for a negative count after each expert of the draw, and constants
    made anew for each expert of the draw, which are made once.

    Args:
        logits: ``[T, E]``; gradients must be enabled.
        k: experts a row, 1 to E.

    Returns:
        Weights and indices, ``[T, k]``.
    """
    log_p = clamped_log_p(logits)
    z = draw(states(log_p, log_complement(log_p.detach()), k), log_p, k).detach()
    return straight_through(logits, z, marginals(logits, k), k)


def marginals(logits: Tensor, k: int) -> Tensor:
    """The derivative of ``log P(N = k)`` by ``log p``, itself differentiable; ``log(1 - p)`` is a constant in both."""
    log_p = clamped_log_p(logits).requires_grad_()
    log_partition = states(log_p, log_complement(log_p.detach()), k)[:, -1, k + 1]
    return torch.autograd.grad(log_partition.sum(), log_p, create_graph=True)[0]


def states(log_p: Tensor, log_q: Tensor, k: int) -> Tensor:
    """``log P(j of the first i experts)`` at ``[:, i, j + 1]``, ``[T, E + 1, k + 2]``; column 0 is the floor."""
    state = log_p.new_full((log_p.shape[0], k + 2), FLOOR)
    state[:, 1] = 0.0
    after = [state.clone()]
    for expert in range(log_p.shape[1]):
        state = _with_expert(state, log_p[:, expert : expert + 1], log_q[:, expert : expert + 1])
        after.append(state.clone())
    return torch.stack(after, dim=1)


def draw(table: Tensor, log_p: Tensor, k: int) -> Tensor:
    """Ones at k experts a row, ``[T, E]``: from the last to the first, each by its probability given those after it.

    That probability is ``P(left - 1 of those before) p / P(left of those before and this)``: two states gathered for
    each row. It goes through its log odds, as if its complement were not known.
    """
    num_rows, num_experts = log_p.shape
    rows = torch.arange(num_rows, device=log_p.device)
    left = torch.full_like(rows, k)
    drawn = []
    for before in reversed(range(num_experts)):
        done = left == 0
        if done.all():
            chosen = torch.zeros_like(log_p[:, before])
        else:
            log_chance = table[rows, before, left] + log_p[:, before] - table[rows, before + 1, left + 1]
            log_chance = torch.where(done, FLOOR, log_chance)
            chosen = torch.bernoulli(torch.sigmoid(log_chance - log_complement(log_chance)))
            chosen = torch.where(done, 0.0, chosen)
        left = torch.where(chosen > 0, left - 1, left)
        drawn.append(chosen)
    return torch.stack(drawn[::-1], dim=1)


def _with_expert(state: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    floor = state.new_full((state.shape[0], 1), FLOOR)
    return torch.cat((floor, _log_add(state[:, :-1] + log_p, state[:, 1:] + log_q)), dim=1)


def _log_add(a: Tensor, b: Tensor) -> Tensor:
    difference = torch.where(a == b, 0.0, a - b)
    return torch.maximum(a, b) + F.softplus(-difference.abs())
