"""AdaMoE: null experts among the k, so that tokens use different numbers of real ones (arXiv 2406.13233)."""

from __future__ import annotations

import math

import torch
from torch import nn

from probmoe_ext.ops import route_top_k
from probmoe_ext.ops.arguments import single
from probmoe_ext.routers.base import ExpertsPerToken, Router
from probmoe_ext.routers.losses import loads_and_probabilities
from probmoe_ext.routers.registry import register_router
from probmoe_ext.routers.topk import chosen, weights_at


@register_router("adamoe")
class AdaMoERouter(Router):
    """Top-k over the ``E`` experts and ``m`` null experts, which cost nothing and add nothing.

    A head of this router gives the null experts' logits beside the gate's. The ``k`` largest of all ``E + m`` are
    chosen; the real ones among them are weighted by their softmax probability divided by the sum of theirs (null
    experts have no part in it), and slots with a null expert are not used. So a token has from ``max(0, k - m)`` to
    ``k`` experts; one that has none gets 0 from the layer. With a balanced load the mean is ``k E / (E + m)``: to keep
    a model's 8 experts per token with ``m = E``, ask for ``k = 16``.

    A loss ``load`` joins the backward pass: ``load_weight (E + m) sum_i f_i P_i``, ``f_i`` the share of tokens that
    chose expert ``i`` and ``P_i`` its mean probability, where each null expert's ``f_i`` is the mean over the null
    experts: it asks for how many are used, not for which. This loss alone trains the head.

    Source: Zeng et al., "AdaMoE: Token-Adaptive Routing with Null Experts for Mixture-of-Experts Language Models",
    2024 (arXiv 2406.13233), and the authors' code for Mixtral (github.com/CengZihao/AdaMoE), from which the scale of
    the loss and the separate head with its initial values (uniform within ``1/sqrt(H)``) are taken.

    Args:
        num_experts: ``E``.
        k: Slots of a token, null experts included, one number, at most ``E``.
        hidden_size: ``H``, the width of the hidden states.
        num_null: ``m``, at least 1; None for ``E``.
        load_weight: Coefficient of ``load``, at least 0.

    Raises:
        ValueError: If an option or ``k`` is not allowed.
    """

    has_loss = True

    def __init__(
        self,
        num_experts: int,
        k: ExpertsPerToken,
        *,
        hidden_size: int,
        num_null: int | None = None,
        load_weight: float = 0.01,
    ) -> None:
        super().__init__(num_experts, k, hidden_size=hidden_size, num_null=num_null, load_weight=load_weight)
        self.one_k()
        self.num_null = self.num_experts if num_null is None else num_null
        if self.num_null < 1:
            raise ValueError(f"num_null of router 'adamoe' must be at least 1, got {num_null}")
        if not 0 <= load_weight < math.inf:
            raise ValueError(f"load_weight of router 'adamoe' must be finite and at least 0, got {load_weight}")
        self.load_weight = load_weight
        self.null = nn.Linear(hidden_size, self.num_null, bias=False)

    @property
    def leaves_slots_unused(self) -> bool:
        """True: those of null experts."""
        return True

    def forward(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route ``[T, E]`` logits and hidden states ``[T, H]`` to weights and indices ``[T, k]``, null experts last."""
        wide = single(logits)
        null = self.null(hidden_states.to(self.null.weight.dtype)).to(wide.dtype)
        everything = torch.cat((wide, null), dim=-1)
        _, slots = route_top_k(everything.detach(), self.k_max)
        is_null = slots >= self.num_experts
        order = is_null.int().argsort(dim=-1, stable=True)
        indices = slots.masked_fill(is_null, self.num_experts).gather(-1, order)
        weights = self.weights_for(hidden_states, logits, indices)
        if self.training:
            loads, mass = loads_and_probabilities(torch.softmax(everything, dim=-1), slots, self.token_mask)
            real, null_loads = loads.split([self.num_experts, self.num_null])
            loads = torch.cat((real, null_loads.mean().expand(self.num_null)))
            weights = self.join_loss(weights, self.load_weight * len(loads) * (loads * mass).sum(), "load")
        return weights, indices

    def weights_for(
        self,
        hidden_states: torch.Tensor,
        logits: torch.Tensor,
        indices: torch.Tensor,
        scores: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The softmax probabilities of given experts ``[T, K]``, divided by their sum."""
        # Divided by the same sum, a softmax over the real experts alone gives the same weights, and underflows less.
        dense = torch.softmax(single(logits), dim=-1)
        return weights_at(indices, dense * chosen(indices, self.num_experts, dense.dtype), True).to(logits.dtype)
