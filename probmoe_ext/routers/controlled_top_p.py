"""Top-p whose threshold a controller moves, so that the tokens use k experts on average (arXiv 2512.13996)."""

from __future__ import annotations

import math

import torch
from torch import nn

from probmoe_ext.ops.arguments import single
from probmoe_ext.routers.base import ExpertsPerToken
from probmoe_ext.routers.registry import register_router
from probmoe_ext.routers.target import TargetRouter
from probmoe_ext.routers.top_p import check_weights, join_losses, smallest_sets
from probmoe_ext.routers.topk import chosen, weights_at

UNIT = 1 << 24
"""Errors are counted in integers of this fraction: exact sums, which no cast of the model rounds."""


@register_router("controlled_top_p")
class ControlledTopPRouter(TargetRouter):
    """Top-p with one threshold for all layers, held by a proportional-integral controller at ``k`` experts on average.

    Jin et al. 2025, "Sparsity-Controllable Dynamic Top-p MoE", arXiv 2512.13996. The logits of a token are standardised
    over the experts and multiplied by a scale that each layer learns, ``s (logits - mean) / deviation``; the
    smallest set of experts that has the share ``p`` of their softmax is used, at least one, weighted by its
    probabilities divided by their sum. One threshold serves all layers, so the scales share the experts out among them.
    Before each pass, with the mean number ``a`` of experts that tokens used in the last one, over all layers::

        error = (k - a) / E,     p = start + proportional * error + integral * (sum of all errors)

    kept between 0 and 1, and so is ``start`` plus the integral part, which would run away while the threshold is at a
    bound. In evaluation the threshold is the last one. The losses are those of :class:`TopPRouter`, with
    the coefficients that the paper found best; it reports that a z-loss does harm.

    The paper's gains and start were not available to the author of this router; those here settle within some tens of
    passes if the number of experts answers to the threshold as for equal probabilities, and are stable up to ten times
    that answer. Nor was the scale's start: 1. A model that was trained with another router has to adapt to the
    standardised logits.

    Args:
        num_experts: ``E``.
        k: Experts per token to reach on average, one number; the results have ``E`` slots.
        start: The threshold in the beginning, above 0 and at most 1.
        proportional: Gain of the last error, at least 0.
        integral: Gain of the sum of errors, positive.
        entropy_weight: Coefficient of ``entropy``, at least 0.
        balance_weight: Coefficient of ``balance``, at least 0.

    Raises:
        ValueError: If an option or ``k`` is not allowed.
    """

    has_loss = True

    error: torch.Tensor
    """The last error, times ``UNIT``."""

    total: torch.Tensor
    """The sum of all errors, times ``UNIT``."""

    def __init__(
        self,
        num_experts: int,
        k: ExpertsPerToken,
        *,
        start: float = 0.4,
        proportional: float = 0.05,
        integral: float = 0.05,
        entropy_weight: float = 1e-3,
        balance_weight: float = 1e-4,
    ) -> None:
        super().__init__(
            num_experts,
            k,
            start=start,
            proportional=proportional,
            integral=integral,
            entropy_weight=entropy_weight,
            balance_weight=balance_weight,
        )
        if not 0 < start <= 1:
            raise ValueError(f"start of router 'controlled_top_p' must be above 0 and at most 1, got {start}")
        if not 0 <= proportional < math.inf:
            raise ValueError(
                f"proportional of router 'controlled_top_p' must be finite and at least 0, got {proportional}"
            )
        if not 1e-6 <= integral < math.inf:
            raise ValueError(f"integral of router 'controlled_top_p' must be finite and at least 1e-6, got {integral}")
        self.start, self.proportional, self.integral = start, proportional, integral
        self.loss_weights = check_weights(self.name, entropy_weight, balance_weight)
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("error", torch.zeros((), dtype=torch.int64))
        self.register_buffer("total", torch.zeros((), dtype=torch.int64))

    @property
    def p(self) -> torch.Tensor:
        """The threshold of this pass, a scalar in float32."""
        moved = self.proportional * self.error.float() + self.integral * self.total.float()
        return (self.start + moved / UNIT).clamp(0, 1)

    def begin_pass(self) -> None:
        """Let the threshold follow the last pass: up if it used fewer than ``k`` experts per token, else down."""
        excess, tokens = self.excess()
        lowest, highest = (round((end - self.start) / self.integral * UNIT) for end in (0, 1))
        self.error.copy_(-excess * UNIT // (tokens * self.num_experts).clamp(min=1))
        self.total.add_(self.error).clamp_(lowest, highest)

    def standardized(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits ``[T, E]`` that the probabilities are of, in float32 (float64 for such logits)."""
        wide = single(logits)
        allowed = wide > -torch.inf
        count = allowed.sum(-1, keepdim=True).clamp(min=1)
        wide = torch.where(allowed, wide, 0)
        centred = torch.where(allowed, wide - wide.sum(-1, keepdim=True) / count, 0)
        # Equal logits stay 0: the floor only keeps their gradient finite.
        deviation = (centred.square().sum(-1, keepdim=True) / count).clamp(min=1e-12).sqrt()
        return torch.where(allowed, self.scale.to(wide.dtype) * centred / deviation, -torch.inf)

    def forward(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route ``[T, E]`` logits to weights and indices ``[T, E]``; the hidden states are not used."""
        standardized = self.standardized(logits)
        weights, indices = smallest_sets(standardized, self.p, 1, self.num_experts, True)
        weights = weights.to(logits.dtype)
        if self.training:
            self.note_used(indices < self.num_experts)
            weights = join_losses(self, weights, standardized, indices, self.loss_weights)
        return weights, indices

    def weights_for(
        self,
        hidden_states: torch.Tensor,
        logits: torch.Tensor,
        indices: torch.Tensor,
        scores: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The probabilities of given experts ``[T, K]``, divided by their sum."""
        dense = torch.softmax(self.standardized(logits), dim=-1)
        return weights_at(indices, dense * chosen(indices, self.num_experts, dense.dtype), True).to(logits.dtype)
