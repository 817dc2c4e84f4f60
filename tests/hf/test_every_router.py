"""What a swap promises, for every router of the package: the same tests over the registry."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from probmoe_ext.hf import from_pretrained, restore_router, save_pretrained, swap_router
from probmoe_ext.routers import aux_losses, router_class
from probmoe_ext.routers.context import PREVIOUS_LOGITS
from tests.hf.models import LAYERS, E, K, gates, tiny, tokens
from tests.hf.test_training import step
from tests.routers.cases import DRAWS, K_OF, MODEL, NOT_REENTRANT, OPTIONS, every_router

routers = pytest.mark.parametrize("name", every_router())


def swapped(name: str, dtype: torch.dtype = torch.float32, training: bool = True, layers: int = LAYERS) -> Any:
    model = tiny("olmoe", dtype, num_hidden_layers=layers, **MODEL.get(name, {}))
    torch.manual_seed(3)
    return swap_router(model, name, k=K_OF.get(name, K), **OPTIONS.get(name, {})).train(training)


def routing(model: Any, ids: torch.Tensor, **kwargs: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weights and indices of each layer."""
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [gate.register_forward_hook(lambda gate, args, output: found.append(output[1:])) for gate in gates(model)]
    torch.manual_seed(7)
    model(ids, **kwargs)
    for hook in hooks:
        hook.remove()
    return found


@routers
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_contract(name: str, training: bool, dtype: torch.dtype) -> None:
    model = swapped(name, dtype, training)
    ids = tokens()
    layers = routing(model, ids)
    assert len(layers) == LAYERS
    for gate, (weights, indices) in zip(gates(model), layers, strict=True):
        router = gate.probmoe
        assert weights.shape == indices.shape == (ids.numel(), router.width)
        assert weights.dtype == dtype
        assert indices.dtype == torch.int64
        assert weights.isfinite().all()
        unused = indices == E
        assert indices.min() >= 0
        assert indices.max() <= E
        assert (weights[unused] == 0).all()
        assert router.leaves_slots_unused or not unused.any()
        for row in indices:
            chosen = row[row < E].tolist()
            assert len(chosen) == len(set(chosen))
    assert all(loss.isfinite() for loss in aux_losses(model).values())


@routers
def test_thirty_steps_lower_the_loss(name: str) -> None:
    model, ids = swapped(name), tokens(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(30):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    for gate in gates(model):
        assert all(parameter.isfinite().all() for parameter in gate.parameters())


@routers
def test_the_gradient_is_finite_under_autocast_and_in_half_precision(name: str) -> None:
    for dtype, autocast in ((torch.float32, True), (torch.bfloat16, False)):
        model = swapped(name, dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, gradients, _ = step(model)
        assert loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients)


@routers
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_replays_the_same_experts(name: str, use_reentrant: bool) -> None:
    loss, gradients, chosen = step(swapped(name))
    replayed = swapped(name)
    replayed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if use_reentrant:
        replayed.enable_input_require_grads()
    if use_reentrant and name in NOT_REENTRANT:
        with pytest.raises(ValueError, match='"use_reentrant": False'):
            step(replayed)
        return
    other, other_gradients, twice = step(replayed)
    assert other.equal(loss)
    for first, again in zip(chosen, twice, strict=True):
        assert len(again) == 2
        assert first[0].equal(again[0])
        assert first[0].equal(again[1])
    assert all(one.equal(two) for one, two in zip(gradients, other_gradients, strict=True))


@routers
def test_it_is_saved_and_loaded_with_its_state(name: str, tmp_path: Path) -> None:
    model, ids = swapped(name), tokens()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # so that what a router learns or adapts is not what it starts with
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval()
    save_pretrained(model, tmp_path / "model")
    loaded = from_pretrained(tmp_path / "model", dtype=torch.float32)
    attention = model.config._attn_implementation
    loaded.set_attn_implementation(attention)
    assert loaded(ids).logits.equal(model(ids).logits)
    # And training goes on as it would have.
    losses = [step(one.train())[0] for one in (model, loaded)]
    assert losses[0].equal(losses[1])


@routers
def test_copies_are_whole_and_the_original_comes_back(name: str) -> None:
    ids, before = tokens(), tiny("olmoe", **MODEL.get(name, {}))
    expected = before(ids).logits
    model = swapped(name)
    model(ids, labels=ids).loss.backward()
    model.zero_grad()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False))
    loss = step(model)[0]
    assert all(step(other)[0].equal(loss) for other in copies)
    model.zero_grad()
    assert restore_router(model.eval())(ids).logits.equal(expected)


@routers
def test_padding_changes_no_loss(name: str) -> None:
    model, ids = swapped(name), tokens()
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    found = []
    for filler in (0, 5):
        torch.manual_seed(7)
        model(ids.masked_fill(mask == 0, filler), attention_mask=mask)
        found.append(aux_losses(model))
    assert found[0].keys() == found[1].keys()
    for key, loss in found[0].items():
        torch.testing.assert_close(loss, found[1][key])


@routers
def test_it_generates(name: str) -> None:
    model = swapped(name, training=False)
    generated = model.generate(tokens(2, 5), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert generated.shape == (2, 9)


@routers
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_model_compiles_without_a_break(name: str, training: bool) -> None:
    # One layer, and a second for those that know of the layer before: what a compiler sees in the others is the same.
    router = router_class(name)
    layers = 2 if router.adapts or PREVIOUS_LOGITS in router.needs else 1
    model, ids = swapped(name, training=training, layers=layers), tokens()
    torch._dynamo.reset()
    # What differs between the backends is the backward graph.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if training else "eager")
    results, state = [], copy.deepcopy(model.state_dict())
    for call in (model, compiled):
        model.zero_grad()
        model.load_state_dict(state)  # what a router adapts included
        torch.manual_seed(4)
        if training:
            call(ids, labels=ids).loss.backward()
            results.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
        else:
            with torch.no_grad():
                results.append([call(ids).logits])
    for expected, got in zip(*results, strict=True):
        assert got.isfinite().all()
        if not (training and name in DRAWS):  # a compiled graph draws other numbers
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
