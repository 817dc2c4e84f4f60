"""Evaluate experts on the slots that tokens use, and on no other: one matrix product for each expert, grouped.

A slot with index ``E`` (one past the last expert) is not used. It costs neither a row of a matrix product nor, on the
CPU, a row of anything else; it adds nothing to the output and gets no gradient, forward and backward. Nothing is read
back to the host: on an accelerator and under ``torch.compile`` all shapes are those of the slots, with the unused rows
sorted behind the last group, where the kernel does not look.

The function has the signature of transformers' expert implementations and is registered among them as
``"probmoe_grouped_mm"``. It is written against what ``use_experts_implementation`` puts on a class since 5.0.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from probmoe_ext.hf.layers import shape_of
from probmoe_ext.ops.arguments import single

NAME = "probmoe_grouped_mm"


def follows_interface(experts: Any) -> bool:
    """Whether a module keeps its weights as the expert implementations of transformers expect them."""
    up = getattr(experts, "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj", None)
    weights = (up, getattr(experts, "down_proj", None))
    return all(hasattr(experts, name) for name in ("is_transposed", "has_bias", "_apply_gate")) and all(
        isinstance(weight, Tensor)
        and len(shape_of(weight)) == 3
        and weight.is_floating_point()
        and weight.element_size() >= 2
        for weight in weights
    )


def grouped_experts_forward(
    self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """The weighted sum of each token's experts, over the slots that it uses.

    Args:
        self: The experts, a module that :func:`follows_interface`.
        hidden_states: ``[T, H]``.
        top_k_index: ``[T, K]``, int64; a slot with an index of ``E`` or above is not used.
        top_k_weights: ``[T, K]``.

    Returns:
        ``[T, H]`` in the dtype of ``hidden_states``; the sum over slots is taken in float32 at least.
    """
    experts: Any = self
    has_gate = getattr(experts, "has_gate", True)
    up, down = experts.gate_up_proj if has_gate else experts.up_proj, experts.down_proj
    num_experts, (tokens, width) = down.shape[0], top_k_index.shape
    chosen = top_k_index.reshape(-1)
    # Shapes that depend on the data are free on the CPU, and a synchronisation elsewhere.
    compact = chosen.device.type == "cpu" and not torch.compiler.is_compiling()
    if compact:
        slot = (chosen < num_experts).nonzero().squeeze(1)
        chosen, order = chosen[slot].sort()
        slot = slot[order]
    else:
        chosen, slot = chosen.sort()
    token = slot // width
    offsets = torch.searchsorted(chosen, torch.arange(num_experts, device=chosen.device), right=True, out_int32=True)

    def clear(rows: Tensor) -> Tensor:
        # The kernel leaves rows behind the last group as they are, in its result and in the gradient of its input.
        return rows if compact else rows.masked_fill((chosen >= num_experts).unsqueeze(-1), 0)

    def linear(rows: Tensor, weight: Tensor, bias: str) -> Tensor:
        rows = _grouped_mm(rows, weight if experts.is_transposed else weight.transpose(-2, -1), offsets)
        return rows + getattr(experts, bias)[chosen.clamp(max=num_experts - 1)] if experts.has_bias else rows

    rows = linear(clear(hidden_states[token]), up, "gate_up_proj_bias" if has_gate else "up_proj_bias")
    rows = clear(rows)
    rows = experts._apply_gate(rows) if has_gate else experts.act_fn(rows)
    rows = clear(linear(rows, down, "down_proj_bias"))
    if getattr(experts, "has_post_expert_norm", False):
        rows = experts.post_expert_norm(rows)
    rows = rows * top_k_weights.reshape(-1)[slot].unsqueeze(-1)
    rows = single(rows)
    if compact:
        result = rows.new_zeros(tokens, rows.shape[-1]).index_add(0, token, rows)
    else:
        back = torch.empty_like(slot).scatter_(0, slot, torch.arange(len(slot), device=slot.device))
        result = rows[back].view(tokens, width, -1).sum(dim=1)
    return result.to(hidden_states.dtype)


def register_implementation() -> None:
    """Make the function known to transformers, if it is there; ``set_experts_implementation`` then takes its name."""
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        return
    ALL_EXPERTS_FUNCTIONS.register(NAME, grouped_experts_forward)


def _grouped_mm(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """``rows`` ``[S, in]`` in groups that end at ``offsets`` ``[E]``, times ``weight`` ``[E, in, out]``."""
    device = rows.device.type
    # The operator knows no autocast; F.linear, in its place in the model's own loop, does.
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    rows, weight = rows.to(dtype), weight.to(dtype)
    if torch.compiler.is_compiling() and dtype != torch.bfloat16:
        product: Tensor = torch.ops.probmoe_hf.grouped_mm(rows, weight, offsets)
        return product
    return F.grouped_mm(rows, weight, offs=offsets)


# torch traces its operator for bfloat16 alone, though it runs for other types: for these, one that the compiler does
# not look into. (That of transformers reads the offsets back to the host.)
@torch.library.custom_op("probmoe_hf::grouped_mm", mutates_args=())
def _opaque_grouped_mm(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return F.grouped_mm(rows, weight, offs=offsets)


@torch.library.custom_op("probmoe_hf::grouped_mm_backward", mutates_args=())
def _opaque_grouped_mm_backward(
    gradient: Tensor, rows: Tensor, weight: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    gradient = gradient.contiguous()
    return (
        F.grouped_mm(gradient, weight.transpose(-2, -1), offs=offsets),
        F.grouped_mm(rows.t(), gradient, offs=offsets),
    )


@_opaque_grouped_mm.register_fake
def _(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[-1])


@_opaque_grouped_mm_backward.register_fake
def _(gradient: Tensor, rows: Tensor, weight: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), rows.new_empty(weight.shape)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    rows, weight, offsets = ctx.saved_tensors
    return (*torch.ops.probmoe_hf.grouped_mm_backward(gradient, rows, weight, offsets), None)


_opaque_grouped_mm.register_autograd(
    _differentiate, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)
