"""The class that the gate of a swapped layer has: its own, routing by a router of this package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from probmoe_ext.hf.choice import PLAIN, ChoiceRule
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
        weight: The name of the ``[E, H]`` tensor in the gate.
        bias: The name of the tensor that is added to the logits, ``None`` without one.
        correction: The name of the tensor that is added to the scores for choosing, ``None`` without one.
        rule: How scores come from logits, and choices from scores.
        scale: What the weights are multiplied by in the end.
        ignores_autocast: Whether float32 logits stay float32 under autocast.
    """

    num_experts: int
    hidden_size: int
    k: int
    normalize: bool
    records: str
    float32_weights: bool
    weight: str = "weight"
    bias: str | None = None
    correction: str | None = None
    rule: ChoiceRule = PLAIN
    scale: float = 1.0
    ignores_autocast: bool = False

    @property
    def largest_k(self) -> int:
        """How many experts a token can choose from."""
        groups = self.rule.groups
        return self.num_experts if groups is None else self.num_experts // groups[0] * groups[1]


def tensor_of(gate: nn.Module, name: str) -> Any:
    """A tensor of a gate by its dotted name: a parameter, a buffer, or what a parametrization makes."""
    found: Any = gate
    for part in name.split("."):
        found = getattr(found, part)
    return found


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
        hidden_states = hidden_states.reshape(-1, form.hidden_size)
        logits = gate_logits(self, form, router.gate_input(hidden_states))
        recorded = logits
        if form.records == "probabilities":
            recorded = torch.softmax(logits, dim=-1, dtype=torch.float32)
        elif form.records == "logits as float32":
            recorded = logits.float()
        if form.rule == PLAIN:
            weights, indices = router(hidden_states, logits.float() if form.float32_weights else logits)
        else:
            correction = None if form.correction is None else tensor_of(self, form.correction).flatten()
            choice, scores = form.rule.choice(logits.float(), correction)
            weights, indices = router(hidden_states, choice, scores)
        if router.layer is not None:
            # The layer behind may want the logits; the attention weights have had their use, and are large.
            router.layer.logits, router.layer.attention = logits, None
        if not form.float32_weights:
            weights = weights.to(hidden_states.dtype if form.records == "float32 logits" else logits.dtype)
        return recorded, weights if form.scale == 1 else weights * form.scale, indices


def gate_logits(gate: nn.Module, form: RouterForm, hidden_states: torch.Tensor) -> torch.Tensor:
    """The logits ``[T, E]`` of hidden states ``[T, H]``, in the dtype in which the original computes them."""
    weight = tensor_of(gate, form.weight)
    bias = None if form.bias is None else tensor_of(gate, form.bias)
    if form.records == "float32 logits":
        device = hidden_states.device.type
        with torch.autocast(device, enabled=torch.is_autocast_enabled(device) and not form.ignores_autocast):
            return F.linear(hidden_states.float(), weight.float(), None if bias is None else bias.float())
    if hidden_states.dtype != weight.dtype and not torch.is_autocast_enabled(hidden_states.device.type):
        hidden_states = hidden_states.to(weight.dtype)
    return F.linear(hidden_states, weight, bias)
