"""The router in a compiled graph: one graph, the numbers of the uncompiled one, and no wait for the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from probmoe_ext.hf import moe_layers, swap_router
from tests.hf.models import H
from tests.hf.test_models import swappable

pytestmark = pytest.mark.filterwarnings("ignore:the '.*' implementation of .* computes slots")
# One of each form: plain, biased and normalised, within groups, and with scores and a correction.
families = pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v2_groups", "deepseek_v3"])
ks = pytest.mark.parametrize("k", [1, (1, 2)], ids=str)


def swapped_gate(family: str, k: Any, training: bool) -> Any:
    return moe_layers(swap_router(swappable(family), "probmoe", k=k).train(training))[0].gate


def run(gate: Any, call: Any, hidden: torch.Tensor) -> list[torch.Tensor]:
    gate.zero_grad()
    torch.manual_seed(9)
    logits, weights, indices = call(hidden)
    if gate.training:
        (weights * torch.arange(1.0, weights.numel() + 1).reshape(weights.shape)).sum().backward()
    return [logits, weights, indices, *(p.grad.clone() for p in gate.parameters() if p.grad is not None)]


@families
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_router_is_one_graph_with_the_same_numbers(family: str, training: bool) -> None:
    gate = swapped_gate(family, (1, 2), training)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lambda hidden: gate(hidden), fullgraph=True, backend="aot_eager")
    hidden = torch.randn(20, H)
    expected, got = run(gate, gate, hidden), run(gate, compiled, hidden)
    assert len(expected) == len(got) >= (4 if training else 3)
    assert got[2].equal(expected[2])
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    # Other numbers of tokens: at most one more graph, with the size as a symbol.
    for rows in (7, 33, 50):
        run(gate, compiled, torch.randn(rows, H))
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 2


@families
@ks
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_routing_never_asks_for_a_value(family: str, k: Any, training: bool) -> None:
    # A fake tensor has no values: whatever would wait for the device to read one, raises.
    gate = swapped_gate(family, k, training)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        hidden = mode.from_tensor(torch.randn(20, H))
        logits, weights, indices = gate(hidden)
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            weights.sum().item()
    assert weights.shape == indices.shape == (20, gate.probmoe.k_max)
    assert logits.shape == (20, 8)
