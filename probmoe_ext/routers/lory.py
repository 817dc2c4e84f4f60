"""Lory: experts merged softly for each segment, by the routing of the segment before (arXiv 2405.03133)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from probmoe_ext.ops.arguments import single
from probmoe_ext.routers.base import ExpertsPerToken, Router
from probmoe_ext.routers.context import BATCH_SHAPE
from probmoe_ext.routers.experts import Evaluation, Handover
from probmoe_ext.routers.registry import register_router


@register_router("lory")
class LoryRouter(Router):
    """One expert for each segment of a sequence, its parameters a weighted sum of all experts' parameters.

    A sequence is cut into segments of ``segment`` tokens. With ``e_i = softmax(R h_i)``, ``h_i`` the mean of the
    hidden states of segment ``i`` and ``R`` the model's gate, segment ``i`` goes through the expert with parameters
    ``sum_j e_{i-1, j} theta_j``. The first segment has none before it and uses its own ``e_1``, as a constant for the
    gradient. So no token is routed by a later segment, and all but the first ``segment`` tokens by nothing later than
    themselves; within the first segment, as in the paper, the values (not what the gate learns) see all of it.
    The gate being linear, ``R h_i`` is the mean of the tokens' logits. Padding counts in no mean, and segments are
    counted from a sequence's first token that is none.

    Generation with a cache routes by the prompt alone, as in the paper: tokens that follow a cached prompt, one by one
    or more, all go through the expert that is merged by the mean over the whole prompt. Scoring a text in one
    forward pass, and generation without a cache, go by segments as in training.

    The weights that are returned are those of the merge, for all ``E`` experts. Each segment of each sequence has a
    merged expert of its own in memory.

    Source: Zhong et al., "Lory: Fully Differentiable Mixture-of-Experts for Autoregressive Language Model
    Pre-training", 2024 (arXiv 2405.03133), section 3; its batching by similar documents is a matter of the data.

    Args:
        num_experts: ``E``.
        k: ``E``: all experts have a part.
        segment: Tokens of a segment, at least 1.

    Raises:
        ValueError: If ``k`` is not ``E``, or ``segment`` is out of range.
    """

    runs_experts = True
    merges_experts = True
    needs = frozenset({BATCH_SHAPE})

    def __init__(self, num_experts: int, k: ExpertsPerToken, *, segment: int = 256) -> None:
        super().__init__(num_experts, k, segment=segment)
        if self.k_min != self.num_experts:
            raise ValueError(f"router 'lory' merges all experts: k must be {self.num_experts}, got {k!r}")
        if segment < 1:
            raise ValueError(f"segment of router 'lory' must be at least 1, got {segment}")
        self.segment = segment
        self._mixture = Handover()
        self._prompt = Handover()

    def forward(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route ``[T, E]`` logits to weights and indices ``[T, E]``; the hidden states are not used."""
        batch, length = self.batch_shape
        wide = single(logits).view(batch, length, -1)
        mixture = self._continued(batch) if self.continues and not self.training else self._by_segments(wide)
        self._mixture.put(mixture)
        weights = self._from_segments(mixture.unsqueeze(2).expand(-1, -1, self._size(mixture), -1))
        indices = torch.arange(self.num_experts, device=logits.device).expand(batch * length, -1)
        return weights.to(logits.dtype), indices.contiguous()

    def run_experts(
        self, evaluate: Evaluation, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """The segments of tokens that were just routed, each through its merged expert."""
        mixture = self._mixture.take()
        batch, length = self.batch_shape
        segments = self._to_segments(hidden_states.view(batch, length, -1), mixture.shape[1])
        rows = evaluate.merged(segments.flatten(0, 1), mixture.flatten(0, 1)) * evaluate.scale
        return self._from_segments(rows.view(segments.shape))

    def _by_segments(self, logits: torch.Tensor) -> torch.Tensor:
        """The mixtures ``[batch, S, E]`` of the segments."""
        keep = torch.ones_like(logits[..., :1]) if self.token_mask is None else self._mask().unsqueeze(-1)
        count = -(-logits.shape[1] // self.segment)
        logits, keep = (self._to_segments(one, count) for one in (logits, keep.to(logits.dtype)))
        kept = torch.where(keep > 0, logits, 0)
        if not self.training:
            total = keep.sum((1, 2)).clamp(min=1)
            self._prompt.put((kept.sum((1, 2)) / total).softmax(-1).detach())
        own = (kept.sum(2) / keep.sum(2).clamp(min=1)).softmax(-1)
        return torch.cat((own[:, :1].detach(), own[:, :-1]), dim=1)

    def _continued(self, batch: int) -> torch.Tensor:
        """The mixture ``[batch, 1, E]`` of a prompt."""
        mixture = self._prompt.take()
        self._prompt.put(mixture)
        if len(mixture) != batch:
            raise ValueError(
                f"router 'lory' generates by the prompts, of which there were {len(mixture)}, and now are {batch} rows"
            )
        return mixture.unsqueeze(1)

    def _mask(self) -> torch.Tensor:
        assert self.token_mask is not None
        return self.token_mask.view(self.batch_shape)

    def _order(self) -> torch.Tensor | None:
        """``[batch, length]``, the places of tokens with those that are padding behind; ``None`` if there are none."""
        return None if self.token_mask is None else (~self._mask()).int().argsort(dim=1, stable=True)

    def _size(self, mixture: torch.Tensor) -> int:
        """Tokens of a segment, where there are several; all tokens where there is one."""
        return self.segment if mixture.shape[1] > 1 else self.batch_shape[1]

    def _to_segments(self, values: torch.Tensor, count: int) -> torch.Tensor:
        """``[batch, length, D]`` to ``[batch, S, n, D]``, 0 behind the last token."""
        size = self.segment if count > 1 else values.shape[1]
        order = self._order()
        if order is not None:
            values = values.gather(1, order.unsqueeze(-1).expand(values.shape))
        return F.pad(values, (0, 0, 0, count * size - values.shape[1])).unflatten(1, (count, size))

    def _from_segments(self, segments: torch.Tensor) -> torch.Tensor:
        """``[batch, S, n, D]`` to ``[T, D]``, the inverse of :meth:`_to_segments`."""
        values, order = segments.flatten(1, 2)[:, : self.batch_shape[1]], self._order()
        if order is not None:
            back = order.argsort(dim=1)
            values = values.gather(1, back.unsqueeze(-1).expand(values.shape))
        return values.flatten(0, 1)
