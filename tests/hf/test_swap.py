"""Swapping keeps everything that is not routing, and can be undone bit for bit."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from probmoe_ext.hf import restore_router, routing_of, swap_router
from probmoe_ext.routers import aux_losses, register_router
from tests.hf.models import FAMILIES, LAYERS, E, H, K, experts, gates, tiny, tokens
from tests.routers.balance import BalanceRouter, BiasedRouter

NORMALIZES = {"olmoe": False, "qwen2": False, "qwen3": True, "mixtral": True}
families = pytest.mark.parametrize("family", FAMILIES)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture
def own_routers() -> None:
    """Register routers with a loss and with a parameter for one test."""
    register_router("balance")(BalanceRouter)
    register_router("biased")(BiasedRouter)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(one[name].equal(other[name]) for name in one)


@families
@dtypes
@pytest.mark.parametrize("when", ["before", "after"])
def test_evaluation_with_the_models_own_k_is_bit_for_bit(family: str, dtype: torch.dtype, when: str) -> None:
    ids = tokens()
    expected = tiny(family, dtype)(ids, labels=ids, output_router_logits=True)
    model = tiny(family, dtype)
    if when == "after":
        model(ids, output_router_logits=True)
    before = state(model)
    assert swap_router(model, "probmoe") is model
    got = model(ids, labels=ids, output_router_logits=True)
    assert got.logits.equal(expected.logits)
    assert got.loss.equal(expected.loss)
    assert got.aux_loss.equal(expected.aux_loss)
    assert len(got.router_logits) == len(expected.router_logits) == LAYERS
    assert all(one.equal(other) for one, other in zip(got.router_logits, expected.router_logits, strict=True))
    assert same_state(state(model), before)


@families
@dtypes
@pytest.mark.parametrize("k", [2, (1, K)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_what_is_recorded_is_what_the_original_records(family: str, dtype: torch.dtype, k: Any, training: bool) -> None:
    ids = tokens()
    model = tiny(family, dtype).train(training)
    seen: list[Any] = []
    hook = gates(model)[0].register_forward_hook(lambda gate, args, output: seen.append((*args, *output)))
    swap_router(model, "probmoe", k=k)
    got = model(ids, labels=ids, output_router_logits=True)
    assert len(got.router_logits) == LAYERS
    assert got.router_logits[0].equal(seen[0][1])
    hidden, logits, weights, indices = seen[0]
    hook.remove()
    restore_router(model)
    expected = gates(model)[0](hidden)
    assert logits.equal(expected[0])
    assert weights.dtype == expected[1].dtype
    assert indices.shape == (ids.numel(), 2 if k == 2 else K)
    assert got.aux_loss.isfinite()
    # The model's own loss of balance is of the logits alone; the first layer sees what the original would.
    assert torch.equal(got.router_logits[0], tiny(family, dtype)(ids, output_router_logits=True).router_logits[0])


@families
def test_restore_is_bit_for_bit(family: str) -> None:
    ids, model = tokens(), tiny(family)
    expected = model(ids, output_router_logits=True)
    classes = [type(module) for module in model.modules()]
    attributes = [sorted(module.__dict__) for module in model.modules()]
    before, shown = state(model), repr(model)
    for k in (2, (1, K), K):
        swap_router(model, "probmoe", k=k)
        assert repr(model) != shown
    swap_router(model, "topk", layers=[0])
    swap_router(model, "probmoe", k=(0, 3), layers=[1])
    assert restore_router(model) is model
    assert [type(module) for module in model.modules()] == classes
    assert [sorted(module.__dict__) for module in model.modules()] == attributes
    assert not any(getattr(module, "_is_expert_parallel", False) for module in experts(model))
    assert same_state(state(model), before)
    assert repr(model) == shown
    got = model(ids, output_router_logits=True)
    assert got.logits.equal(expected.logits)
    assert all(one.equal(other) for one, other in zip(got.router_logits, expected.router_logits, strict=True))
    assert restore_router(model) is model


@families
def test_defaults_come_from_the_model_and_k_may_differ(family: str) -> None:
    model = swap_router(tiny(family), "probmoe")
    assert [gate.probmoe.k for gate in gates(model)] == [K] * LAYERS
    assert {gate.probmoe.options["normalize"] for gate in gates(model)} == {NORMALIZES[family]}
    ids = tokens()
    other = tiny(family, num_experts_per_tok=2)(ids)
    torch.testing.assert_close(swap_router(model, "topk", k=2)(ids).logits, other.logits, rtol=1e-4, atol=1e-5)


def test_training_mode_dtype_and_device_follow_the_gate() -> None:
    model = tiny("olmoe").train()
    swap_router(model, "probmoe")
    assert all(gate.probmoe.training for gate in gates(model))
    model.eval()
    assert not any(gate.probmoe.training for gate in gates(model))
    meta = swap_router(tiny("olmoe").to("meta"), "probmoe", k=(1, 3))
    assert routing_of(meta)["model.layers.1.mlp.gate"]["k"] == [1, 3]


@pytest.mark.usefixtures("own_routers")
def test_a_router_with_parameters_and_a_loss() -> None:
    ids = tokens()
    model = tiny("olmoe", torch.bfloat16).train()
    names = list(model.state_dict())
    swap_router(model, "biased", coefficient=0.5)
    extra = [name for name in model.state_dict() if name not in names]
    assert extra == [f"model.layers.{index}.mlp.gate.probmoe.bias" for index in range(LAYERS)]
    assert gates(model)[0].probmoe.bias.dtype == torch.bfloat16
    assert gates(model)[0].probmoe.options["hidden_size"] == H
    assert isinstance(gates(model)[0], type(gates(tiny("olmoe"))[0]))
    (model(ids, labels=ids).loss * 256).backward()
    assert all(gate.probmoe.bias.grad.abs().sum() > 0 for gate in gates(model))
    assert [float(gate.probmoe.loss_scale) for gate in gates(model)] == [256.0] * LAYERS
    assert list(aux_losses(model)) == [f"model.layers.{index}.mlp.gate.probmoe.balance" for index in range(LAYERS)]
    swap_router(model, "balance")
    assert len(model._forward_hooks) == 2
    restore_router(model)
    assert list(model.state_dict()) == names
    assert len(model._forward_hooks) == 0


@pytest.mark.usefixtures("own_routers")
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_a_loss_of_a_router_is_scaled_with_the_models(scale: float) -> None:
    ids, gradients = tokens(), []
    for coefficient in (0.0, 2.0):
        model = swap_router(tiny("olmoe").train(), "balance", coefficient=coefficient)
        (model(ids, labels=ids).loss * scale).backward()
        gradients.append(gates(model)[-1].weight.grad / scale)
    model = swap_router(tiny("olmoe").train(), "topk")
    seen: list[torch.Tensor] = []
    gates(model)[-1].register_forward_pre_hook(lambda gate, args: seen.append(args[0]))
    model(ids)
    logits = seen[0].reshape(-1, H) @ gates(model)[-1].weight.T
    loss = 2.0 * E * torch.softmax(logits, -1).mean(0).square().sum()
    (expected,) = torch.autograd.grad(loss, gates(model)[-1].weight)
    torch.testing.assert_close(gradients[1] - gradients[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [K, (1, 3)], ids=str)
def test_a_swapped_model_can_be_copied_and_pickled(k: Any) -> None:
    ids = tokens()
    model = swap_router(tiny("olmoe"), "probmoe", k=k)
    expected = model(ids).logits
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for one in copies:
        assert one(ids).logits.equal(expected)
        assert routing_of(one) == routing_of(model)
        assert type(gates(one)[0]) is type(gates(model)[0])
        assert type(gates(restore_router(one))[0]).__name__ == "OlmoeTopKRouter"
    assert routing_of(model)


@families
def test_generation(family: str) -> None:
    ids = tokens(2, 5)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    model = tiny(family)
    expected = model.generate(ids, **options)
    assert swap_router(model, "probmoe").generate(ids, **options).equal(expected)
    swap_router(model, "probmoe", k=(1, K))
    assert model.generate(ids, **options).equal(model.generate(ids, **options))


def test_hooks_of_accelerate_stay() -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="accelerate is an optional dependency")

    class Counting(hooks.ModelHook):  # type: ignore[misc, name-defined]
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return args, kwargs

    ids, model, hook = tokens(), tiny("olmoe"), Counting()
    expected, other = model(ids).logits, swap_router(tiny("olmoe"), "probmoe", k=(1, 3))(ids).logits
    hooks.add_hook_to_module(gates(model)[0], hook)
    hooks.add_hook_to_module(experts(model)[0], hook)
    swap_router(model, "probmoe", k=(1, 3))
    assert model(ids).logits.equal(other)
    assert not other.equal(expected)
    assert hook.calls == 2
    assert restore_router(model)(ids).logits.equal(expected)
    assert hook.calls == 4
