"""How the tests that run over every router build one: a line for each that needs other arguments than ``k = K``."""

from __future__ import annotations

from typing import Any

from probmoe_ext.routers import available_routers

K_OF: dict[str, Any] = {
    "probmoe": (1, 4),
    "switch": 1,
    "da_moe": (1, 4),
    "lory": 8,
    "top_p": (1, 8),
}
"""Experts per token, where not the tiny models' own 4."""
OPTIONS: dict[str, dict[str, Any]] = {"lory": {"segment": 5}, "thor": {"inference": "ensemble"}}
"""Options beside the defaults."""
MODEL: dict[str, dict[str, Any]] = {"da_moe": {"attn_implementation": "eager"}}
"""Changes of the tiny model's configuration."""
DRAWS: set[str] = {
    "dirmoe",
    "gumbel_softmax",
    "noisy_topk",
    "probmoe",
    "simple",
    "sparsemixer",
    "sparsemixer_v2",
    "switch",
    "thor",
}
"""Routers whose training draws."""
NOT_REENTRANT: set[str] = {"moepp"}
"""Routers that learn through another layer, which reentrant checkpointing cuts off: they say so."""


def every_router() -> tuple[str, ...]:
    """The routers of the package; tests register others for a while."""
    return ROUTERS


ROUTERS = available_routers()
