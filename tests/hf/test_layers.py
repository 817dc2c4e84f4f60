"""Which layers are swapped, and what is refused, with nothing changed."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from probmoe_ext.hf import restore_router, routing_of, swap_router
from tests.hf.models import LAYERS, E, K, experts, gates, tiny


def test_layers_can_be_chosen_and_swapped_again() -> None:
    model = swap_router(tiny("olmoe"), "probmoe", layers=[0, 2])
    swap_router(model, "probmoe", k=(1, 3), layers=range(2, 3), normalize=True)
    exact = {"normalize": False, "forward": "sample", "backward": "marginal"}
    assert routing_of(model) == {
        "model.layers.0.mlp.gate": {"layer": 0, "router": "probmoe", "k": K, "options": exact},
        "model.layers.2.mlp.gate": {
            "layer": 2,
            "router": "probmoe",
            "k": [1, 3],
            "options": exact | {"normalize": True},
        },
    }
    swap_router(model, "topk")
    assert [one["router"] for one in routing_of(model).values()] == ["topk"] * LAYERS
    assert not any("probmoe_num_experts" in module.__dict__ for module in experts(model))
    assert routing_of(restore_router(model)) == {}


def test_layers_are_numbered_as_the_model_does() -> None:
    model = tiny("qwen2", mlp_only_layers=[0])
    assert [one["layer"] for one in routing_of(swap_router(model, "probmoe")).values()] == [1, 2]
    with pytest.raises(ValueError, match=r"layers of Qwen2MoeForCausalLM, 1, 2; got 0$"):
        swap_router(model, "topk", layers=[0, 1])


def test_a_model_without_experts_names_what_it_has() -> None:
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no mixture-of-experts layer.*LlamaDecoderLayer"):
        swap_router(LlamaForCausalLM(config), "probmoe")
    assert routing_of(LlamaForCausalLM(config)) == {}
    with pytest.raises(ValueError, match="of the classes Linear"):
        swap_router(nn.Linear(2, 2), "probmoe")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        swap_router("allenai/OLMoE-1B-7B-0924", "probmoe")  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"k": E + 1}, ValueError, "at most the number of experts, 8, got 9"),
        ({"k": (3, 2)}, ValueError, r"ascending, got \(3, 2\)"),
        ({"k": "4"}, TypeError, "k must be an int, got '4'"),
        ({"layers": [3]}, ValueError, "layers of OlmoeForCausalLM, 0, 1, 2; got 3$"),
        ({"layers": [-1]}, ValueError, "got -1$"),
        ({"layers": []}, ValueError, "got none$"),
        ({"layers": ["0"]}, TypeError, r"layers must be ints, got \['0'\]"),
        ({"layers": "0"}, TypeError, "layers must be ints, got '0'"),
        ({"temperature": 1.0}, ValueError, "no option 'temperature'"),
        ({"name": "dense"}, ValueError, "one of .*probmoe"),
    ],
    ids=str,
)
def test_a_refusal_changes_nothing(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = tiny("olmoe")
    with pytest.raises(error, match=message):
        swap_router(model, **({"name": "probmoe"} | options))
    assert routing_of(model) == {}


def test_what_lies_over_a_module_is_not_hidden() -> None:
    model = swap_router(tiny("olmoe"), "probmoe")
    nn.utils.parametrize.register_parametrization(gates(model)[1], "weight", nn.Identity())
    for call in (restore_router, lambda model: swap_router(model, "topk")):
        with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.gate was given the class Parametrized"):
            call(model)
    assert len(routing_of(model)) == LAYERS
    other = tiny("olmoe")
    gates(other)[0].forward = lambda hidden_states: None
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.gate has a forward that was set on the instance"):
        swap_router(other, "probmoe")
    gates(other)[0]._is_hooked = True
    with pytest.raises(ValueError, match="by the parallel plan that the model was loaded with"):
        swap_router(other, "probmoe")
