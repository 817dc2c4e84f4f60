"""Train a model whose routing draws to say the same whatever it draws (THOR, arXiv 2110.04260)."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch

from probmoe_ext.hf.trainers import IGNORED

TrainerType = TypeVar("TrainerType")


def consistency_loss(
    first: torch.Tensor, second: torch.Tensor, labels: torch.Tensor, items: torch.Tensor | float | None = None
) -> torch.Tensor:
    """The divergence ``(KL(p || q) + KL(q || p)) / 2`` between two forward passes, a mean over the predicted tokens.

    Args:
        first: ``[batch, length, V]``, the logits of one pass, in any floating dtype.
        second: Those of the other.
        labels: ``[batch, length]``, as models take them: position ``t`` predicts label ``t + 1``, and -100 is none.
        items: What the sum is divided by, if not by the predicted tokens of this batch.

    Returns:
        A scalar in float32 (float64 for such logits), differentiable in both.

    Raises:
        ValueError: If shapes do not fit.
    """
    if first.shape != second.shape or first.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits {tuple(first.shape)} and {tuple(second.shape)} must agree, and have labels of the shape of all "
            f"but the last dimension; got {tuple(labels.shape)}"
        )
    wide = torch.promote_types(first.dtype, torch.float32)
    log_p, log_q = (logits[:, :-1].to(wide).log_softmax(-1) for logits in (first, second))
    # The sum of both divergences in one: (p - q)(log p - log q).
    divergence = 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1)
    counted = labels[:, 1:] != IGNORED
    total = counted.sum().clamp(min=1) if items is None else torch.as_tensor(items, device=first.device)
    return torch.where(counted, divergence, 0).sum() / total


def train_consistently(trainer: TrainerType, weight: float = 1.0) -> TrainerType:
    """Let a trainer run each batch twice, and add the divergence between the two predictions to the two losses.

    The loss becomes ``L_1 + L_2 + weight * (KL(p || q) + KL(q || p)) / 2``: with the router ``"thor"`` two draws of
    experts that have to agree (arXiv 2110.04260, section 3), and likewise for any router that draws, or for dropout.
    A step takes twice the time and memory; evaluation is as before.

    Args:
        trainer: A ``Trainer`` of transformers or of a class derived from it, of a model that returns ``logits`` for
            ``labels``. Call this before ``train``, and after :func:`probmoe_ext.hf.watch_trainer` if that is needed.
        weight: At least 0; the authors' code has 1 by default.

    Returns:
        ``trainer``, whose ``compute_loss`` now does this in training.

    Raises:
        ValueError: If ``weight`` is negative or not finite.
    """
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight must be finite and at least 0, got {weight}")
    held: Any = trainer
    inner = held.compute_loss

    def compute_loss(
        model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        arguments = {"return_outputs": True, "num_items_in_batch": num_items_in_batch, **kwargs}
        if not model.training:
            return inner(model, inputs, **(arguments | {"return_outputs": return_outputs}))
        labels = inputs["labels"]
        loss, first = inner(model, dict(inputs), **arguments)
        again, second = inner(model, dict(inputs), **arguments)
        items = num_items_in_batch
        if items is not None:
            # On several GPUs in one process the library repeats the number for each of them.
            items = torch.as_tensor(items, device=labels.device).float().flatten()[0]
            if held.args.average_tokens_across_devices:
                # The tokens of all processes were counted, and their gradients will be averaged.
                items = items / held.accelerator.num_processes
        loss = loss + again + weight * consistency_loss(first["logits"], second["logits"], labels, items)
        return (loss, first) if return_outputs else loss

    held.compute_loss = compute_loss
    return trainer
