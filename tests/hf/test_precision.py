"""Autocast, half-precision weights and loss scaling: routing in float32, outputs in the model's dtype, no NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from probmoe_ext import reference
from probmoe_ext.hf import moe_layers, swap_router
from probmoe_ext.hf.gate import gate_logits, tensor_of
from probmoe_ext.routers import aux_losses, register_router
from tests.hf.models import H, K, gates, tiny, tokens
from tests.hf.test_models import swappable
from tests.routers.balance import BalanceRouter

pytestmark = pytest.mark.filterwarnings("ignore:the '.*' implementation of .* computes slots")
families = pytest.mark.parametrize("family", ["olmoe", "mixtral", "granitemoe", "gpt_oss", "ernie", "deepseek_v3"])
halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@families
@halves
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_gate_computes_in_float32_and_answers_in_the_models_dtype(
    family: str, dtype: torch.dtype, training: bool
) -> None:
    model = swap_router(swappable(family).to(dtype).train(training), "topk", k=2)
    gate: Any = moe_layers(model)[0].gate
    hidden = torch.randn(40, H).to(dtype)
    recorded, weights, indices = gate(hidden)
    original = gate.original.forward(gate, hidden)
    assert recorded.equal(original[0])
    assert weights.dtype == original[1].dtype
    # What float32 makes of the same logits, rounded once (at most to the neighbour, if the sum was in another order).
    form = gate.probmoe_form
    logits = gate_logits(gate, form, hidden)
    correction = None if form.correction is None else tensor_of(gate, form.correction).flatten()
    choice, scores = form.rule.choice(logits.float(), correction)
    chosen = scores.gather(-1, choice.topk(2, dim=-1).indices)
    expected = (chosen / chosen.sum(-1, keepdim=True) if form.normalize else chosen).to(weights.dtype) * form.scale
    rtol = 1e-6 if weights.dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(weights.sort().values, expected.sort().values, rtol=rtol, atol=0)
    assert indices.sort().values.equal(choice.topk(2, dim=-1).indices.sort().values)


@families
@pytest.mark.parametrize("k", [2, (1, 2)], ids=str)
@pytest.mark.parametrize("precision", ["bfloat16", "float16", "autocast bfloat16", "autocast float16"])
def test_training_has_no_nan_and_keeps_its_dtype(family: str, k: Any, precision: str) -> None:
    half = torch.float16 if "float16" in precision.replace("bfloat16", "") else torch.bfloat16
    autocast = precision.startswith("autocast")
    model = swappable(family).to(torch.float32 if autocast else half).train()
    with torch.autocast("cpu", half, enabled=autocast):
        expected = model(tokens()).logits.dtype
        swap_router(model, "probmoe", k=k)
        output = model(tokens(), labels=tokens())
    assert output.logits.dtype == expected
    assert output.loss.isfinite()
    output.loss.backward()
    for layer in moe_layers(model):
        weight = layer.gate.get_parameter(layer.gate.probmoe_form.weight)  # type: ignore[union-attr, operator]
        assert weight.grad.dtype == (torch.float32 if autocast else half)
        assert weight.grad.isfinite().all()
        assert (weight.grad.abs().sum(-1) > 0).all()


@halves
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
def test_extreme_logits_give_no_nan(dtype: torch.dtype, normalize: bool) -> None:
    model = swap_router(tiny("olmoe", dtype).train(), "probmoe", k=(1, K), normalize=normalize)
    gate = gates(model)[0]
    hidden = (torch.randn(40, H) * 300).to(dtype).requires_grad_()
    recorded, weights, _ = gate(hidden)
    assert recorded.isfinite().all()
    assert gate_logits(gate, gate.probmoe_form, hidden).abs().max() > 500
    assert weights.isfinite().all()
    assert weights.dtype == gate.original.forward(gate, hidden)[1].dtype
    weights.sum().backward()
    assert gate.weight.grad.isfinite().all()


def test_the_value_under_autocast_is_that_of_the_rounded_logits() -> None:
    model = swap_router(tiny("olmoe").train(), "probmoe", k=3, forward="topk")
    gate, hidden = gates(model)[0], torch.randn(40, H)
    with torch.autocast("cpu", torch.bfloat16):
        _, weights, indices = gate(hidden)
        logits = gate_logits(gate, gate.probmoe_form, hidden)
        assert weights.dtype == gate.original.forward(gate, hidden)[1].dtype
    assert logits.dtype == torch.bfloat16
    exact, same = reference.route_probmoe(logits.float(), 3, training=False)
    assert same.equal(indices)
    torch.testing.assert_close(weights, exact.to(weights.dtype), rtol=1e-6, atol=0)


def test_loss_scaling_reaches_auxiliary_losses() -> None:
    register_router("balance")(BalanceRouter)
    ids, found = tokens(), []
    for enabled in (False, True):
        model = swap_router(tiny("olmoe").train(), "balance", coefficient=2.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=enabled)
        with torch.autocast("cpu", torch.float16):
            loss = model(ids, labels=ids).loss
        scaler.scale(loss).backward()
        assert float(gates(model)[0].probmoe.loss_scale) == (256.0 if enabled else 1.0)
        scaler.unscale_(optimizer)
        assert all(value.isfinite() for value in aux_losses(model).values())
        found.append(gates(model)[-1].weight.grad.clone())
        before = gates(model)[-1].weight.detach().clone()
        scaler.step(optimizer)
        assert not gates(model)[-1].weight.equal(before)
    assert all(one.isfinite().all() for one in found)
    # Scaling keeps small gradients that float16 would lose; what both have must agree.
    torch.testing.assert_close(found[0], found[1], rtol=2e-2, atol=2e-3)
