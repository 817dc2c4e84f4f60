"""The class that the gate of a swapped layer has: its own, routing by a router of this package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from probmoe_ext.hf.reclass import Reclassed
from probmoe_ext.routers import Router


@dataclass(frozen=True)
class RouterForm:
    """What the original router of a layer computes.

    Attributes:
        num_experts: ``E``.
        hidden_size: ``H``.
        k: Experts per token.
        normalize: Whether the weights of a token are divided by their sum.
        records: Its first result: ``"logits"``; ``"logits as float32"``, widened; ``"float32 logits"``, computed so;
            or ``"probabilities"`` (as early 5.x do).
        float32_weights: Whether its weights are float32 in a half-precision model, too.
    """

    num_experts: int
    hidden_size: int
    k: int
    normalize: bool
    records: str
    float32_weights: bool


class SwappedGate(Reclassed):
    """Routes by the router in ``self.probmoe``, and records what the original does.

    In evaluation mode, if the router is then the same as the original one, the original runs: bit for bit.
    """

    probmoe: Router
    probmoe_form: RouterForm

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return ``(router_logits [T, E], weights [T, K], indices [T, K])`` for hidden states ``[..., H]``."""
        form, router = self.probmoe_form, self.probmoe
        if not self.training and router.top_k_in_evaluation() == (form.k, form.normalize):
            original: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = super().forward(hidden_states)
            return original
        weight: Any = self.weight  # a tensor, and no parameter, under a parametrization
        hidden_states = hidden_states.reshape(-1, form.hidden_size)
        if form.records == "float32 logits":
            logits = F.linear(hidden_states.float(), weight.float())
        else:
            logits = F.linear(hidden_states, weight)
        recorded = logits
        if form.records == "probabilities":
            recorded = torch.softmax(logits, dim=-1, dtype=torch.float32)
        elif form.records == "logits as float32":
            recorded = logits.float()
        weights, indices = router(hidden_states, logits.float() if form.float32_weights else logits)
        return recorded, weights, indices
