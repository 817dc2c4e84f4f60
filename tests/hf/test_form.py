"""Routers are recognised by what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from probmoe_ext.hf import swap_router
from probmoe_ext.hf.form import read_form
from probmoe_ext.hf.layers import moe_layers
from tests.hf.models import E, H, K, tiny


class Gate(nn.Module):
    """A router in the form of the library, with what can be different about it."""

    def __init__(self, **different: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(E, H, device="meta"))
        if different.pop("bias", False):
            self.bias = nn.Parameter(torch.empty(E, device="meta"))
        if different.pop("correction", False):
            self.register_buffer("e_score_correction_bias", torch.empty(E, device="meta"))
        self.different = different
        self.routed_scaling_factor = different.get("scaling", 1.0)

    def forward(self, x: torch.Tensor) -> Any:
        different = self.different
        if different.get("raises"):
            raise RuntimeError("needs token ids")
        if different.get("wide"):
            x, weight = x.float(), self.weight.float()
        else:
            weight = self.weight
        logits = F.linear(x, weight, getattr(self, "bias", None))
        scores = logits.float().sigmoid() if different.get("sigmoid") else logits.float().softmax(-1)
        choose = scores + self.e_score_correction_bias if hasattr(self, "e_score_correction_bias") else scores
        indices = choose.topk(K, dim=-1).indices
        weights = scores.gather(-1, indices) * self.routed_scaling_factor
        if different.get("normalize"):
            weights = weights / weights.sum(-1, keepdim=True)
        if different.get("narrow"):
            weights = weights.to(x.dtype)
        recorded = logits * 2 if different.get("recorded") else logits
        return (weights, indices) if different.get("two") else (recorded, weights, indices)


class Block(nn.Module):
    def __init__(self, **different: Any) -> None:
        super().__init__()
        self.router = Gate(**different)
        self.experts = nn.Identity()


@pytest.mark.parametrize(
    ("different", "normalize", "records", "float32_weights"),
    [
        ({}, False, "logits", True),
        ({"narrow": True}, False, "logits", False),
        ({"normalize": True}, True, "logits", True),
        ({"wide": True}, False, "float32 logits", True),
    ],
    ids=str,
)
def test_forms(different: dict[str, Any], normalize: bool, records: str, float32_weights: bool) -> None:
    before = torch.random.get_rng_state()
    (layer,) = moe_layers(Block(**different))
    form = read_form(layer)
    assert (form.num_experts, form.hidden_size, form.k) == (E, H, K)
    assert (form.normalize, form.records, form.float32_weights) == (normalize, records, float32_weights)
    assert layer.gate.weight.is_meta
    assert torch.random.get_rng_state().equal(before)


@pytest.mark.parametrize(
    ("different", "reason"),
    [
        ({"bias": True}, r"does not choose the k largest of softmax.*\(it also has bias"),
        ({"correction": True}, "does not choose the k largest of softmax.*it also has e_score_correction_bias"),
        ({"sigmoid": True}, "its weights are sigmoid scores, not the softmax probabilities"),
        ({"sigmoid": True, "normalize": True}, "its weights are sigmoid scores"),
        ({"scaling": 2.5}, "its weights are not the softmax probabilities.*routed_scaling_factor=2.5"),
        ({"recorded": True}, "its first result is neither"),
        ({"two": True}, "it returns 2 results rather than"),
        ({"raises": True}, r"it failed on a small input \(RuntimeError: needs token ids\)"),
    ],
    ids=str,
)
def test_other_routers_are_refused_with_the_reason(different: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=rf"the router at router \(Gate\) is not supported: .*{reason}"):
        swap_router(Block(**different), "probmoe")


def test_defaults_around_the_call_do_not_matter() -> None:
    model, other = tiny("olmoe"), tiny("mixtral", torch.bfloat16)
    expected = [read_form(moe_layers(one)[0]) for one in (model, other)]
    try:
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
            forms = [read_form(moe_layers(one)[0]) for one in (model, other)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert forms == expected


def test_a_linear_gate_is_refused() -> None:
    block = Block()
    block.gate = nn.Linear(H, E, bias=False)
    with pytest.raises(ValueError, match=r"the router at gate \(Linear\) is not supported: it returns a Tensor"):
        swap_router(block, "probmoe")


def test_modules_of_the_router_are_left_alone() -> None:
    block = Block()
    block.router.statistics = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="it has modules of its own with parameters"):
        swap_router(block, "probmoe")
    assert block.router.statistics.weight.dtype == torch.float32


def test_with_as_many_as_there_are_experts_the_model_says_whether_it_normalizes() -> None:
    for family, expected in (("olmoe", False), ("qwen3", True), ("mixtral", True)):
        assert read_form(moe_layers(tiny(family, num_experts_per_tok=E))[0]).normalize is expected
