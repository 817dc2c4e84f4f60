"""Swap the router of every mixture-of-experts layer of a model, and swap it back."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from probmoe_ext.hf.experts import check_experts, restore_experts, skip_unused_slots, unused_slots_cost
from probmoe_ext.hf.form import read_form
from probmoe_ext.hf.gate import RouterForm, SwappedGate
from probmoe_ext.hf.layers import MoELayer, find_layers, moe_layers
from probmoe_ext.hf.padding import PaddingCarrier
from probmoe_ext.hf.parallel import share_draws
from probmoe_ext.hf.reclass import check_reclassable, reclass, restore_class
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

    Args:
        model: A transformers (5 or later) model, before or after its first forward pass, or a module around it.
        name: A registered router, see :func:`probmoe_ext.routers.available_routers`.
        k: Experts per token, an int or a band ``(k_min, k_max)``; the model's own number by default.
        layers: Numbers of decoder layers, as in the names of their parameters; every one with experts by default.
        **options: The router's. ``normalize`` is by default what the model does.

    Returns:
        ``model``.

    Raises:
        TypeError: If ``model`` is no module, or ``k`` or ``layers`` are no integers.
        ValueError: If the model has no mixture-of-experts layer, or one with a router that is not softmax and top-k;
            if the router or an option is unknown; if ``k`` or ``layers`` are out of range.
    """
    planned = [(layer, *_plan(layer, name, k, options)) for layer in moe_layers(model, layers)]
    costly = [layer for layer, form, router in planned if not _install(layer, form, router)]
    if costly:
        warnings.warn(unused_slots_cost(costly[0].experts), stacklevel=2)
    share_draws(model)
    watch_model(model)
    return model


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
    for _, gate in swapped:
        restore_class(gate)
        del gate.probmoe
        del gate.probmoe_form
    for module in list(model.modules()):
        restore_experts(module)
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
        layer.path: {
            "layer": layer.index,
            "router": layer.gate.probmoe.name,
            "k": list(layer.gate.probmoe.k) if isinstance(layer.gate.probmoe.k, tuple) else layer.gate.probmoe.k,
            "options": dict(layer.gate.probmoe.options),
        }
        for layer in find_layers(model)
        if isinstance(layer.gate, SwappedGate)
    }


def _plan(layer: MoELayer, name: str, k: ExpertsPerToken | None, options: dict[str, Any]) -> tuple[RouterForm, Router]:
    gate = layer.gate
    check_reclassable(gate, layer.path)
    form = gate.probmoe_form if isinstance(gate, SwappedGate) else read_form(layer)
    fitting = {"normalize": form.normalize, "hidden_size": form.hidden_size}
    defaults = {option: value for option, value in fitting.items() if option in router_options(name)}
    router = make_router(name, num_experts=form.num_experts, k=form.k if k is None else k, **(defaults | options))
    if router.leaves_slots_unused:
        check_experts(layer.experts, layer.path)
    weight: Any = gate.weight
    return form, router.to(device=weight.device, dtype=weight.dtype).train(gate.training)


def _install(layer: MoELayer, form: RouterForm, router: Router) -> bool:
    """Swap one layer; say whether slots that are not used cost nothing in it."""
    reclass(layer.gate, SwappedGate)
    gate: Any = layer.gate
    gate.probmoe_form = form
    gate.probmoe = router
    if router.leaves_slots_unused:
        return skip_unused_slots(layer.experts, form)
    restore_experts(layer.experts)
    return True


def watch_model(model: nn.Module) -> None:
    """Note the scale of the model's loss, and its padding, as long as a router has a loss of its own."""
    for key, hook in list(model._forward_hooks.items()):
        if hook is _note_loss:
            del model._forward_hooks[key]
    carrier = model.__dict__.pop("probmoe_padding", None)
    if carrier is not None:
        carrier.remove()
    if any(isinstance(module, Router) and module.has_loss for module in model.modules()):
        model.register_forward_hook(_note_loss)
        model.__dict__["probmoe_padding"] = PaddingCarrier(model)


def _note_loss(model: nn.Module, args: Any, output: Any) -> None:
    loss = output[0] if isinstance(output, tuple) and output else getattr(output, "loss", None)
    # Hooks on tensors inside a compiled graph are not supported; watch_loss can be called outside of it.
    if isinstance(loss, torch.Tensor) and loss.dim() == 0 and not torch.compiler.is_compiling():
        watch_loss(model, loss)
