"""Hugging Face models: swap the router, swap it back, save and load. Imports transformers only when needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from probmoe_ext.hf.card import model_card
from probmoe_ext.hf.checkpoint import from_pretrained, push_to_hub, save_pretrained
from probmoe_ext.hf.consistency import consistency_loss, train_consistently
from probmoe_ext.hf.esft import expert_affinity, select_experts, train_experts_only
from probmoe_ext.hf.layers import moe_layers
from probmoe_ext.hf.losses import add_router_losses
from probmoe_ext.hf.padding import padding_mask
from probmoe_ext.hf.parameters import freeze_router, parameter_table, router_parameters
from probmoe_ext.hf.replay import RoutingRecord, record_routing, replay_routing
from probmoe_ext.hf.serving import custom_routing_function
from probmoe_ext.hf.swap import restore_router, routing_of, swap_router
from probmoe_ext.hf.trainers import watch_trainer

if TYPE_CHECKING:
    from probmoe_ext.hf.monitor import RoutingMonitor

__all__ = [
    "RoutingMonitor",
    "RoutingRecord",
    "add_router_losses",
    "consistency_loss",
    "custom_routing_function",
    "expert_affinity",
    "freeze_router",
    "from_pretrained",
    "model_card",
    "moe_layers",
    "padding_mask",
    "parameter_table",
    "push_to_hub",
    "record_routing",
    "replay_routing",
    "restore_router",
    "router_parameters",
    "routing_of",
    "save_pretrained",
    "select_experts",
    "swap_router",
    "train_consistently",
    "train_experts_only",
    "watch_trainer",
]


def __getattr__(name: str) -> Any:
    """Import what is built on a class of transformers when it is asked for."""
    if name == "RoutingMonitor":
        from probmoe_ext.hf.monitor import RoutingMonitor

        return RoutingMonitor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
