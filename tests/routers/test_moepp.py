"""MoE++: zero, copy and constant experts, and gates that see those of the layer before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from probmoe_ext.hf import swap_router
from probmoe_ext.routers import make_router
from probmoe_ext.routers.context import Batch, LayerContext
from tests.hf.models import gates, tiny, tokens
from tests.routers.experts import LoopEvaluation

T, E, K, D = 40, 5, 3, 4
ZERO, COPY, CONSTANT = 1, 2, 2
N = E + ZERO + COPY + CONSTANT


def router(**options: Any) -> Any:
    kinds = {"num_zero": ZERO, "num_copy": COPY, "num_constant": CONSTANT}
    one = make_router(
        "moepp", num_experts=E, k=K, **({"hidden_size": D, "load_weight": 0.3, "tau": 0.6} | kinds | options)
    )
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.normal_()
    return one.double().train()


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    hidden = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    return hidden, torch.randn(T, E, dtype=torch.float64, requires_grad=True)


def restated(
    one: Any, held: LoopEvaluation, x: torch.Tensor, logits: torch.Tensor, previous: torch.Tensor, keep: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, the loss and the logits, token by token."""
    rows, everything = [], []
    f, p = torch.zeros(N, dtype=torch.float64), torch.zeros(N, dtype=torch.float64)
    for token in range(T):
        g = torch.cat((logits[token], one.head.weight @ x[token])) + one.residual.weight @ previous[token]
        everything.append(g)
        probability = g.softmax(-1)
        slots = probability.argsort(descending=True)[:K].tolist()
        total = sum(probability[i] for i in slots if i != E) if one.normalize else 1.0
        row = torch.zeros(D, dtype=torch.float64)
        for i in slots:
            if i < E:
                output = held.expert(i, x[token])
            elif i < E + ZERO:
                continue
            elif i < E + ZERO + COPY:
                output = x[token]
            else:
                j = i - E - ZERO - COPY
                a = (one.mixing[2 * j : 2 * j + 2] @ x[token]).softmax(-1)
                output = a[0] * x[token] + a[1] * one.constants[j]
            row = row + probability[i] / total * output
        rows.append(held.scale * row)
        if keep[token]:
            p = p + probability / sum(keep)
            for i in slots:
                f[i] += 1 / sum(keep)
    eta = torch.tensor([1.0] * E + [one.tau] * (N - E), dtype=torch.float64)
    return torch.stack(rows), one.load_weight * (eta * f * p).sum(), torch.stack(everything)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_two_layers_are_those_of_the_formulas(normalize: bool, masked: bool) -> None:
    first, second = router(normalize=normalize), router(normalize=normalize)
    first.layer = LayerContext()
    second.layer = LayerContext(previous=first.layer)
    keep = [not masked or token % 3 > 0 for token in range(T)]
    if masked:
        first.batch = second.batch = Batch(mask=torch.tensor(keep))
    (x, one), (y, two) = inputs(), inputs()
    held = LoopEvaluation(E, D, scale=1.5)
    outputs, losses = [], []
    for layer, hidden, logits in ((first, x, one), (second, y, two)):
        weights, indices = layer(hidden, logits)
        assert (weights[indices == E] == 0).all()
        assert weights.shape == (T, K)
        outputs.append(layer.run_experts(held, hidden, indices, weights * held.scale))
        losses.append(layer.losses["load"])
    a, loss_a, before = restated(first, held, x, one, torch.zeros(T, N, dtype=torch.float64), keep)
    b, loss_b, _ = restated(second, held, y, two, before, keep)
    torch.testing.assert_close(outputs, [a, b])
    torch.testing.assert_close(losses, [loss_a.detach(), loss_b.detach()])
    leaves = (x, y, one, two, held.up, *first.parameters(), *second.parameters())
    objective = sum(output.cos().sum() for output in outputs)
    expected = a.cos().sum() + b.cos().sum() + loss_a + loss_b
    ours, theirs = (torch.autograd.grad(value, leaves) for value in (objective, expected))
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right)
    # The second layer taught the first one's gate through the residual.
    (alone,) = torch.autograd.grad(restated(first, held, x, one, torch.zeros_like(before), keep)[0].cos().sum(), one)
    assert not torch.allclose(alone, ours[2])


def test_zero_computation_experts_without_a_chance_leave_top_k() -> None:
    one, (hidden, logits), held = router(load_weight=0.0), inputs(), LoopEvaluation(E, D)
    weights, indices = one(hidden, logits + 100)
    usual = make_router("topk", num_experts=E, k=K)
    expected = usual(hidden, logits)
    torch.testing.assert_close((weights, indices), expected)
    output = one.run_experts(held, hidden, indices, weights)
    torch.testing.assert_close(output, held(hidden, *reversed(expected)))


def test_a_token_with_nothing_but_zero_experts_adds_nothing() -> None:
    one = router(num_zero=K, num_copy=0, num_constant=0, normalize=True)
    hidden, logits = inputs()
    weights, indices = one(hidden, logits - 100)
    assert (indices == E).all()
    output = one.run_experts(LoopEvaluation(E, D), hidden, indices, weights)
    assert (output == 0).all()
    output.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_a_masked_expert_is_not_chosen_and_disturbs_no_layer_behind() -> None:
    first, second = router(), router()
    first.layer = LayerContext()
    second.layer = LayerContext(previous=first.layer)
    hidden, logits = inputs()
    _, indices = first(hidden, logits.masked_fill(torch.arange(E) == 2, -torch.inf))
    assert not (indices == 2).any()
    weights, _ = second(hidden, logits)
    weights.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_the_residual_starts_at_nothing_and_is_learnt() -> None:
    ids = tokens()
    model = swap_router(tiny("olmoe"), "moepp")
    before = model(ids).logits
    routers = [gate.probmoe for gate in gates(model)]
    assert routers[0].kinds == [8, 1, 1, 2]
    assert all(one.layer.residual is None for one in routers)
    for one in routers:
        one.layer = None
    assert model(ids).logits.equal(before)
    model = swap_router(tiny("olmoe").train(), "moepp")
    model(ids, labels=ids).loss.backward()
    first, *others = (gate.probmoe.residual.weight.grad for gate in gates(model))
    assert (first == 0).all()
    assert all((one != 0).any() for one in others)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_zero": -1}, "num_zero of router 'moepp' must be at least 0, got -1"),
        ({"num_zero": 0, "num_copy": 0, "num_constant": 0}, "needs a zero, copy or constant expert"),
        ({"tau": 0.0}, "tau of router 'moepp' must be above 0 and at most 1, got 0.0"),
        ({"load_weight": -1.0}, "load_weight of router 'moepp' must be finite and at least 0, got -1.0"),
        ({"k": (1, 2)}, r"takes one k, got the band \(1, 2\)"),
    ],
)
def test_what_is_not_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_router("moepp", **({"num_experts": E, "k": K, "hidden_size": D} | options))


def test_layers_of_other_kinds_do_not_fit() -> None:
    model = swap_router(tiny("olmoe"), "moepp", layers=[0])
    swap_router(model, "moepp", layers=[1], num_constant=3)
    with pytest.raises(ValueError, match="the layer before has 12 experts of all kinds, and this one 13"):
        model(tokens())
