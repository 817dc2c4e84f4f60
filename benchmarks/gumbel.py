"""The Gumbel family's closures and the peers that they are timed against."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import RelaxedBernoulli

from probmoe_ext import ops

from .peers import Make, Run, Size, largest

TEMPERATURE = 0.5


def drawn(logits: Tensor, k: Size) -> tuple[Tensor, Tensor]:
    """Ordered draws without replacement, ours."""
    return ops.gumbel_top_k(logits, largest(k), seed=1)


def multinomial_of_softmax(logits: Tensor, k: Size) -> Run:
    """Draws without replacement, torch's, the probabilities made beforehand."""
    probabilities = torch.softmax(logits, -1)
    return lambda: torch.multinomial(probabilities, largest(k))


def relaxed(logits: Tensor, k: Size) -> Tensor:
    """Relaxed top-k, ours."""
    return ops.relaxed_top_k(logits, largest(k), TEMPERATURE)


def relaxed_by_rounds(logits: Tensor, k: Size) -> Tensor:
    """Relaxed top-k as published, with its clamp at the smallest number."""
    x = logits - torch.empty_like(logits).exponential_().log()
    result = torch.zeros_like(x)
    for _ in range(largest(k)):
        a = torch.softmax(x / TEMPERATURE, -1)
        result = result + a
        x = x + torch.log((1 - a).clamp(min=torch.finfo(x.dtype).tiny))
    return result


def log_prob(logits: Tensor, indices: Tensor) -> Tensor:
    """Plackett-Luce over the logits in the order of the draw, what was not drawn last, in torch operators."""
    chosen = logits.gather(-1, indices)
    rest = logits.scatter(-1, indices, -torch.inf).logsumexp(-1, keepdim=True)
    left = torch.cat([chosen, rest], -1).flip(-1).logcumsumexp(-1).flip(-1)[..., :-1]
    return (chosen - left).sum(-1)


def of_a_draw(function: Callable[[Tensor, Tensor], Tensor]) -> Make:
    """A function of logits and an ordered draw, which is made beforehand."""

    def bound(logits: Tensor, k: Size) -> Run:
        indices, _ = drawn(logits, k)
        return lambda: function(logits, indices)

    return bound


def sigmoid(logits: Tensor, k: Size) -> Tensor:
    """Binary concrete draws, ours."""
    return ops.gumbel_sigmoid(logits, TEMPERATURE, seed=1)


def relaxed_bernoulli(logits: Tensor, k: Size) -> Tensor:
    """Binary concrete draws, torch's."""
    return RelaxedBernoulli(torch.tensor(TEMPERATURE), logits=logits).rsample()
