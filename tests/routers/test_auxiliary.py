"""A loss that a router brings along joins the backward pass, with the scale of the model's own loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from probmoe_ext.routers import Router, aux_losses, watch_loss
from tests.routers.balance import BalanceRouter

T, E, H, K = 16, 6, 4, 2


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(H, E, bias=False)
        self.router = BalanceRouter(E, K, coefficient=0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, indices = self.router(x, self.gate(x))
        return (weights * indices).sum()


def gradients(x: torch.Tensor, factor: float = 1.0, watched: bool = True) -> tuple[Layer, torch.Tensor]:
    torch.manual_seed(0)
    layer = Layer()
    loss = layer(x)
    if watched:
        watch_loss(layer, loss)
    (loss * factor).backward()
    assert layer.gate.weight.grad is not None
    return layer, layer.gate.weight.grad


def explicit(x: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(0)
    layer = Layer()
    layer.eval()  # does not join its loss there
    probs = torch.softmax(layer.gate(x), -1)
    (gradient,) = torch.autograd.grad(layer(x) + 0.5 * E * probs.mean(0).square().sum(), layer.gate.weight)
    return gradient


def test_the_gradient_is_that_of_the_sum() -> None:
    x = torch.randn(T, H)
    torch.testing.assert_close(gradients(x)[1], explicit(x))
    torch.testing.assert_close(gradients(x, watched=False)[1], explicit(x))


@pytest.mark.parametrize("factor", [65536.0, 0.25, 1 / 3])
def test_it_is_scaled_as_the_loss_is(factor: float) -> None:
    x = torch.randn(T, H)
    torch.testing.assert_close(gradients(x, factor)[1], factor * explicit(x))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(gradients(x, factor, watched=False)[1], factor * explicit(x))


def test_losses_accumulate_over_batches() -> None:
    torch.manual_seed(0)
    layer, batches = Layer(), [torch.randn(T, H) for _ in range(4)]
    for x in batches:
        loss = layer(x)
        watch_loss(layer, loss)
        (loss / 4).backward()
    assert layer.gate.weight.grad is not None
    torch.testing.assert_close(layer.gate.weight.grad, sum(explicit(x) for x in batches) / 4)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_replayed_layer_brings_its_loss_once(use_reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    x = torch.randn(T, H)
    torch.manual_seed(0)
    layer = Layer()
    loss = checkpoint(layer, x.clone().requires_grad_(), use_reentrant=use_reentrant)
    watch_loss(layer, loss)
    (loss * 8).backward()
    assert layer.gate.weight.grad is not None
    torch.testing.assert_close(layer.gate.weight.grad, 8 * explicit(x))


def test_the_losses_can_be_read() -> None:
    layer, _ = gradients(torch.randn(T, H))
    losses = aux_losses(nn.ModuleDict({"moe": layer}))
    assert list(losses) == ["moe.router.balance"]
    assert losses["moe.router.balance"] > 0
    assert not losses["moe.router.balance"].requires_grad
    assert aux_losses(nn.Linear(2, 2)) == {}


def test_no_gradient_no_loss() -> None:
    layer = Layer()
    with torch.no_grad():
        loss = layer(torch.randn(T, H))
    watch_loss(layer, loss)
    assert not loss.requires_grad


def test_the_scale_stays_float32_and_out_of_the_state_dict() -> None:
    router = BalanceRouter(E, K).bfloat16()
    assert router.loss_scale.dtype == torch.float32
    assert list(router.state_dict()) == []


def test_what_join_loss_refuses() -> None:
    router = BalanceRouter(E, K)
    with pytest.raises(ValueError, match=r"'balance' must be a scalar, got shape \(2,\)"):
        router.join_loss(torch.ones(T, K), torch.ones(2), "balance")
    with pytest.raises(TypeError, match="has_loss = True"):
        Router(E, K).join_loss(torch.ones(T, K), torch.ones(()), "balance")


def test_it_compiles_in_one_graph() -> None:
    x = torch.randn(T, H)
    torch.manual_seed(0)
    layer = Layer()
    loss = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    watch_loss(layer, loss)
    (loss * 8).backward()
    assert layer.gate.weight.grad is not None
    torch.testing.assert_close(layer.gate.weight.grad, 8 * explicit(x))
