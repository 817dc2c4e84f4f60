"""What a router chooses its experts by and what it weights them with, where that is not one plain softmax.

A conventional router chooses and weights by the same softmax. Others weight by sigmoid scores, add a correction bias to
the scores before they choose (DeepSeek-V3, section 2.1.2; ERNIE 4.5), or choose among the experts of the best groups
only (DeepSeek-V2, section 2.2.2). The routers of this package take such models as two tensors: the *choice*, logits
whose order is the model's, and the *scores*, of which the weights are made.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

LOWEST_SIGMOID, LOWEST_SOFTMAX = 1e-3, 1e-4
"""Where the log-odds of a corrected score go on as a straight line: corrected scores may be 0, 1, or beyond."""


@dataclass(frozen=True)
class ChoiceRule:
    """How scores come from logits, and choices from scores.

    Attributes:
        score: ``"softmax"`` over all experts, or the ``"sigmoid"`` of each.
        corrected: Whether a bias of each expert is added to the scores for choosing (and only for that).
        groups: ``(n, kept)``: the experts lie in ``n`` groups, and only the best ``kept`` are chosen from.
        best_of_group: A group is as good as the sum of its best 1 or 2 (corrected) scores.
    """

    score: Literal["softmax", "sigmoid"] = "softmax"
    corrected: bool = False
    groups: tuple[int, int] | None = None
    best_of_group: int = 1

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """Scores ``[T, E]`` of float32 logits ``[T, E]``."""
        return torch.sigmoid(logits) if self.score == "sigmoid" else torch.softmax(logits, dim=-1)

    def within_groups(self, scores: torch.Tensor) -> torch.Tensor:
        """Which experts ``[T, E]`` may be chosen, by their (corrected) scores."""
        if self.groups is None:
            return torch.ones_like(scores, dtype=torch.bool)
        count, kept = self.groups
        members = scores.unflatten(-1, (count, -1))
        best = members.topk(self.best_of_group, dim=-1).values.sum(-1).topk(kept, dim=-1).indices
        chosen = torch.zeros(members.shape[:-1], dtype=torch.bool, device=scores.device).scatter(-1, best, True)
        return chosen.unsqueeze(-1).expand_as(members).flatten(-2)

    def choice(self, logits: torch.Tensor, correction: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The choice and the scores of a token.

        The choice is the logits themselves, but for a correction ``b``: then the log-odds (sigmoid) or the logarithm
        (softmax) of ``score + b - mean(b)``, continued by their tangents near and beyond the ends of their range. That
        keeps the order of the corrected scores, is the logits where all ``b`` are equal, and does not depend on a
        number added to all of them. Experts outside the best groups get -inf.

        Args:
            logits: ``[T, E]``, float32.
            correction: ``[E]``, or ``None`` without one.

        Returns:
            Choice and scores, both ``[T, E]`` float32, differentiable.
        """
        scores = self.scores(logits)
        corrected, choice = scores, logits
        if correction is not None:
            correction = correction.to(logits.dtype)
            corrected = scores + correction
            centred = corrected - correction.mean()
            if self.score == "sigmoid":
                inside = centred.clamp(LOWEST_SIGMOID, 1 - LOWEST_SIGMOID)
                beyond = (centred - inside) / (LOWEST_SIGMOID * (1 - LOWEST_SIGMOID))
                choice = torch.logit(inside) + beyond
            else:
                inside = centred.clamp(min=LOWEST_SOFTMAX)
                choice = inside.log() + (centred - inside) / LOWEST_SOFTMAX + logits.logsumexp(-1, keepdim=True)
        if self.groups is not None:
            choice = choice.masked_fill(~self.within_groups(corrected.detach()), -torch.inf)
        return choice, scores


PLAIN = ChoiceRule()
