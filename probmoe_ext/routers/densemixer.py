"""DenseMixer: top-k routing whose router learns from the outputs of all experts (Yao et al. 2026)."""

from __future__ import annotations

import torch

from probmoe_ext.ops.arguments import single
from probmoe_ext.routers.base import ExpertsPerToken
from probmoe_ext.routers.experts import Evaluation, Handover
from probmoe_ext.routers.registry import register_router
from probmoe_ext.routers.topk import TopKRouter, chosen


@register_router("densemixer")
class DenseMixerRouter(TopKRouter):
    """Top-k whose gradient to the logits is that of the sum over all experts, by a straight-through estimator.

    With ``p = softmax(logits)``, ``f_e`` the experts and ``S`` the ``k`` largest, the layer computes
    ``y = sum_{e in S} w_e f_e(x)``, ``w_e = p_e``, as top-k does. Its gradient is taken as that of
    ``sum_e w_e f_e(x)`` over all experts: ``dL/dw_e = <dL/dy, f_e(x)>`` for each of them. An expert's parameters, and
    the hidden states through it, get their gradient only where it was chosen. With ``normalize``, ``w_e = p_e / n``,
    ``n`` the sum of ``p`` over ``S``, a constant for the experts that were not chosen (the authors' "partscale").

    Training evaluates every expert on every token, the ones that were not chosen without a graph of their own: their
    outputs, ``[T, E - k, H]``, are what the backward pass keeps. That is left out where no gradient is asked for.
    Evaluation is plain top-k.

    Source: Yao et al., "DenseMixer: Improving MoE Post-Training with Precise Router Gradient", and the authors' code
    (github.com/yaof20/DenseMixer), from which the treatment of ``normalize`` is taken.

    Args:
        num_experts: ``E``.
        k: Experts per token, one number.
        normalize: Whether the ``k`` weights are divided by their sum.

    Raises:
        ValueError: If ``k`` is a band, or out of range.
    """

    runs_experts = True

    def __init__(self, num_experts: int, k: ExpertsPerToken, *, normalize: bool = False) -> None:
        super().__init__(num_experts, k, normalize=normalize)
        self._dense = Handover()

    def forward(
        self, hidden_states: torch.Tensor, logits: torch.Tensor, scores: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route ``[T, E]`` logits to weights and indices ``[T, k]``; with ``scores``, these are ``p``."""
        if self.training:
            if scores is None:
                dense = torch.softmax(single(logits), dim=-1)
            else:  # an expert that must not be chosen has no gradient, as in the softmax
                dense = torch.where(logits == -torch.inf, 0, scores)
            self._dense.put(dense)
        return super().forward(hidden_states, logits, scores)

    def run_experts(
        self, evaluate: Evaluation, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Evaluate the chosen experts; in training add the others, with weights of value 0 that have a gradient."""
        result = evaluate(hidden_states, indices, weights)
        if not self.training:
            return result
        dense = self._dense.take()
        if not dense.requires_grad:  # frozen, or the first run of a layer that will be replayed
            return result
        z = chosen(indices, self.num_experts, dense.dtype)
        if self.normalize:
            total = (dense.detach() * z).sum(-1, keepdim=True)
            dense = dense / torch.where(total == 0, 1, total)
        everyone = torch.arange(self.num_experts, device=indices.device)
        others = torch.where(z > 0, self.num_experts, everyone)
        through = ((dense - dense.detach()) * evaluate.scale).to(weights.dtype)
        return result + evaluate.frozen(hidden_states.detach(), others, through)
