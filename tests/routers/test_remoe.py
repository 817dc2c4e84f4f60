"""ReMoE: ReLU routing, its penalty, and how the coefficient follows the number of experts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from probmoe_ext.hf import record_routing, replay_routing, swap_router
from probmoe_ext.routers import ReMoERouter, aux_losses, make_router
from probmoe_ext.routers.context import Batch
from tests.hf.models import LAYERS, gates, tiny, tokens

T, E, K, H = 24, 6, 2, 4


def router(**options: Any) -> Any:
    return make_router("remoe", num_experts=E, k=K, **options)


def logits(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(T, E, dtype=torch.float64).to(dtype)


def plain(logits: torch.Tensor, coefficient: float, balance: bool, counted: torch.Tensor) -> tuple[Any, Any, Any]:
    """Dense weights, penalty, and number of active experts, token by token."""
    dense = torch.stack([torch.stack([x if x > 0 else x * 0 for x in row]) for row in logits])
    count, active = int(counted.sum()), [0] * E
    for t in range(T):
        for e in range(E):
            active[e] += int(bool(counted[t]) and bool(logits[t, e] > 0))
    loss = logits.new_zeros(())
    for t in range(T):
        for e in range(E):
            share = E / (K * count) * active[e] if balance else 1.0
            loss = loss + (coefficient / count * share * dense[t, e] if counted[t] else 0)
    return dense, loss, sum(active)


@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_values_and_gradients(balance: bool, padded: bool) -> None:
    one, two = logits().requires_grad_(), logits(torch.float32).requires_grad_()
    counted = torch.arange(T) % 3 > 0 if padded else torch.ones(T, dtype=torch.bool)
    dense, loss, active = plain(one, 0.3, balance, counted)
    remoe = router(coefficient=0.3, balance=balance)
    if padded:
        remoe.batch = Batch(mask=counted)
    weights, indices = remoe(torch.zeros(T, H), two)
    assert weights.shape == indices.shape == (T, E)
    upstream = torch.randn(T, E + 1, dtype=torch.float64)
    (dense * upstream[:, :E]).sum().add(loss).backward()
    (weights * upstream.gather(1, indices)).sum().backward()
    for t in range(T):
        expected = {e: dense[t, e].item() for e in range(E) if dense[t, e] > 0}
        got = {e: w for e, w in zip(indices[t].tolist(), weights[t].tolist(), strict=True) if e < E}
        assert got == pytest.approx(expected, rel=1e-6)
        assert (weights[t][indices[t] == E] == 0).all()
    assert aux_losses(remoe)["l1"].item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(two.grad, one.grad.float(), rtol=1e-4, atol=1e-6)
    assert (remoe.active.item(), remoe.tokens.item()) == (active, int(counted.sum()))
    remoe.eval()(torch.zeros(T, H), 2 * two)
    assert remoe.active.item() == active  # what evaluation uses is not noted


def test_given_experts_have_their_weights() -> None:
    remoe = router()
    given = torch.tensor([[0, 3, E]]).expand(T, 3)
    two = logits(torch.float32).requires_grad_()
    weights = remoe.weights_for(torch.zeros(T, H), two, given)
    expected = torch.cat([two.detach()[:, [0, 3]].relu(), torch.zeros(T, 1)], -1)
    assert weights.equal(expected)
    weights.sum().backward()
    assert two.grad[:, [0, 3]].equal((two.detach()[:, [0, 3]] > 0).float())
    assert (two.grad[:, [1, 2, 4, 5]] == 0).all()
    model, ids = swap_router(tiny("olmoe"), "remoe"), tokens()
    with record_routing(model) as record:
        before = model(ids).logits
    with replay_routing(model, record):
        torch.testing.assert_close(model(ids).logits, before)


def test_masked_experts_are_never_used() -> None:
    two = logits(torch.float32)
    two[:, 1] = -torch.inf
    two[0] = -torch.inf
    two.requires_grad_()
    weights, indices = router()(torch.zeros(T, H), two)
    assert not (indices == 1).any()
    assert (indices[0] == E).all()
    weights.sum().backward()
    assert two.grad.isfinite().all()


@pytest.mark.parametrize(
    ("active", "counted", "sign"), [(K * T + 1, T, 1), (K * T, T, 0), (K * T - 1, T, -1), (0, 0, 0)]
)
def test_the_coefficient_follows_the_number_of_experts(active: int, counted: int, sign: int) -> None:
    remoe = router(coefficient=1e-3, growth=1.5)
    assert remoe.coefficient.item() == pytest.approx(1e-3)
    remoe.active.fill_(active)
    remoe.tokens.fill_(counted)
    for steps in (1, 2):
        remoe.begin_pass()
        assert remoe.coefficient.item() == pytest.approx(1e-3 * 1.5 ** (sign * steps), rel=1e-6)


@pytest.mark.parametrize(("active", "limit"), [(K * T + 1, 1e30), (0, 1e-30)])
def test_the_coefficient_stays_in_range(active: int, limit: float) -> None:
    remoe = router(growth=10.0)
    remoe.active.fill_(active)
    remoe.tokens.fill_(T)
    for _ in range(50):
        remoe.begin_pass()
    assert remoe.coefficient.item() == pytest.approx(limit, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_cast_changes_the_coefficient(dtype: torch.dtype) -> None:
    remoe = router().to(dtype)
    remoe.active.fill_(T * E)
    remoe.tokens.fill_(T)
    for _ in range(300):
        remoe.begin_pass()
    assert copy.deepcopy(remoe).coefficient.item() == pytest.approx(1e-8 * 1.2**300, rel=1e-4)


def test_the_layers_of_a_model_have_one_coefficient() -> None:
    model, ids = swap_router(tiny("olmoe").train(), "remoe", k=1, coefficient=1e-2), tokens()
    routers = [gate.probmoe for gate in gates(model)]
    assert all(router.peers == tuple(routers) for router in routers)
    # The first layer uses fewer than one expert per token, the others more: together more than one.
    with torch.no_grad():
        gates(model)[0].weight.zero_()
    model(ids)
    assert routers[0].active == 0
    assert all(router.active > router.tokens for router in routers[1:])
    assert sum(int(router.active) for router in routers) > LAYERS * ids.numel()
    model(ids)
    assert [router.steps.item() for router in routers] == [1] * LAYERS
    model.eval()(ids)
    assert [router.steps.item() for router in routers] == [1] * LAYERS
    assert [router.steps.item() for router in (gate.probmoe for gate in gates(copy.deepcopy(model)))] == [1] * LAYERS


def test_training_reaches_the_target() -> None:
    torch.manual_seed(1)
    gate, inputs = torch.nn.Linear(H, E), torch.randn(256, H)
    remoe = router(coefficient=1e-2)
    torch.nn.init.constant_(gate.bias, 1.0)
    target = inputs @ torch.randn(H, E)
    optimizer = torch.optim.SGD(gate.parameters(), lr=0.3)
    used = []
    for _ in range(150):
        remoe.begin_pass()
        weights, indices = remoe(inputs, gate(inputs))
        dense = torch.zeros(256, E + 1).scatter_add(1, indices, weights)[:, :E]
        loss = (dense - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        used.append(remoe.active.item() / 256)
    assert used[0] > 2 * K
    assert sum(used[-50:]) / 50 == pytest.approx(K, rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": (1, 2)}, "takes one k"),
        ({"coefficient": 0.0}, "coefficient .* between 1e-30 and 1e30, got 0.0"),
        ({"coefficient": float("nan")}, "coefficient"),
        ({"growth": 1.0}, "growth .* from 1.0001 to 10, got 1.0"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReMoERouter(E, **({"k": K} | options))
