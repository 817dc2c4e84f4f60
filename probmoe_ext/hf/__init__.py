"""Hugging Face models: swap the router, swap it back, save and load. Imports transformers only when needed."""

from __future__ import annotations

from probmoe_ext.hf.card import model_card
from probmoe_ext.hf.checkpoint import from_pretrained, push_to_hub, save_pretrained
from probmoe_ext.hf.layers import moe_layers
from probmoe_ext.hf.parameters import freeze_router, parameter_table, router_parameters
from probmoe_ext.hf.serving import custom_routing_function
from probmoe_ext.hf.swap import restore_router, routing_of, swap_router
from probmoe_ext.hf.trainers import watch_trainer

__all__ = [
    "custom_routing_function",
    "freeze_router",
    "from_pretrained",
    "model_card",
    "moe_layers",
    "parameter_table",
    "push_to_hub",
    "restore_router",
    "router_parameters",
    "routing_of",
    "save_pretrained",
    "swap_router",
    "watch_trainer",
]
