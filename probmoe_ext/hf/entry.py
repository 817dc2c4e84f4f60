"""The routing of a model in its configuration, so that every way of saving a model saves how it routes.

Two things tell a loader that knows nothing of this package what it needs to know. Where all layers evaluate as plain
top-k with one k, the configuration says that k, and the checkpoint *is* an ordinary one. Where they do not, each such
layer's smallest and largest k are a buffer of the checkpoint, which a plain loader reports as unexpected: no checkpoint
loads silently as what it is not.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from torch import nn

from probmoe_ext.hf.gate import RouterForm, SwappedGate, tensor_of
from probmoe_ext.hf.layers import MoELayer, find_layers
from probmoe_ext.routers import Router

ENTRY = "probmoe"
"""The key in ``config.json``: ``{"routing": [{"router", "k", "options", "gates"}, …], "config": {…}}``.

``gates`` are paths of modules; ``config`` holds what the keys that hold k were before the swap."""
BAND = "experts_per_token"
"""The name of the buffer ``[2]`` (smallest and largest k, int64) in a router that plain top-k does not replace."""
K_NAMES = ("num_experts_per_tok", "experts_per_token", "moe_k", "moe_topk", "num_experts_per_token", "top_k_experts")


def describe(router: Router) -> dict[str, Any]:
    """What builds a router again, in values that JSON can hold."""
    k = list(router.k) if isinstance(router.k, tuple) else router.k
    return {"router": router.name, "k": k, "options": dict(router.options)}


def check_options(router: Router) -> None:
    """Check that the options of a router can be written to a configuration.

    Raises:
        TypeError: If JSON cannot hold one; the message names it.
    """
    for name, value in router.options.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            kind = type(value).__name__
            raise TypeError(f"option {name!r} of router {router.name!r} cannot be saved in JSON: {kind}") from None


def entry_of(config: Any) -> dict[str, Any] | None:
    """The routing in a configuration, ``None`` if there is none.

    Raises:
        ValueError: If it is there and not readable.
    """
    entry = getattr(config, ENTRY, None)
    if entry is None:
        return None
    keys = {"router", "k", "options", "gates"}
    right = isinstance(entry, dict) and isinstance(entry.get("routing"), list) and isinstance(entry.get("config"), dict)
    if not right or not all(isinstance(one, dict) and keys <= set(one) for one in entry["routing"]):
        raise ValueError(f"{ENTRY!r} in config.json is damaged: {json.dumps(entry, default=str)[:200]}")
    found: dict[str, Any] = entry
    return found


def write_entry(model: nn.Module) -> None:
    """Bring the configuration of a model, and the buffers that plain loaders report, up to date with its routers."""
    clear_entry(model)
    for root in _roots(model):
        every = list(find_layers(root))
        layers = [layer for layer in every if isinstance(layer.gate, SwappedGate)]
        if not layers:
            continue
        text, own = root.config.get_text_config(), _form(layers[0]).k
        names = [name for name in K_NAMES if getattr(text, name, None) == own]
        k = _common_k(layers, own if len(layers) < len(every) else None)
        if k is not None and (names or k == own):
            for name in names:
                setattr(text, name, k)
        else:
            _mark(layers)
        setattr(root.config, ENTRY, {"routing": _grouped(layers), "config": dict.fromkeys(names, own)})


def clear_entry(model: nn.Module) -> None:
    """Undo :func:`write_entry`; to be called while the gates that it was called for are still swapped."""
    for root in _roots(model):
        layers = [layer for layer in find_layers(root) if isinstance(layer.gate, SwappedGate)]
        entry = getattr(root.config, ENTRY, None)
        if entry is not None:
            delattr(root.config, ENTRY)
        if layers and isinstance(entry, dict):
            for name in entry.get("config", ()):
                setattr(root.config.get_text_config(), name, _form(layers[0]).k)
        for router in _routers(layers):
            if BAND in router._buffers:
                delattr(router, BAND)


def band_of(router: Router) -> list[int] | None:
    """What the checkpoint said of the smallest and largest k of a router, ``None`` if it says nothing."""
    held = router._buffers.get(BAND)
    return None if held is None else [int(value) for value in held]


def _common_k(layers: list[MoELayer], others: int | None) -> int | None:
    """The one k with which all layers evaluate as plain top-k (``others`` is that of further layers), or ``None``."""
    found = set() if others is None else {others}
    for layer in layers:
        evaluation = _router(layer).top_k_in_evaluation()
        if evaluation is None or evaluation[1] != _form(layer).normalize:
            return None
        found.add(evaluation[0])
    return found.pop() if len(found) == 1 else None


def _mark(layers: list[MoELayer]) -> None:
    for layer in layers:
        plain = _router(layer).top_k_in_evaluation() == (_form(layer).k, _form(layer).normalize)
        # A router with a state of its own is reported by that.
        if plain or _router(layer).state_dict():
            continue
        for gate in (layer.gate, *layer.others):
            router: Any = gate.probmoe
            device = tensor_of(gate, _form(layer).weight).device
            router.register_buffer(BAND, torch.tensor([router.k_min, router.k_max], device=device))


def _grouped(layers: list[MoELayer]) -> list[dict[str, Any]]:
    groups: dict[str, dict[str, Any]] = {}
    for layer in layers:
        what = describe(_router(layer))
        groups.setdefault(json.dumps(what, sort_keys=True), what | {"gates": []})["gates"].append(layer.place)
    return list(groups.values())


def _roots(model: nn.Module) -> list[Any]:
    """The outermost transformers models in a module; configurations of models inside of them are theirs."""
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return []
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{root}.") or root == "" for root in found)
        if not inside and isinstance(module, transformers.PreTrainedModel):
            found[path] = module
    return list(found.values())


def _routers(layers: list[MoELayer]) -> list[Any]:
    return [gate.probmoe for layer in layers for gate in (layer.gate, *layer.others)]


def _router(layer: MoELayer) -> Router:
    router: Any = layer.gate.probmoe
    return router


def _form(layer: MoELayer) -> RouterForm:
    form: Any = layer.gate.probmoe_form
    return form
