"""Auxiliary losses of routers: how one joins the backward pass by itself, and how it is read.

A router hands its loss over together with the weights that it returns (``Router.join_loss``). A function that is the
identity on the weights then gives the loss its gradient whenever the weights get theirs, so no training script has to
know about it, and a layer that activation checkpointing replays brings its loss along.

The gradient of the loss must be scaled as that of the model's own loss is (loss scaling for float16, division by the
number of accumulated batches). The factor is the gradient that arrives at the model's loss, which a backward pass
computes before anything else: :func:`watch_loss` notes it in the routers. The swap does this by itself for Hugging
Face models that return a loss; a training loop that computes its own loss calls :func:`watch_loss` before
``backward``, or leaves it alone if it scales nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class AuxiliaryLosses(nn.Module):
    """A module whose training forward pass may have losses of its own; the base of every router."""

    has_loss: bool = False
    """Whether :meth:`join_loss` is called; a class that says so gets a buffer for the scale (not in the state dict)."""

    loss_scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.losses: dict[str, torch.Tensor] = {}
        if self.has_loss:
            self.register_buffer("loss_scale", torch.ones((), dtype=torch.float32), persistent=False)

    def take_losses(self, device: torch.device) -> None:
        """Let :meth:`join_loss` be called on this module from outside, whatever its class says."""
        if not self.has_loss:
            self.has_loss = True
            self.register_buffer("loss_scale", torch.ones((), dtype=torch.float32, device=device), persistent=False)

    def join_loss(self, weights: torch.Tensor, loss: torch.Tensor, name: str) -> torch.Tensor:
        """Make an auxiliary loss part of the backward pass, through the routing weights.

        Args:
            weights: ``[T, K]``, what ``forward`` is about to return.
            loss: A scalar on the same device, already multiplied by its coefficient.
            name: What :func:`aux_losses` calls it.

        Returns:
            ``weights``, to be returned in place of the argument: whatever differentiates them differentiates the loss.

        Raises:
            TypeError: If the class does not say ``has_loss = True``.
            ValueError: If ``loss`` is no scalar.
        """
        if not self.has_loss:
            raise TypeError(f"{type(self).__name__} must say `has_loss = True` to join a loss ({name!r})")
        if loss.dim() != 0:
            raise ValueError(f"the auxiliary loss {name!r} must be a scalar, got shape {tuple(loss.shape)}")
        self.losses[name] = loss.detach()
        apply: Callable[..., torch.Tensor] = _JoinLoss.apply
        return apply(weights, loss, self.loss_scale)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> AuxiliaryLosses:
        apply: Callable[..., Any] = super()._apply
        apply(fn, recurse)
        if self.has_loss:
            # A cast of the model must not round the scale (1/3 in bfloat16); a change of device applies.
            self.loss_scale = self.loss_scale.to(torch.float32)
        return self


class _JoinLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: torch.Tensor, loss: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(scale)
        ctx.loss_dtype = loss.dtype
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        (scale,) = ctx.saved_tensors
        if torch.compiler.is_compiling():
            # What depends on no incoming gradient is moved to the forward graph, where the scale is not known yet.
            scale = scale + 0 * torch.nan_to_num(gradients[0].float().sum())
        return gradients[0], scale.to(ctx.loss_dtype), None


def aux_losses(model: nn.Module) -> dict[str, torch.Tensor]:
    """Read the auxiliary losses of the latest training forward pass.

    Args:
        model: A model with routers in it, or a router.

    Returns:
        Detached scalars, with their coefficients, by ``"<path of the router>.<name of the loss>"``. Empty if no router
        has any.
    """
    return {
        f"{path}.{name}" if path else name: loss
        for path, router in model.named_modules()
        if isinstance(router, AuxiliaryLosses)
        for name, loss in router.losses.items()
    }


def watch_loss(model: nn.Module, loss: torch.Tensor, share: torch.Tensor | float | None = None) -> None:
    """Let the auxiliary losses of a model be scaled as its loss is.

    Args:
        model: The model whose routers are to know the scale.
        loss: The scalar that the training step differentiates, before any loss scaler or division touched it.
        share: If ``loss`` is not the mean over the batch, but divided by the tokens of more batches (of all that an
            optimizer step accumulates), the share that this batch has in them; ``None`` is 1.
    """
    if not loss.requires_grad:
        return

    def note_scale(gradient: torch.Tensor) -> None:
        for router in model.modules():
            if isinstance(router, AuxiliaryLosses) and router.has_loss:
                # Through .data: the router saved this very tensor for its backward pass, which must see the new value.
                router.loss_scale.data.copy_(gradient.detach() if share is None else gradient.detach() * share)

    register: Callable[..., Any] = loss.register_hook
    register(note_scale)
