"""Adapters on the gate, put on before and after the swap; and the parameters of routers by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from probmoe_ext.hf import (
    freeze_router,
    moe_layers,
    parameter_table,
    restore_router,
    router_parameters,
    routing_of,
    swap_router,
)
from probmoe_ext.routers import register_router, registry
from tests.hf.models import LAYERS, E, H, K, tiny, tokens
from tests.routers.balance import BiasedRouter

peft = pytest.importorskip("peft", reason="peft is an optional dependency")

GATE_BY_LORA = {"target_modules": ["q_proj"], "target_parameters": ["mlp.gate.weight", "mlp.experts.down_proj"]}
GATE_COPIED = {"target_modules": ["q_proj"], "modules_to_save": ["gate"]}
GATE_LEFT = {"target_modules": ["q_proj"]}
configs = pytest.mark.parametrize("config", [GATE_BY_LORA, GATE_COPIED, GATE_LEFT], ids=["lora", "copied", "left"])
orders = pytest.mark.parametrize("first", ["swap", "adapter"])
ks = pytest.mark.parametrize("k", [K, (1, K)], ids=str)


def adapted(model: Any, config: dict[str, Any]) -> Any:
    torch.manual_seed(11)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, init_lora_weights=False, **config))


def both(config: dict[str, Any], k: Any, first: str, name: str = "probmoe", **options: Any) -> Any:
    """A tiny OLMoE with adapter and router, in training mode."""
    if first == "swap":
        return adapted(swap_router(tiny("olmoe"), name, k=k, **options), config).train()
    return swap_router(adapted(tiny("olmoe"), config), name, k=k, **options).train()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    ids = tokens()
    torch.manual_seed(7)
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@configs
@ks
def test_both_orders_give_the_same_model(config: dict[str, Any], k: Any) -> None:
    one, other = both(config, k, "swap"), both(config, k, "adapter")
    assert list(routing_of(one)) == list(routing_of(other))
    assert len(routing_of(one)) == LAYERS
    assert list(one.state_dict()) == list(other.state_dict())
    first, second = gradients(one), gradients(other)
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)
    assert one.config.probmoe == other.config.probmoe
    assert one.config.probmoe["routing"][0]["gates"] == [f"model.layers.{index}.mlp.gate" for index in range(LAYERS)]


@orders
@ks
def test_lora_on_the_gate_is_trained_through_the_router(first: str, k: Any) -> None:
    model = both(GATE_BY_LORA, k, first)
    found = gradients(model)
    on_gates = [name for name in found if ".gate." in name]
    assert len(on_gates) == 2 * LAYERS
    assert all("lora_" in name for name in found)
    assert all(found[name].isfinite().all() and found[name].abs().sum() > 0 for name in on_gates)


@orders
def test_a_copied_gate_is_the_one_that_routes_and_learns(first: str) -> None:
    model = both(GATE_COPIED, (1, K), first)
    found = gradients(model)
    trained = [name for name in found if ".gate." in name]
    assert trained == [
        f"base_model.model.model.layers.{i}.mlp.gate.modules_to_save.default.weight" for i in range(LAYERS)
    ]
    assert all((found[name].abs().sum(-1) > 0).all() for name in trained)
    ids = tokens()
    model.eval()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        for layer in moe_layers(model):
            layer.gate.weight.normal_()
        after = model(input_ids=ids).logits
        assert not after.equal(before)
        with model.disable_adapter():
            expected = swap_router(tiny("olmoe"), "probmoe", k=(1, K))(ids).logits
            assert model(input_ids=ids).logits.equal(expected)


@configs
@orders
def test_the_adapter_is_saved_merged_and_taken_off(config: dict[str, Any], first: str, tmp_path: Path) -> None:
    ids, model = tokens(), both(config, (1, K), first).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    try:
        peft.PeftModel.from_pretrained(tiny("olmoe"), tmp_path)
    except TypeError as error:
        pytest.skip(f"this peft cannot load an adapter into this transformers: {error}")
    base = swap_router(tiny("olmoe"), "probmoe", k=(1, K))
    loaded = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    assert loaded(input_ids=ids).logits.equal(expected)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-3, atol=1e-4)
    assert list(routing_of(merged)) == [f"model.layers.{index}.mlp.gate" for index in range(LAYERS)]
    assert routing_of(restore_router(merged)) == {}
    assert not any("probmoe" in type(module).__name__.lower() for module in merged.modules())


@configs
@orders
def test_restoring_under_an_adapter(config: dict[str, Any], first: str) -> None:
    ids, model = tokens(), both(config, (1, K), first).eval()
    expected = adapted(tiny("olmoe"), config).eval()(input_ids=ids).logits
    assert not model(input_ids=ids).logits.equal(expected)
    assert restore_router(model)(input_ids=ids).logits.equal(expected)
    assert not hasattr(model.config, "probmoe")


@orders
def test_a_few_steps_with_lora_lower_the_loss(first: str) -> None:
    ids, model = tokens(8), both(GATE_BY_LORA, (1, K), first)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(25):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_routers_own_parameters_can_be_copied_by_the_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    register_router("biased")(BiasedRouter)
    model = both(GATE_LEFT | {"modules_to_save": ["probmoe"]}, 2, "swap", "biased")
    found = gradients(model)
    copies = [name for name in found if "probmoe.modules_to_save.default.bias" in name]
    assert len(copies) == LAYERS
    assert all(found[name].abs().sum() > 0 for name in copies)
    assert {one["router"] for one in routing_of(model).values()} == {"biased"}


@configs
def test_parameters_of_routers_by_themselves(config: dict[str, Any]) -> None:
    model = both(config, K, "swap")
    found = router_parameters(model)
    names = {id(p): name for name, p in model.named_parameters()}
    expected = 0 if config is GATE_LEFT else LAYERS * (2 if config is GATE_BY_LORA else 1)
    assert len({id(p) for p in found}) == len(found) == expected
    assert all(".mlp.gate." in names[id(p)] and p.requires_grad for p in found)
    freeze_router(model)
    assert router_parameters(model) == []
    assert not any(".mlp.gate." in name for name in gradients(model))


def test_parameters_of_routers_without_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    register_router("biased")(BiasedRouter)
    model = swap_router(tiny("olmoe"), "biased", k=2).train()
    assert [tuple(p.shape) for p in router_parameters(model)] == [(E, H), (E,)] * LAYERS
    rates = [{"params": router_parameters(model), "lr": 0.0}]
    chosen = {id(p) for p in rates[0]["params"]}
    rates.append({"params": [p for p in model.parameters() if id(p) not in chosen]})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(rates, lr=0.1)
    gradients(model)
    optimizer.step()
    for name, p in model.named_parameters():
        assert p.equal(before[name]) is (".mlp.gate." in name or p.grad is None)
    with pytest.raises(ValueError, match="no mixture-of-experts layer"):
        freeze_router(torch.nn.Linear(2, 2))


def test_the_table_of_parameters_adds_up() -> None:
    model = both(GATE_BY_LORA, K, "swap")
    print(table := parameter_table(model))
    rows = {cells[1].strip(): cells[2:5] for cells in (line.split("|") for line in table.splitlines()[2:])}
    numbers = {name: [int(cell.replace(",", "")) for cell in cells] for name, cells in rows.items()}
    assert list(numbers) == ["routers", "experts", "attention", "embeddings and head", "norms", "all"]
    lora = 2 * (E + H)
    assert numbers["routers"] == [LAYERS * (E * H + lora), LAYERS * lora, LAYERS * lora]
    assert numbers["norms"][1:] == [0, 0]
    everything = [p.numel() for p in model.parameters()]
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    assert numbers["all"] == [sum(everything), sum(trained), sum(trained)]
    assert [sum(column) for column in zip(*list(numbers.values())[:-1], strict=True)] == numbers["all"]
    copied = parameter_table(both(GATE_COPIED, K, "swap"))
    assert f"| routers | {2 * LAYERS * E * H:,} | {LAYERS * E * H:,} | {LAYERS * E * H:,} |" in copied
    assert "| routers |" not in parameter_table(torch.nn.Linear(2, 2))
