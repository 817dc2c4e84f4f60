"""Routing functions for inference engines, which have a model of their own and take the routing as a function.

vLLM's ``FusedMoE`` has the argument ``custom_routing_function``. It calls it by keyword with ``hidden_states [T, H]``,
``gating_output [T, E]``, ``topk`` and ``renormalize``, and casts what comes back to float32 weights and to the integer
dtype of its kernels (``CustomRoutingRouter._compute_routing`` in
``vllm/model_executor/layers/fused_moe/router/custom_routing_router.py``, commit 05da17c). Nothing there
knows slots that are not used: its alignment kernel for small batches counts tokens in ``counts[topk_ids[i]]`` without
comparing the index to the number of experts (``moe_align_block_size_small_batch_expert_kernel`` in
``csrc/moe/moe_align_sum_kernels.cu``, commit 00e6fb6), so index ``E`` would be counted for another thread's expert. A
slot that is not used therefore gets an expert that the token uses anyway, at weight 0: right results, and the work of
``k_max`` experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from probmoe_ext.hf.choice import PLAIN
from probmoe_ext.hf.gate import RouterForm, SwappedGate, tensor_of
from probmoe_ext.hf.layers import moe_layers
from probmoe_ext.routers import Router

RoutingFunction = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def custom_routing_function(model: nn.Module, layer: int | None = None) -> RoutingFunction:
    """The evaluation routing of a swapped model as a function for vLLM's ``FusedMoE(custom_routing_function=…)``.

    Give ``FusedMoE`` the largest k as ``top_k`` and the model's own ``renormalize``. A factor on the weights
    (``routed_scaling_factor``) is left to the engine, whose layer has an argument for it.

    Args:
        model: A model after :func:`probmoe_ext.hf.swap_router`, or loaded by ``probmoe_ext.from_pretrained``. Only its
            routers are kept, and what their choice needs (a correction bias).
        layer: The number of the decoder layer; needed only if the layers do not route alike.

    Returns:
        ``function(hidden_states, gating_output, topk, renormalize)``, to weights (float32) and ids (int32), both
        ``[T, topk]``. It raises a ``ValueError`` if ``topk`` is less than the largest k, or ``renormalize`` is not what
        the router does.

    Raises:
        ValueError: If a layer is not swapped, or its router evaluates the experts in a way of its own; if the layers
            route in more than one way and none was chosen.
    """
    layers = moe_layers(model, None if layer is None else [layer])
    swapped = [one for one in layers if isinstance(one.gate, SwappedGate)]
    if len(swapped) < len(layers):
        raise ValueError(f"the router at {layers[0].path} is the model's own: vLLM has it already")
    gates: list[Any] = [one.gate for one in swapped]
    first = gates[0]
    for one, gate in zip(swapped, gates, strict=True):
        if gate.probmoe.runs_experts and gate.probmoe.top_k_in_evaluation() is None:
            raise ValueError(
                f"router {gate.probmoe.name!r} at {one.path} does not evaluate the experts as an engine does: a "
                "routing function would leave out a part of it"
            )
    alike = all(
        (gate.probmoe_form, gate.probmoe.name, gate.probmoe.k, gate.probmoe.options)
        == (first.probmoe_form, first.probmoe.name, first.probmoe.k, first.probmoe.options)
        for gate in gates
    )
    own_state = first.probmoe_form.correction is not None or any(True for _ in first.probmoe.parameters())
    if len(gates) > 1 and (own_state or not alike):
        raise ValueError(
            "the layers of this model do not route by one function: call this with layer= once for each of "
            + ", ".join(str(one.index) for one in swapped)
        )
    return _Function(first)


class _Function:
    """A router in evaluation mode, with what its choice needs; nothing of the model."""

    def __init__(self, gate: Any) -> None:
        import copy

        self.form: RouterForm = gate.probmoe_form
        self.router: Router = copy.deepcopy(gate.probmoe).eval()
        correction = None if self.form.correction is None else tensor_of(gate, self.form.correction)
        self.correction = None if correction is None else correction.detach().clone().flatten()

    @torch.no_grad()
    def __call__(
        self, hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route ``gating_output`` ``[T, E]``."""
        form, router = self.form, self.router
        num_experts = gating_output.shape[-1]
        if num_experts != form.num_experts:
            raise ValueError(f"gating_output must be of {form.num_experts} experts, got {num_experts}")
        if topk < router.width:
            raise ValueError(f"topk must be at least the largest k of the router, {router.width}, got {topk}")
        normalizes = router.options.get("normalize")
        if normalizes is not None and bool(renormalize) is not bool(normalizes):
            raise ValueError(f"renormalize must be {bool(normalizes)}, as the router was trained; got {renormalize}")
        logits = gating_output.float()
        if form.rule == PLAIN:
            weights, indices = router(hidden_states, logits)
        else:
            correction = None if self.correction is None else self.correction.to(logits.device)
            weights, indices = router(hidden_states, *form.rule.choice(logits, correction))
        used = indices < num_experts
        # The token's own first expert: no expert has to read another row for it. Expert 0 if there is none at all.
        first = torch.where(used[:, :1], indices[:, :1], 0)
        indices = torch.where(used, indices, first)
        more = topk - router.width
        if more:
            indices = torch.cat([indices, first.expand(-1, more)], dim=-1)
            weights = torch.nn.functional.pad(weights, (0, more))
        return weights.float(), indices.to(torch.int32)
