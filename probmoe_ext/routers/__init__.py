"""Routers: what turns hidden states into experts. One small file each, found by name; no Hugging Face import here."""

from __future__ import annotations

from probmoe_ext.routers.auxiliary import aux_losses, watch_loss
from probmoe_ext.routers.base import (
    ExpertsPerToken,
    Router,
    available_routers,
    make_router,
    register_router,
    router_options,
)
from probmoe_ext.routers.losses import load_balancing_loss, z_loss
from probmoe_ext.routers.probmoe import ProbMoERouter
from probmoe_ext.routers.topk import TopKRouter

__all__ = [
    "ExpertsPerToken",
    "ProbMoERouter",
    "Router",
    "TopKRouter",
    "aux_losses",
    "available_routers",
    "load_balancing_loss",
    "make_router",
    "register_router",
    "router_options",
    "watch_loss",
    "z_loss",
]
