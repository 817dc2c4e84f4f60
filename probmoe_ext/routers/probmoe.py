"""ProbMoE: a sampled subset of experts, with the exact gradient of its distribution (arXiv 2606.01509)."""

from __future__ import annotations

from typing import Literal

import torch

from probmoe_ext.ops import route_probmoe, subset_marginals, subset_mode, subset_sample
from probmoe_ext.ops.arguments import single
from probmoe_ext.routers.base import ExpertsPerToken, Router
from probmoe_ext.routers.registry import register_router
from probmoe_ext.routers.topk import chosen, weights_at

FORWARD = ("sample", "topk")
BACKWARD = ("marginal", "ste")


@register_router("probmoe")
class ProbMoERouter(Router):
    """Experts drawn from the subsets of allowed size, weighted by their softmax probability.

    With ``s = softmax(r)``, ``z`` the indicator of a subset drawn with probability proportional to
    ``exp(sum of r over it)``, and ``m`` its marginals, training returns ``(stopgrad(z - m) + m) * s`` at the chosen
    experts: the values are those of ``s``, the gradient passes through ``m`` and ``s``. In evaluation it returns the
    most probable subset: the ``k`` largest logits, or with a band every positive logit, clamped to the band.

    Args:
        num_experts: ``E``.
        k: Experts per token; a band ``(k_min, k_max)`` lets their number vary with the token.
        normalize: Whether the weights of a token are divided by their sum.
        forward: ``"sample"``, or ``"topk"`` for the most probable subset in training too.
        backward: ``"marginal"`` for the exact marginals, or ``"ste"`` for a straight-through gradient.

    Raises:
        ValueError: If an option or ``k`` is not allowed.
    """

    takes_scores = True

    def __init__(
        self,
        num_experts: int,
        k: ExpertsPerToken,
        *,
        normalize: bool = False,
        forward: Literal["sample", "topk"] = "sample",
        backward: Literal["marginal", "ste"] = "marginal",
    ) -> None:
        super().__init__(num_experts, k, normalize=normalize, forward=forward, backward=backward)
        for option, value, allowed in (("forward", forward, FORWARD), ("backward", backward, BACKWARD)):
            if value not in allowed:
                raise ValueError(f"{option} of router 'probmoe' must be one of {', '.join(allowed)}; got {value!r}")
        self.normalize = normalize
        self.forward_rule: Literal["sample", "topk"] = forward
        self.backward_rule: Literal["marginal", "ste"] = backward

    def top_k_in_evaluation(self) -> tuple[int, bool] | None:
        """``(k, normalize)`` for one ``k``; ``None`` for a band, whose sizes vary in evaluation too."""
        return None if self.leaves_slots_unused else (self.k_max, self.normalize)

    def forward(
        self, hidden_states: torch.Tensor, logits: torch.Tensor, scores: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route ``[T, E]`` logits to weights and indices ``[T, k_max]``; the hidden states are not used.

        With ``scores`` these stand in the place of ``s`` in every formula.
        """
        if scores is not None:
            return self._route_scores(logits, scores)
        weights, indices = route_probmoe(
            logits,
            self.k,
            training=self.training,
            normalize=self.normalize,
            forward=self.forward_rule,
            backward=self.backward_rule,
        )
        return weights, indices

    def weights_for(
        self,
        hidden_states: torch.Tensor,
        logits: torch.Tensor,
        indices: torch.Tensor,
        scores: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``(stopgrad(z - m) + m) * s`` at given experts ``[T, K]``, ``z`` their indicator; ``s`` in evaluation.

        With ``normalize`` it is divided by its sum over all experts, which are not chosen ones only in the gradient.
        """
        wide = single(logits)
        dense = torch.softmax(wide, dim=-1) if scores is None else scores
        return self._weights(indices, wide, dense).to(logits.dtype)

    def _route_scores(self, logits: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sampled = self.training and self.forward_rule == "sample"
        indices = (subset_sample if sampled else subset_mode)(logits.detach(), self.k)
        return self._weights(indices, logits, scores), indices

    def _weights(self, indices: torch.Tensor, logits: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        z = chosen(indices, self.num_experts, scores.dtype)
        if self.training and self.backward_rule == "marginal":
            marginals = subset_marginals(logits, self.k)
            z = (z - marginals).detach() + marginals
        return weights_at(indices, z * scores, self.normalize)
