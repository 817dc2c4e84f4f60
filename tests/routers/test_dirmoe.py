"""DirMoE: calibration, the first forward pass, limits, its two losses, schedules, and the swap."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.dirmoe_sparsity import train_toy
from probmoe_ext import routers
from probmoe_ext.hf import record_routing, replay_routing, restore_router, routing_of, swap_router
from probmoe_ext.routers import DirMoERouter, aux_losses, make_router
from probmoe_ext.routers.context import Batch
from tests.contract import assert_near

H, T = 12, 64
SIZES = [(8, 1), (8, 3), (16, 2), (48, 1), (48, 3)]


def router_of(num_experts: int, k: int | tuple[int, int], **options: object) -> DirMoERouter:
    router = make_router("dirmoe", num_experts=num_experts, k=k, hidden_size=H, **options)
    assert isinstance(router, DirMoERouter)
    return router


# ---- calibration and schedules ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_experts", "k"), SIZES)
@pytest.mark.parametrize("mass", [0.5, 0.9, 0.99])
def test_calibrated_prior(num_experts: int, k: int, mass: float) -> None:
    """The definitions, by the moments of the Dirichlet law itself."""
    ratio = routers.calibrate_ratio(mass, k, num_experts)
    base = torch.tensor([ratio] * k + [1.0] * (num_experts - k), dtype=torch.float64)
    mean = base / base.sum()
    assert_near(mean[:k].sum(), torch.tensor(mass, dtype=torch.float64), 1e-12, "mass")
    least = routers.mean_simpson(k, num_experts, ratio)
    assert_near((mean**2).sum(), torch.tensor(least, dtype=torch.float64), 1e-12, "Simpson index of the mean")
    simpson = (least + 1) / 2
    law = torch.distributions.Dirichlet(routers.calibrate_concentration(simpson, k, num_experts, ratio) * base)
    assert_near((law.variance + law.mean**2).sum(), torch.tensor(simpson, dtype=torch.float64), 1e-12, "Simpson index")


def test_symmetric_calibration() -> None:
    assert math.isclose(routers.calibrate_concentration(0.3, 2, 8), (1 - 0.3) / (0.3 * 8 - 1))


def test_calibration_refuses() -> None:
    for mass in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=f"mass must be above 0 and below 1, got {mass}"):
            routers.calibrate_ratio(mass, 2, 8)
    for k in (0, 8, 9):
        with pytest.raises(ValueError, match=f"k must be from 1 to num_experts - 1 = 7, got {k}"):
            routers.calibrate_ratio(0.5, k, 8)
    with pytest.raises(ValueError, match=r"simpson must be above 0.125 .* got 0.1"):
        routers.calibrate_concentration(0.1, 2, 8)


def test_schedules() -> None:
    assert routers.annealed_temperature(0, 2.0, 0.9, 0.1) == 2.0
    assert math.isclose(routers.annealed_temperature(10, 2.0, 0.9, 0.1), 2 * 0.9**10)
    assert routers.annealed_temperature(1000, 2.0, 0.9, 0.1) == 0.1
    assert math.isclose(routers.annealed_concentration(3, 8.0, 0.5, 0.5), 1.0)
    assert routers.annealed_concentration(30, 8.0, 0.5, 0.5) == 0.5
    for arguments, message in (
        ((-1, 1.0, 0.9, 0.1), "step must be at least 0"),
        ((0, 1.0, 1.1, 0.1), "rate of the temperature"),
        ((0, 1.0, 0.9, 2.0), "floor of the temperature"),
        ((0, -1.0, 0.9, 0.1), "start must be positive"),
    ):
        with pytest.raises(ValueError, match=message):
            routers.annealed_temperature(*arguments)


# ---- one forward pass ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_experts", "k"), SIZES)
def test_first_forward_is_the_prior(num_experts: int, k: int) -> None:
    """The heads reproduce the prior for every token, so that posterior and prior agree and their divergence is 0."""
    router = router_of(num_experts, k)
    hidden = torch.randn(T, H)
    alpha_hi, alpha_lo = router.concentrations(hidden)
    assert_near(alpha_hi, torch.full((T, num_experts), router.prior_hi), 1e-5 * router.prior_hi, "alpha_hi")
    assert_near(alpha_lo, torch.full((T, num_experts), router.prior_lo), 1e-6, "alpha_lo")
    router(hidden, torch.randn(T, num_experts))
    losses = aux_losses(router)
    assert set(losses) == {"kl", "sparsity"}
    assert abs(losses["kl"]) < 1e-8
    assert losses["sparsity"] > 0
    with torch.no_grad():
        router.heads.bias += 0.3
    router(hidden, torch.randn(T, num_experts))
    assert aux_losses(router)["kl"] > 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("num_experts", "k"), [*SIZES, (8, (1, 3))])
def test_contract(num_experts: int, k: int | tuple[int, int], normalize: bool, dtype: torch.dtype) -> None:
    """Shapes, dtypes, unused slots, distinct experts, and weights that are shares of a token."""
    router = router_of(num_experts, k, normalize=normalize).to(dtype)
    hidden, logits = torch.randn(T, H).to(dtype), torch.randn(T, num_experts).to(dtype)
    for training in (True, False):
        weights, indices = router.train(training)(hidden, logits)
        assert weights.shape == indices.shape == (T, router.width)
        assert weights.dtype == dtype and indices.dtype == torch.int64
        unused = indices == num_experts
        assert (weights[unused] == 0).all() and (weights >= 0).all()
        used = (~unused).sum(-1)
        assert (used == router.k_max).all() if training else (used >= router.k_min).all()
        for row in indices:
            chosen = row[row < num_experts].tolist()
            assert len(chosen) == len(set(chosen))
        total = weights.double().sum(-1)
        tolerance = 3 * torch.finfo(dtype).eps
        assert (total <= 1 + tolerance).all()
        if normalize or not training:
            assert ((total - 1).abs() <= tolerance)[used > 0].all()
    assert (router(hidden[:0], logits[:0])[0].shape) == (0, router.width)
    router.train()(hidden[:0], logits[:0])
    assert all(loss == 0 for loss in aux_losses(router).values()), "no tokens, no loss"


@pytest.mark.parametrize(("num_experts", "k"), SIZES)
def test_low_temperature_gives_hard_gates(num_experts: int, k: int) -> None:
    """As the temperature goes to 0 the gates are 0 or 1: their sum is a whole number, open with P = sigmoid(logit)."""
    router = router_of(num_experts, k)
    logits = torch.randn(T, num_experts)
    soft = []
    for temperature in (1.0, 1e-5):
        routers.set_temperature(router, temperature)
        torch.manual_seed(1)
        router(torch.randn(T, H), logits)
        soft.append(float(router.open_gates) * T)
    assert abs(soft[1] - round(soft[1])) < 0.02
    assert abs(soft[0] - round(soft[0])) > 0.02 or abs(soft[0] - soft[1]) > 1
    p = torch.sigmoid(logits.double() + router.gate_bias.detach().double())
    assert abs(soft[1] - float(p.sum())) < 6 * float((p * (1 - p)).sum().sqrt())


def test_gradients_reach_gate_bias_and_heads() -> None:
    router = router_of(8, 2)
    logits = torch.randn(T, 8, requires_grad=True)
    weights, _ = router(torch.randn(T, H), logits)
    weights.square().sum().backward()
    for name, tensor in (("logits", logits), *router.named_parameters()):
        assert tensor.grad is not None and tensor.grad.isfinite().all(), name
        assert (tensor.grad != 0).any(), name


def test_losses_are_those_of_the_definition() -> None:
    """What joins the backward pass is the gradient of the stated sum, and nothing else."""
    hidden, logits = torch.randn(T, H), torch.randn(T, 8)

    def gradients(explicit: bool) -> list[torch.Tensor]:
        torch.manual_seed(2)
        router = router_of(8, 2, kl_weight=0.3, sparsity_weight=0.7, target=2.5)
        with torch.no_grad():
            router.heads.weight.normal_(0, 0.3)
        torch.manual_seed(3)
        if not explicit:
            router(hidden, logits)[0].sum().backward()  # normalised weights have no gradient of their own
        else:
            alpha_hi, alpha_lo = router.concentrations(hidden)
            *_, kl, gates = routers.dirmoe.route_dirmoe(
                logits + router.gate_bias,
                alpha_hi,
                alpha_lo,
                2,
                temperature=0.5,
                concentration=router.concentration,
                prior=(router.prior_concentration, router.prior_hi, router.prior_lo),
                training=True,
            )
            (0.3 * kl.mean() + 0.7 * (gates - 2.5).square().mean()).backward()
        return [parameter.grad for parameter in router.parameters() if parameter.grad is not None]

    for joined, stated in zip(gradients(False), gradients(True), strict=True):
        assert_near(joined, stated, 1e-4 * float(stated.abs().max()), "gradient")


def test_padding_counts_for_nothing() -> None:
    """With some tokens masked, losses, their gradients and the count of open gates are those of the others alone."""
    router = make_router("dirmoe", num_experts=6, k=2, hidden_size=5)
    assert isinstance(router, DirMoERouter)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    states = torch.randn(9, 5, generator=torch.Generator().manual_seed(2))
    logits = torch.randn(9, 6, generator=torch.Generator().manual_seed(3))
    seen = []
    for mask in (None, torch.arange(9) < 4):
        torch.manual_seed(4)
        router.zero_grad()
        router.batch = Batch(mask=mask)
        count = 4 if mask is None else 9  # draws are counted by row: the first four are the same
        weights, _ = router(states[:count], logits[:count])
        (0 * weights.sum()).backward()
        gradients = [parameter.grad.clone() for parameter in router.parameters()]  # type: ignore[union-attr]
        seen.append((*aux_losses(router).values(), router.open_gates, *gradients))
    for alone, masked in zip(*seen, strict=True):
        assert_near(masked, alone, 1e-6, "masked")


@pytest.mark.parametrize("k", [1, 3, (1, 3)], ids=str)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_given_experts_have_the_weights_that_they_were_chosen_with(k: Any, normalize: bool, training: bool) -> None:
    router = router_of(8, k, normalize=normalize).train(training)
    torch.nn.init.normal_(router.heads.weight, std=0.3)
    states, found = torch.randn(T, H), []
    logits = torch.randn(T, 8)
    torch.manual_seed(4)
    weights, indices = router(states, logits.requires_grad_())
    upstream = torch.randn(weights.shape)
    torch.manual_seed(4)
    given = router.weights_for(states, logits, indices)
    assert_near(given, weights, 1e-5, "weights")
    router.kl_weight = router.sparsity_weight = 0.0
    torch.manual_seed(4)
    inputs = (logits, *router.parameters())
    for result in (router(states, logits)[0], given):
        gradients = torch.autograd.grad((result * upstream).sum(), inputs, allow_unused=True)
        found.append([torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True)])
    for one, two in zip(*found, strict=True):
        assert_near(two, one, 1e-4, "gradients")
    other = torch.tensor([[5, 8, 0]]).expand(T, 3)
    torch.manual_seed(4)
    weights = router.weights_for(states, logits, other)
    assert (weights[:, 1] == 0).all()
    assert (weights[:, [0, 2]] > 0).all()
    if normalize or not training:
        assert_near(weights.sum(-1), torch.ones(T), 1e-6, "sum")


def test_the_penalty_of_the_mean() -> None:
    router = router_of(8, 2, sparsity_of="mean", kl_weight=0.0, sparsity_weight=0.7)
    router(torch.randn(T, H), torch.randn(T, 8))
    assert aux_losses(router)["sparsity"].item() == pytest.approx(0.7 * (router.open_gates.item() - 2) ** 2, rel=1e-5)
    with pytest.raises(ValueError, match="sparsity_of of router 'dirmoe' must be one of token, mean"):
        router_of(8, 2, sparsity_of="batch")


def test_evaluation_takes_the_largest_gates() -> None:
    router = router_of(8, 3).eval()
    logits = torch.randn(T, 8)
    _, indices = router(torch.randn(T, H), logits)
    assert torch.equal(indices, (logits + router.gate_bias).topk(3).indices)
    assert router.top_k_in_evaluation() is None
    band = router_of(8, (1, 3), gate_bias=0.0).eval()
    _, indices = band(torch.randn(T, H), logits)
    assert torch.equal((indices < 8).sum(-1), (logits > 0).sum(-1).clamp(1, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature .* 1e-6 to 1e6, got 0.0"),
        ({"sparsity_weight": -1.0}, "sparsity_weight .* at least 0, got -1.0"),
        ({"kl_weight": math.inf}, "kl_weight .* finite"),
        ({"floor": 1.0}, "floor .* below 1, got 1.0"),
        ({"target": 9.0}, "target .* from 0 to E = 8, got 9.0"),
        ({"mass": 1.0}, "mass must be above 0 and below 1"),
        ({"mass": 0.2}, "mass of router 'dirmoe' must exceed the share 0.25"),
        ({"simpson": 0.1}, "simpson must be above"),
        ({"gate_bias": math.nan}, "gate_bias .* finite"),
    ],
)
def test_options_are_checked(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        router_of(8, 2, **options)


def test_setters_are_checked() -> None:
    router = router_of(8, 2)
    with pytest.raises(ValueError, match="temperature must be from 1e-6"):
        routers.set_temperature(router, 0.0)
    with pytest.raises(ValueError, match="concentration must be positive"):
        routers.set_concentration(router, math.inf)
    routers.set_concentration(nn.Sequential(router), 3.0)
    assert router.concentration == router.prior_concentration == 3.0


# ---- the target number of experts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_experts", "k"), [(8, 2), (16, 3)])
def test_the_penalty_reaches_the_target_and_its_absence_does_not(num_experts: int, k: int) -> None:
    """The paper's ablation, small: within 5 % of k with a weight of 0.01, farther off with 0."""
    with_penalty, without = (train_toy(num_experts, k, weight, steps=500)[-100:] for weight in (0.01, 0.0))
    assert abs(sum(with_penalty) / 100 - k) <= 0.05 * k
    assert abs(sum(without) / 100 - k) > 0.1 * k


