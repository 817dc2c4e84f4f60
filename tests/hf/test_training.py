"""Training with a swapped router: gradients, activation checkpointing, half precision, and torch.compile."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from probmoe_ext.hf import swap_router
from tests.hf.models import FAMILIES, LAYERS, K, gates, tiny, tokens

ks = pytest.mark.parametrize("k", [K, (1, K)], ids=str)


def step(model: Any, seed: int = 7) -> tuple[torch.Tensor, list[torch.Tensor], list[list[torch.Tensor]]]:
    """Loss, gradients, and the experts chosen in each run of each layer (checkpointing runs them twice)."""
    ids = tokens()
    chosen: list[list[torch.Tensor]] = [[] for _ in range(LAYERS)]
    hooks = [
        gate.register_forward_hook(lambda gate, args, output, index=index: chosen[index].append(output[2]))
        for index, gate in enumerate(gates(model))
    ]
    torch.manual_seed(seed)
    loss = model(ids, labels=ids).loss
    loss.backward()
    for hook in hooks:
        hook.remove()
    return loss.detach(), [p.grad for p in model.parameters() if p.grad is not None], chosen


@pytest.mark.parametrize("family", FAMILIES)
@ks
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_replays_the_same_experts(family: str, k: Any, use_reentrant: bool) -> None:
    plain = swap_router(tiny(family).train(), "probmoe", k=k)
    loss, gradients, chosen = step(plain)
    replayed = swap_router(tiny(family).train(), "probmoe", k=k)
    replayed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if use_reentrant:
        replayed.enable_input_require_grads()
    other, other_gradients, twice = step(replayed)
    assert other.equal(loss)
    for first, again in zip(chosen, twice, strict=True):
        assert len(first) == 1
        assert len(again) == 2
        assert first[0].equal(again[0])
        assert first[0].equal(again[1])
    assert all(one.equal(two) for one, two in zip(gradients, other_gradients, strict=True))
    assert not step(plain, seed=8)[2][0][0].equal(chosen[0][0])


SAVED = {
    "nothing": (),
    "matrix products": (torch.ops.aten.mm.default, torch.ops.aten._grouped_mm.default),
    "the seed": (torch.ops.aten.randint.low,),
    "routing": (torch.ops.probmoe_ext.route_probmoe.default,),
}


@ks
@pytest.mark.parametrize(
    ("saved", "preserve_rng_state"),
    # A caller who has the generator not restored, and saves nothing that was drawn, asks for other draws.
    [*((name, True) for name in SAVED), ("the seed", False), ("routing", False)],
)
def test_selective_checkpointing_replays_the_same_experts(k: Any, saved: str, preserve_rng_state: bool) -> None:
    plain = swap_router(tiny("olmoe").train(), "probmoe", k=k)
    loss, gradients, chosen = step(plain)
    replayed = swap_router(tiny("olmoe").train(), "probmoe", k=k)
    contexts = functools.partial(create_selective_checkpoint_contexts, list(SAVED[saved]))
    replayed.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={
            "use_reentrant": False,
            "context_fn": contexts,
            "preserve_rng_state": preserve_rng_state,
        }
    )
    other, other_gradients, twice = step(replayed)
    assert other.equal(loss)
    for first, again in zip(chosen, twice, strict=True):
        assert len(again) == 2
        assert first[0].equal(again[0])
        assert first[0].equal(again[1])
    assert all(one.equal(two) for one, two in zip(gradients, other_gradients, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@ks
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
def test_the_gradient_reaches_every_gate(family: str, k: Any, precision: str) -> None:
    model = tiny(family, torch.bfloat16 if precision == "bfloat16" else torch.float32).train()
    swap_router(model, "probmoe", k=k)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        loss, gradients, _ = step(model)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)
    for gate in gates(model):
        # Experts that no token chose hear of it too: that is what the marginals are for.
        assert (gate.weight.grad.abs().sum(-1) > 0).all()


def test_a_few_steps_lower_the_loss() -> None:
    ids = tokens(8)
    model = swap_router(tiny("olmoe").train(), "probmoe", k=(1, K))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model(ids, labels=ids, output_router_logits=True).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


def compiled_gradients(k: Any, training: bool) -> tuple[Any, Any, list[torch.Tensor]]:
    """Outputs and gate gradients of a compiled model for three seeds; ``k`` None leaves it as it came."""
    ids = tokens()
    model = tiny("olmoe", experts_implementation="grouped_mm").train(training)
    if k is not None:
        swap_router(model, "probmoe", k=k)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if not training:
        with torch.no_grad():
            return compiled(ids).logits, model(ids).logits, []
    gradients = []
    for seed in (1, 2, 1):
        model.zero_grad()
        torch.manual_seed(seed)
        compiled(ids, labels=ids).loss.backward()
        gradients.append(gates(model)[0].weight.grad.clone())
    return None, None, gradients


def compiled_or_skip(k: Any, training: bool) -> tuple[Any, Any, list[torch.Tensor]]:
    """What the model as it came can do, a swapped one can; early versions of the library break its graph."""
    try:
        return compiled_gradients(k, training)
    except torch._dynamo.exc.TorchDynamoException:
        with pytest.raises(torch._dynamo.exc.TorchDynamoException):
            compiled_gradients(None, training)
        pytest.skip("this transformers cannot compile the model as it came, either")


@pytest.mark.parametrize("k", [K, 2, (1, K)], ids=str)
def test_evaluation_compiles_in_one_graph(k: Any) -> None:
    compiled, eager, _ = compiled_or_skip(k, training=False)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-5)


@ks
def test_training_compiles_in_one_graph(k: Any) -> None:
    _, _, (first, other, again) = compiled_or_skip(k, training=True)
    assert first.isfinite().all()
    assert (first.abs().sum(-1) > 0).all()
    assert first.equal(again)
    assert not first.equal(other)
