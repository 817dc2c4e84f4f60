"""Slots that a token does not use: right results on every implementation, and no work where it can be avoided."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations import moe
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from probmoe_ext.hf import dispatch, restore_router, swap_router
from probmoe_ext.hf.experts import SwappedExperts, kernel_knows_unused_slots
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
        elif func.name() == "aten::_grouped_mm" and args[0].dim() == 2 and args[1].dim() == 3:
            # Rows past the last offset belong to no group. (Two matrices give the gradient of the weights.)
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
@implementations
def test_unused_slots_cost_nothing(implementation: str, dtype: torch.dtype) -> None:
    gate, module = layer("olmoe", implementation, dtype)
    x = torch.randn(50, H, dtype=dtype, requires_grad=True)
    _, weights, indices = gate(x)
    used = int((indices < E).sum())
    assert used < indices.numel()
    for rows, one in ((used, indices), (indices.numel(), indices.clamp(max=E - 1))):
        with Rows() as forward:
            result = module(x, one, weights.detach())
        with Rows() as backward:
            result.sum().backward()
        # An expert multiplies a row twice, gate_up and down; the backward pass does so for the rows and, with columns
        # of the weights in the place of rows, for the weights.
        assert forward.count == 2 * rows
        assert backward.count == 2 * rows


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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("where", ["compact", "static"])
def test_shapes_that_do_not_depend_on_the_data_compute_the_same(
    family: str, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an accelerator and torch.compile run, in eager mode, with the rows that no kernel writes full of NaN."""
    gate, module = layer(family, "grouped_mm")
    x = torch.randn(50, H, requires_grad=True)
    _, weights, indices = gate(x)
    weights = weights.detach().requires_grad_()
    expected = dense(module, x, weights, indices)
    if where == "static":
        monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
        original = dispatch._grouped_mm
        seen: list[int] = []

        # Compiled or not, this is the operator that a compiler sees.
        def spoilt(rows: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
            tail = torch.arange(len(rows)) >= offs[-1]
            seen.append(int(tail.sum()))
            return Spoil.apply(original(Spoil.apply(rows, tail, False), weight, offs), tail, True)

        monkeypatch.setattr(dispatch, "_grouped_mm", spoilt)
    got = module(x, indices, weights)
    if where == "static":
        assert seen == [int((indices == E).sum())] * 2
    tensors = (x, weights, module.gate_up_proj, module.down_proj)
    upstream = torch.randn_like(got)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(got, tensors, upstream), torch.autograd.grad(expected, tensors, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


class Spoil(torch.autograd.Function):
    """Fills rows with NaN, of the value or of its gradient."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, tail: torch.Tensor, value: bool) -> torch.Tensor:
        ctx.tail, ctx.value = tail, value
        return rows.masked_fill(tail.unsqueeze(-1), torch.nan) if value else rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        (gradient,) = gradients
        return gradient if ctx.value else gradient.masked_fill(ctx.tail.unsqueeze(-1), torch.nan), None, None


def test_the_dispatch_is_one_of_the_librarys_implementations() -> None:
    ids = tokens()
    swap_router(tiny("olmoe"), "probmoe", k=BAND)
    model = tiny("olmoe")
    expected = model(ids).logits
    # What set_experts_implementation does, which knows names of its own alone in early versions.
    model.config._experts_implementation = dispatch.NAME
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_a_class_with_a_loop_of_its_own_gets_the_used_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, module = layer("olmoe", "eager")
    x = torch.randn(50, H)
    _, weights, indices = gate(x)
    expected = module(x, indices, weights)
    monkeypatch.setattr("probmoe_ext.hf.experts.follows_interface", lambda experts: False)
    with Rows() as rows:
        torch.testing.assert_close(module(x, indices, weights), expected, rtol=1e-4, atol=1e-6)
    assert rows.count == 2 * (indices < E).sum()


def other_kernel(self: Any, hidden_states: torch.Tensor, top_k_index: Any, top_k_weights: Any) -> torch.Tensor:
    """An implementation that cannot be given unused slots."""
    assert top_k_index.max() < E
    SEEN.append(top_k_index)
    return dispatch.grouped_experts_forward(self, hidden_states, top_k_index, top_k_weights)


SEEN: list[torch.Tensor] = []


@pytest.fixture
def other() -> Iterator[str]:
    """Its name among the library's."""
    SEEN.clear()
    ALL_EXPERTS_FUNCTIONS.register("other", other_kernel)
    yield "other"
    del ALL_EXPERTS_FUNCTIONS._global_mapping["other"]


def test_a_kernel_that_knows_no_such_slots_gets_real_experts(other: str) -> None:
    gate, module = layer("olmoe", "eager")
    x = torch.randn(50, H)
    _, weights, indices = gate(x)
    expected = module(x, indices, weights)
    module.config._experts_implementation = other
    weights = weights.detach().requires_grad_()
    got = module(x, indices, weights)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    (gradient,) = torch.autograd.grad(got.sum(), weights)
    assert ((gradient == 0) == (indices == E)).all()
    (real,) = SEEN
    assert real[indices < E].equal(indices[indices < E])
    some = indices[:, 0] < E
    first = indices[:, :1].expand(-1, K)
    assert real[some][indices[some] == E].equal(first[some][indices[some] == E])


def test_a_warning_says_when_nothing_is_saved(other: str) -> None:
    model = tiny("olmoe")
    model.config._experts_implementation = other
    with pytest.warns(
        UserWarning, match=r"the 'other' implementation of OlmoeExperts computes .* grouped_mm"
    ) as caught:
        swap_router(model, "probmoe", k=BAND)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for implementation in ("eager", "grouped_mm", "batched_mm"):
            model = tiny("olmoe")
            model.set_experts_implementation(implementation)
            swap_router(model, "probmoe", k=BAND)


def test_experts_that_are_split_get_real_experts_before_the_plan_sees_them() -> None:
    """As the library splits them: a forward on the instance, which holds the one of the class."""
    model = tiny("olmoe")
    expected = swap_router(tiny("olmoe"), "probmoe", k=BAND)(tokens()).logits
    module, seen = experts(model)[1], []
    original, module._is_hooked = module.forward, True
    module.forward = lambda x, indices, weights: (seen.append(indices), original(x, indices, weights))[1]
    before = sorted(module.__dict__)
    with pytest.warns(UserWarning, match="^experts split over processes compute slots that a token does not use"):
        swap_router(model, "probmoe", k=BAND)
    torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-4, atol=1e-5)
    assert seen[0].max() < E
    restore_router(model)
    assert sorted(module.__dict__) == before
    assert len(module._forward_pre_hooks) == 0


def test_kernels_that_expert_parallelism_can_use_run_as_they_are() -> None:
    assert not kernel_knows_unused_slots("no such")
    known = {name for name in ALL_EXPERTS_FUNCTIONS.keys() if kernel_knows_unused_slots(name)}  # noqa: SIM118
    parallel = "sentinel" in inspect.getsource(moe)
    assert ("grouped_mm" in known) == parallel


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


def test_the_compilers_operator() -> None:
    rows, weight = torch.randn(10, 8, requires_grad=True), torch.randn(3, 8, 4, requires_grad=True)
    offsets = torch.tensor([4, 4, 10], dtype=torch.int32)
    torch.library.opcheck(torch.ops.probmoe_hf.grouped_mm.default, (rows, weight, offsets))
    results = []
    for product in (torch.ops.probmoe_hf.grouped_mm(rows, weight, offsets), F.grouped_mm(rows, weight, offs=offsets)):
        results.append((product, *torch.autograd.grad(product, (rows, weight), torch.ones_like(product))))
    assert all(one.equal(other) for one, other in zip(*results, strict=True))
