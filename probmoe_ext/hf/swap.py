"""Swap the router of every mixture-of-experts layer of a model, and swap it back."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from probmoe_ext.hf.block import check_block, keep_forward, restore_block
from probmoe_ext.hf.choice import PLAIN
from probmoe_ext.hf.context import BatchCarrier, LayerCarrier, check_context, needs_batch, needs_layer
from probmoe_ext.hf.entry import check_options, clear_entry, describe, write_entry
from probmoe_ext.hf.experts import check_experts, restore_experts, take_router, unused_slots_cost
from probmoe_ext.hf.form import read_form
from probmoe_ext.hf.gate import RouterForm, SwappedGate, tensor_of
from probmoe_ext.hf.layers import MoELayer, find_layers, moe_layers
from probmoe_ext.hf.parallel import share_draws
from probmoe_ext.hf.reclass import check_reclassable, reclass, restore_class
from probmoe_ext.hf.trainers import label_share
from probmoe_ext.routers import ExpertsPerToken, Router, make_router, router_options, watch_loss

Model = TypeVar("Model", bound=nn.Module)


def swap_router(
    model: Model,
    name: str,
    k: ExpertsPerToken | None = None,
    layers: Iterable[int] | None = None,
    **options: Any,
) -> Model:
    """Let the mixture-of-experts layers of a model route by another router, in place.

    The gates keep their weights, their names in the state dict, dtype, device and hooks; recorded ``router_logits`` and
    the model's own auxiliary loss stay what they are. If the router is in evaluation mode what the model's own is, the
    model's own runs. Layers that have been swapped before get the new router; those not named in ``layers`` keep
    theirs. All is checked before anything is changed.

    The routing is written to ``model.config.probmoe``, so that every way of saving the model saves it. If all layers
    then evaluate as plain top-k with one k, the configuration's own k is that one, and the checkpoint an ordinary one;
    if not, each such layer has a buffer of two numbers that a plain loader reports (see ``probmoe_ext.hf.entry``).

    Args:
        model: A transformers (5 or later) model, before or after its first forward pass, or a module around it.
        name: A registered router, see :func:`probmoe_ext.routers.available_routers`.
        k: Experts per token, an int or a band ``(k_min, k_max)``; the model's own number by default.
        layers: Numbers of decoder layers, as in the names of their parameters; every one with experts by default.
        **options: The router's. ``normalize`` is by default what the model does.

    Returns:
        ``model``.

    Raises:
        TypeError: If ``model`` is no module, ``k`` or ``layers`` are no integers, or an option is nothing for JSON.
        ValueError: If the model has no mixture-of-experts layer, or one with a router that this package does not know;
            if the router or an option is unknown; if ``k`` or ``layers`` are out of range.
    """
    costly = swap_layers(model, moe_layers(model, layers), name, k, options)
    if costly:
        warnings.warn(unused_slots_cost(costly[0].experts), stacklevel=2)
    share_draws(model)
    return model


def swap_layers(
    model: nn.Module, layers: list[MoELayer], name: str, k: ExpertsPerToken | None, options: dict[str, Any]
) -> list[MoELayer]:
    """Do what :func:`swap_router` does for given layers; return those that compute slots which are not used."""
    planned = [(layer, _plan(model, layer, name, k, options)) for layer in layers]
    costly = [layer for layer, gates in planned if not _install(layer, gates)]
    write_entry(model)
    watch_model(model)
    return costly


def restore_router(model: Model) -> Model:
    """Give every layer its original router back, in place; nothing if none was swapped.

    Args:
        model: What was given to :func:`swap_router`.

    Returns:
        ``model``, bit for bit as it was but for what training changed.

    Raises:
        ValueError: If a gate was wrapped after it was swapped (the message says by what).
    """
    swapped = [(path, module) for path, module in model.named_modules() if isinstance(module, SwappedGate)]
    for path, gate in swapped:
        check_reclassable(gate, path)
    clear_entry(model)
    for _, gate in swapped:
        restore_class(gate)
        del gate.probmoe
        del gate.probmoe_form
    for module in list(model.modules()):
        restore_experts(module)
        restore_block(module)
    watch_model(model)
    return model


def routing_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Describe how the swapped layers of a model route, in values that JSON can hold.

    Args:
        model: Any model.

    Returns:
        By the path of the gate: ``layer`` (the number of the decoder layer), ``router`` (the name), ``k`` (an int, or
        ``[k_min, k_max]``) and ``options``. Empty if nothing was swapped.
    """
    return {
        layer.path: {"layer": layer.index, **describe(layer.gate.probmoe)}
        for layer in find_layers(model)
        if isinstance(layer.gate, SwappedGate)
    }


