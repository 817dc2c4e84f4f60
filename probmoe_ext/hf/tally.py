"""What one layer's routing adds up to: sums on the layer's device, without a look at them until a report asks.

Loads and sizes are counted over all tokens. What needs a distribution over experts for each token (entropy, coverage,
drift) is measured on evenly spaced tokens of each batch, at most :data:`SAMPLE`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from probmoe_ext.hf.gate import tensor_of

SAMPLE = 256
"""Tokens of a forward pass on which a layer's distributions are measured."""

BUCKETS = ("frequent", "common", "uncommon", "rare")
BOUNDS = (1e-2, 1e-3, 1e-4)
"""Share of a token id among those seen so far: at least the first bound is frequent, below the last is rare."""

MEANS = ("entropy", "coverage", "exploration", "drift", "drift_kl")


@dataclass(frozen=True)
class Gate:
    """What a tally has to know of a gate.

    Attributes:
        path: Where it is in the model.
        num_experts: ``E``.
        k: Experts per token of the original router.
        probabilities: Whether its first result are probabilities, and not logits.
        weight: The name of its ``[E, H]`` tensor.
        bias: The name of the tensor that is added to the logits, ``None`` without one.
    """

    path: str
    num_experts: int
    k: int
    probabilities: bool
    weight: str = "weight"
    bias: str | None = None


class Tally:
    """The running sums of a layer."""

    def __init__(self, gate: Gate, module: nn.Module) -> None:
        self.gate = gate
        tensors = [None if name is None else tensor_of(module, name) for name in (gate.weight, gate.bias)]
        self.reference = tuple(_copy_of(tensor) for tensor in tensors)
        size = 2 * gate.num_experts + 3 + len(MEANS) + 2 * len(BUCKETS)
        self.sums = torch.zeros(size, dtype=torch.float64, device=tensor_of(module, gate.weight).device)

    @torch.no_grad()
    def add(
        self,
        hidden_states: torch.Tensor,
        recorded: torch.Tensor,
        indices: torch.Tensor,
        mask: torch.Tensor | None,
        buckets: torch.Tensor | None,
    ) -> None:
        """Add a forward pass.

        Args:
            hidden_states: ``[..., H]``, ``T`` tokens, what the gate saw.
            recorded: ``[T, E]``, logits or probabilities, its first result.
            indices: ``[T, K]``, the experts that it chose.
            mask: ``[T]`` bool, the tokens that count; ``None`` for all.
            buckets: ``[T]``, the place of each token in :data:`BUCKETS`; ``None`` if it is not known.
        """
        experts, device = self.gate.num_experts, recorded.device
        if self.sums.device != device:
            self.sums = self.sums.to(device)
        tokens = recorded.shape[0]
        keep = torch.ones(tokens, device=device) if mask is None else mask.float()
        sizes = (indices < experts).sum(-1)
        load = torch.zeros(experts + 1, device=device)
        load = load.scatter_add(0, indices.flatten(), keep.unsqueeze(-1).expand(indices.shape).flatten())[:-1]
        histogram = torch.zeros(experts + 1, device=device).scatter_add(0, sizes, keep)
        by_bucket = torch.zeros(2, len(BUCKETS), device=device)
        if buckets is not None:
            places = buckets.unsqueeze(0).expand(2, -1)
            by_bucket = by_bucket.scatter_add(1, places, torch.stack((keep, keep * sizes)))
        some = slice(None, None, max(1, -(-tokens // SAMPLE)))
        hidden = hidden_states.reshape(tokens, -1)[some]
        means = self._means(hidden, recorded[some].float(), indices[some], sizes[some]) * keep[some]
        sampled = keep[some].sum().unsqueeze(0)
        self.sums += torch.cat((load, histogram, by_bucket.flatten(), sampled, means.sum(-1), keep.sum().unsqueeze(0)))

    def _means(
        self, hidden: torch.Tensor, recorded: torch.Tensor, indices: torch.Tensor, sizes: torch.Tensor
    ) -> torch.Tensor:
        """The values of :data:`MEANS` for each sampled token, ``[5, n]``."""
        tiny = torch.finfo(torch.float32).tiny
        logits = recorded.clamp(min=tiny).log() if self.gate.probabilities else recorded
        log_p = logits.log_softmax(-1).clamp(min=-1e4)
        p = log_p.exp()
        chosen = F.pad(torch.zeros_like(p), (0, 1)).scatter(-1, indices, 1.0)[:, :-1]
        top = torch.zeros_like(p).scatter(-1, logits.topk(self.gate.k, dim=-1).indices, 1.0)
        weight, bias = (None if one is None else one.to(hidden.device).float() for one in self.reference)
        assert weight is not None
        first = F.linear(hidden.float(), weight, bias)
        first_top = torch.zeros_like(p).scatter(-1, first.topk(self.gate.k, dim=-1).indices, 1.0)
        first_log_p = first.log_softmax(-1)
        return torch.stack(
            (
                torch.special.entr(p).sum(-1),
                (p * chosen).sum(-1),
                (chosen * (1 - top)).sum(-1) / sizes.clamp(min=1),
                1 - (top * first_top).sum(-1) / self.gate.k,
                (first_log_p.exp() * (first_log_p - log_p)).sum(-1),
            )
        )


def _copy_of(tensor: Any) -> torch.Tensor | None:
    """A copy of a gate's whole tensor; where it is sharded, every process takes part."""
    if tensor is None:
        return None
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            whole: torch.Tensor = tensor.detach().clone()
            return whole
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    copy: torch.Tensor = tensor.detach().clone()
    return copy


def summarize(gate: Gate, sums: torch.Tensor) -> dict[str, Any]:
    """The metrics of a layer, from its sums over the tokens of all processes; see docs/monitoring.md for formulas."""
    experts = gate.num_experts
    values = sums.cpu()
    load, histogram, by_bucket, sampled, means, tokens = values.split(
        [experts, experts + 1, 2 * len(BUCKETS), 1, len(MEANS), 1]
    )
    count, slots = max(1.0, float(tokens)), max(1.0, float(load.sum()))
    mean_load = slots / experts
    share = load / slots
    last = int((histogram > 0).nonzero().max()) if float(tokens) else 0
    found: dict[str, Any] = {
        "tokens": int(tokens),
        "mean_k": float(load.sum()) / count,
        "k_histogram": (histogram[: last + 1] / count).tolist(),
        "load": (load / count).tolist(),
        "load_entropy": float(torch.special.entr(share).sum()) / max(math.log(experts), 1e-9),
        "util_ratio": float((load > 0).sum()) / experts,
        "max_vio": (float(load.max()) - mean_load) / mean_load,
        "dead_experts": int((load == 0).sum()),
    }
    found.update(zip(MEANS, (means / max(1.0, float(sampled))).tolist(), strict=True))
    seen, sizes = by_bucket.view(2, -1)
    if float(seen.sum()):
        found["mean_k_by_frequency"] = {
            name: float(size) / float(number)
            for name, size, number in zip(BUCKETS, sizes, seen, strict=True)
            if float(number)
        }
    return found
