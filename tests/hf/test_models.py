"""Which models can be swapped: those whose router keeps the contract, whatever they are called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import CONFIG_MAPPING

from probmoe_ext.hf import moe_layers, restore_router, routing_of, swap_router
from probmoe_ext.hf.choice import PLAIN, ChoiceRule
from probmoe_ext.hf.layers import MoELayer
from probmoe_ext.routers import Router, register_router
from tests.hf.models import FAMILIES, MORE, E, H, K, tiny, tokens

REFUSED = {
    "phimoe": "each a softmax of its own",
    "minimax_m2": "its forward needs e_score_correction_bias besides the hidden states",
    "lfm2": r"unsupported operand|its forward needs expert_bias",
}
"""Routers of models that are not supported in any version, and why."""
RULES = {
    "deepseek_v2_groups": ChoiceRule("softmax", groups=(4, 2), best_of_group=1),
    "deepseek_v3": ChoiceRule("sigmoid", corrected=True, groups=(2, 1), best_of_group=2),
    "glm4": ChoiceRule("sigmoid", corrected=True),
    "ernie": ChoiceRule("softmax", corrected=True),
}
SCALES = {"deepseek_v2": 2.5, "deepseek_v2_groups": 16.0, "deepseek_v3": 2.5}
BIASED = ("gpt_oss",)
supported = pytest.mark.parametrize("family", [family for family in (*FAMILIES, *MORE) if family not in REFUSED])


def first_layer(model: Any) -> MoELayer | None:
    """The first layer with experts, if its router returns ``(logits, weights, indices)`` in this version."""
    try:
        layer = moe_layers(model)[0]
    except ValueError:
        return None
    result = layer.gate(torch.randn(1, 5, H))
    if not (isinstance(result, tuple) and len(result) == 3):
        return None
    logits, weights, indices = result
    right = logits.shape[-1] == E and weights.shape == indices.shape and indices.dtype == torch.int64
    return layer if right else None


def swappable(family: str, **changes: Any) -> Any:
    """The model, or a skip where the installed version's router does not keep the contract, once it was refused."""
    model = tiny(family, **changes)
    if first_layer(model) is None:
        with pytest.raises(ValueError, match=r"is not supported: it |has no mixture-of-experts layer") as refusal:
            swap_router(model, "probmoe")
        pytest.skip(f"refused in this transformers: {refusal.value}")
    return model


@supported
def test_what_a_router_computes_is_read(family: str) -> None:
    form = moe_layers(swap_router(swappable(family), "probmoe"))[0].gate.probmoe_form
    assert form.rule == RULES.get(family, PLAIN)
    assert form.scale == SCALES.get(family, 1.0)
    assert form.bias == ("bias" if family in BIASED else None)
    assert (form.correction is not None) is form.rule.corrected


@supported
def test_evaluation_is_the_models_own_and_comes_back(family: str) -> None:
    ids, model = tokens(), swappable(family)
    expected = model(ids).logits
    assert swap_router(model, "probmoe")(ids).logits.equal(expected)
    assert restore_router(model)(ids).logits.equal(expected)


@supported
def test_top_k_in_training_computes_what_the_model_does(family: str) -> None:
    # In training the swapped gate computes by itself, which must be what the class of the model computes.
    ids, results = tokens(), []
    model = swappable(family).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for one in (model, swap_router(tiny(family).train(), "topk")):
        loss = one(ids, labels=ids).loss
        wanted = parameters if one is model else [p for p in one.parameters() if p.requires_grad]
        results.append((loss, *torch.autograd.grad(loss, wanted, allow_unused=True)))
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) is (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-5)


@supported
def test_a_smaller_k_is_the_models_own_rule_at_that_k(family: str) -> None:
    other = {"ernie": {"moe_k": 1}, "hunyuan": {"moe_topk": 1}}.get(family, {})
    model = swap_router(swappable(family), "probmoe", k=1)
    ids = tokens()
    expected = tiny(family, num_experts_per_tok=1, **other)(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)


