"""Expert choice: each expert takes the tokens that suit it best, as many as it has room for."""

from __future__ import annotations

import functools
import math
import warnings
from typing import Literal

import torch

from probmoe_ext.ops import route_top_k
from probmoe_ext.ops.arguments import single
from probmoe_ext.routers.base import ExpertsPerToken, Router
from probmoe_ext.routers.registry import register_router
from probmoe_ext.routers.topk import probabilities_at

EVALUATIONS = ("topk", "expert_choice")


@register_router("expert_choice")
class ExpertChoiceRouter(Router):
    """Each expert takes the ``ceil(T * k / E)`` tokens that have the largest ``softmax(logits)`` for it.

    Zhou et al. 2022 (Mixture-of-Experts with Expert Choice Routing, arXiv 2202.09368, eq. 1-2), where ``k`` is called
    the capacity factor: the experts that a token gets on average. A token may get any number of them, none or all, each
    at the weight of its softmax; the load is even by construction. The choice is over all tokens of a forward pass, and
    the capacity rounded up; padding is not chosen, and not counted in ``T``.

    This is not causal: whether a token gets an expert depends on the tokens after it, and on other texts of the batch.
    A language model can learn from that what it will not know when it generates, so the first router of a process warns
    of it. Evaluation, and with it generation, is therefore plain top-k by default, which depends on the token alone;
    ``evaluation="expert_choice"`` keeps the rule of training, for encoders. Then what a token gets in generation
    depends on what is in the pass: a single one gets all experts.

    Args:
        num_experts: ``E``.
        k: Experts per token on average (in top-k evaluation, of each), one number.
        normalize: Whether the weights of a token are divided by their sum; not in the paper.
        evaluation: ``"topk"`` or ``"expert_choice"``.

    Raises:
        ValueError: If ``k`` is a band or out of range, or ``evaluation`` is unknown.
    """

    def __init__(
        self,
        num_experts: int,
        k: ExpertsPerToken,
        *,
        normalize: bool = False,
        evaluation: Literal["topk", "expert_choice"] = "topk",
    ) -> None:
        super().__init__(num_experts, k, normalize=normalize, evaluation=evaluation)
        self.one_k()
        if evaluation not in EVALUATIONS:
            raise ValueError(
                f"evaluation of router 'expert_choice' must be one of {', '.join(EVALUATIONS)}; got {evaluation!r}"
            )
        self.normalize = normalize
        self.evaluation = evaluation
        _warn_once()

    @property
    def width(self) -> int:
        """``E``, a slot of each expert; ``k`` in evaluation as top-k."""
        return self.num_experts if self.training or self.evaluation == "expert_choice" else self.k_max

    @property
    def leaves_slots_unused(self) -> bool:
        """The number of a token's experts varies."""
        return True

    def top_k_in_evaluation(self) -> tuple[int, bool] | None:
        """``(k, normalize)``, unless evaluation is to choose as training does."""
        return (self.k_max, self.normalize) if self.evaluation == "topk" else None

    def forward(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route ``[T, E]`` logits to weights and indices ``[T, width]``; the hidden states are not used."""
        if not self.training and self.evaluation == "topk":
            return route_top_k(logits, self.k_max, normalize=self.normalize)
        wide = single(logits.detach())
        mask = self.token_mask
        affinity = torch.softmax(wide, dim=-1)
        room = math.ceil(len(logits) * self.k_max / self.num_experts)
        capacity: int | torch.Tensor = room
        if mask is not None:
            affinity = torch.where(mask.unsqueeze(-1), affinity, -1)
            # At most that room; how much of it only the device knows.
            capacity = (mask.sum() * self.k_max + self.num_experts - 1) // self.num_experts
        best = affinity.T.contiguous().topk(room).indices
        within = (torch.arange(room, device=logits.device) < capacity).expand_as(best)
        # What is masked for a token is not chosen, even if an expert has room; nor is padding.
        taken = torch.zeros_like(affinity.T, dtype=torch.bool).scatter(-1, best, within).T & (affinity > 0)
        indices = torch.where(taken, torch.arange(self.num_experts, device=logits.device), self.num_experts)
        return self.weights_for(hidden_states, logits, indices), indices

    def weights_for(
        self,
        hidden_states: torch.Tensor,
        logits: torch.Tensor,
        indices: torch.Tensor,
        scores: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The softmax probabilities of given experts ``[T, K]``, divided by their sum if ``normalize``."""
        return probabilities_at(indices, logits, self.normalize)


@functools.cache
def _warn_once() -> None:
    warnings.warn(
        "router 'expert_choice' is not causal: in training, a token's experts depend on the tokens after it and on the "
        "rest of the batch; its evaluation is plain top-k unless evaluation='expert_choice'",
        stacklevel=6,
    )
