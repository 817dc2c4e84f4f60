"""SIMPLE: a sampled k-subset of experts, with the gradient of its exact marginals, weighted by these."""

from __future__ import annotations

import torch

from probmoe_ext.ops import subset_marginals, subset_mode, subset_sample
from probmoe_ext.ops.arguments import single
from probmoe_ext.routers.base import ExpertsPerToken, Router
from probmoe_ext.routers.registry import register_router
from probmoe_ext.routers.topk import chosen, straight_through, weights_at


@register_router("simple")
class SimpleRouter(Router):
    """Experts drawn from the subsets of size ``k``, weighted by the probability that each had to be in it.

    With ``z`` the 0/1 vector of a subset drawn with probability proportional to ``exp(sum of the logits over it)`` and
    ``m`` its exact marginals, training returns ``(stopgrad(z - m) + m) * m / k`` at the chosen experts. The estimator
    of ``z`` is SIMPLE (Ahmed et al. 2023, arXiv 2210.01941), as Qian et al. 2024 (PR-MPNN, arXiv 2310.02156)
    use it to choose edges. In evaluation it takes the ``k`` largest logits, at the same weights.

    The division by ``k`` is a choice made here: the marginals sum to ``k``, and so the weights of all experts sum to 1
    as a softmax does. At ``k = 1`` the weights are the softmax, at ``k = E`` they are all ``1 / E``. What differs from
    ProbMoE is the weight: there it is the softmax.

    Args:
        num_experts: ``E``.
        k: Experts per token, one number.
        normalize: Whether the weights of a token are divided by their sum.

    Raises:
        ValueError: If ``k`` is a band, or out of range.
    """

    def __init__(self, num_experts: int, k: ExpertsPerToken, *, normalize: bool = False) -> None:
        super().__init__(num_experts, k, normalize=normalize)
        self.one_k()
        self.normalize = normalize

    def forward(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route ``[T, E]`` logits to weights and indices ``[T, k]``; the hidden states are not used."""
        indices = (subset_sample if self.training else subset_mode)(logits.detach(), self.k_max)
        return self.weights_for(hidden_states, logits, indices), indices

    def weights_for(
        self,
        hidden_states: torch.Tensor,
        logits: torch.Tensor,
        indices: torch.Tensor,
        scores: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The same formula at given experts ``[T, K]``, ``z`` their 0/1 vector; ``m / k`` in evaluation."""
        marginals = subset_marginals(single(logits), self.k_max)
        z = chosen(indices, self.num_experts, marginals.dtype)
        if self.training:
            z = straight_through(z, marginals)
        return weights_at(indices, z * marginals / self.k_max, self.normalize).to(logits.dtype)
