"""The model and the tokenizer that a training begins with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from probmoe_ext.train.data import Example, load_examples
from probmoe_ext.train.lora import add_lora
from probmoe_ext.train.models import Routing, apply_routing, load_model, set_experts
from probmoe_ext.train.options import TrainConfig
from probmoe_ext.train.protocols import PROMPTS
from probmoe_ext.train.tiny import BUILT_IN, build_tiny

TOKENIZER_EXAMPLES = 5000
"""More text adds time, and hardly a piece to a vocabulary of a thousand."""


def load_beginning(config: TrainConfig, training: list[Example], checkpoint: Path | None = None) -> tuple[Any, Any]:
    """The model and the tokenizer with which a training begins, or goes on from a checkpoint."""
    routing = Routing(config.router, config.k, config.router_options)
    if checkpoint is not None and config.lora_rank is None:
        model, tokenizer = load_model(str(checkpoint), routing, config.dtype, config.experts)
    elif config.model in BUILT_IN:
        model, tokenizer = build_tiny(tokenizer_text(config, training), config.seed, BUILT_IN[config.model])
        model.to(getattr(torch, config.dtype))
        set_experts(model, config.experts)
        apply_routing(model, routing)
    else:
        model, tokenizer = load_model(config.model, routing, config.dtype, config.experts)
    if config.aux_loss is not None:
        model.config.output_router_logits = config.aux_loss > 0
        model.config.router_aux_loss_coef = model.router_aux_loss_coef = config.aux_loss
    if config.gradient_checkpointing:
        # Renamed within transformers 5.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        model.config.use_cache = False
    if config.lora_rank is not None:
        # A checkpoint holds the adapters, which the Trainer loads.
        model = add_lora(model, config.lora_rank, config.lora_alpha)
    return model, tokenizer


def tokenizer_text(config: TrainConfig, training: list[Example]) -> list[str]:
    """What the tokenizer of a built-in model is trained on."""
    examples = load_examples(config.tokenizer_data, "train") if config.tokenizer_data else training
    prompt = PROMPTS[config.prompt]
    return [f"{prompt(one.question)} {one.answer}" for one in examples[:TOKENIZER_EXAMPLES]]
