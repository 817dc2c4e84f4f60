"""What share of an optimizer step's loss a batch has, so that auxiliary losses of routers are weighted as the loss is.

A trainer that accumulates gradients divides the sum of a batch's token losses by the tokens of all batches of the step
(``num_items_in_batch``), inside of the loss. The gradient that arrives there does not show it; the labels do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from probmoe_ext.routers import watch_loss

TrainerType = TypeVar("TrainerType")
IGNORED = -100


def label_share(inputs: Mapping[str, Any]) -> torch.Tensor | None:
    """The share that a batch has in the tokens of its optimizer step.

    Args:
        inputs: What the model is called with: ``labels`` (or ``shift_labels``) and ``num_items_in_batch``.

    Returns:
        A scalar tensor; ``None`` if there is no telling, which is the case where the loss is a mean over the batch.
    """
    items, labels, shifted = (inputs.get(name) for name in ("num_items_in_batch", "labels", "shift_labels"))
    counted = shifted if shifted is not None else labels[..., 1:] if isinstance(labels, torch.Tensor) else None
    if items is None or counted is None:
        return None
    total = torch.as_tensor(items, device=counted.device).float().clamp(min=1)
    # On several GPUs in one process the library repeats the number for each of them.
    return counted.ne(IGNORED).sum() / total.flatten()[0]


def watch_trainer(trainer: TrainerType) -> TrainerType:
    """Scale the auxiliary losses of routers as a trainer's loss, for trainers that compute their loss themselves.

    A model that is given labels tells its routers by itself, so :class:`transformers.Trainer` needs nothing. TRL's
    ``SFTTrainer`` and others with a ``compute_loss`` of their own take other outputs of the model: call this once,
    before ``train``.

    Args:
        trainer: A ``Trainer`` of transformers or of a class derived from it.

    Returns:
        ``trainer``, whose ``compute_loss`` now also notes the scale.
    """
    held: Any = trainer
    inner = held.compute_loss

    def compute_loss(
        model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        share = label_share({**inputs, "num_items_in_batch": num_items_in_batch})
        result = inner(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs)
        if share is not None and held.args.average_tokens_across_devices:
            # The tokens of all processes were counted, and their gradients will be averaged.
            share = share * held.accelerator.num_processes
        watch_loss(model, result[0] if return_outputs else result, share)
        return result

    held.compute_loss = compute_loss
    return trainer
