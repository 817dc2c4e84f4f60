"""MoE++: experts that compute (almost) nothing, and gates that see those of the layer before (arXiv 2410.07348)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from probmoe_ext.ops import route_top_k
from probmoe_ext.ops.arguments import single
from probmoe_ext.routers.base import ExpertsPerToken, Router
from probmoe_ext.routers.context import PREVIOUS_LOGITS
from probmoe_ext.routers.experts import Evaluation, Handover
from probmoe_ext.routers.losses import loads_and_probabilities
from probmoe_ext.routers.registry import register_router
from probmoe_ext.routers.topk import chosen


@register_router("moepp")
class MoEPlusPlusRouter(Router):
    """Top-k over the model's ``E`` experts and three kinds of zero-computation experts (eq. 3-6).

    The kinds are zero, ``E(x) = 0``; copy, ``E(x) = x``; and constant, ``E(x) = a_1 x + a_2 v`` with a vector ``v`` of
    its own and ``(a_1, a_2) = softmax(W_c x)``. The logits of all ``N`` are ``G_j = W_j x + R_j G_{j-1}`` in layer
    ``j``: the gate's for the ``E`` experts and those of a head of this router for the others, plus the gating residual
    of the layer before (none in the first, or if that routes by another router). The ``k`` largest of ``softmax(G)``
    are chosen and weigh their experts. In the returned slots only the model's experts appear, the rest are not used.

    A loss ``load`` joins the backward pass (eq. 7): ``load_weight sum_i eta_i f_i P_i``, ``f_i`` the share of tokens
    that chose ``i``, ``P_i`` its mean probability, ``eta_i`` 1 for the model's experts and ``tau`` for the others: the
    smaller ``tau``, the fewer of the model's experts are used.

    Choices: ``R`` starts at 0, so that the gates of a trained model begin as they are; ``v`` starts normal with
    standard deviation 0.02 (1 in the authors' code, which trains from scratch), the heads as linear layers do. With
    ``normalize`` the weights are divided by the sum of the chosen ones but for zero experts', as in the authors' code
    (github.com/SkyworkAI/MoE-plus-plus). No token is dropped: the paper's capacity is left out. The residual's
    gradient reaches the layers before, as in the paper, for which activation checkpointing must not be reentrant.

    Source: Jin et al., "MoE++: Accelerating Mixture-of-Experts Methods with Zero-Computation Experts", 2025 (arXiv
    2410.07348).

    Args:
        num_experts: ``E``.
        k: Slots of a token, zero-computation experts included, one number, at most ``E``.
        hidden_size: ``H``, the width of the hidden states.
        normalize: Whether the weights are divided by their sum.
        num_zero: Zero experts.
        num_copy: Copy experts.
        num_constant: Constant experts; None for ``max(E // 4 - num_zero - num_copy, 2)``, as in the paper's table 2.
        tau: Above 0 and at most 1.
        load_weight: Coefficient of ``load``, at least 0.

    Raises:
        ValueError: If an option or ``k`` is not allowed.
    """

    has_loss = True
    runs_experts = True
    needs = frozenset({PREVIOUS_LOGITS})

    def __init__(
        self,
        num_experts: int,
        k: ExpertsPerToken,
        *,
        hidden_size: int,
        normalize: bool = False,
        num_zero: int = 1,
        num_copy: int = 1,
        num_constant: int | None = None,
        tau: float = 0.75,
        load_weight: float = 0.01,
    ) -> None:
        super().__init__(
            num_experts,
            k,
            hidden_size=hidden_size,
            normalize=normalize,
            num_zero=num_zero,
            num_copy=num_copy,
            num_constant=num_constant,
            tau=tau,
            load_weight=load_weight,
        )
        self.one_k()
        constant = max(self.num_experts // 4 - num_zero - num_copy, 2) if num_constant is None else num_constant
        for name, number in (("num_zero", num_zero), ("num_copy", num_copy), ("num_constant", constant)):
            if number < 0:
                raise ValueError(f"{name} of router 'moepp' must be at least 0, got {number}")
        if not 0 < tau <= 1:
            raise ValueError(f"tau of router 'moepp' must be above 0 and at most 1, got {tau}")
        if not 0 <= load_weight < math.inf:
            raise ValueError(f"load_weight of router 'moepp' must be finite and at least 0, got {load_weight}")
        self.normalize = normalize
        self.tau = tau
        self.load_weight = load_weight
        self.kinds = [self.num_experts, num_zero, num_copy, constant]
        others = sum(self.kinds[1:])
        if not others:
            raise ValueError("router 'moepp' needs a zero, copy or constant expert; with none it is 'topk'")
        self.head = nn.Linear(hidden_size, others, bias=False)
        self.residual = nn.Linear(self.num_experts + others, self.num_experts + others, bias=False)
        nn.init.zeros_(self.residual.weight)
        bound = hidden_size**-0.5  # as a linear layer, which warns where there are no constant experts
        self.mixing = nn.Parameter(torch.empty(2 * constant, hidden_size).uniform_(-bound, bound))
        self.constants = nn.Parameter(torch.empty(constant, hidden_size).normal_(std=0.02))
        self._extra = Handover()

    @property
    def leaves_slots_unused(self) -> bool:
        """True: those of zero-computation experts."""
        return True

    def forward(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route ``[T, E]`` logits and hidden states ``[T, H]`` to weights and indices ``[T, k]``."""
        everything = self._logits(hidden_states, logits)
        if self.layer is not None:
            self.layer.leave(everything)
        probabilities = torch.softmax(everything, dim=-1)
        _, slots = route_top_k(everything.detach(), self.k_max)
        dense = probabilities * chosen(slots, sum(self.kinds), probabilities.dtype)
        experts, zero, copies, constants = dense.split(self.kinds, dim=-1)
        if self.normalize:
            total = dense.sum(-1, keepdim=True) - zero.sum(-1, keepdim=True)
            total = torch.where(total > 0, total, 1)  # of a token with nothing but zero experts
            experts, copies, constants = experts / total, copies / total, constants / total
        self._extra.put(torch.cat((copies.sum(-1, keepdim=True), constants), dim=-1))
        is_other = slots >= self.num_experts
        order = is_other.int().argsort(dim=-1, stable=True)
        indices = slots.masked_fill(is_other, self.num_experts).gather(-1, order)
        weights = F.pad(experts, (0, 1)).gather(-1, indices).to(logits.dtype)
        if self.training:
            loads, mass = loads_and_probabilities(probabilities, slots, self.token_mask)
            own, others = (loads * mass).split([self.num_experts, sum(self.kinds[1:])])
            weights = self.join_loss(weights, self.load_weight * (own.sum() + self.tau * others.sum()), "load")
        return weights, indices

    def run_experts(
        self, evaluate: Evaluation, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The model's experts and the zero-computation experts of tokens that were just routed."""
        extra = self._extra.take() * evaluate.scale
        copies, constants = extra.split([1, self.kinds[-1]], dim=-1)
        x = hidden_states.to(extra.dtype)
        mixing = F.linear(hidden_states.to(self.mixing.dtype), self.mixing).to(extra.dtype)
        through, instead = torch.softmax(mixing.unflatten(-1, (-1, 2)), dim=-1).unbind(-1)
        copied = (copies + (constants * through).sum(-1, keepdim=True)) * x
        replaced = (constants * instead) @ self.constants.to(extra.dtype)
        return evaluate(hidden_states, indices, weights) + (copied + replaced).to(hidden_states.dtype)

    def _logits(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """``G``, ``[T, N]`` in float32 (float64 for such logits)."""
        wide = single(logits)
        others = self.head(hidden_states.to(self.head.weight.dtype)).to(wide.dtype)
        own = torch.cat((wide, others), dim=-1)
        previous = self.previous_residual
        if previous is None:
            previous = torch.zeros_like(own)  # so that the first layer's matrix has a gradient, of 0
        if previous.shape != own.shape:
            raise ValueError(
                f"the layer before has {previous.shape[-1]} experts of all kinds, and this one {own.shape[-1]}: "
                "swap the layers with the same num_zero, num_copy and num_constant"
            )
        previous = torch.where(previous == -torch.inf, 0, previous).to(own.device)  # an expert that was masked out
        return own + F.linear(previous, self.residual.weight.to(own.dtype))
