"""Decisions that are recorded and used again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from probmoe_ext.hf import RoutingRecord, record_routing, replay_routing, swap_router
from probmoe_ext.routers import Router, register_router
from tests.hf.models import LAYERS, E, K, gates, tiny, tokens

ks = pytest.mark.parametrize("k", [K, 2, (1, K)], ids=str)


def step(model: Any, seed: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(seed)
    ids = tokens()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", ["olmoe", "qwen3"])
@ks
@pytest.mark.parametrize("backward", ["marginal", "ste"])
def test_a_replayed_step_has_the_loss_and_gradients_of_the_recorded_one(family: str, k: Any, backward: str) -> None:
    model = swap_router(tiny(family).train(), "probmoe", k=k, backward=backward)
    with record_routing(model) as record:
        loss, gradients = step(model, seed=1)
    assert len(record) == 1
    assert len(record.passes[0]) == LAYERS
    other, _ = step(model, seed=2)
    assert not other.equal(loss)
    with replay_routing(model, record):
        again, same = step(model, seed=2)
    torch.testing.assert_close(again, loss)
    for one, two in zip(gradients, same, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
    assert step(model, seed=2)[0].equal(other)


@pytest.mark.parametrize("family", ["olmoe", "qwen3"])
@ks
def test_evaluation_replays_what_training_drew(family: str, k: Any) -> None:
    ids = tokens()
    model = swap_router(tiny(family).train(), "probmoe", k=k)
    with record_routing(model) as record:
        expected = model(ids).logits
    model.eval()
    assert not torch.allclose(model(ids).logits, expected, atol=1e-3)
    with replay_routing(model, record):
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_decisions_of_the_models_own_router() -> None:
    ids, model = tokens(), tiny("olmoe")
    expected = model(ids).logits
    with record_routing(model) as record, torch.no_grad():
        model(ids)
        model(ids.flip(0))
    swap_router(model, "topk")
    with torch.no_grad():
        gates(model)[1].weight.copy_(-gates(model)[1].weight)
    with replay_routing(model, record):
        for batch in (ids, ids.flip(0)):
            seen: list[torch.Tensor] = []
            hook = gates(model)[1].register_forward_hook(lambda gate, args, output, seen=seen: seen.append(output[2]))
            assert not torch.allclose(model(batch).logits, expected, atol=1e-3)
            hook.remove()
            assert seen[0].equal(record.passes[0 if batch is ids else 1]["model.layers.1.mlp.gate"].long())


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_checkpointed_layer_is_one_decision(use_reentrant: bool) -> None:
    plain = swap_router(tiny("olmoe").train(), "probmoe", k=(1, K))
    model = swap_router(tiny("olmoe").train(), "probmoe", k=(1, K))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    results = []
    for one in (plain, model):
        with record_routing(one) as record:
            losses = [step(one, seed)[0] for seed in (1, 2)]
        assert len(record) == 2
        with replay_routing(one, record):
            for seed, loss in enumerate(losses):
                torch.testing.assert_close(step(one, seed + 8)[0], loss)
        with replay_routing(one, record):
            results.append([gradient for seed in (3, 4) for gradient in step(one, seed)[1]])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_a_record_is_kept_in_a_file(tmp_path: Path) -> None:
    model = swap_router(tiny("olmoe").train(), "probmoe", k=(1, K))
    with record_routing(model) as record:
        loss, _ = step(model, seed=1)
    record.save(tmp_path / "routing.pt")
    loaded = RoutingRecord.load(tmp_path / "routing.pt")
    assert (loaded.passes[0]["model.layers.0.mlp.gate"] == E).any()
    with replay_routing(model, loaded):
        torch.testing.assert_close(step(model, seed=9)[0], loss)


def test_nothing_stays_behind_and_errors_say_what_is_wrong() -> None:
    model = swap_router(tiny("olmoe").train(), "probmoe")
    before = [(sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    with record_routing(model) as record:
        model(tokens())
    with replay_routing(model, record):
        model(tokens())
        with pytest.raises(ValueError, match="the record has 1 forward passes, and this is another one"):
            model(tokens())
    with (
        replay_routing(model, record),
        pytest.raises(ValueError, match=r"0 was recorded with 24 tokens; model\.layers\.0\.mlp\.gate sees 12"),
    ):
        model(tokens(1))
    assert [(sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == before
    with (
        pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.gate was not swapped"),
        replay_routing(tiny("olmoe"), record),
    ):
        pass
    for name in list(record.passes[0])[1:]:
        del record.passes[0][name]
    with (
        pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.gate is not in the record"),
        replay_routing(model, record),
    ):
        pass


def test_a_router_that_cannot_replay_says_so() -> None:
    @register_router("own weights")
    class Own(Router):
        pass

    model = swap_router(tiny("olmoe"), "own weights")
    with (
        pytest.raises(ValueError, match="router 'own weights' cannot replay"),
        replay_routing(model, RoutingRecord()),
    ):
        pass
    with pytest.raises(ValueError, match="does not implement weights_for"):
        Own(E, K).weights_for(torch.ones(1, 1), torch.ones(1, E), torch.zeros(1, K))
