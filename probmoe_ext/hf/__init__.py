"""Hugging Face models: swap the router, swap it back, and see what is there. Imports transformers only when needed."""

from __future__ import annotations

from probmoe_ext.hf.layers import moe_layers
from probmoe_ext.hf.swap import restore_router, routing_of, swap_router

__all__ = ["moe_layers", "restore_router", "routing_of", "swap_router"]
