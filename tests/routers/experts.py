"""Experts in float64 with plain loops, for the tests of routers that run them, and what those compute of them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class LoopEvaluation(nn.Module):
    """An evaluation of experts ``[E, …]``, slot by slot; see :class:`probmoe_ext.routers.experts.Evaluation`."""

    def __init__(self, num_experts: int, hidden_size: int, width: int = 5, scale: float = 1.0) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(num_experts, hidden_size, width, dtype=torch.float64))
        self.down = nn.Parameter(torch.randn(num_experts, width, hidden_size, dtype=torch.float64))
        self.scale = scale

    @property
    def module(self) -> nn.Module:
        return self

    def expert(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """What an expert makes of ``[…, H]``."""
        return F.silu(x @ self.up[index]) @ self.down[index]

    def forward(self, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows = []
        for x, row, weight in zip(hidden_states, indices.tolist(), weights, strict=True):
            used = [one * self.expert(index, x) for index, one in zip(row, weight, strict=True) if index < len(self.up)]
            rows.append(torch.stack(used).sum(0) if used else torch.zeros_like(x))
        return torch.stack(rows)

    def frozen(self, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        constants = {name: parameter.detach() for name, parameter in self.named_parameters()}
        result: torch.Tensor = torch.func.functional_call(self, constants, (hidden_states, indices, weights))
        return result

    def merged(self, hidden_states: torch.Tensor, mixture: torch.Tensor) -> torch.Tensor:
        rows = []
        for x, weights in zip(hidden_states, mixture, strict=True):
            up, down = (sum(w * one for w, one in zip(weights, stack, strict=True)) for stack in (self.up, self.down))
            rows.append(F.silu(x @ up) @ down)
        return torch.stack(rows)
