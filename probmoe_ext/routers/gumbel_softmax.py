"""Gumbel-softmax: a sampled choice of experts, with the gradient of its relaxation at a temperature."""

from __future__ import annotations

import torch

from probmoe_ext.ops import gumbel_top_k, relaxed_top_k, route_top_k
from probmoe_ext.ops.arguments import make_seed, single
from probmoe_ext.routers.base import ExpertsPerToken, Router
from probmoe_ext.routers.registry import register_router
from probmoe_ext.routers.topk import chosen, straight_through, weights_at


@register_router("gumbel_softmax")
class GumbelSoftmaxRouter(Router):
    """The ``k`` largest of ``logits + Gumbel(0, 1)`` in training, with the gradient of a relaxed k-hot.

    With ``z`` the 0/1 vector of that draw, ``y`` the relaxed k-hot of the same noise at the temperature, and ``s`` the
    softmax of the logits, training returns ``(stopgrad(z - y) + y) * s`` at the chosen experts. For ``k = 1`` this is
    the straight-through Gumbel-softmax of Jang et al. 2017 (arXiv 1611.01144, section 2.2), ``y = softmax((logits +
    Gumbel) / temperature)``; for more experts ``y`` is the relaxation of Xie & Ermon 2019 (arXiv 1901.10517). Weighting
    by ``s``, so that evaluation is plain top-k, is a choice made here: the paper's estimator is of ``z`` alone. As the
    temperature goes to 0 so does the gradient of ``y``, and that of ``s`` at the sampled experts is left.

    ``temperature`` is an attribute that a schedule may set; it has no part in evaluation.

    Args:
        num_experts: ``E``.
        k: Experts per token, one number.
        normalize: Whether the weights of a token are divided by their sum.
        temperature: Of the relaxation, from 1e-6 to 1e6.

    Raises:
        ValueError: If ``k`` is a band or out of range, or the temperature is.
    """

    takes_scores = True

    def __init__(
        self, num_experts: int, k: ExpertsPerToken, *, normalize: bool = False, temperature: float = 1.0
    ) -> None:
        super().__init__(num_experts, k, normalize=normalize, temperature=temperature)
        self.one_k()
        if not 1e-6 <= temperature <= 1e6:
            raise ValueError(f"temperature of router 'gumbel_softmax' must be from 1e-6 to 1e6, got {temperature}")
        self.normalize = normalize
        self.temperature = temperature

    def top_k_in_evaluation(self) -> tuple[int, bool] | None:
        """``(k, normalize)``: without noise it is the usual router."""
        return self.k_max, self.normalize

    def forward(
        self, hidden_states: torch.Tensor, logits: torch.Tensor, scores: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route ``[T, E]`` logits to weights and indices ``[T, k]``; the hidden states are not used.

        With ``scores`` these stand in the place of ``s``.
        """
        wide = single(logits)
        scores = torch.softmax(wide, dim=-1) if scores is None else scores
        if self.training:
            # One seed for both, so that they have the same noise.
            seed = make_seed(None, wide)
            indices, _ = gumbel_top_k(wide.detach(), self.k_max, seed)
            z = straight_through(
                chosen(indices, self.num_experts, wide.dtype), relaxed_top_k(wide, self.k_max, self.temperature, seed)
            )
        else:
            _, indices = route_top_k(wide, self.k_max)
            z = chosen(indices, self.num_experts, wide.dtype)
        return weights_at(indices, z * scores, self.normalize).to(logits.dtype), indices