# ---- in a model ---------------------------------------------------------------------------------------------------


def test_swap_trains_saves_and_restores() -> None:
    from tests.hf.models import LAYERS, gates, tiny, tokens

    ids = tokens()
    plain = tiny("olmoe")
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    logits = plain(ids).logits
    model = swap_router(plain, "dirmoe", k=2, temperature=0.7).train()
    extra = sorted(set(model.state_dict()) - set(before))
    assert len(extra) == 3 * LAYERS and all("probmoe" in name for name in extra)
    json.dumps(routing_of(model))
    routing = next(iter(routing_of(model).values()))
    assert routing["router"] == "dirmoe" and routing["options"]["temperature"] == 0.7
    assert routing["options"]["hidden_size"] == 32 and routing["options"]["normalize"] is False
    model(ids, labels=ids).loss.backward()
    assert len(aux_losses(model)) == 2 * LAYERS
    for gate in gates(model):
        assert gate.weight.grad.isfinite().all() and (gate.weight.grad != 0).any()
        assert all((p.grad != 0).any() for p in gate.probmoe.parameters())
    other = swap_router(tiny("olmoe"), "dirmoe", k=2)
    other.load_state_dict(model.state_dict())
    model.eval(), other.eval()
    assert torch.equal(model(ids).logits, other(ids).logits)
    restored = restore_router(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in restored.state_dict().items())
    assert torch.equal(restored(ids).logits, logits)


