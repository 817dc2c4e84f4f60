"""What an inference engine gets: ordinary checkpoints for exact k, and a routing function for a band."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from probmoe_ext.hf import custom_routing_function, moe_layers, swap_router
from probmoe_ext.hf.gate import gate_logits
from probmoe_ext.routers import register_router
from tests.hf.models import E, H, K, tiny
from tests.hf.test_models import swappable
from tests.routers.balance import BiasedRouter

pytestmark = pytest.mark.filterwarnings("ignore:the '.*' implementation of .* computes slots")


def mixture(weights: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Dense weights ``[T, E]`` of slots, index ``E`` left out: what the experts' outputs are added with."""
    return torch.zeros(len(weights), E + 1).scatter_add(-1, indices.long(), weights.float())[:, :E]


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "granitemoe", "gpt_oss", "deepseek_v2", "deepseek_v3", "ernie"])
@pytest.mark.parametrize("k", [None, 1, (1, 2)], ids=str)
@pytest.mark.parametrize("extra", [0, 2], ids=["width", "wider"])
def test_the_function_routes_as_the_model_does(family: str, k: Any, extra: int) -> None:
    model = swap_router(swappable(family), "probmoe", k=k)
    layer = moe_layers(model)[0]
    gate: Any = layer.gate
    hidden = torch.randn(64, H)
    _, weights, indices = gate(hidden)
    logits = gate_logits(gate, gate.probmoe_form, hidden)
    function = custom_routing_function(model, layer.index)
    topk = gate.probmoe.k_max + extra
    got, ids = function(
        hidden_states=hidden, gating_output=logits, topk=topk, renormalize=gate.probmoe.options["normalize"]
    )
    assert (got.dtype, ids.dtype) == (torch.float32, torch.int32)
    assert got.shape == ids.shape == (64, topk)
    assert ids.min() >= 0
    assert ids.max() < E
    scale = gate.probmoe_form.scale
    torch.testing.assert_close(mixture(got * scale, ids), mixture(weights, indices), rtol=1e-5, atol=1e-6)
    # A slot that is not used costs no expert that the token does not use anyway.
    used = torch.zeros(64, E + 1, dtype=torch.bool).scatter(-1, indices, True)
    assert used.gather(-1, ids.long()).all()


def test_a_token_without_experts_weighs_nothing() -> None:
    function = custom_routing_function(swap_router(tiny("olmoe"), "probmoe", k=(0, 3)))
    weights, ids = function(torch.zeros(2, H), torch.full((2, E), -1.0), 3, False)
    assert weights.equal(torch.zeros(2, 3))
    assert ids.equal(torch.zeros(2, 3, dtype=torch.int32))


def test_experts_that_no_engine_has_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'moepp' at model\.layers\.0\.mlp\.gate does not evaluate the experts as an"):
        custom_routing_function(swap_router(tiny("olmoe"), "moepp"), 0)
    custom_routing_function(swap_router(tiny("olmoe"), "densemixer"))


def test_half_precision_logits_are_routed_in_float32() -> None:
    function = custom_routing_function(swap_router(tiny("olmoe"), "probmoe", k=(1, K)))
    logits = torch.randn(64, E).bfloat16()
    for one, other in zip(function(None, logits, K, False), function(None, logits.float(), K, False), strict=True):
        assert one.equal(other)


def test_it_has_the_engines_signature_and_keeps_nothing_of_the_model() -> None:
    model = swap_router(tiny("olmoe"), "probmoe", k=(1, K))
    function = custom_routing_function(model)
    assert list(inspect.signature(function).parameters) == ["hidden_states", "gating_output", "topk", "renormalize"]
    held = [value for value in vars(function).values() if isinstance(value, torch.nn.Module)]
    assert [type(one).__name__ for one in held] == ["ProbMoERouter"]
    logits = torch.randn(5, E)
    expected = function(None, logits, K, False)
    swap_router(model.train(), "topk")
    assert all(one.equal(two) for one, two in zip(function(None, logits, K, False), expected, strict=True))


def test_it_compiles_in_one_graph() -> None:
    function = custom_routing_function(swap_router(tiny("olmoe"), "probmoe", k=(1, K)))
    compiled = torch.compile(lambda logits: function(None, logits, K, False), fullgraph=True, backend="aot_eager")
    logits = torch.randn(9, E)
    for one, other in zip(compiled(logits), function(None, logits, K, False), strict=True):
        assert one.equal(other)


def test_what_it_refuses() -> None:
    model = tiny("olmoe")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.gate is the model's own"):
        custom_routing_function(model)
    function = custom_routing_function(swap_router(model, "probmoe", k=(1, 3)))
    logits = torch.randn(2, E)
    with pytest.raises(ValueError, match="topk must be at least the largest k of the router, 3, got 2"):
        function(None, logits, 2, False)
    with pytest.raises(ValueError, match="renormalize must be False, as the router was trained; got True"):
        function(None, logits, 3, True)
    with pytest.raises(ValueError, match="gating_output must be of 8 experts, got 7"):
        function(None, logits[:, 1:], 3, False)
    swap_router(model, "probmoe", k=2, layers=[1])
    with pytest.raises(ValueError, match="call this with layer= once for each of 0, 1, 2"):
        custom_routing_function(model)
    assert custom_routing_function(model, 1)(None, logits, 2, False)[0].shape == (2, 2)
    register_router("biased")(BiasedRouter)
    with pytest.raises(ValueError, match="do not route by one function"):
        custom_routing_function(swap_router(model, "biased"))
