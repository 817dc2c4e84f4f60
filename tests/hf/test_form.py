"""Routers are recognised by what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from probmoe_ext.hf import routing_of, swap_router
from probmoe_ext.hf.choice import PLAIN, ChoiceRule
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
        weight, bias = self.weight, getattr(self, "bias", None)
        if different.get("wide"):
            x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
        logits = F.linear(x, weight, bias)
        scores = logits.float().sigmoid() if different.get("sigmoid") else logits.float().softmax(-1)
        choose = scores + self.e_score_correction_bias if hasattr(self, "e_score_correction_bias") else scores
        indices = choose.topk(K, dim=-1, largest=not different.get("smallest")).indices
        weights = scores.gather(-1, indices) * self.routed_scaling_factor
        if different.get("normalize"):
            weights = weights / weights.sum(-1, keepdim=True)
        if different.get("squared"):
            weights = weights**2
        if different.get("apart"):
            weights = torch.stack([logits[:, i:].softmax(-1)[:, 0] for i in range(K)], dim=-1)
        if different.get("narrow"):
            weights = weights.to(x.dtype)
        recorded = logits * 2 if different.get("recorded") else logits
        if different.get("two"):
            return weights, indices
        return (indices, weights, recorded) if different.get("reversed") else (recorded, weights, indices)


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
        ({"bias": True}, False, "logits", True),
        ({"bias": True, "wide": True}, False, "float32 logits", True),
    ],
    ids=str,
)
def test_forms(different: dict[str, Any], normalize: bool, records: str, float32_weights: bool) -> None:
    before = torch.random.get_rng_state()
    (layer,) = moe_layers(Block(**different))
    form = read_form(layer)
    assert (form.num_experts, form.hidden_size, form.k) == (E, H, K)
    assert (form.normalize, form.records, form.float32_weights) == (normalize, records, float32_weights)
    assert form.bias == ("bias" if different.get("bias") else None)
    assert (form.rule, form.scale) == (PLAIN, 1.0)
    assert layer.gate.weight.is_meta
    assert torch.random.get_rng_state().equal(before)


@pytest.mark.parametrize(
    ("different", "rule", "scale"),
    [
        ({"scaling": 2.5}, PLAIN, 2.5),
        ({"correction": True}, ChoiceRule("softmax", corrected=True), 1.0),
        ({"sigmoid": True}, ChoiceRule("sigmoid"), 1.0),
        ({"sigmoid": True, "normalize": True, "bias": True}, ChoiceRule("sigmoid"), 1.0),
        ({"sigmoid": True, "correction": True, "scaling": 1.25}, ChoiceRule("sigmoid", corrected=True), 1.25),
    ],
    ids=str,
)
def test_scores_of_their_own_are_read(different: dict[str, Any], rule: ChoiceRule, scale: float) -> None:
    (layer,) = moe_layers(Block(**different))
    form = read_form(layer)
    assert (form.rule, form.scale) == (rule, scale)
    assert form.correction == ("e_score_correction_bias" if rule.corrected else None)
    assert form.normalize is bool(different.get("normalize"))


@pytest.mark.parametrize(
    ("different", "reason"),
    [
        ({"smallest": True}, "does not choose the k largest of softmax or sigmoid scores"),
        (
            {"squared": True},
            "its weights are neither softmax nor sigmoid scores.*has routed_scaling_factor=1.0",
        ),
        ({"apart": True}, "each a softmax of its own"),
        ({"recorded": True}, "its first result is neither"),
        ({"two": True}, "it returns 2 results rather than"),
        ({"reversed": True}, r"it returns int64 \[32, 4\], float32 \[32, 4\], float32 \[32, 8\] rather than"),
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
    before = block.router.statistics.weight.clone()
    assert routing_of(swap_router(block, "probmoe"))["router"]["k"] == K
    assert block.router.statistics.weight.equal(before)


def test_a_forward_with_further_arguments_is_refused() -> None:
    class Biased(Gate):
        def forward(self, x: torch.Tensor, expert_bias: torch.Tensor) -> Any:
            return super().forward(x + expert_bias)

    block = Block()
    block.router = Biased()
    with pytest.raises(ValueError, match=r"\(Biased\) is not supported: its forward needs expert_bias besides"):
        swap_router(block, "probmoe")


def test_with_as_many_as_there_are_experts_the_model_says_whether_it_normalizes() -> None:
    for family, expected in (("olmoe", False), ("qwen3", True), ("mixtral", True)):
        assert read_form(moe_layers(tiny(family, num_experts_per_tok=E))[0]).normalize is expected
