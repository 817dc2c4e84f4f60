"""The experts of a layer as a router sees them, for routers that do something else than evaluate the chosen ones."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import nn


class Evaluation(Protocol):
    """Evaluates experts. Slots with index ``E`` are not used: they add nothing, and have no gradient."""

    @property
    def module(self) -> nn.Module:
        """The module that holds the experts' parameters, as the model has it."""

    def __call__(self, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum ``[T, H]`` of the experts ``[T, K]`` of each token; any ``T`` and ``K``."""

    def frozen(self, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The same, with no gradient to the experts' parameters."""
