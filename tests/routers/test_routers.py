"""What every router of the package promises, and what each one computes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from probmoe_ext.routers import Router, make_router

T, E, K = 64, 8, 3
HALF = [torch.float32, torch.bfloat16, torch.float16]


def routers() -> list[Router]:
    return [
        make_router("topk", num_experts=E, k=K),
        make_router("probmoe", num_experts=E, k=K),
        make_router("probmoe", num_experts=E, k=(0, K)),
        make_router("probmoe", num_experts=E, k=(1, K), normalize=True, forward="topk", backward="ste"),
    ]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("router", routers(), ids=str)
def test_shapes_dtypes_and_unused_slots(router: Router, training: bool, dtype: torch.dtype) -> None:
    logits = torch.randn(T, E).to(dtype)
    weights, indices = router.train(training)(torch.randn(T, 4), logits)
    assert weights.shape == indices.shape == (T, router.width)
    assert weights.dtype == dtype
    assert indices.dtype == torch.int64
    unused = indices == E
    used = (~unused).sum(-1)
    assert used.min() >= router.k_min
    assert used.max() <= router.k_max
    assert (weights[unused] == 0).all()
    assert (weights[~unused] > 0).all()
    for row in indices:
        chosen = row[row < E].tolist()
        assert len(chosen) == len(set(chosen))
    if not router.leaves_slots_unused:
        assert not unused.any()


@pytest.mark.parametrize("router", routers(), ids=str)
def test_weights_are_float32_softmax_under_autocast_and_in_half_precision(router: Router) -> None:
    logits = torch.randn(T, E) * 3
    with torch.autocast("cpu", torch.bfloat16):
        weights, indices = router(torch.randn(T, 4), logits.bfloat16())
    padded = torch.cat([logits.bfloat16().float().softmax(-1), torch.zeros(T, 1)], -1)
    expected = padded.gather(-1, indices)
    if router.options["normalize"]:
        expected = expected / expected.sum(-1, keepdim=True)
    # One rounding, of the result: half a unit in the last of 8 bits.
    assert weights.dtype == torch.bfloat16
    torch.testing.assert_close(weights.float(), expected, rtol=2**-8, atol=1e-30)


@pytest.mark.parametrize("normalize", [False, True])
def test_topk_is_softmax_and_topk(normalize: bool) -> None:
    logits = torch.randn(T, E, requires_grad=True)
    weights, indices = make_router("topk", num_experts=E, k=K, normalize=normalize)(torch.zeros(T, 4), logits)
    expected, order = torch.softmax(logits, -1).topk(K, dim=-1)
    expected = expected / expected.sum(-1, keepdim=True) if normalize else expected
    assert indices.equal(order)
    torch.testing.assert_close(weights, expected)
    gradient = torch.randn(T, K)
    ours, theirs = (torch.autograd.grad(one, logits, gradient)[0] for one in (weights, expected))
    torch.testing.assert_close(ours, theirs)


def test_topk_takes_no_band() -> None:
    with pytest.raises(ValueError, match=r"'topk' takes one k, got the band \(1, 3\)"):
        make_router("topk", num_experts=E, k=(1, 3))


@pytest.mark.parametrize(("option", "value"), [("forward", "argmax"), ("backward", "reinforce")])
def test_probmoe_names_the_options_that_it_knows(option: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{option} of router 'probmoe' must be one of .*; got '{value}'"):
        make_router("probmoe", num_experts=E, k=K, **{option: value})


def test_probmoe_samples_in_training_and_not_in_evaluation() -> None:
    router = make_router("probmoe", num_experts=E, k=K)
    logits, hidden = torch.randn(T, E), torch.zeros(T, 4)
    first, second = (router(hidden, logits)[1] for _ in range(2))
    assert not first.equal(second)
    torch.manual_seed(5)
    one = router(hidden, logits)[1]
    torch.manual_seed(5)
    assert router(hidden, logits)[1].equal(one)
    router.eval()
    weights, indices = router(hidden, logits)
    expected, order = torch.softmax(logits, -1).topk(K, dim=-1)
    assert indices.equal(order)
    torch.testing.assert_close(weights, expected)


def test_probmoe_evaluates_a_band_at_its_mode() -> None:
    logits, hidden = torch.randn(T, E), torch.zeros(T, 4)
    _, indices = make_router("probmoe", num_experts=E, k=(1, K)).eval()(hidden, logits)
    used = (indices < E).sum(-1)
    assert used.equal((logits > 0).sum(-1).clamp(1, K))
    assert used.unique().numel() > 1


def test_probmoe_sends_its_gradient_to_experts_that_were_not_chosen() -> None:
    logits = torch.randn(T, E, requires_grad=True)
    for k in (K, (1, K)):
        weights, indices = make_router("probmoe", num_experts=E, k=k)(torch.zeros(T, 4), logits)
        (gradient,) = torch.autograd.grad(weights.square().sum(), logits)
        assert gradient.isfinite().all()
        missed = torch.ones(T, E + 1).scatter(-1, indices, 0)[:, :E].bool()
        assert (gradient[missed] != 0).all()


def test_whether_evaluation_is_the_usual_router() -> None:
    assert make_router("topk", num_experts=E, k=K, normalize=True).top_k_in_evaluation() == (K, True)
    assert make_router("probmoe", num_experts=E, k=K).top_k_in_evaluation() == (K, False)
    assert make_router("probmoe", num_experts=E, k=(1, K)).top_k_in_evaluation() is None


def test_nothing_of_hugging_face_is_imported() -> None:
    code = (
        "import sys, probmoe_ext, probmoe_ext.routers, probmoe_ext.hf; "
        "print([name for name in sys.modules if name.split('.')[0] in ('transformers', 'accelerate', 'datasets')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
