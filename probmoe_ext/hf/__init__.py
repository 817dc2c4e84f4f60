"""Hugging Face models: swap the router, swap it back, save and load. Imports transformers only when needed."""

from __future__ import annotations

from probmoe_ext.hf.card import model_card
from probmoe_ext.hf.checkpoint import from_pretrained, push_to_hub, save_pretrained
from probmoe_ext.hf.layers import moe_layers
from probmoe_ext.hf.swap import restore_router, routing_of, swap_router

__all__ = [
    "from_pretrained",
    "model_card",
    "moe_layers",
    "push_to_hub",
    "restore_router",
    "routing_of",
    "save_pretrained",
    "swap_router",
]
