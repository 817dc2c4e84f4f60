"""Top-p, and top-p with a controlled threshold."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch

from probmoe_ext.hf import record_routing, replay_routing, swap_router
from probmoe_ext.routers import aux_losses, entropy_loss, make_router
from probmoe_ext.routers.context import Batch
from tests.hf.models import LAYERS, gates, tiny, tokens

T, E, H = 24, 6, 4
LOSSES = {"entropy_weight": 0.3, "balance_weight": 0.7}
names = pytest.mark.parametrize("name", ["top_p", "controlled_top_p"])


def router(name: str, **options: Any) -> Any:
    return make_router(name, num_experts=E, **({"k": (1, E) if name == "top_p" else 2} | options))


def logits(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(T, E, dtype=torch.float64).mul(1.5).to(dtype)


def standardized(row: torch.Tensor, scale: float) -> torch.Tensor:
    mean = row.sum() / E
    return scale * (row - mean) / ((row - mean).square().sum() / E).sqrt()


def smallest(probabilities: torch.Tensor, p: float, fewest: int, most: int) -> list[int]:
    order = sorted(range(E), key=lambda e: -probabilities[e].item())
    taken: list[int] = []
    while len(taken) < most and (len(taken) < fewest or sum(probabilities[e].item() for e in taken) < p):
        taken.append(order[len(taken)])
    return taken


@pytest.mark.parametrize(("name", "normalize"), [("top_p", False), ("top_p", True), ("controlled_top_p", True)])
@pytest.mark.parametrize("p", [0.5, 0.8, 0.97])
@pytest.mark.parametrize("padded", [False, True])
def test_values_and_gradients(name: str, p: float, normalize: bool, padded: bool) -> None:
    controlled = name == "controlled_top_p"
    one, two = logits().requires_grad_(), logits(torch.float32).requires_grad_()
    counted = torch.arange(T) % 3 > 0 if padded else torch.ones(T, dtype=torch.bool)
    made = router(name, **LOSSES, **({"start": p} if controlled else {"p": p, "normalize": normalize}))
    if controlled:
        made.scale.data.fill_(2.5)
    if padded:
        made.batch = Batch(mask=counted)
    weights, indices = made(torch.zeros(T, H), two)
    upstream = torch.randn(T, E + 1, dtype=torch.float64)

    total, entropy, many = 0.0, 0.0, int(counted.sum())
    uses, mass, sizes = [0] * E, [0.0] * E, set()
    for t in range(T):
        probabilities = (standardized(one[t], 2.5) if controlled else one[t]).softmax(0)
        taken = smallest(probabilities, p, 1, E)
        share = sum(probabilities[e] for e in taken) if normalize else 1.0
        assert indices[t].tolist() == taken + [E] * (E - len(taken))
        assert weights[t].tolist() == pytest.approx(
            [(probabilities[e] / share).item() for e in taken] + [0.0] * (E - len(taken))
        )
        total = total + sum(upstream[t, e] * probabilities[e] / share for e in taken)
        sizes.add(len(taken))
        if counted[t]:
            entropy = entropy - sum(q * q.log() for q in probabilities) / many
            for e in range(E):
                uses[e] += e in taken
                mass[e] = mass[e] + probabilities[e]
    balance = E * sum(uses[e] / many * mass[e] / many for e in range(E))
    assert len(sizes) > 1
    losses = aux_losses(made)
    assert losses["entropy"].item() == pytest.approx(0.3 * entropy.item(), rel=1e-5)
    assert losses["balance"].item() == pytest.approx(0.7 * balance.item(), rel=1e-5)
    (total + 0.3 * entropy + 0.7 * balance).backward()
    (weights * upstream.gather(1, indices)).sum().backward()
    torch.testing.assert_close(two.grad, one.grad.float(), rtol=1e-3, atol=1e-5)
    if controlled:
        assert made.scale.grad.abs() > 0
        assert (made.active.item(), made.tokens.item()) == (sum(uses), many)


def test_the_number_of_experts_is_limited() -> None:
    two = logits(torch.float32)
    for k, fewest, most in ((3, 1, 3), ((2, 4), 2, 4), ((0, 2), 1, 2)):
        made = router("top_p", k=k, p=0.7)
        indices = made(torch.zeros(T, H), two)[1]
        assert indices.shape == (T, most)
        for t in range(T):
            assert indices[t][indices[t] < E].tolist() == smallest(two[t].softmax(0), 0.7, fewest, most)


def test_limits_of_the_share() -> None:
    two = logits(torch.float32) * 20  # so that the smallest probabilities are lost in the sum
    weights, indices = router("top_p", p=1.0)(torch.zeros(T, H), two)
    assert (indices < E).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(T))
    weights, indices = router("top_p", p=1e-6)(torch.zeros(T, H), two)
    assert indices[:, 0].equal(two.argmax(-1))
    assert (indices[:, 1:] == E).all()
    weights, indices = router("top_p", p=1.0, k=3, normalize=True)(torch.zeros(T, H), two)
    expected, places = make_router("topk", num_experts=E, k=3, normalize=True)(torch.zeros(T, H), two)
    assert indices.equal(places)
    torch.testing.assert_close(weights, expected)
    controlled = router("controlled_top_p", start=1.0)
    controlled.scale.data.fill_(50.0)
    assert (controlled(torch.zeros(T, H), two)[1] < E).all()


@names
def test_masked_experts_are_never_used(name: str) -> None:
    two = logits(torch.float32)
    two[:, 1] = -torch.inf
    two[0, 2:] = -torch.inf
    two.requires_grad_()
    made = router(name, **LOSSES, **({"p": 1.0, "k": (2, E)} if name == "top_p" else {"start": 1.0}))
    weights, indices = made(torch.zeros(T, H), two)
    assert not (indices == 1).any()
    assert indices[0].tolist() == [0] + [E] * (E - 1)
    weights.square().sum().backward()
    assert two.grad.isfinite().all()
    whole = logits(torch.float32)
    rest = torch.cat([whole[1:, :1], whole[1:, 2:]], -1)
    expected = entropy_loss(rest)
    whole[:, 1] = -torch.inf
    assert entropy_loss(whole[1:]).item() == pytest.approx(expected.item())


def test_equal_logits_are_standardized_to_zero() -> None:
    two = torch.full((T, E), 0.3, requires_grad=True)
    weights, _ = router("controlled_top_p", start=1.0)(torch.zeros(T, H), two)
    torch.testing.assert_close(weights, torch.full((T, E), 1 / E))
    weights.square().sum().backward()
    assert two.grad.isfinite().all()


@names
def test_replay(name: str) -> None:
    model, ids = swap_router(tiny("olmoe"), name), tokens()
    with record_routing(model) as record:
        before = model(ids).logits
    with replay_routing(model, record):
        torch.testing.assert_close(model(ids).logits, before)
    made = router(name)
    weights, indices = made(torch.zeros(T, H), logits())
    torch.testing.assert_close(made.weights_for(torch.zeros(T, H), logits(), indices), weights)


def test_the_controller() -> None:
    made = router("controlled_top_p", start=0.4, proportional=0.3, integral=0.1)
    made.begin_pass()
    assert made.p.item() == pytest.approx(0.4)
    total = 0.0
    for active in (3.0, 2.5, 0.5, 2.0):
        made.active.fill_(round(active * 100))
        made.tokens.fill_(100)
        made.begin_pass()
        error = (2 - active) / E
        total += error
        assert made.p.item() == pytest.approx(0.4 + 0.3 * error + 0.1 * total, rel=1e-5)
    kept = copy.deepcopy(made).to(torch.bfloat16)
    assert kept.p.equal(made.p)
    kept.load_state_dict(make_router("controlled_top_p", num_experts=E, k=2).state_dict())
    assert kept.total == 0


@pytest.mark.parametrize(("active", "bound"), [(6, 0.0), (1, 1.0)])
def test_the_integral_stops_at_the_bounds(active: int, bound: float) -> None:
    made = router("controlled_top_p", proportional=0.0, integral=0.1)
    made.tokens.fill_(1)
    made.active.fill_(active)
    for _ in range(100):
        made.begin_pass()
    assert made.p.item() == pytest.approx(bound, abs=1e-6)
    made.active.fill_(2 * 2 - active if active == 1 else 1)
    made.begin_pass()
    assert abs(made.p.item() - bound) == pytest.approx(0.1 / E, rel=1e-3)  # at once, not after another hundred


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 4.0])
def test_the_controller_reaches_its_target(sharpness: float) -> None:
    torch.manual_seed(1)
    made = make_router("controlled_top_p", num_experts=64, k=8)
    made.scale.data.fill_(sharpness)
    used = []
    for _ in range(300):
        made.begin_pass()
        made(torch.zeros(128, H), torch.randn(128, 64))
        used.append(made.active.item() / 128)
    assert sum(used[-50:]) / 50 == pytest.approx(8, rel=0.02)
    assert max(used[-50:]) - min(used[-50:]) < 2


def test_the_layers_of_a_model_have_one_threshold() -> None:
    model, ids = swap_router(tiny("olmoe").train(), "controlled_top_p", k=2), tokens()
    routers = [gate.probmoe for gate in gates(model)]
    model(ids)
    with torch.no_grad():
        routers[0].scale.fill_(5.0)  # a sure layer leaves its experts to the others
    for _ in range(80):
        model(ids)
    counts = [router.active.item() / ids.numel() for router in routers]
    assert len({router.p.item() for router in routers}) == 1
    assert counts[0] < 1.6 < min(counts[1:])
    assert sum(counts) / LAYERS == pytest.approx(2, abs=0.2)
    threshold = routers[0].p
    model.eval()(ids)
    assert routers[0].p.equal(threshold)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("top_p", {"p": 0.0}, "p of router 'top_p' must be above 0 and at most 1, got 0.0"),
        ("top_p", {"p": 1.1}, "p of router"),
        ("top_p", {"entropy_weight": -1.0}, "entropy_weight of router 'top_p' must be finite and at least 0, got -1.0"),
        ("controlled_top_p", {"k": (1, 2)}, "takes one k"),
        ("controlled_top_p", {"start": 0.0}, "start"),
        ("controlled_top_p", {"proportional": math.inf}, "proportional"),
        ("controlled_top_p", {"integral": 0.0}, "integral .* at least 1e-6, got 0.0"),
        ("controlled_top_p", {"balance_weight": math.nan}, "balance_weight"),
    ],
)
def test_errors(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        router(name, **options)
