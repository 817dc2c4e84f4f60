"""How a model routes on given problems: active experts a token, evenness of the load, and the loss on the answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from probmoe_ext.hf import moe_layers
from probmoe_ext.train.data import Example
from probmoe_ext.train.encode import IGNORED, PadRight, encode, pad_token
from probmoe_ext.train.models import experts_of


@dataclass(frozen=True)
class Statistics:
    """Measured in evaluation mode, on prompt and reference answer together.

    Attributes:
        loss: mean negative log-likelihood of the answer's tokens, in nats.
        active_experts: mean number of experts a token uses; None for a model without experts.
        load_entropy: entropy of the share of work that each expert gets, divided by log E (1 is an even load), mean
            over the layers; None for a model without experts.
    """

    loss: float
    active_experts: float | None
    load_entropy: float | None


class _Load:
    """Counts, through hooks, how often the gates choose each expert on the tokens that `mask` marks."""

    def __init__(self, model: Any) -> None:
        self.mask = torch.ones(0, dtype=torch.bool)
        self.counts: dict[str, torch.Tensor] = {}
        self.tokens = 0
        layers = moe_layers(model) if experts_of(model.config) else []
        self.hooks = [layer.gate.register_forward_hook(self._hook(layer.path)) for layer in layers]

    def _hook(self, path: str) -> Callable[[Any, Any, tuple[torch.Tensor, ...]], None]:
        def count(gate: Any, inputs: Any, output: tuple[torch.Tensor, ...]) -> None:
            logits, _, indices = output
            experts = logits.shape[-1]
            chosen = torch.bincount(indices[self.mask].flatten(), minlength=experts + 1)[:experts]
            self.counts[path] = self.counts.get(path, torch.zeros_like(chosen)) + chosen

        return count

    def summary(self) -> tuple[float | None, float | None]:
        """Mean active experts and normalised entropy of the load, over the layers."""
        if not self.counts:
            return None, None
        active, entropy = [], []
        for chosen in self.counts.values():
            share = chosen.double() / chosen.sum()
            active.append(chosen.sum().item() / self.tokens)
            entropy.append(torch.special.entr(share).sum().item() / math.log(len(share)))
        return sum(active) / len(active), sum(entropy) / len(entropy)

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def measure(
    model: Any, tokenizer: Any, examples: Sequence[Example], prompt: Callable[[str], str], batch_size: int
) -> Statistics:
    """Run a model over problems and their reference answers.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        examples: at least one problem.
        prompt: makes the prompt from the question.
        batch_size: problems at once.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or 2**31
    rows = encode(examples, tokenizer, prompt, limit).rows
    collate = PadRight(pad_token(tokenizer))
    load = _Load(model)
    total, scored = 0.0, 0
    try:
        for start in range(0, len(rows), batch_size):
            batch = {name: value.to(model.device) for name, value in collate(rows[start : start + batch_size]).items()}
            load.mask = batch["attention_mask"].flatten().bool()
            load.tokens += int(load.mask.sum())
            labels = batch.pop("labels")[:, 1:]
            with torch.inference_mode():
                logits = model(**batch).logits[:, :-1].float()
            total += F.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
            ).item()
            scored += int((labels != IGNORED).sum())
    finally:
        load.remove()
    active, entropy = load.summary()
    return Statistics(total / scored, active, entropy)