Planned = list[tuple[nn.Module, RouterForm, Router]]
"""Each gate of a layer (more than one under an adapter) with its form and its new router."""


def _plan(model: nn.Module, layer: MoELayer, name: str, k: ExpertsPerToken | None, options: dict[str, Any]) -> Planned:
    check_block(layer)
    planned: Planned = []
    for gate in (layer.gate, *layer.others):
        check_reclassable(gate, layer.path)
        form = gate.probmoe_form if isinstance(gate, SwappedGate) else read_form(replace(layer, gate=gate))
        fitting = {"normalize": form.normalize, "hidden_size": form.hidden_size}
        defaults = {option: value for option, value in fitting.items() if option in router_options(name)}
        router = make_router(name, num_experts=form.num_experts, k=form.k if k is None else k, **(defaults | options))
        if form.rule != PLAIN and not router.takes_scores:
            raise ValueError(
                f"router {name!r} cannot take the place of the one at {layer.path} ({type(gate).__name__}): it weights "
                f"by softmax, and the model by its own scores ({form.rule})"
            )
        if router.k_max > form.largest_k:
            raise ValueError(
                f"k must be at most {form.largest_k}, the number of experts in the groups that a token of {layer.path} "
                f"chooses from; got {k!r}"
            )
        check_options(router)
        check_context(model, layer, router)
        check_experts(layer.experts, layer.path, router)
        weight: Any = tensor_of(gate, form.weight)
        planned.append((gate, form, router.to(device=weight.device, dtype=weight.dtype).train(gate.training)))
    return planned


def _install(layer: MoELayer, planned: Planned) -> bool:
    """Swap one layer; say whether slots that are not used cost nothing in it."""
    keep_forward(layer)
    for module, form, router in planned:
        reclass(module, SwappedGate)
        gate: Any = module
        gate.probmoe_form = form
        gate.probmoe = router
    _, form, router = planned[0]  # of the gate that is in use
    return take_router(layer.experts, form, router)


def watch_model(model: nn.Module) -> None:
    """Note what the routers of a model need: the scale of its loss, the batch, the layers around them."""
    for key, hook in list(model._forward_hooks.items()):
        if hook is _note_loss:
            del model._forward_hooks[key]
            del model._forward_hooks_with_kwargs[key]
    for carrier in model.__dict__.pop("probmoe_carriers", ()):
        carrier.remove()
    routers = [module for module in model.modules() if isinstance(module, Router)]
    if any(router.has_loss for router in routers):
        model.register_forward_hook(_note_loss, with_kwargs=True)
    carriers = [
        carrier(model)
        for carrier, needed in ((BatchCarrier, needs_batch), (LayerCarrier, needs_layer))
        if any(map(needed, routers))
    ]
    if carriers:
        model.__dict__["probmoe_carriers"] = carriers


def _note_loss(model: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
    loss = output[0] if isinstance(output, tuple) and output else getattr(output, "loss", None)
    # Hooks on tensors inside a compiled graph are not supported; watch_loss can be called outside of it.
    if isinstance(loss, torch.Tensor) and loss.dim() == 0 and not torch.compiler.is_compiling():
        watch_loss(model, loss, label_share(kwargs))
