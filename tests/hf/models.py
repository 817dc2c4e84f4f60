"""Tiny models with random weights, one of each family."""

from __future__ import annotations

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

FAMILIES = ("olmoe", "qwen2", "qwen3", "mixtral")
"""What every test of the swap runs on; `MORE` are the others of `tests/hf/test_models.py`."""
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
_SMALL = {"num_experts": E, "moe_intermediate_size": 16}
_SHARED = _SMALL | {"shared_expert_intermediate_size": 16}
_LINEAR = {f"linear_{what}": 2 if "num" in what else 8 for what in ("num_key_heads", "num_value_heads")} | {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "full_attention"],
}
_LATENT = {
    "n_routed_experts": E,
    "moe_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
}
_OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("olmoe", {"num_experts": E}),
    "qwen2": ("qwen2_moe", _SHARED),
    "qwen3": ("qwen3_moe", _SMALL | {"head_dim": 16, "norm_topk_prob": True}),
    "mixtral": ("mixtral", {"num_local_experts": E}),
    "flex_olmo": ("flex_olmo", {"num_experts": E}),
    "qwen3_next": ("qwen3_next", _SHARED | _LINEAR | {"head_dim": 16}),
    "granitemoe": ("granitemoe", {"num_local_experts": E}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": E, "head_dim": 16}),
    "ernie": (
        "ernie4_5_moe",
        {"moe_num_experts": E, "moe_k": K, "moe_intermediate_size": 16, "moe_num_shared_experts": 1}
        | {"moe_layer_start_index": 1},
    ),
    "deepseek_v2": ("deepseek_v2", _LATENT | {"topk_method": "greedy", "routed_scaling_factor": 2.5}),
    "deepseek_v2_groups": (
        "deepseek_v2",
        _LATENT | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 16.0},
    ),
    "deepseek_v3": ("deepseek_v3", _LATENT | {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}),
    "glm4": ("glm4_moe", _LATENT | {"head_dim": 16, "n_group": 1, "topk_group": 1}),
    "hunyuan": ("hunyuan_v1_moe", {"num_experts": E, "moe_topk": K, "head_dim": 16}),
    "jamba": (
        "jamba",
        {"num_experts": E, "attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 1}
        | {"expert_layer_offset": 0, "use_mamba_kernels": False},
    ),
    "minimax": ("minimax", {"num_local_experts": E, "head_dim": 16}),
    "phimoe": ("phimoe", {"num_local_experts": E, "num_experts_per_tok": 2}),
    "minimax_m2": ("minimax_m2", {"num_local_experts": E, "head_dim": 16}),
    "lfm2": ("lfm2_moe", _SMALL | {"num_dense_layers": 1, "layer_types": ["full_attention"] * LAYERS}),
}
MORE = tuple(family for family in _OWN if family not in FAMILIES)


def tiny(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model in evaluation mode, the same weights each time."""
    name, own = _OWN[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**(_COMMON | own | changes)))
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            # Zero at first, and then without effect.
            if name.endswith(("e_score_correction_bias", "router.bias")):
                torch.nn.init.normal_(tensor, std=0.3)
        return model.to(dtype).eval()


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
