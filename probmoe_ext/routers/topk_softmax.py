"""The softmax of the chosen logits alone: the router of Mixtral."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from probmoe_ext.ops import route_top_k
from probmoe_ext.ops.arguments import single
from probmoe_ext.routers.base import ExpertsPerToken, Router
from probmoe_ext.routers.registry import register_router


@register_router("topk_softmax")
class TopKSoftmaxRouter(Router):
    """``softmax(TopK(logits))``: the ``k`` largest logits, and a softmax over them alone.

    The weights of a token sum to 1 whatever the model does with its own: this is ``topk`` with ``normalize=True``, by
    the formula of Jiang et al. 2024 (Mixtral of Experts, arXiv 2401.04088, section 2.1). At ``k = 1`` the weight is 1,
    and the logits get no gradient.

    Args:
        num_experts: ``E``.
        k: Experts per token, one number.

    Raises:
        ValueError: If ``k`` is a band, or out of range.
    """

    def __init__(self, num_experts: int, k: ExpertsPerToken) -> None:
        super().__init__(num_experts, k)
        self.one_k()

    def top_k_in_evaluation(self) -> tuple[int, bool] | None:
        """``(k, True)``: it renormalises in every mode."""
        return self.k_max, True

    def forward(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route ``[T, E]`` logits to weights and indices ``[T, k]``; the hidden states are not used."""
        return route_top_k(logits, self.k_max, normalize=True)

    def weights_for(
        self,
        hidden_states: torch.Tensor,
        logits: torch.Tensor,
        indices: torch.Tensor,
        scores: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The softmax over the logits of given experts ``[T, K]``."""
        wide = single(logits)
        return softmax_at(indices, wide).to(logits.dtype)


def softmax_at(indices: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The softmax over the logits ``[T, E]`` at ``indices`` ``[T, K]``; 0 for index ``E``, and where all are -inf."""
    kept = F.pad(logits, (0, 1), value=-torch.inf).gather(-1, indices)
    used = kept.isneginf().logical_not()
    # Without an expert there is nothing to normalise: 0, and no NaN in the gradient.
    weights = torch.where(used.any(-1, keepdim=True), kept, 0).softmax(-1)
    return torch.where(used, weights, 0)
