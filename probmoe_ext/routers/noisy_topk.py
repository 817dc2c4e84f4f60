"""Noisy top-k gating: the first sparse router, with learnt noise and two losses that balance it."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from probmoe_ext.ops import route_top_k
from probmoe_ext.ops.arguments import single
from probmoe_ext.routers.base import ExpertsPerToken, Router
from probmoe_ext.routers.losses import variation_loss
from probmoe_ext.routers.registry import register_router
from probmoe_ext.routers.topk import chosen
from probmoe_ext.routers.topk_softmax import softmax_at


@register_router("noisy_topk")
class NoisyTopKRouter(Router):
    """``softmax(TopK(logits + N(0, 1) * deviation))`` in training, ``deviation = softplus(noise head) + floor``.

    Shazeer et al. 2017 (arXiv 1701.06538), eq. 3-5. The noise head is a linear map of the hidden state without a bias;
    it starts at zero, a deviation of ``log 2``. Evaluation has no noise: the softmax over the ``k`` largest logits.

    Two losses join the backward pass by themselves: ``importance``, the squared coefficient of variation of the weights
    that each expert got (eq. 6-7), and ``load``, that of the expected number of tokens: the probability that a token
    keeps an expert, were that expert's noise drawn again and that of the others kept (eq. 8-11).

    The paper has no floor; its published code adds 0.01, which keeps the probability differentiable where the head
    learns to switch the noise off. Paper and code divide by ``E`` in the variance; some ports by ``E - 1``.

    Args:
        num_experts: ``E``.
        k: Experts per token, one number.
        hidden_size: ``H``, the width of the hidden states.
        importance_weight: Coefficient of ``importance``, at least 0; the paper's language models have 0.1.
        load_weight: Coefficient of ``load``, at least 0.
        floor: The least deviation, positive.

    Raises:
        ValueError: If an option or ``k`` is not allowed.
    """

    has_loss = True

    def __init__(
        self,
        num_experts: int,
        k: ExpertsPerToken,
        *,
        hidden_size: int,
        importance_weight: float = 0.1,
        load_weight: float = 0.1,
        floor: float = 0.01,
    ) -> None:
        super().__init__(
            num_experts,
            k,
            hidden_size=hidden_size,
            importance_weight=importance_weight,
            load_weight=load_weight,
            floor=floor,
        )
        self.one_k()
        for name, weight in (("importance_weight", importance_weight), ("load_weight", load_weight)):
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name} of router 'noisy_topk' must be finite and at least 0, got {weight}")
        if not 0 < floor < math.inf:
            raise ValueError(f"floor of router 'noisy_topk' must be positive and finite, got {floor}")
        self.importance_weight = importance_weight
        self.load_weight = load_weight
        self.floor = floor
        self.noise = nn.Linear(hidden_size, self.num_experts, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with the same noise for every expert and token."""
        nn.init.zeros_(self.noise.weight)

    def top_k_in_evaluation(self) -> tuple[int, bool] | None:
        """``(k, True)``: without noise it is the usual router, renormalised."""
        return self.k_max, True

    def forward(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route ``[T, E]`` logits by hidden states ``[T, H]`` to weights and indices ``[T, k]``."""
        if not self.training:
            return route_top_k(logits, self.k_max, normalize=True)
        wide = single(logits)
        deviation = F.softplus(self.noise(hidden_states.to(self.noise.weight.dtype)).to(wide.dtype)) + self.floor
        noisy = wide + torch.randn_like(wide) * deviation
        order = noisy.topk(min(self.k_max + 1, self.num_experts)).indices
        indices = order[:, : self.k_max]
        weights = softmax_at(indices, noisy)
        gates = torch.zeros_like(noisy).scatter(-1, indices, weights)
        importance = variation_loss(gates, mask=self.token_mask)
        load = variation_loss(self._keeping(wide, noisy, deviation, order), mask=self.token_mask)
        weights = self.join_loss(weights, self.importance_weight * importance, "importance")
        weights = self.join_loss(weights, self.load_weight * load, "load")
        return weights.to(logits.dtype), indices

    def _keeping(
        self, logits: torch.Tensor, noisy: torch.Tensor, deviation: torch.Tensor, order: torch.Tensor
    ) -> torch.Tensor:
        """The probability ``[T, E]`` that each expert is kept if its noise alone is drawn again (eq. 9)."""
        if self.k_max == self.num_experts:
            return torch.ones_like(logits)
        values = noisy.gather(-1, order)
        # What an expert has to exceed: the k-th largest of the others.
        kept = chosen(order[:, : self.k_max], self.num_experts, torch.bool)
        margin = logits - torch.where(kept, values[:, self.k_max, None], values[:, self.k_max - 1, None])
        # Masked experts have infinite margins (or none): certain either way, and without a gradient.
        certain = margin.isfinite().logical_not()
        probability = torch.special.ndtr(torch.where(certain, 0, margin) / deviation)
        return torch.where(certain, (margin > 0).to(probability.dtype), probability)
