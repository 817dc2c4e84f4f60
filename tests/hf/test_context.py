"""What routers are told of the batch and of their layer, and how they come to run the experts themselves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from probmoe_ext.hf import restore_router, swap_router
from probmoe_ext.routers import Router, make_router, register_router
from tests.hf.models import LAYERS, H, K, experts, gates, tiny, tokens
from tests.hf.test_training import step


class Curious(Router):
    """Top-k that keeps all that it is told."""

    needs = frozenset({"token_ids", "batch_shape", "attention", "previous_logits"})
    adapts = True
    passes = 0
    seen: Any = None

    def forward(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        before = self.previous_logits
        attention = self.attention.detach()
        seen = (self.token_ids, self.batch_shape, attention, None if before is None else before.detach())
        self.seen = [*(self.seen or []), (*seen, logits.detach())]
        weights, indices = logits.float().softmax(-1).topk(self.k_max)
        return weights.to(logits.dtype), indices

    def begin_pass(self) -> None:
        self.passes += 1


class Halving(Router):
    """Top-k whose experts count half, and learn nothing."""

    runs_experts = True

    def forward(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, indices = logits.float().softmax(-1).topk(self.k_max)
        return weights.to(logits.dtype), indices

    def run_experts(self, evaluate: Any, hidden_states: Any, indices: Any, weights: Any) -> torch.Tensor:
        frozen: torch.Tensor = evaluate.frozen(hidden_states, indices, weights)
        assert frozen.equal(evaluate(hidden_states, indices, weights))
        return 0.5 * frozen


@pytest.fixture(autouse=True)
def _own_routers() -> None:
    register_router("curious")(Curious)
    register_router("halving")(Halving)


def curious(**changes: Any) -> Any:
    return swap_router(tiny("olmoe", attn_implementation="eager", **changes).train(), "curious")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_router_is_told_what_it_needs(checkpointing: bool) -> None:
    model, ids = curious(), tokens(2, 6)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    wanted: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda module, args, output: wanted.append(output[1].detach()))
    model(ids, labels=ids).loss.backward()
    routers = [gate.probmoe for gate in gates(model)]
    for index, router in enumerate(routers):
        assert router.passes == 1
        assert len(router.seen) == 1 + checkpointing
        for token_ids, shape, attention, before, _ in router.seen:
            assert token_ids.equal(ids.flatten())
            assert shape == (2, 6)
            assert attention.equal(wanted[index])
            assert (before is None) if index == 0 else before.equal(routers[index - 1].seen[0][4])
        assert router.layer.attention is None
    model.eval()(ids)
    assert routers[0].passes == 1
    assert routers[0].batch.token_ids is None
    assert routers[0].layer.logits is None


def test_the_hooks_go_with_the_router() -> None:
    model = curious()
    hooks = len(model.model.layers[0].self_attn._forward_hooks)
    swap_router(model, "curious")
    assert len(model.model.layers[0].self_attn._forward_hooks) == hooks == 1
    copied = copy.deepcopy(model)
    copied(tokens())
    assert gates(model)[0].probmoe.passes == 0
    assert gates(copied)[1].probmoe.layer.previous is gates(copied)[0].probmoe.layer
    restore_router(model)
    assert not model.model.layers[0].self_attn._forward_hooks
    assert not model._forward_pre_hooks


def test_what_cannot_be_told_is_said() -> None:
    with pytest.raises(ValueError, match='attn_implementation="eager"'):
        swap_router(tiny("olmoe", attn_implementation="sdpa"), "curious")
    model = curious()
    with pytest.raises(ValueError, match="needs token ids"):
        model(inputs_embeds=torch.randn(1, 4, H))
    alone = make_router("curious", num_experts=8, k=K)
    with pytest.raises(ValueError, match="needs attention weights"):
        alone(torch.randn(4, H), torch.randn(4, 8))
    with pytest.raises(ValueError, match=r"needs of .* must be among"):
        register_router("wrong")(type("Wrong", (Curious,), {"needs": frozenset({"luck"})}))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_a_router_runs_the_experts(implementation: str) -> None:
    ids = tokens()
    model = swap_router(tiny("olmoe", experts_implementation=implementation), "halving")
    reference = swap_router(tiny("olmoe", experts_implementation=implementation), "topk")
    outputs: dict[str, list[torch.Tensor]] = {"halved": [], "whole": []}
    for key, one in (("halved", model), ("whole", reference)):
        experts(one)[0].register_forward_hook(lambda module, args, output, key=key: outputs[key].append(output))
        one(ids)
    torch.testing.assert_close(outputs["halved"][0], 0.5 * outputs["whole"][0], rtol=1e-4, atol=1e-6)
    step(model.train())
    assert all(parameter.grad is None for parameter in experts(model)[0].parameters())
    assert all(gate.weight.grad.abs().sum() > 0 for gate in gates(model))
    assert len(gates(model)) == LAYERS
    swap_router(model, "topk").zero_grad()
    step(model)
    assert all(parameter.grad is not None for parameter in experts(model)[0].parameters())
