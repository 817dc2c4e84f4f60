"""Evaluate experts that are merged first: one expert for each group of tokens, made of the parameters of all."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def merged_experts_forward(self: nn.Module, hidden_states: Tensor, mixture: Tensor) -> Tensor:
    """Each group of tokens through the expert ``sum_e mixture[g, e] * (the parameters of e)``.

    Args:
        self: The experts, a module that :func:`~probmoe_ext.hf.dispatch.follows_interface`.
        hidden_states: ``[G, n, H]``.
        mixture: ``[G, E]``, floating; cast to the parameters' dtype.

    Returns:
        ``[G, n, H]`` in the dtype of ``hidden_states``. ``G`` merged experts are kept for the backward pass.
    """
    experts: Any = self
    has_gate = getattr(experts, "has_gate", True)

    def merged(parameter: Tensor) -> Tensor:
        return (mixture.to(parameter.dtype) @ parameter.flatten(1)).unflatten(-1, parameter.shape[1:])

    def linear(rows: Tensor, weight: Tensor, bias: str) -> Tensor:
        matrix = merged(weight)
        rows = rows.to(weight.dtype) @ (matrix if experts.is_transposed else matrix.transpose(-2, -1))
        return rows + merged(getattr(experts, bias)).unsqueeze(1) if experts.has_bias else rows

    up = experts.gate_up_proj if has_gate else experts.up_proj
    rows = linear(hidden_states, up, "gate_up_proj_bias" if has_gate else "up_proj_bias")
    rows = experts._apply_gate(rows) if has_gate else experts.act_fn(rows)
    rows = linear(rows, experts.down_proj, "down_proj_bias")
    if getattr(experts, "has_post_expert_norm", False):
        rows = experts.post_expert_norm(rows)
    return rows.to(hidden_states.dtype)
