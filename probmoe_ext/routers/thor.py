"""THOR: experts drawn uniformly, kept in agreement by a consistency loss (arXiv 2110.04260)."""

from __future__ import annotations

from typing import Literal

import torch

from probmoe_ext.ops import gumbel_top_k
from probmoe_ext.routers.base import ExpertsPerToken, Router
from probmoe_ext.routers.context import BATCH_SHAPE
from probmoe_ext.routers.registry import register_router

TRAINING = ("batch", "sequence", "token")
INFERENCE = ("token", "sequence", "ensemble")


@register_router("thor")
class ThorRouter(Router):
    """``k`` distinct experts at random, all subsets alike, each with weight ``1/k``; the gate has no part in it.

    In training one draw serves the whole batch, as in the authors' code, or each sequence or token has its own. In
    evaluation each token or sequence draws (the paper's two ways of dispatching), or all experts are averaged
    (``"ensemble"``), which draws nothing and costs ``E`` experts. An expert whose logit is -inf is not chosen.

    What makes the experts agree is not here: two forward passes and the divergence between them, see
    :func:`probmoe_ext.hf.train_consistently`.

    Source: Zuo et al., "Taming Sparsely Activated Transformer with Stochastic Experts", 2022 (arXiv 2110.04260), where
    ``k`` is 1, and the authors' code (github.com/microsoft/Stochastic-Mixture-of-Experts).

    Args:
        num_experts: ``E``.
        k: Experts per token, one number.
        draw: What shares a draw in training: ``"batch"``, ``"sequence"`` or ``"token"``.
        inference: What shares a draw in evaluation: ``"token"`` or ``"sequence"``; or ``"ensemble"``.

    Raises:
        ValueError: If an option or ``k`` is not allowed.
    """

    needs = frozenset({BATCH_SHAPE})

    def __init__(
        self,
        num_experts: int,
        k: ExpertsPerToken,
        *,
        draw: Literal["batch", "sequence", "token"] = "batch",
        inference: Literal["token", "sequence", "ensemble"] = "token",
    ) -> None:
        super().__init__(num_experts, k, draw=draw, inference=inference)
        self.one_k()
        for option, value, allowed in (("draw", draw, TRAINING), ("inference", inference, INFERENCE)):
            if value not in allowed:
                raise ValueError(f"{option} of router 'thor' must be one of {', '.join(allowed)}; got {value!r}")
        self.draw = draw
        self.inference = inference

    @property
    def width(self) -> int:
        """``k``; ``E`` in an evaluation that averages."""
        return self.num_experts if not self.training and self.inference == "ensemble" else self.k_max

    def forward(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose for ``[T, E]`` logits, of which only -inf counts, weights and indices ``[T, K]``."""
        masked = logits.detach() == -torch.inf
        if self.width > self.k_max:
            indices = torch.arange(self.num_experts, device=logits.device).expand(logits.shape).contiguous()
        else:
            # The experts' places in a random order, those that must not be chosen behind all.
            places = self._orders(logits).argsort(dim=-1).masked_fill(masked, self.num_experts)
            indices = places.topk(self.width, dim=-1, largest=False).indices
        return self.weights_for(hidden_states, logits, indices), indices

    def weights_for(
        self,
        hidden_states: torch.Tensor,
        logits: torch.Tensor,
        indices: torch.Tensor,
        scores: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The same weight for each of the given experts ``[T, K]``."""
        closed = torch.nn.functional.pad(logits.detach() == -torch.inf, (0, 1), value=True)
        used = (~closed.gather(-1, indices)).to(torch.promote_types(logits.dtype, torch.float32))
        return (used / used.sum(-1, keepdim=True).clamp(min=1)).to(logits.dtype)

    def _orders(self, logits: torch.Tensor) -> torch.Tensor:
        """A random order of the experts for each token, ``[T, E]``, shared as it should be."""
        level = self.draw if self.training else self.inference
        rows = 1 if level == "batch" else len(logits) if level == "token" else self.batch_shape[0]
        orders, _ = gumbel_top_k(torch.zeros(rows, self.num_experts, device=logits.device), self.num_experts)
        each = len(logits) // max(rows, 1)
        return orders.unsqueeze(1).expand(-1, each, -1).flatten(0, 1)
