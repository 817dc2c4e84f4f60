"""Top-k whose choice has the gradient of a softmax: the straight-through estimator."""

from __future__ import annotations

import torch

from probmoe_ext.ops import route_top_k
from probmoe_ext.ops.arguments import single
from probmoe_ext.routers.registry import register_router
from probmoe_ext.routers.topk import TopKRouter, chosen, straight_through, weights_at


@register_router("straight_through")
class StraightThroughRouter(TopKRouter):
    """The values of top-k; in the backward pass the choice is replaced by the softmax that it was made of.

    With ``s = softmax(logits)`` and ``z`` the 0/1 vector of the ``k`` largest, training returns
    ``(stopgrad(z - s) + s) * s`` at the chosen experts: the values are those of ``s``, and ``z`` has the dense
    gradient of ``s``. Evaluation is plain top-k. The estimator is that of Bengio et al. 2013 (arXiv 1308.3432,
    section 4), which has single binary units; to take the softmax for all ``k`` choices, and to weight by it, is a
    choice made here. It is ProbMoE's formula with ``s`` in the place of the exact marginals.

    Args:
        num_experts: ``E``.
        k: Experts per token, one number.
        normalize: Whether the weights of a token are divided by their sum; experts that were not chosen then get a
            gradient through that sum, too.

    Raises:
        ValueError: If ``k`` is a band, or out of range.
    """

    def forward(
        self, hidden_states: torch.Tensor, logits: torch.Tensor, scores: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route ``[T, E]`` logits to weights and indices ``[T, k]``; the hidden states are not used.

        With ``scores`` these are the weights, and the choice keeps the gradient of ``s``.
        """
        _, indices = route_top_k(logits.detach(), self.k_max)
        return self.weights_for(hidden_states, logits, indices, scores), indices

    def weights_for(
        self,
        hidden_states: torch.Tensor,
        logits: torch.Tensor,
        indices: torch.Tensor,
        scores: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The same formula at given experts ``[T, K]``, ``z`` their 0/1 vector."""
        soft = torch.softmax(single(logits), dim=-1)
        scores = soft if scores is None else scores
        z = chosen(indices, self.num_experts, soft.dtype)
        if self.training:
            z = straight_through(z, soft)
        return weights_at(indices, z * scores, self.normalize).to(logits.dtype)
