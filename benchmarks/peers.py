"""What a user would run instead today: each maker takes logits and k and returns the closure to time.

Nothing here is a strawman: each does at most what the published method does, and where a step is left out or replaced
it is by a cheaper one, which its docstring says. ProbMoE's own routing step by step is in `benchmarks.published`; here
are its lean forms.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from probmoe_ext import reference

Size: TypeAlias = "int | tuple[int, int]"
Run = Callable[[], object]
Make = Callable[[Tensor, Size], Run]
Differentiable = Callable[[Tensor], Tensor]

FLOOR = -300.0
"""What the published log-space forms put in place of -inf."""


def largest(k: Size) -> int:
    """``k_max``: peers know no band and use as many experts as ours may."""
    return k if isinstance(k, int) else k[1]


def with_backward(forward: Callable[[Tensor, Size], Tensor]) -> Make:
    """Forward and backward from random upstream gradients to the logits."""

    def make(logits: Tensor, k: Size) -> Run:
        leaf = logits.clone().requires_grad_()
        upstream = torch.randn_like(forward(leaf, k))

        def run() -> None:
            leaf.grad = None
            forward(leaf, k).backward(upstream)

        return run

    return make


def forward_only(function: Callable[[Tensor, Size], object]) -> Make:
    """``function(logits, k)`` as it is."""
    return lambda logits, k: lambda: function(logits, k)


def softmax_topk(logits: Tensor, k: Size) -> tuple[Tensor, Tensor]:
    """Conventional routing: weights and experts."""
    weights, indices = torch.topk(torch.softmax(logits, -1), largest(k), -1)
    return weights, indices


def multinomial(logits: Tensor, k: Size) -> Tensor:
    """Draws without replacement (of the Plackett-Luce law, not of ours)."""
    return torch.multinomial(torch.softmax(logits, -1), largest(k))


def _gumbel_keys(logits: Tensor) -> Tensor:
    return logits - torch.empty_like(logits).exponential_().log_()


def gumbel_softmax_topk(logits: Tensor, k: Size, temperature: float = 1.0) -> Tensor:
    """Gumbel-softmax with a hard top-k: a k-hot vector whose gradient is that of the relaxed one."""
    keys = _gumbel_keys(logits) / temperature
    soft = torch.softmax(keys, -1)
    hard = torch.zeros_like(soft).scatter(-1, torch.topk(keys, largest(k), -1).indices, 1.0)
    return hard - soft.detach() + soft


def marginals_by_circuit(logits: Tensor, k: int) -> Tensor:
    """Marginals by the "exactly k" circuit: a balanced tree of log-space products, and its derivative.

    A node of the tree covers a range of experts and holds ``log P(j of them)`` for j up to k: the log-sum-exp over i of
    i on its left and j - i on its right, the elements of an exactly-k sentential decision diagram over a balanced
    vtree. The nodes of a level are evaluated together.
    """
    with torch.enable_grad():
        r = logits if logits.requires_grad else logits.detach().requires_grad_()
        log_p, log_q = F.logsigmoid(r), F.logsigmoid(-r)
        width = 1 << (r.shape[-1] - 1).bit_length()
        missing = width - r.shape[-1]  # experts that are never in
        table = torch.stack([F.pad(log_q, (0, missing), value=0.0), F.pad(log_p, (0, missing), value=FLOOR)], dim=-1)
        while table.shape[-2] > 1:
            most = table.shape[-1] - 1
            j, i = (torch.arange(size + 1, device=r.device) for size in (min(2 * most, k), most))
            partner = j.unsqueeze(-1) - i
            partner = torch.where((partner < 0) | (partner > most), most + 1, partner)  # or the floor's column
            left, right = table[..., 0::2, :], F.pad(table[..., 1::2, :], (0, 1), value=FLOOR)
            table = torch.logsumexp(left.unsqueeze(-2) + right[..., partner], dim=-1)
        (marginals,) = torch.autograd.grad(table[..., 0, k].sum(), log_p, create_graph=logits.requires_grad)
        return marginals


def routed_through(marginals: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, Size], Tensor]:
    """ProbMoE's weights ``(stopgrad(z - m) + m) s`` at the experts of S, lean: the marginals are computed once.

    S is drawn by Gumbel top-k here, which is cheaper than an exact draw from any table.
    """

    def forward(logits: Tensor, k: Size) -> Tensor:
        m, s = marginals(logits, largest(k)), torch.softmax(logits, -1)
        chosen = torch.topk(_gumbel_keys(logits.detach()), largest(k), -1).indices
        z = torch.zeros_like(s).scatter(-1, chosen, 1.0)
        return (((z - m).detach() + m) * s).gather(-1, chosen)

    return forward


def simple_indicator(logits: Tensor, k: Size) -> Tensor:
    """SIMPLE: a k-hot draw whose gradient is that of log-space marginals (the draw here: multinomial, cheaper)."""
    marginals = reference.subset_marginals_log_space(logits, largest(k))
    drawn = torch.zeros_like(logits).scatter(-1, multinomial(logits.detach(), k), 1.0)
    return drawn + marginals - marginals.detach()
