"""Top-p: the fewest experts that have a given share of the probability (arXiv 2403.07652)."""

from __future__ import annotations

import math

import torch

from probmoe_ext.ops.arguments import single
from probmoe_ext.routers.base import ExpertsPerToken, Router
from probmoe_ext.routers.losses import entropy_loss, load_balancing_loss
from probmoe_ext.routers.registry import register_router
from probmoe_ext.routers.topk import chosen, weights_at


@register_router("top_p")
class TopPRouter(Router):
    """The smallest set of experts whose probabilities, of ``softmax(logits)``, add up to at least ``p``.

    Huang et al. 2024, "Harder Tasks Need More Experts", arXiv 2403.07652, equations 3 to 5: experts are taken by
    descending probability until they have ``p``, the more the less sure the gate is of its choice, and are weighted by
    their probabilities. Since many unsure choices would reach ``p`` as well, the loss ``entropy`` asks for sure ones;
    the loss ``balance`` is ``E sum_e f_e P_e`` with the share ``f_e`` of the tokens that use an expert, and its mean
    probability ``P_e``. Both coefficients are the paper's.

    The paper does not limit the number of experts but by ``E``; here ``k`` does, so that a token never costs more than
    with the router that was replaced. ``k = (1, E)`` is the paper's.

    Args:
        num_experts: ``E``.
        k: The most experts that a token uses; of a band ``(k_min, k_max)`` the ends, but at least one.
        p: The share, above 0 and at most 1 (all experts that the limit allows).
        normalize: Whether the weights of a token are divided by their sum.
        entropy_weight: Coefficient of ``entropy``, at least 0.
        balance_weight: Coefficient of ``balance``, at least 0.

    Raises:
        ValueError: If an option or ``k`` is not allowed.
    """

    has_loss = True

    def __init__(
        self,
        num_experts: int,
        k: ExpertsPerToken,
        *,
        p: float = 0.4,
        normalize: bool = False,
        entropy_weight: float = 1e-4,
        balance_weight: float = 1e-2,
    ) -> None:
        super().__init__(
            num_experts, k, p=p, normalize=normalize, entropy_weight=entropy_weight, balance_weight=balance_weight
        )
        if not 0 < p <= 1:
            raise ValueError(f"p of router 'top_p' must be above 0 and at most 1, got {p}")
        self.p, self.normalize = p, normalize
        self.fewest = max(self.k_min, 1) if self.k_min < self.k_max else 1
        self.loss_weights = check_weights(self.name, entropy_weight, balance_weight)

    @property
    def leaves_slots_unused(self) -> bool:
        """Whether some token may use fewer than ``k_max`` experts."""
        return self.fewest < self.k_max

    def forward(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route ``[T, E]`` logits to weights and indices ``[T, k_max]``; the hidden states are not used."""
        wide = single(logits)
        weights, indices = smallest_sets(wide, self.p, self.fewest, self.k_max, self.normalize)
        weights = weights.to(logits.dtype)
        return (join_losses(self, weights, wide, indices, self.loss_weights) if self.training else weights), indices

    def weights_for(
        self,
        hidden_states: torch.Tensor,
        logits: torch.Tensor,
        indices: torch.Tensor,
        scores: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The probabilities of given experts ``[T, K]``, divided by their sum if ``normalize``."""
        dense = torch.softmax(single(logits), dim=-1)
        dense = dense * chosen(indices, self.num_experts, dense.dtype)
        return weights_at(indices, dense, self.normalize).to(logits.dtype)


def check_weights(name: str, entropy_weight: float, balance_weight: float) -> tuple[float, float]:
    """Check the coefficients of the two losses.

    Raises:
        ValueError: If one is negative or not finite.
    """
    for option, weight in (("entropy_weight", entropy_weight), ("balance_weight", balance_weight)):
        if not 0 <= weight < math.inf:
            raise ValueError(f"{option} of router {name!r} must be finite and at least 0, got {weight}")
    return entropy_weight, balance_weight


def smallest_sets(
    logits: torch.Tensor, p: float | torch.Tensor, fewest: int, most: int, normalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each token that have the share ``p``, by descending probability, ties to the lower index.

    Args:
        logits: ``[T, E]``; an expert at -inf is never taken.
        p: The share, a number or a scalar tensor.
        fewest: The least number of experts.
        most: ``K``, the largest.
        normalize: Whether the weights of a token are divided by their sum.

    Returns:
        Weights ``[T, K]``, with a gradient, and indices ``[T, K]``; weight 0 and index ``E`` where a slot is not used.
    """
    ordered, indices = torch.sort(logits, dim=-1, descending=True, stable=True)
    weights = torch.softmax(ordered, dim=-1)[..., :most]
    ordered, indices = ordered[..., :most], indices[..., :most]
    before = weights.detach().cumsum(-1) - weights.detach()
    ranks = torch.arange(most, device=logits.device)
    # Rounding may bring the sum to 1 before its end.
    used = ((before < p) | (ranks < fewest) | (p >= 1)) & (ordered > -torch.inf)
    weights = torch.where(used, weights, 0)
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, torch.where(used, indices, logits.shape[-1])


def join_losses(
    router: Router,
    weights: torch.Tensor,
    logits: torch.Tensor,
    indices: torch.Tensor,
    coefficients: tuple[float, float],
) -> torch.Tensor:
    """Join the losses ``entropy`` and ``balance`` of a router, with their coefficients, to its weights."""
    entropy, balance = coefficients
    mask = router.token_mask
    if entropy:
        weights = router.join_loss(weights, entropy * entropy_loss(logits, mask=mask), "entropy")
    if balance:
        loss = load_balancing_loss(
            logits, indices, router.k, mask=mask, probabilities="softmax", normalization="transformers"
        )
        weights = router.join_loss(weights, balance * loss, "balance")
    return weights
