"""Softmax and top-k: what mixture-of-experts models ship with, and the baseline of every comparison."""

from __future__ import annotations

import torch

from probmoe_ext.ops import route_top_k
from probmoe_ext.ops.arguments import single
from probmoe_ext.routers.base import ExpertsPerToken, Router
from probmoe_ext.routers.registry import register_router


@register_router("topk")
class TopKRouter(Router):
    """The ``k`` largest entries of ``softmax(logits)``, by descending probability, ties to the lower index.

    The gradient reaches the logits through the weights of the chosen experts only; the choice has none.

    Args:
        num_experts: ``E``.
        k: Experts per token, one number.
        normalize: Whether the ``k`` weights are divided by their sum.

    Raises:
        ValueError: If ``k`` is a band, or out of range.
    """

    takes_scores = True

    def __init__(self, num_experts: int, k: ExpertsPerToken, *, normalize: bool = False) -> None:
        super().__init__(num_experts, k, normalize=normalize)
        self.one_k()
        self.normalize = normalize

    def top_k_in_evaluation(self) -> tuple[int, bool] | None:
        """``(k, normalize)``: it is the usual router in every mode."""
        return self.k_max, self.normalize

    def forward(
        self, hidden_states: torch.Tensor, logits: torch.Tensor, scores: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route ``[T, E]`` logits to weights and indices ``[T, k]``; the hidden states are not used."""
        weights, indices = route_top_k(logits, self.k_max, normalize=self.normalize)
        if scores is not None:
            weights = weights_at(indices, scores * chosen(indices, self.num_experts, scores.dtype), self.normalize)
        return weights, indices

    def weights_for(
        self,
        hidden_states: torch.Tensor,
        logits: torch.Tensor,
        indices: torch.Tensor,
        scores: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The softmax probabilities (or scores) of given experts ``[T, K]``."""
        return probabilities_at(indices, logits, self.normalize, scores)


def chosen(indices: torch.Tensor, num_experts: int, dtype: torch.dtype) -> torch.Tensor:
    """``z``, the 0/1 vector ``[T, E]`` of the experts at ``indices`` ``[T, K]``; index ``E`` is none."""
    zeros = torch.zeros(*indices.shape[:-1], num_experts + 1, dtype=dtype, device=indices.device)
    return zeros.scatter(-1, indices, 1)[..., :-1]


def weights_at(indices: torch.Tensor, dense: torch.Tensor, normalize: bool) -> torch.Tensor:
    """Dense weights ``[T, E]`` at ``indices`` ``[T, K]``, divided by the sum over all experts if ``normalize``."""
    weights = torch.nn.functional.pad(dense, (0, 1)).gather(-1, indices)
    if not normalize:
        return weights
    # Only a token without experts, or with scores that all underflowed, has the sum 0.
    total = dense.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, 1, total)


def probabilities_at(
    indices: torch.Tensor, logits: torch.Tensor, normalize: bool, scores: torch.Tensor | None = None
) -> torch.Tensor:
    """``softmax(logits)`` (or scores) ``[T, E]`` at ``indices`` ``[T, K]``, divided by their sum if ``normalize``."""
    wide = single(logits)
    dense = torch.softmax(wide, dim=-1) if scores is None else scores
    return weights_at(indices, dense * chosen(indices, dense.shape[-1], dense.dtype), normalize).to(logits.dtype)


def straight_through(hard: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    """The values of ``hard`` to the last bit, with the gradient of ``soft`` (Bengio et al. 2013, arXiv 1308.3432)."""
    return hard + (soft - soft.detach())
