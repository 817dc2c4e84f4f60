"""ReMoE: the experts with a positive logit, and a penalty that follows their number (arXiv 2412.14711)."""

from __future__ import annotations

import math

import torch

from probmoe_ext.ops.arguments import single
from probmoe_ext.routers.base import ExpertsPerToken
from probmoe_ext.routers.registry import register_router
from probmoe_ext.routers.target import TargetRouter
from probmoe_ext.routers.topk import chosen, weights_at

RANGE = (1e-30, 1e30)
"""What the coefficient is kept in."""


@register_router("remoe")
class ReMoERouter(TargetRouter):
    """Experts weighted by ``ReLU(logits)``, so that those with a logit of at most 0 are not used.

    Wang, Zhu and Chen 2025, "ReMoE", arXiv 2412.14711, sections 3.1 to 3.4. The choice is continuous: an expert comes
    and goes at weight 0. How many there are is learnt, from 0 to ``E`` for each token, and held at ``k`` on average
    by a penalty, the loss ``l1``. With ``T`` tokens and ``R = ReLU(logits)`` it is::

        coefficient / T * sum_t sum_e f_e R_te,     f_e = E / (k T) * sum_t 1[R_te > 0]

    where ``f`` balances the load (a constant for the gradient), and is 1 without ``balance``. Before each pass the
    coefficient follows the sparsity ``S``, the share of the logits in the last pass that were not positive::

        coefficient <- coefficient * growth ** sign((1 - k / E) - S)

    As in the paper, ``S`` is that of all layers together, which keep one coefficient in common: each may use more or
    fewer than ``k``. Where the routers of a model do not know each other (``peers``), each follows its own. In a
    distributed run it is that of the process's own tokens, and a coefficient is kept in step by what synchronises the
    buffers. The penalties of the layers are added up, as in the authors' code; the paper's mean over them starts from
    a coefficient that is smaller by their number. A pass whose tokens are all padding changes nothing.

    The rule is an integrator without damping: where the optimizer answers late (Adam with large steps), the coefficient
    overshoots, and experts that no token uses any more do not come back. A ``growth`` nearer to 1 prevents that.

    The weights are as large as the logits, not shares of 1: a model that was trained with another router has to adapt,
    and options for renormalisation have no meaning here.

    Args:
        num_experts: ``E``.
        k: Experts per token to reach on average, one number; the results have ``E`` slots.
        coefficient: Of the penalty in the beginning, between 1e-30 and 1e30, and later kept there.
        growth: What the coefficient is multiplied or divided by, from 1.0001 to 10.
        balance: Whether the penalty balances the load.

    Raises:
        ValueError: If an option or ``k`` is not allowed.
    """

    has_loss = True

    steps: torch.Tensor
    """How often the coefficient grew, less how often it shrank: an integer, which no cast of the model rounds."""

    def __init__(
        self,
        num_experts: int,
        k: ExpertsPerToken,
        *,
        coefficient: float = 1e-8,
        growth: float = 1.2,
        balance: bool = True,
    ) -> None:
        super().__init__(num_experts, k, coefficient=coefficient, growth=growth, balance=balance)
        if not RANGE[0] < coefficient < RANGE[1]:
            raise ValueError(f"coefficient of router 'remoe' must be between 1e-30 and 1e30, got {coefficient}")
        if not 1.0001 <= growth <= 10:
            raise ValueError(f"growth of router 'remoe' must be from 1.0001 to 10, got {growth}")
        self.start, self.growth, self.balance = coefficient, growth, balance
        # A coefficient that nothing answers to must not become infinite, nor so small that it never comes back.
        self.lowest, self.highest = (round(math.log(limit / coefficient, growth)) for limit in RANGE)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def coefficient(self) -> torch.Tensor:
        """The coefficient of the penalty in this pass, a scalar in float32."""
        return self.start * self.growth ** self.steps.float()

    def begin_pass(self) -> None:
        """Let the coefficient follow the last pass: up if it used more than ``k`` experts per token, else down."""
        self.steps.add_(self.excess()[0].sign()).clamp_(self.lowest, self.highest)

    def forward(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route ``[T, E]`` logits to weights and indices ``[T, E]``; the hidden states are not used."""
        dense = _dense(logits)
        weights, indices = torch.sort(dense, dim=-1, descending=True, stable=True)
        indices = torch.where(weights > 0, indices, self.num_experts)
        weights = weights.to(logits.dtype)
        if self.training:
            used, tokens = self.note_used(dense > 0)
            many = tokens.clamp(min=1)
            shares = used.sum(0) * (self.num_experts / self.k_max) / many if self.balance else 1
            penalty = self.coefficient * (shares * torch.where(used, dense, 0)).sum() / many
            weights = self.join_loss(weights, penalty, "l1")
        return weights, indices

    def weights_for(
        self,
        hidden_states: torch.Tensor,
        logits: torch.Tensor,
        indices: torch.Tensor,
        scores: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``ReLU(logits)`` at given experts ``[T, K]``: 0 for one that has no positive logit any more."""
        dense = _dense(logits)
        return weights_at(indices, dense * chosen(indices, self.num_experts, dense.dtype), False).to(logits.dtype)


def _dense(logits: torch.Tensor) -> torch.Tensor:
    """``ReLU`` of the logits ``[T, E]``, in float32 (float64 for such logits)."""
    return torch.relu(single(logits))