@supported
@pytest.mark.parametrize("band", [False, True], ids=["exact", "band"])
@pytest.mark.filterwarnings("ignore:the '.*' implementation of .* computes slots")
def test_training_reaches_the_experts_that_were_not_chosen(family: str, band: bool) -> None:
    ids, model = tokens(4), swappable(family).train()
    k = 2 if family == "deepseek_v3" else K
    swap_router(model, "probmoe", k=(1, k) if band else k)
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    for layer in moe_layers(model):
        gate: Any = layer.gate
        weight = gate.get_parameter(gate.probmoe_form.weight)
        assert weight.grad.isfinite().all()
        assert (weight.grad.abs().sum(-1) > 0).all()
        _, weights, indices = gate(torch.randn(50, weight.shape[1]))
        assert ((indices == E) == (weights == 0)).all()
        assert bool((indices == E).any()) is band


@pytest.mark.parametrize("family", REFUSED)
def test_other_routers_are_refused_with_the_reason(family: str) -> None:
    model = tiny(family)
    # The early versions of these routers return other things altogether.
    early = Version(transformers.__version__) < Version("5.17") and family != "minimax_m2"
    with pytest.raises(ValueError, match="is not supported: it returns" if early else REFUSED[family]):
        swap_router(model, "probmoe")
    assert routing_of(model) == {}
    assert model(tokens()).logits.isfinite().all()


def test_a_router_that_only_knows_softmax_is_refused_for_models_with_scores() -> None:
    @register_router("softmax-only")
    class SoftmaxOnly(Router):
        pass

    model = swappable("glm4")
    with pytest.raises(ValueError, match=r"'softmax-only' cannot take the place .*Glm4MoeTopkRouter.*sigmoid"):
        swap_router(model, "softmax-only")
    assert routing_of(model) == {}


def test_k_cannot_be_more_than_the_groups_hold() -> None:
    model = swappable("deepseek_v2_groups")
    with pytest.raises(ValueError, match="k must be at most 4, the number of experts in the groups"):
        swap_router(model, "probmoe", k=5)


def test_choices_stay_within_the_groups() -> None:
    model = swap_router(swappable("deepseek_v2_groups").train(), "probmoe", k=3)
    _, _, indices = moe_layers(model)[0].gate(torch.randn(200, 32))
    used = torch.nn.functional.one_hot(indices // 2, 4).sum(1).gt(0).sum(-1)
    assert used.max() == 2


@pytest.mark.parametrize("family", ["qwen2", "qwen3_next", "ernie", "deepseek_v2"])
def test_shared_experts_stay(family: str) -> None:
    ids, model = tokens(), swappable(family)
    shared = [module for name, module in model.named_modules() if name.endswith(("shared_expert", "shared_experts"))]
    assert shared
    calls: list[torch.Tensor] = []
    for module in shared:
        module.register_forward_hook(lambda module, args, output: calls.append(output))
    swap_router(model, "probmoe", k=1)
    model(ids)
    assert len(calls) == len(shared)
    weights = [p.clone() for module in shared for p in module.parameters()]
    assert all(one.equal(p) for one, p in zip(weights, (p for m in shared for p in m.parameters()), strict=True))


@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss"])
def test_layers_can_be_chosen(family: str) -> None:
    model = swappable(family)
    swap_router(model, "probmoe", k=(1, 2), layers=[2])
    assert [one["layer"] for one in routing_of(model).values()] == [2]


def test_a_vision_language_model_is_swapped_in_its_text_part() -> None:
    from transformers import Qwen3VLMoeForConditionalGeneration

    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "head_dim": 16}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": E, "num_experts_per_tok": K}
    text |= {"moe_intermediate_size": 16, "initializer_range": 0.2, "pad_token_id": 0}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"deepstack_visual_indexes": [], "num_position_embeddings": 16}
    config = CONFIG_MAPPING["qwen3_vl_moe"](text_config=text, vision_config=vision)
    model, ids = Qwen3VLMoeForConditionalGeneration(config).eval(), tokens()
    expected = model(ids).logits
    assert swap_router(model, "probmoe")(ids).logits.equal(expected)
    assert len(routing_of(model)) == 2
    loss = swap_router(model.train(), "probmoe", k=(1, K))(ids, labels=ids).loss
    loss.backward()
    for layer in moe_layers(model):
        assert (layer.gate.weight.grad.abs().sum(-1) > 0).all()
