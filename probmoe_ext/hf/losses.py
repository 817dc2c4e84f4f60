"""Auxiliary losses that join the training of a swapped model by themselves, counted without padding."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from probmoe_ext.hf.gate import SwappedGate
from probmoe_ext.hf.padding import mask_of
from probmoe_ext.hf.swap import Model, watch_model
from probmoe_ext.routers import Router, load_balancing_loss, z_loss


def add_router_losses(
    model: Model,
    *,
    load_balancing: float = 0.0,
    z: float = 0.0,
    probabilities: Literal["marginals", "softmax"] = "marginals",
) -> Model:
    """Add losses to the routers of a swapped model, in place; they train it without a change of the script.

    Each layer adds its own to the backward pass of the model's loss, and is scaled as that is (loss scaling,
    accumulation). The value of the loss that the model returns does not change: :func:`probmoe_ext.routers.aux_losses`
    reads the added ones. The model's own auxiliary loss (``output_router_logits``) is another, of the logits alone;
    use one of the two. Tokens that the ``attention_mask`` excludes do not count, see
    :func:`probmoe_ext.hf.padding_mask`.

    Args:
        model: A model after :func:`probmoe_ext.hf.swap_router`; swapping again takes the losses away.
        load_balancing: The coefficient of :func:`probmoe_ext.routers.load_balancing_loss` (normalised as in Switch
            Transformers: 1 for an even load), usually around 0.01.
        z: The coefficient of :func:`probmoe_ext.routers.z_loss`, usually around 0.001. With both 0 the losses go away.
        probabilities: What the balance is of, the ``"marginals"`` of the law or the ``"softmax"``.

    Returns:
        ``model``.

    Raises:
        ValueError: If no router was swapped, or an option or coefficient is not allowed.
    """
    for name, value in (("load_balancing", load_balancing), ("z", z)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a number that is at least 0, got {value!r}")
    if probabilities not in ("marginals", "softmax"):
        raise ValueError(f"probabilities must be one of marginals, softmax; got {probabilities!r}")
    gates: list[Any] = [module for module in model.modules() if isinstance(module, SwappedGate)]
    if not gates:
        raise ValueError(f"{type(model).__name__} has no swapped router to add a loss to; call swap_router first")
    for gate in gates:
        router: Router = gate.probmoe
        for key, hook in list(router._forward_hooks.items()):
            if isinstance(hook, RouterLosses):
                del router._forward_hooks[key]
                router.losses.clear()
        if load_balancing or z:
            router.take_losses(next(gate.parameters()).device)
            router.register_forward_hook(RouterLosses(load_balancing, z, probabilities))
    watch_model(model)
    return model


class RouterLosses:
    """A forward hook of a router that joins losses to the weights it returns."""

    def __init__(self, load_balancing: float, z: float, probabilities: Literal["marginals", "softmax"]) -> None:
        self.load_balancing = load_balancing
        self.z = z
        self.probabilities = probabilities

    def __call__(
        self, router: nn.Module, args: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Join them in training."""
        if not router.training or not isinstance(router, Router):
            return None
        (weights, indices), logits = output, args[1]
        mask = mask_of(router, len(logits))
        if self.load_balancing:
            loss = load_balancing_loss(logits, indices, router.k, mask=mask, probabilities=self.probabilities)
            weights = router.join_loss(weights, self.load_balancing * loss, "load_balancing")
        if self.z:
            weights = router.join_loss(weights, self.z * z_loss(logits, mask=mask), "z")
        return weights, indices
