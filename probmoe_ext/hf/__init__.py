"""Hugging Face models: swap the router, swap it back, and see what is there. Imports transformers only when needed."""

from __future__ import annotations

from probmoe_ext.hf.layers import moe_layers
from probmoe_ext.hf.losses import add_router_losses
from probmoe_ext.hf.padding import padding_mask
from probmoe_ext.hf.replay import RoutingRecord, record_routing, replay_routing
from probmoe_ext.hf.swap import restore_router, routing_of, swap_router

__all__ = [
    "RoutingRecord",
    "add_router_losses",
    "moe_layers",
    "padding_mask",
    "record_routing",
    "replay_routing",
    "restore_router",
    "routing_of",
    "swap_router",
]
