"""A router with a parameter, a hidden size and an auxiliary loss, for tests: the package has none of its own yet."""

from __future__ import annotations

import torch
from torch import nn

from probmoe_ext.routers import Router


class BalanceRouter(Router):
    """Top-k on logits plus a bias per expert that is learnt, with a loss on the mean probabilities in training."""

    has_loss = True

    def __init__(self, num_experts: int, k: int, *, hidden_size: int = 4, coefficient: float = 0.1) -> None:
        super().__init__(num_experts, k, hidden_size=hidden_size, coefficient=coefficient)
        self.coefficient = coefficient

    def forward(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        probs = torch.softmax(logits.float(), -1)
        weights, indices = probs.topk(self.k_max, dim=-1)
        if self.training:
            loss = self.coefficient * self.num_experts * probs.mean(0).square().sum()
            weights = self.join_loss(weights, loss, "balance")
        return weights.to(logits.dtype), indices


class BiasedRouter(BalanceRouter):
    """The same with a parameter of its own."""

    def __init__(self, num_experts: int, k: int, *, hidden_size: int = 4, coefficient: float = 0.1) -> None:
        super().__init__(num_experts, k, hidden_size=hidden_size, coefficient=coefficient)
        self.bias = nn.Parameter(torch.zeros(num_experts))

    def forward(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(hidden_states, logits + self.bias)
