"""SparseMixer: one sampled expert stands for all in the router's gradient (arXiv 2310.00811 and 2409.12136)."""

from __future__ import annotations

from typing import ClassVar

import torch

from probmoe_ext.ops import gumbel_top_k
from probmoe_ext.ops.arguments import single
from probmoe_ext.routers.base import ExpertsPerToken, Router
from probmoe_ext.routers.registry import register_router
from probmoe_ext.routers.topk import straight_through

LOWEST = -1e30
"""Stands for -inf: chosen after every other expert, and then with weight 0."""


@register_router("sparsemixer")
class SparseMixerRouter(Router):
    """Experts drawn one after the other; the gradient of the choice by the midpoint method.

    Liu, Gao and Chen 2023, "Sparse Backpropagation for MoE Training", arXiv 2310.00811, section 3; facts that the paper
    leaves open are from the authors' package ``sparsemixer``. A first expert ``D`` is drawn with the probabilities
    ``p = softmax(logits)`` over the experts that are allowed: those with

        (max - logit) / max(|logit|, max) <= 2 jitter,

    the others being out of reach of a multiplicative jitter. The exact gradient has a term for the choice, in which
    each ``D`` is compared with no expert at all, ``L(p_D) - L(0)`` as a function of its weight, beside the usual one
    through the weight. The midpoint method, ``L(w) - L(0) = w L'(w / 2) + O(w^3)``, gives it from one evaluation at
    half the weight. So the weight is, in training::

        p_D      if D is the most probable expert, or else with probability 1 / 2
        p_D / 2  otherwise

    and its gradient is ``2 dp_D`` in either case: on average the sum of both terms, and by the first-order method
    ``w L'(w)`` for the most probable expert. In evaluation ``D`` is the most probable expert, with weight ``p_D``.

    The paper is about ``k = 1``. For more, the expert that was drawn is removed and the next one drawn from the rest in
    the same way, so that its weight is its share of what is left, as Liu et al. 2024 do for ``k = 2``; the weights do
    not add up to 1. The trained vector that the paper scales the output by is left out: what the experts end with can
    take it up. There is no loss for the balance; a model that has one keeps it.

    Args:
        num_experts: ``E``.
        k: Experts per token, one number.
        jitter: How far from the largest logit an expert may lie, from 0 (none but it) to 1 (all are allowed).

    Raises:
        ValueError: If an option or ``k`` is not allowed.
    """

    parts: ClassVar[int] = 2
    """The weight of an inner point is this part of the whole."""
    whole: ClassVar[float] = 1 / 2
    """How often the whole weight is used for an expert that is not the most probable one."""
    gain: ClassVar[float] = 2.0
    """What the gradient is multiplied by."""

    def __init__(self, num_experts: int, k: ExpertsPerToken, *, jitter: float = 0.1) -> None:
        super().__init__(num_experts, k, jitter=jitter)
        self.one_k()
        if not 0 <= jitter <= 1:
            raise ValueError(f"jitter of router {self.name!r} must be from 0 to 1, got {jitter}")
        self.jitter = jitter

    def forward(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route ``[T, E]`` logits to weights and indices ``[T, k]``; the hidden states are not used."""
        return self._draw(logits, None)

    def weights_for(
        self,
        hidden_states: torch.Tensor,
        logits: torch.Tensor,
        indices: torch.Tensor,
        scores: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weights of given experts ``[T, K]``, had they been drawn in this order; 0 for one that is not allowed.

        In training, whole weights or parts of them are drawn anew.
        """
        return self._draw(logits, indices)[0]

    def _draw(self, logits: torch.Tensor, given: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        wide = single(logits)
        left = wide.clamp(min=LOWEST)
        constant = left.detach()
        weights, indices = [], []
        for slot in range(self.k_max if given is None else given.shape[-1]):
            highest = left.detach().amax(-1, keepdim=True)
            distance = (highest - constant) / torch.maximum(constant.abs(), highest)
            allowed = left.masked_fill(distance > 2 * self.jitter, -torch.inf)
            best = allowed.argmax(-1, keepdim=True)
            unused = None
            if given is not None:
                index = given[..., slot : slot + 1]
                unused, index = index == self.num_experts, index.clamp(max=self.num_experts - 1)
            else:
                index = gumbel_top_k(allowed.detach(), 1)[0] if self.training else best
            weight = torch.softmax(allowed, dim=-1).gather(-1, index)
            if self.training:
                weight = self._estimate(weight, index == best)
            without = left.scatter(-1, index, -torch.inf)
            if unused is not None:
                weight, without = torch.where(unused, 0, weight), torch.where(unused, left, without)
            left = without
            weights.append(torch.where(wide.gather(-1, index) == -torch.inf, 0, weight))
            indices.append(index)
        return torch.cat(weights, -1).to(logits.dtype), torch.cat(indices, -1)

    def _estimate(self, weight: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
        """The whole weight or a part of it, with the gradient of the whole times the gain."""
        whole = best | (torch.rand_like(weight) < self.whole)
        value = torch.where(whole, weight, weight / self.parts).detach()
        return straight_through(value, self.gain * weight)


@register_router("sparsemixer_v2")
class SparseMixerV2Router(SparseMixerRouter):
    """Experts drawn one after the other; the gradient of the choice by a third-order method.

    Liu et al. 2024, "GRIN: GRadient-INformed MoE", arXiv 2409.12136, section 2, and the authors' package; the drawing,
    the evaluation mode, ``k > 1`` and the arguments are those of :class:`SparseMixerRouter`. Heun's third-order method,
    ``L(w) - L(0) = w (L'(w) + 3 L'(w / 3)) / 4 + O(w^4)``, takes the place of the midpoint method: the weight is

        p_D      if D is the most probable expert, or else with probability 1 / 4
        p_D / 3  otherwise

    and its gradient is ``dp_D``: on average the term for the choice alone. Phi-3.5-MoE, which was trained so, uses
    ``jitter = 0.01``.
    """

    parts = 3
    whole = 1 / 4
    gain = 1.0