def test_replay() -> None:
    from tests.hf.models import gates, tiny, tokens

    model, ids = swap_router(tiny("olmoe"), "dirmoe", k=2), tokens()
    with record_routing(model) as record:
        before = model(ids).logits
    with replay_routing(model, record):
        assert_near(model(ids).logits, before, 1e-4, "logits")
    seen: list[torch.Tensor] = []
    gates(model)[1].register_forward_hook(lambda gate, args, output: seen.append(output[2]))
    with replay_routing(model.train(), record):
        model(ids, labels=ids).loss.backward()
    assert torch.equal(seen[0], list(record.passes[0].values())[1].long())
    assert all((gate.weight.grad != 0).any() for gate in gates(model))


def test_bfloat16_and_checkpointing() -> None:
    """A replayed layer draws the same noise and brings its losses once."""
    from tests.hf.models import tiny, tokens

    gradients = []
    for replay in (False, True):
        model = swap_router(tiny("mixtral", torch.bfloat16).train(), "dirmoe", k=2)
        if replay:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(5)
        model(tokens(), labels=tokens()).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_it_compiles_in_one_graph() -> None:
    router = router_of(8, 2)
    hidden, logits = torch.randn(T, H), torch.randn(T, 8)
    torch._dynamo.reset()
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    for temperature in (0.5, 0.4, 0.3):
        routers.set_temperature(router, temperature)
        torch.manual_seed(1)
        weights, indices = compiled(hidden, logits)
        torch.manual_seed(1)
        want, order = router(hidden, logits)
        assert torch.equal(indices, order)
        assert_near(weights, want, 1e-6, "compiled")


def test_the_callback_sets_what_the_functions_say() -> None:
    from types import SimpleNamespace

    from probmoe_ext.train.schedules import DirMoESchedule

    model = nn.Sequential(router_of(8, 2), router_of(16, 2))
    started = [router.concentration for router in model]
    schedule = DirMoESchedule(1.0, 0.99, 0.2, concentration_rate=0.9, concentration_floor=0.5)
    schedule.on_train_begin(None, SimpleNamespace(global_step=0), None, model=model)
    for step in (0, 3, 500):
        schedule.on_step_begin(None, SimpleNamespace(global_step=step), None, model=model)
        for router, start in zip(model, started, strict=True):
            assert math.isclose(router.temperature, max(0.2, 0.99**step))
            assert math.isclose(router.concentration, start * max(0.5, 0.9**step))
            assert router.prior_concentration == router.concentration
    with pytest.raises(ValueError, match="no router 'dirmoe'"):
        DirMoESchedule().on_train_begin(None, SimpleNamespace(global_step=0), None, model=nn.Linear(2, 2))
