"""Hugging Face models: swap the router, swap it back, and see what is there. Imports transformers only when needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from probmoe_ext.hf.layers import moe_layers
from probmoe_ext.hf.losses import add_router_losses
from probmoe_ext.hf.padding import padding_mask
from probmoe_ext.hf.replay import RoutingRecord, record_routing, replay_routing
from probmoe_ext.hf.swap import restore_router, routing_of, swap_router

if TYPE_CHECKING:
    from probmoe_ext.hf.monitor import RoutingMonitor

__all__ = [
    "RoutingMonitor",
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


def __getattr__(name: str) -> Any:
    """Import what is built on a class of transformers when it is asked for."""
    if name == "RoutingMonitor":
        from probmoe_ext.hf.monitor import RoutingMonitor

        return RoutingMonitor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
