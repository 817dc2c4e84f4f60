"""Tiny models with random weights, one of each family."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

FAMILIES = ("olmoe", "qwen2", "qwen3", "mixtral")
E, K, H, LAYERS, VOCABULARY = 8, 4, 32, 3, 64

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": H,
    "intermediate_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": K,
    # Large enough for routing that differs from token to token.
    "initializer_range": 0.2,
}


def tiny(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model in evaluation mode, the same weights each time."""
    if family == "olmoe":
        config, cls = OlmoeConfig(**(_COMMON | {"num_experts": E} | changes)), OlmoeForCausalLM
    elif family == "qwen2":
        own = {"num_experts": E, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
        config, cls = Qwen2MoeConfig(**(_COMMON | own | changes)), Qwen2MoeForCausalLM
    elif family == "qwen3":
        own = {"num_experts": E, "moe_intermediate_size": 16, "head_dim": 16, "norm_topk_prob": True}
        config, cls = Qwen3MoeConfig(**(_COMMON | own | changes)), Qwen3MoeForCausalLM
    else:
        config, cls = MixtralConfig(**(_COMMON | {"num_local_experts": E} | changes)), MixtralForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return cls(config).to(dtype).eval()


def tokens(rows: int = 2, length: int = 12) -> torch.Tensor:
    """Token ids without special ones, ``[rows, length]``."""
    rng = torch.Generator().manual_seed(2)
    return torch.randint(3, VOCABULARY, (rows, length), generator=rng)


def gates(model: Any) -> list[Any]:
    """The gate of each layer."""
    return [layer.mlp.gate for layer in model.model.layers]


def experts(model: Any) -> list[Any]:
    """The experts of each layer."""
    return [layer.mlp.experts for layer in model.model.layers]
