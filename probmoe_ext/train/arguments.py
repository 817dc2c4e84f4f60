"""The settings of a run as the Trainer's arguments, and what follows from them: steps and rates."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from transformers import TrainingArguments

from probmoe_ext.train.errors import UsageError
from probmoe_ext.train.options import TrainConfig
from probmoe_ext.train.tiny import BUILT_IN

PAPER_RATE, TINY_RATE = 1e-6, 3e-3


def accumulation_of(config: TrainConfig) -> int:
    """Forward passes of each process in an optimizer step.

    Raises:
        UsageError: `total_batch` is no multiple of what the processes take at once.
    """
    at_once = config.batch_size * int(os.environ.get("WORLD_SIZE", "1"))
    total = config.total_batch or at_once
    if total % at_once:
        raise UsageError(f"total_batch={total} must be a multiple of batch_size × processes, {at_once}")
    return total // at_once


def optimizer_steps(config: TrainConfig, examples: int) -> int:
    """Number of optimizer steps for so many training examples."""
    batch = config.batch_size * accumulation_of(config) * int(os.environ.get("WORLD_SIZE", "1"))
    return config.max_steps or math.ceil(math.ceil(examples / batch) * config.epochs)


def peak_rate(config: TrainConfig) -> float:
    """The peak learning rate."""
    if config.learning_rate is not None:
        return config.learning_rate
    return TINY_RATE if config.model in BUILT_IN else PAPER_RATE


def trainer_arguments(config: TrainConfig, folder: Path, examples: int, device: torch.device) -> TrainingArguments:
    """What the Trainer is told, for so many training examples."""
    strategy = "epoch" if config.save_steps is None else "steps"
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=accumulation_of(config),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=peak_rate(config),
        optim=config.optimizer,
        lr_scheduler_type=config.schedule if config.schedule != "constant" else "constant_with_warmup",
        warmup_steps=math.ceil(optimizer_steps(config, examples) * config.warmup),
        weight_decay=config.weight_decay,
        adam_beta2=config.adam_beta2,
        max_grad_norm=config.max_grad_norm,
        bf16=config.autocast if config.autocast is not None else device.type == "cuda" and config.dtype == "float32",
        use_cpu=device.type == "cpu",
        seed=config.seed,
        logging_steps=config.log_steps,
        save_strategy=strategy,
        save_steps=config.save_steps or 500,
        save_total_limit=config.keep,
        eval_strategy=strategy if config.holdout else "no",
        eval_steps=config.save_steps,
        prediction_loss_only=True,
        metric_for_best_model="eval_loss" if config.select == "best" else None,
        greater_is_better=False,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
        report_to=[],
    )
