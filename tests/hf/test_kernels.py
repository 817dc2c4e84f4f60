"""Kernels of the hub: they may replace norms, and never the block that calls a swapped router."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch

from probmoe_ext.hf import moe_layers, restore_router, routing_of, swap_router
from tests.hf.models import tiny, tokens

pytestmark = pytest.mark.filterwarnings("ignore:the '.*' implementation of .* computes slots")


def kernelize(model: Any) -> list[str]:
    """What the ``kernels`` library does to a model: set a forward on modules whose class has a name for one."""

    def routes_by_itself(self: Any, hidden_states: torch.Tensor) -> Any:
        logits = torch.nn.functional.linear(hidden_states, self.router.weight)
        return hidden_states * 0, logits

    replaced = []
    for path, module in model.named_modules():
        cls: Any = type(module)
        if hasattr(cls, "kernel_layer_name") and cls.kernel_condition(module):
            module.forward = MethodType(routes_by_itself, module)
            replaced.append(path)
    return replaced


@pytest.fixture
def with_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-OSS as its classes are where the library is installed."""
    block = type(moe_layers(tiny("gpt_oss"))[0].block)
    monkeypatch.setattr(block, "kernel_layer_name", "MegaBlocksMoeMLP", raising=False)
    monkeypatch.setattr(block, "kernel_condition", staticmethod(lambda module: True), raising=False)


@pytest.mark.usefixtures("with_kernels")
def test_kernels_after_the_swap_leave_the_block_alone() -> None:
    ids, model = tokens(), swap_router(tiny("gpt_oss"), "probmoe", k=(1, 2))
    expected = model(ids).logits
    assert kernelize(model) == []
    assert model(ids).logits.equal(expected)
    restore_router(model)
    assert len(kernelize(model)) == len(moe_layers(model))
    assert not model(ids).logits.equal(expected)


@pytest.mark.usefixtures("with_kernels")
def test_kernels_before_the_swap_are_refused() -> None:
    model = tiny("gpt_oss")
    assert kernelize(model)
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp \(GptOssMLP\) has a forward .* use_kernels=True does"):
        swap_router(model, "probmoe")
    assert routing_of(model) == {}


def test_blocks_without_a_kernel_keep_their_class() -> None:
    model = tiny("olmoe")
    classes = [type(layer.block) for layer in moe_layers(model)]
    swap_router(model, "probmoe", k=(1, 2))
    assert [type(layer.block) for layer in moe_layers(model)] == classes
