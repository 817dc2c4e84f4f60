"""Switch routing: one expert per token, as many tokens per expert as its capacity allows."""

from __future__ import annotations

import math

import torch
from torch import nn

from probmoe_ext.ops import route_top_k
from probmoe_ext.routers.base import ExpertsPerToken, Router
from probmoe_ext.routers.losses import load_balancing_loss
from probmoe_ext.routers.registry import register_router
from probmoe_ext.routers.topk import chosen, probabilities_at


@register_router("switch")
class SwitchRouter(Router):
    """The most probable expert, weighted by its probability, while that expert has room.

    Fedus et al. 2022 (Switch Transformers, arXiv 2101.03961). In training the gate sees hidden states times noise that
    is uniform in ``1 - jitter .. 1 + jitter``, and an expert takes its first ``ceil(T / E * capacity_factor)`` tokens,
    in the order of the batch (eq. 3); later ones are dropped: no expert sees them, and the residual connection alone
    passes them on. The loss ``balance``, ``balance_weight * E * sum_e f_e P_e`` with the share of tokens ``f`` that
    chose an expert, dropped or not, and the mean probability ``P`` (eq. 4-6), joins the backward pass by itself.

    Choices that the paper leaves open: capacity is counted over all tokens of a forward pass (there over those of a
    device) and rounded up; padding takes no room. The paper has a capacity in evaluation, too; here there is none
    unless asked for, so that no token's experts depend on others, and evaluation is plain top-1. Jitter needs the gate
    of a swapped model: a router that is called by itself gets logits, which are made already.

    How many tokens the latest forward pass dropped is in the attribute ``dropped``, for a whole model in
    :func:`dropped_tokens`.

    Args:
        num_experts: ``E``.
        k: 1.
        jitter: Half width of the noise, at least 0 and below 1; the paper's is 0.01.
        balance_weight: Coefficient of ``balance``, at least 0.
        capacity_factor: In training, positive; None for no limit.
        evaluation_capacity_factor: In evaluation, positive; None for no limit.

    Raises:
        ValueError: If ``k`` is not 1, or an option is not allowed.
    """

    has_loss = True

    def __init__(
        self,
        num_experts: int,
        k: ExpertsPerToken,
        *,
        jitter: float = 0.01,
        balance_weight: float = 0.01,
        capacity_factor: float | None = 1.25,
        evaluation_capacity_factor: float | None = None,
    ) -> None:
        super().__init__(
            num_experts,
            k,
            jitter=jitter,
            balance_weight=balance_weight,
            capacity_factor=capacity_factor,
            evaluation_capacity_factor=evaluation_capacity_factor,
        )
        if self.k != 1:
            raise ValueError(f"router 'switch' has one expert per token: k must be 1, got {k!r}")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter of router 'switch' must be at least 0 and below 1, got {jitter}")
        if not 0 <= balance_weight < math.inf:
            raise ValueError(f"balance_weight of router 'switch' must be finite and at least 0, got {balance_weight}")
        for name, factor in (
            ("capacity_factor", capacity_factor),
            ("evaluation_capacity_factor", evaluation_capacity_factor),
        ):
            if factor is not None and not 0 < factor < math.inf:
                raise ValueError(f"{name} of router 'switch' must be positive and finite, or None; got {factor}")
        self.jitter = jitter
        self.balance_weight = balance_weight
        self.capacity_factor = capacity_factor
        self.evaluation_capacity_factor = evaluation_capacity_factor
        self.dropped = torch.zeros((), dtype=torch.int64, device="cpu")

    @property
    def leaves_slots_unused(self) -> bool:
        """Whether an expert may be full in either mode."""
        return self.capacity_factor is not None or self.evaluation_capacity_factor is not None

    def top_k_in_evaluation(self) -> tuple[int, bool] | None:
        """``(1, False)`` if evaluation has no capacity."""
        return (1, False) if self.evaluation_capacity_factor is None else None

    def gate_input(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The hidden states ``[T, H]`` with their jitter, in training."""
        if not self.training or self.jitter == 0:
            return hidden_states
        noise = torch.empty_like(hidden_states, dtype=torch.float32).uniform_(1 - self.jitter, 1 + self.jitter)
        return (hidden_states * noise).to(hidden_states.dtype)

    def forward(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route ``[T, E]`` logits to weights and indices ``[T, 1]``; the hidden states are not used."""
        weights, indices = route_top_k(logits, 1)
        if self.training:
            balance = load_balancing_loss(logits, indices, 1, mask=self.token_mask, probabilities="softmax")
            weights = self.join_loss(weights, self.balance_weight * balance, "balance")
        factor = self.capacity_factor if self.training else self.evaluation_capacity_factor
        if factor is None:
            return weights, indices
        full = self._is_full(indices, factor)
        self.dropped = full.sum()
        return torch.where(full, 0, weights), torch.where(full, self.num_experts, indices)

    def _is_full(self, indices: torch.Tensor, factor: float) -> torch.Tensor:
        """Whether the expert of a token has taken all that it can before, ``[T, 1]``."""
        taking = chosen(indices, self.num_experts, torch.int64)
        mask = self.token_mask
        if mask is None:
            capacity: int | torch.Tensor = math.ceil(len(indices) * factor / self.num_experts)
        else:
            taking = taking * mask.unsqueeze(-1)
            capacity = (mask.sum().double() * factor / self.num_experts).ceil()
        full = taking.cumsum(0).gather(-1, indices) > capacity
        return full if mask is None else full & mask.unsqueeze(-1)

    def weights_for(
        self,
        hidden_states: torch.Tensor,
        logits: torch.Tensor,
        indices: torch.Tensor,
        scores: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The probabilities of given experts ``[T, K]``; a dropped token has index ``E`` there."""
        return probabilities_at(indices, logits, normalize=False)


def dropped_tokens(model: nn.Module) -> dict[str, torch.Tensor]:
    """How many tokens each Switch router dropped in the latest forward pass, padding not counted.

    Args:
        model: A model with routers in it, or a router.

    Returns:
        int64 scalars by the path of the router; empty if the model has no such router.
    """
    return {path: router.dropped for path, router in model.named_modules() if isinstance(router, SwitchRouter)}
