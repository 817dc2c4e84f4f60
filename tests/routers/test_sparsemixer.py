"""SparseMixer and its second version: what they draw, the weights, and the estimated gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers.models.phimoe.modeling_phimoe import sparsemixer

from probmoe_ext.hf import record_routing, replay_routing, swap_router
from probmoe_ext.routers import make_router
from tests.hf.models import tiny, tokens

T, E, K, H = 40, 6, 3, 4
PARTS = {"sparsemixer": 2, "sparsemixer_v2": 3}
WHOLE = {"sparsemixer": 1 / 2, "sparsemixer_v2": 1 / 4}
GAIN = {"sparsemixer": 2, "sparsemixer_v2": 1}
names = pytest.mark.parametrize("name", list(PARTS))


def router(name: str, k: int = K, training: bool = True, **options: Any) -> Any:
    return make_router(name, num_experts=E, k=k, **options).train(training)


def logits(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    torch.manual_seed(0)
    return (torch.randn(T, E, dtype=torch.float64) * 0.5 + 0.3).to(dtype)


def shares(row: torch.Tensor, jitter: float, gone: list[int]) -> dict[int, torch.Tensor]:
    """The probabilities of the experts that are allowed once some are gone."""
    left = [e for e in range(E) if e not in gone]
    top = max(row[e].item() for e in left)
    reach = [e for e in left if (top - row[e].item()) / max(abs(row[e].item()), top) <= 2 * jitter]
    exponentials = {e: (row[e] - top).exp() for e in reach}
    total = torch.stack(list(exponentials.values())).sum()
    return {e: value / total for e, value in exponentials.items()}


@names
@pytest.mark.parametrize("jitter", [0.1, 0.4])
def test_values_and_gradients_in_training(name: str, jitter: float) -> None:
    one, two = logits().requires_grad_(), logits(torch.float32).requires_grad_()
    torch.manual_seed(3)
    weights, indices = router(name, jitter=jitter)(torch.zeros(T, H), two)
    upstream = torch.randn(T, K, dtype=torch.float64)
    expected, seen = torch.zeros((), dtype=torch.float64), set()
    for t in range(T):
        gone: list[int] = []
        for i, e in enumerate(indices[t].tolist()):
            probabilities = shares(one[t], jitter, gone)
            share = probabilities[e]  # fails for one that is not allowed
            best = max(probabilities, key=lambda one: probabilities[one].item())
            factor = weights[t, i].item() / share.item()
            if e == best:
                assert factor == pytest.approx(1, rel=1e-5)
            else:
                assert min(abs(factor - 1), abs(factor - 1 / PARTS[name])) < 1e-5
                seen.add(round(factor, 2))
            expected = expected + upstream[t, i] * GAIN[name] * share
            gone.append(e)
    assert len(seen) == 2
    expected.backward()
    (weights * upstream).sum().backward()
    torch.testing.assert_close(two.grad, one.grad.float(), rtol=1e-4, atol=1e-6)


@names
def test_evaluation_takes_the_largest(name: str) -> None:
    one, two = logits().requires_grad_(), logits(torch.float32).requires_grad_()
    weights, indices = router(name, training=False)(torch.zeros(T, H), two)
    assert indices.equal(two.topk(K).indices)
    rows = [
        torch.stack([shares(one[t], 0.1, indices[t, :i].tolist())[int(indices[t, i])] for i in range(K)])
        for t in range(T)
    ]
    torch.stack(rows).square().sum().backward()
    weights.square().sum().backward()
    torch.testing.assert_close(weights, torch.stack(rows).float())
    torch.testing.assert_close(two.grad, one.grad.float(), rtol=1e-4, atol=1e-6)


def test_evaluation_is_that_of_phimoe() -> None:
    weights, indices = router("sparsemixer_v2", k=2, jitter=0.2, training=False)(torch.zeros(T, H), logits())
    expected, chosen = sparsemixer(logits(), jitter_eps=0.2, training=False)
    assert indices.equal(chosen)
    torch.testing.assert_close(weights, expected)


def test_the_gradient_is_that_of_phimoe() -> None:
    one, two = logits().requires_grad_(), logits().requires_grad_()
    torch.manual_seed(5)
    expected, chosen = sparsemixer(one, jitter_eps=0.4, training=True)
    weights = router("sparsemixer_v2", k=2, jitter=0.4).weights_for(torch.zeros(T, H), two, chosen)
    upstream = torch.randn(T, 2, dtype=torch.float64)
    (expected * upstream).sum().backward()
    (weights * upstream).sum().backward()
    torch.testing.assert_close(two.grad, one.grad)


@names
def test_experts_and_points_have_their_frequencies(name: str) -> None:
    many = 20000
    row = torch.tensor([1.0, 0.7, 0.9, 0.2, -2.0, 0.95])
    torch.manual_seed(4)
    weights, indices = router(name, jitter=0.2)(torch.zeros(many, H), row.expand(many, E))
    first = shares(row.double(), 0.2, [])
    assert set(first) == {0, 1, 2, 5}
    for e, share in first.items():
        drawn = indices[:, 0] == e
        deviation = math.sqrt(share.item() * (1 - share.item()) / many)
        assert drawn.double().mean().item() == pytest.approx(share.item(), abs=4 * deviation)
        if e > 0:
            whole = (weights[drawn, 0] / share.item() > 0.9).double().mean().item()
            assert whole == pytest.approx(WHOLE[name], abs=4 * 0.5 / math.sqrt(drawn.sum().item()))
    second = shares(row.double(), 0.2, [1])[5].item()
    after = indices[indices[:, 0] == 1, 1]
    assert (after == 5).double().mean().item() == pytest.approx(second, abs=4 * 0.5 / math.sqrt(len(after)))


@names
def test_the_estimate_is_exact_up_to_its_order(name: str) -> None:
    """For a loss ``w ** n`` of one expert that is not the most probable one, averaged over the draws."""
    many, row = 40000, torch.tensor([1.0, 0.5, 0.2, -1.0, -1.0, -1.0], dtype=torch.float64)
    share = row.softmax(0)[1].item()
    for n in range(1, PARTS[name] + 1):
        two = row.expand(many, E).clone().requires_grad_()
        weights = router(name, k=1, jitter=1.0).weights_for(torch.zeros(many, H), two, torch.ones(many, 1).long())
        weights.pow(n).mean().backward()
        slope = two.grad.sum(0)[1].item() / (share * (1 - share))  # of the estimate, over that of the share
        choice, through = share**n / share, n * share ** (n - 1)
        expected = choice + through if name == "sparsemixer" else choice
        assert slope == pytest.approx(expected, rel=0.02)


@names
def test_limits_of_the_jitter(name: str) -> None:
    two = logits(torch.float32)
    weights, indices = router(name, jitter=0.0)(torch.zeros(T, H), two)
    assert indices.equal(two.topk(K).indices)
    assert weights.equal(torch.ones(T, K))
    weights, indices = router(name, jitter=1.0, training=False)(torch.zeros(T, H), two)
    torch.testing.assert_close(weights[:, 0], two.softmax(-1).amax(-1))


@names
def test_masked_experts_come_last_and_weigh_nothing(name: str) -> None:
    for training in (True, False):
        two = logits(torch.float32)
        two[:, 1:4] = -torch.inf
        two[0] = -torch.inf
        two.requires_grad_()
        weights, indices = router(name, k=4, training=training)(torch.zeros(T, H), two)
        assert all(len(set(row)) == 4 for row in indices.tolist())
        masked = (indices >= 1) & (indices < 4)
        assert not masked[1:, :3].any()
        assert masked[1:, 3].all()
        assert (weights[1:, 3] == 0).all()
        assert (weights[0] == 0).all()
        assert (weights[1:, :3] > 0).all()
        weights.sum().backward()
        assert two.grad.isfinite().all()


@names
def test_replay(name: str) -> None:
    model, ids = swap_router(tiny("olmoe"), name), tokens()
    with record_routing(model) as record:
        before = model(ids).logits
    with replay_routing(model, record):
        torch.testing.assert_close(model(ids).logits, before)
    given = torch.tensor([[2, E, 0]]).expand(T, 3)
    weights = router(name, jitter=1.0, training=False).weights_for(torch.zeros(T, H), logits(), given)
    assert (weights[:, 1] == 0).all()
    for t in range(T):
        assert weights[t, 2].item() == pytest.approx(shares(logits()[t], 1.0, [2])[0].item())


@names
@pytest.mark.parametrize(
    ("options", "message"), [({"k": (1, 2)}, "takes one k"), ({"jitter": -0.1}, "jitter .* from 0 to 1, got -0.1")]
)
def test_errors(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_router(name, num_experts=E, **({"k": K} | options))
