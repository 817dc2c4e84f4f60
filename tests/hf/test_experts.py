"""Slots that a token does not use: right results on every implementation, and no work where it can be avoided."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from probmoe_ext.hf import restore_router, swap_router
from probmoe_ext.hf.experts import SwappedExperts
from tests.hf.models import FAMILIES, E, H, K, experts, gates, tiny, tokens

BAND = (0, K)
implementations = pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])


class Rows(TorchDispatchMode):
    """Counts the rows that go through matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name() in ("aten::mm", "aten::bmm"):
            self.count += result.shape[:-1].numel()
        elif func.name() == "aten::_grouped_mm":
            # Rows past the last offset belong to no group.
            offsets = args[2] if len(args) > 2 else (kwargs or {})["offs"]
            self.count += int(offsets[-1])
        return result


def layer(family: str, implementation: str, dtype: torch.dtype = torch.float32, k: Any = BAND) -> tuple[Any, Any]:
    model = swap_router(tiny(family, dtype), "probmoe", k=k)
    model.set_experts_implementation(implementation)
    return gates(model)[0], experts(model)[0]


def dense(module: Any, x: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Every expert on every token, masked."""
    mixture = torch.zeros(len(x), E + 1, dtype=weights.dtype).scatter(-1, indices, weights)[:, :E]
    up = torch.einsum("th,eih->eti", x, module.gate_up_proj)
    gate, up = up.chunk(2, dim=-1)
    out = torch.einsum("eti,ehi->eth", module.act_fn(gate) * up, module.down_proj)
    return torch.einsum("eth,te->th", out, mixture.to(out.dtype))


@pytest.mark.parametrize("family", FAMILIES)
@implementations
def test_unused_slots_equal_masked_dense_computation(family: str, implementation: str) -> None:
    gate, module = layer(family, implementation)
    x = torch.randn(50, H, requires_grad=True)
    _, weights, indices = gate(x)
    assert 0 < (indices == E).sum() < indices.numel()
    weights = weights.detach().requires_grad_()
    results = []
    for one in (module(x, indices, weights), dense(module, x, weights, indices)):
        tensors = (x, weights, module.gate_up_proj, module.down_proj)
        results.append((one, *torch.autograd.grad(one, tensors, torch.ones_like(one))))
    for ours, expected in zip(*results, strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_unused_slots_cost_nothing(implementation: str, dtype: torch.dtype) -> None:
    gate, module = layer("olmoe", implementation, dtype)
    if implementation not in module.probmoe_skips and not hasattr(module, "_is_expert_parallel"):
        pytest.skip(f"the {implementation} experts of this early transformers compute every slot")
    x = torch.randn(50, H, dtype=dtype)
    _, weights, indices = gate(x)
    used = int((indices < E).sum())
    assert used < indices.numel()
    with Rows() as rows:
        module(x, indices, weights)
    # An expert multiplies a row twice: gate_up and down.
    assert rows.count == 2 * used
    with Rows() as rows:
        module(x, indices.clamp(max=E - 1), weights)
    assert rows.count == 2 * indices.numel()


@implementations
def test_a_token_may_use_no_expert_at_all(implementation: str) -> None:
    _, module = layer("olmoe", implementation)
    x, none = torch.randn(5, H), torch.full((5, K), E)
    assert module(x, none, torch.zeros(5, K)).equal(torch.zeros(5, H))


@pytest.mark.parametrize("family", FAMILIES)
def test_implementations_agree_in_the_whole_model(family: str) -> None:
    ids, results = tokens(), []
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model = swap_router(tiny(family).train(), "probmoe", k=(1, K))
        model.set_experts_implementation(implementation)
        torch.manual_seed(3)
        loss = model(ids, labels=ids, output_router_logits=True).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        assert all(value.isfinite().all() for value in results[-1])
        assert all(gate.weight.grad.abs().sum() > 0 for gate in gates(model))
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


@implementations
def test_an_implementation_that_does_not_skip_gets_real_experts(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, module = layer("olmoe", implementation)
    x = torch.randn(50, H)
    _, weights, indices = gate(x)
    expected = module(x, indices, weights)
    module.probmoe_skips = frozenset()
    module._is_expert_parallel = False
    seen: list[torch.Tensor] = []
    original: Callable[..., Any] = module.original.forward
    monkeypatch.setattr(
        module.original, "forward", lambda self, x, i, w: (seen.append(i), original(self, x, i, w))[1], raising=True
    )
    weights = weights.detach().requires_grad_()
    got = module(x, indices, weights)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad(got.sum(), weights)
    assert ((gradient == 0) == (indices == E)).all()
    (real,) = seen
    assert real.max() < E
    assert real[indices < E].equal(indices[indices < E])
    some = indices[:, 0] < E
    first = indices[:, :1].expand(-1, K)
    assert real[some][indices[some] == E].equal(first[some][indices[some] == E])


def test_a_warning_says_when_nothing_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("probmoe_ext.hf.experts.skipping_implementations", lambda *_: frozenset({"eager"}))
    with pytest.warns(UserWarning, match=r"'grouped_mm' implementation of OlmoeExperts .* skip them: eager$") as caught:
        swap_router(tiny("olmoe", experts_implementation="grouped_mm"), "probmoe", k=BAND)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        swap_router(tiny("olmoe"), "probmoe")


def test_only_a_band_touches_the_experts() -> None:
    model = swap_router(tiny("olmoe"), "probmoe", k=2)
    assert not any(isinstance(one, SwappedExperts) for one in experts(model))
    swap_router(model, "probmoe", k=BAND)
    assert all(isinstance(one, SwappedExperts) for one in experts(model))
    assert all(getattr(one, "_is_expert_parallel", True) for one in experts(model))
    swap_router(model, "probmoe", k=(1, 2))
    assert all(isinstance(one, SwappedExperts) for one in experts(model))
    swap_router(model, "probmoe", k=K)
    assert not any(isinstance(one, SwappedExperts) for one in experts(model))
    assert not any(getattr(one, "_is_expert_parallel", False) for one in experts(model))
    restore_router(model)
