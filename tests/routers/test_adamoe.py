"""AdaMoE: null experts among the k."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from probmoe_ext.hf import swap_router
from probmoe_ext.routers import aux_losses, make_router
from probmoe_ext.routers.context import Batch
from tests.hf.models import gates, tiny, tokens

T, E, K, D, M = 24, 6, 4, 5, 3


def router(training: bool = True, **options: Any) -> Any:
    options = {"hidden_size": D, "num_null": M, "load_weight": 0.3} | options
    return make_router("adamoe", num_experts=E, k=K, **options).double().train(training)


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    hidden = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    return hidden, torch.randn(T, E, dtype=torch.float64, requires_grad=True)


def restated(
    one: Any, hidden: torch.Tensor, logits: torch.Tensor, keep: list[bool]
) -> tuple[list[dict[int, torch.Tensor]], torch.Tensor]:
    """For each token its experts' weights, and the loss."""
    rows, f, p = [], torch.zeros(E + M, dtype=torch.float64), torch.zeros(E + M, dtype=torch.float64)
    for token in range(T):
        both = torch.cat((logits[token], one.null.weight @ hidden[token]))
        probability = both.softmax(-1)
        slots = probability.argsort(descending=True)[:K].tolist()
        real = [slot for slot in slots if slot < E]
        rows.append({e: probability[e] / sum(probability[i] for i in real) for e in real})
        if keep[token]:
            p = p + probability / sum(keep)
            for slot in slots:
                f[slot] += 1 / sum(keep)
    f = torch.cat((f[:E], f[E:].mean().repeat(M)))
    return rows, one.load_weight * (E + M) * (f * p).sum()


@pytest.mark.parametrize("masked", [False, True])
def test_real_experts_share_the_weight_and_the_load_counts_both(masked: bool) -> None:
    one, (hidden, logits) = router(), inputs()
    keep = [not masked or token % 3 > 0 for token in range(T)]
    if masked:
        one.batch = Batch(mask=torch.tensor(keep))
    weights, indices = one(hidden, logits)
    rows, loss = restated(one, hidden, logits, keep)
    torch.testing.assert_close(one.losses["load"], loss.detach())
    sizes = set()
    objective = loss
    cotangent = torch.randn_like(weights)
    for token, row in enumerate(rows):
        used = [index for index in indices[token].tolist() if index < E]
        assert used == list(row)  # by descending weight, and the null experts after them
        sizes.add(len(used))
        for slot, (expert, weight) in enumerate(row.items()):
            torch.testing.assert_close(weights[token, slot], weight)
            objective = objective + cotangent[token, slot] * weight
            assert indices[token, slot] == expert
    assert len(sizes) > 2
    assert (weights[indices == E] == 0).all()
    leaves = (hidden, logits, one.null.weight)
    for ours, theirs in zip(
        torch.autograd.grad(weights, leaves, cotangent), torch.autograd.grad(objective, leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_head_learns_from_the_load_alone() -> None:
    one, (hidden, logits) = router(load_weight=0.0), inputs()
    one(hidden, logits)[0].square().sum().backward()
    assert (one.null.weight.grad == 0).all()
    assert logits.grad is not None
    assert (logits.grad != 0).any()


def test_null_experts_without_a_chance_leave_top_k_and_with_every_chance_nothing() -> None:
    one, (hidden, logits) = router(training=False), inputs()
    with torch.no_grad():
        one.null.weight.zero_()
    expected = make_router("topk", num_experts=E, k=K, normalize=True)(hidden, logits + 100)
    for ours, theirs in zip(one(hidden, logits + 100), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    weights, indices = one(hidden, logits - 100)
    # Only three of the four slots can be null.
    assert ((indices < E).sum(-1) == K - M).all()
    assert weights[:, 0].eq(1).all()
    weights, indices = make_router("adamoe", num_experts=E, k=K, hidden_size=D).double().eval()(hidden, logits - 100)
    assert (indices == E).all()
    assert (weights == 0).all()


def test_masked_experts_are_not_chosen() -> None:
    one, (hidden, logits) = router(), inputs()
    mask = torch.tensor([True, False, True, False, False, False])
    weights, indices = one(hidden, logits.masked_fill(mask, -torch.inf))
    assert not torch.isin(indices, torch.tensor([0, 2])).any()
    (gradient,) = torch.autograd.grad(weights.sum(), logits)
    assert gradient.isfinite().all()
    assert (gradient[:, [0, 2]] == 0).all()


def test_a_model_learns_to_use_more_null_experts() -> None:
    model = swap_router(tiny("olmoe").train(), "adamoe", k=4, num_null=8, load_weight=1.0)
    ids = tokens(8)
    sizes: list[float] = []

    def note(gate: Any, args: Any, output: Any) -> None:
        sizes.append(float((output[2] < 8).sum(-1).float().mean()))

    gates(model)[1].register_forward_hook(note)
    heads = [parameter for gate in gates(model) for parameter in gate.parameters()]
    optimizer = torch.optim.AdamW(heads, lr=2e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        losses.append(float(aux_losses(model)["model.layers.1.mlp.gate.probmoe.load"]))
        optimizer.step()
    # Balanced, half of the four slots are null; the loss is then k.
    assert abs(sizes[-1] - 2) < abs(sizes[0] - 2)
    assert abs(sizes[-1] - 2) < 0.4
    assert losses[-1] < losses[0]
    assert losses[-1] == pytest.approx(4, rel=0.1)


@pytest.mark.parametrize(
    ("k", "options", "message"),
    [
        ((1, 2), {}, r"takes one k, got the band \(1, 2\)"),
        (2, {"num_null": 0}, "num_null of router 'adamoe' must be at least 1, got 0"),
        (2, {"load_weight": -1.0}, "load_weight of router 'adamoe' must be finite and at least 0, got -1.0"),
    ],
)
def test_what_is_not_allowed(k: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_router("adamoe", num_experts=E, k=k, hidden_size=D, **options)
