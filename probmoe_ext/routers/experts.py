"""The experts of a layer as a router sees them, for routers that do something else than evaluate the chosen ones."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import nn


class Evaluation(Protocol):
    """Evaluates experts. Slots with index ``E`` are not used: they add nothing, and have no gradient."""

    @property
    def module(self) -> nn.Module:
        """The module that holds the experts' parameters, as the model has it."""

    @property
    def scale(self) -> float:
        """The factor of the model that the weights of ``Router.run_experts`` carry, and weights of its own must."""

    def __call__(self, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum ``[T, H]`` of the experts ``[T, K]`` of each token; any ``T`` and ``K``."""

    def frozen(self, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The same, with no gradient to the experts' parameters."""

    def merged(self, hidden_states: torch.Tensor, mixture: torch.Tensor) -> torch.Tensor:
        """Groups of tokens ``[G, n, H]``, each through one expert whose parameters are the sum ``[G, E]`` of theirs.

        For routers that say ``merges_experts = True``.
        """


class Handover:
    """What ``Router.forward`` leaves for ``Router.run_experts`` of the same pass, beside indices and weights.

    A cell, so that copies and pickles of the router hold no tensors: they may be parts of a graph.
    """

    def __init__(self) -> None:
        self._tensor: torch.Tensor | None = None

    def put(self, tensor: torch.Tensor) -> None:
        """Leave a tensor."""
        self._tensor = tensor

    def take(self) -> torch.Tensor:
        """Get the tensor; the cell is empty then.

        Raises:
            ValueError: If there is none.
        """
        tensor, self._tensor = self._tensor, None
        if tensor is None:
            raise ValueError("run_experts follows forward, in the same mode (training or evaluation), once")
        return tensor

    def __getstate__(self) -> dict[str, Any]:
        """Nothing."""
        return {"_tensor": None}
