"""Switch routing by the equations of its paper, one token after the other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from probmoe_ext.hf import swap_router
from probmoe_ext.routers import aux_losses, dropped_tokens, make_router
from probmoe_ext.routers.context import Batch
from tests.hf.models import gates, tiny, tokens

T, E, H = 24, 4, 6


def switch(**options: Any) -> Any:
    return make_router("switch", num_experts=E, k=1, **options).train()


def restated(
    logits: torch.Tensor, mask: list[bool], factor: float
) -> tuple[list[tuple[int, torch.Tensor]], torch.Tensor]:
    """Expert and weight of each token (``E`` if dropped), and the loss ``E sum f P`` over the tokens that count."""
    room = math.ceil(sum(mask) / E * factor)
    taken, chose, mass, routes = [0] * E, [0] * E, torch.zeros(E, dtype=torch.float64), []
    for row, counts in zip(logits, mask, strict=True):
        p = row.exp() / row.exp().sum()
        expert = max(range(E), key=lambda i: row[i].item())
        if counts:
            chose[expert] += 1
            mass = mass + p
            taken[expert] += 1
        dropped = counts and taken[expert] > room
        routes.append((E if dropped else expert, 0 * p[0] if dropped else p[expert]))
    count = sum(mask)
    return routes, E * sum(chose[e] / count * mass[e] / count for e in range(E))


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 100.0])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients(factor: float, masked: bool) -> None:
    router = switch(capacity_factor=factor, balance_weight=0.2)
    mask = [not masked or t % 3 != 1 for t in range(T)]
    if masked:
        router.batch = Batch(mask=torch.tensor(mask))
    logits = (torch.randn(T, E) + torch.tensor([1.0, 0.0, 0.0, -1.0])).double().requires_grad_()
    weights, indices = router(torch.zeros(T, H), logits)
    routes, balance = restated(logits, mask, factor)
    assert indices.flatten().tolist() == [expert for expert, _ in routes]
    torch.testing.assert_close(weights.flatten(), torch.stack([weight for _, weight in routes]))
    torch.testing.assert_close(aux_losses(router)["balance"], 0.2 * balance.detach())
    dropped = sum(expert == E for expert, _ in routes)
    assert router.dropped.item() == dropped_tokens(router)[""].item() == dropped
    assert (dropped == 0) == (factor == 100)
    g = torch.randn(T, dtype=torch.float64)
    (ours,) = torch.autograd.grad((weights.flatten() * g).sum(), logits)
    target = 0.2 * balance + sum(weight * one for (_, weight), one in zip(routes, g, strict=True))
    torch.testing.assert_close(ours, torch.autograd.grad(target, logits)[0])


def test_evaluation() -> None:
    logits = torch.randn(T, E) + torch.tensor([5.0, 0.0, 0.0, 0.0])
    expected, order = logits.softmax(-1).max(-1, keepdim=True)
    router = switch().eval()
    weights, indices = router(logits, logits)
    assert indices.equal(order)
    torch.testing.assert_close(weights, expected)
    assert router.top_k_in_evaluation() == (1, False)
    limited = switch(evaluation_capacity_factor=0.5).eval()
    assert limited.top_k_in_evaluation() is None
    _, indices = limited(logits, logits)
    assert (indices == 0).sum() == math.ceil(0.5 * T / E)
    assert limited.dropped == (indices == E).sum() > 0
    assert not switch(capacity_factor=None).leaves_slots_unused
    assert limited.leaves_slots_unused


def test_jitter_reaches_the_logits_of_a_model() -> None:
    model, ids = swap_router(tiny("olmoe").train(), "switch", k=1, jitter=0.1), tokens()
    seen: dict[str, torch.Tensor] = {}
    gate = gates(model)[0]
    gate.register_forward_pre_hook(lambda module, args: seen.update(hidden=args[0].detach().flatten(0, -2)))
    gate.register_forward_hook(lambda module, args, output: seen.update(logits=output[0].detach()))
    model(ids)
    # No noise within the bounds gives more than this distance, and some gives a good part of it.
    clean = seen["hidden"] @ gate.weight.T
    farthest = 0.1 * (seen["hidden"].abs() @ gate.weight.abs().T)
    distance = (seen["logits"] - clean).abs() / farthest
    assert 0.2 < distance.max() <= 1 + 1e-4
    model.eval()(ids)
    torch.testing.assert_close(seen["logits"], seen["hidden"] @ gate.weight.T)
    router = switch(jitter=0.0)
    hidden = torch.randn(T, H)
    assert router.gate_input(hidden) is hidden


def test_the_jitter_has_its_law() -> None:
    hidden = torch.full((1000, 8), 2.0)
    noise = switch(jitter=0.25).gate_input(hidden) / 2
    assert 0.75 <= noise.min() < 0.76
    assert 1.24 < noise.max() <= 1.25
    assert noise.mean().item() == pytest.approx(1, abs=0.01)
    assert switch(jitter=0.25).gate_input(hidden.bfloat16()).dtype == torch.bfloat16


def test_a_model_tells_how_many_tokens_it_dropped() -> None:
    model = swap_router(tiny("olmoe").train(), "switch", k=1, capacity_factor=0.25)
    model(tokens())
    dropped = dropped_tokens(model)
    assert len(dropped) == len(gates(model))
    assert all(0 < count < tokens().numel() for count in dropped.values())


def test_given_experts() -> None:
    router = switch(capacity_factor=0.5)
    logits = torch.randn(T, E)
    weights, indices = router(logits, logits)
    torch.testing.assert_close(router.weights_for(logits, logits, indices), weights)


@pytest.mark.parametrize("k", [2, (0, 1)])
def test_one_expert_only(k: Any) -> None:
    with pytest.raises(ValueError, match="router 'switch' has one expert per token: k must be 1, got"):
        make_router("switch", num_experts=E, k=k)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("jitter", 1.0),
        ("jitter", -0.1),
        ("balance_weight", math.inf),
        ("capacity_factor", 0.0),
        ("evaluation_capacity_factor", math.nan),
    ],
)
def test_options_out_of_range(option: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{option} of router 'switch' must be"):
        switch(**{option: value})
