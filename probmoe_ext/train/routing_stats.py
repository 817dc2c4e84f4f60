"""How a model routes on given problems: active experts a token, evenness of the load, and the loss on the answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from probmoe_ext.hf import RoutingMonitor
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
    monitor = RoutingMonitor(model, together=False) if experts_of(model.config) else None
    total, scored = 0.0, 0
    with monitor or nullcontext():
        for start in range(0, len(rows), batch_size):
            batch = {name: value.to(model.device) for name, value in collate(rows[start : start + batch_size]).items()}
            labels = batch.pop("labels")[:, 1:]
            with torch.inference_mode():
                logits = model(**batch).logits[:, :-1].float()
            total += F.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum"
            ).item()
            scored += int((labels != IGNORED).sum())
    found = monitor.report()["mean"] if monitor else {}
    return Statistics(total / scored, found.get("mean_k"), found.get("load_entropy"))
