"""LoRA (Hu et al. 2022, arXiv 2106.09685) by PEFT: adapters on attention and experts, the routers trained whole."""

from __future__ import annotations

from typing import Any

from torch import nn

from probmoe_ext.hf import moe_layers
from probmoe_ext.train.errors import UsageError

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")


def add_lora(model: Any, rank: int, alpha: int | None) -> Any:
    """Freeze a model, and put adapters on its attention and its experts; its routers stay trainable, every weight.

    Args:
        model: a causal language model, its routers swapped already.
        rank: of the adapters.
        alpha: they are scaled by ``alpha / rank``; None is twice the rank.

    Returns:
        The model in PEFT's wrapper.

    Raises:
        UsageError: PEFT is not installed, or the model has no experts.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UsageError("lora_rank needs PEFT: pip install 'probmoe_ext[lora]'") from error
    try:
        layers = moe_layers(model)
    except ValueError as error:
        raise UsageError(str(error)) from error
    modules = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in ATTENTION
    }
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        task_type="CAUSAL_LM",
        target_modules=sorted(modules),
        # transformers keeps the experts of a layer in one tensor [E, out, in].
        target_parameters=sorted(
            {
                f"{layer.place.rpartition('.')[0]}.experts.{name}"
                for layer in layers
                for name, one in layer.experts.named_parameters()
                if one.dim() == 3
            }
        ),
        modules_to_save=sorted({layer.place.rpartition(".")[2] for layer in layers}),
    )
    adapted = get_peft_model(model, config)
    # Activation checkpointing needs a gradient at what goes into the first layer, which is frozen.
    model.enable_input_require_grads()
    return adapted


def merge_lora(model: Any) -> Any:
    """The model with its adapters added to its weights, without PEFT's wrapper: an ordinary model again."""
    return model.merge_and_unload()
