"""DenseMixer: the values of top-k, and the gradient of the sum over all experts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from probmoe_ext.hf import swap_router
from probmoe_ext.routers import Router, make_router
from tests.hf.models import E, H, K, tiny
from tests.routers.experts import LoopEvaluation

T, N, D = 7, 5, 4


def inputs(num_experts: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(T, num_experts, dtype=torch.float64, requires_grad=True)
    return hidden, logits


def restated(
    evaluation: LoopEvaluation, x: torch.Tensor, logits: torch.Tensor, k: int, normalize: bool, chosen: list[list[int]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and a scalar whose gradient is the estimator's if the output's is ``x.cos()``; token by token."""
    rows, objective = [], torch.zeros((), dtype=torch.float64)
    for token, one in enumerate(chosen):
        p = torch.softmax(logits[token], -1)
        total = p[one].sum() if normalize else torch.ones(())
        rows.append(sum(p[e] / total * evaluation.expert(e, x[token]) for e in one))
        gradient = x[token].detach().cos()
        for e in range(len(p)):
            output = evaluation.expert(e, x[token])
            if e in one:
                objective = objective + gradient @ (p[e] / total * output)
            else:  # neither the expert nor what it reads learns; the weight does
                objective = objective + gradient @ output.detach() * p[e] / total.detach()
    return evaluation.scale * torch.stack(rows), evaluation.scale * objective  # type: ignore[arg-type]


def routed(router: Router, evaluation: LoopEvaluation, x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    weights, indices = router(x, logits)
    return router.run_experts(evaluation, x, indices, weights * evaluation.scale)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(("k", "scale"), [(1, 1.0), (2, 2.5), (N, 1.0)])
def test_values_are_those_of_top_k_and_gradients_those_of_all_experts(normalize: bool, k: int, scale: float) -> None:
    x, logits = inputs()
    evaluation = LoopEvaluation(N, D, scale=scale)
    router = make_router("densemixer", num_experts=N, k=k, normalize=normalize)
    output = routed(router, evaluation, x, logits)
    expected, objective = restated(evaluation, x, logits, k, normalize, logits.topk(k).indices.tolist())
    torch.testing.assert_close(output, expected)
    leaves = (x, logits, evaluation.up, evaluation.down)
    ours = torch.autograd.grad(output, leaves, x.detach().cos())
    theirs = torch.autograd.grad(objective, leaves, retain_graph=True)
    torch.testing.assert_close(ours, theirs)
    if k == N:  # nobody is left out, and the estimator is the gradient of the output
        torch.testing.assert_close(ours, torch.autograd.grad(expected, leaves, x.detach().cos()))
    else:
        assert (ours[1].abs() > 1e-9).all()
        top = make_router("topk", num_experts=N, k=k, normalize=normalize)
        other = evaluation(x, *reversed(top(x, logits)))
        assert not torch.allclose(torch.autograd.grad(other, logits, x.detach().cos())[0], ours[1])


def test_without_a_router_that_learns_nothing_dense_is_evaluated() -> None:
    x, logits = inputs()
    evaluation = LoopEvaluation(N, D)
    evaluation.frozen = None  # type: ignore[assignment,method-assign]
    router = make_router("densemixer", num_experts=N, k=2)
    expected, _ = restated(evaluation, x, logits, 2, False, logits.topk(2).indices.tolist())
    torch.testing.assert_close(routed(router, evaluation, x, logits.detach()), expected)
    with torch.no_grad():
        torch.testing.assert_close(routed(router, evaluation, x, logits), expected)
    router.eval()
    torch.testing.assert_close(routed(router, evaluation, x, logits), expected)
    assert router.top_k_in_evaluation() == (2, False)


def test_an_expert_that_must_not_be_chosen_has_no_gradient() -> None:
    x, logits = inputs()
    masked = logits.masked_fill(torch.tensor([False, True, False, False, True]), -torch.inf)
    router, evaluation = make_router("densemixer", num_experts=N, k=2), LoopEvaluation(N, D)
    (gradient,) = torch.autograd.grad(routed(router, evaluation, x, masked).sum(), logits)
    assert gradient.isfinite().all()
    assert (gradient[:, [1, 4]] == 0).all()
    # Sigmoid scores know nothing of the mask by themselves.
    scores = logits.sigmoid()
    weights, indices = router(x, masked, scores)
    assert weights.equal(scores.gather(-1, indices))
    (gradient,) = torch.autograd.grad(router.run_experts(evaluation, x, indices, weights).sum(), logits)
    assert (gradient[:, [1, 4]] == 0).all()
    assert (gradient[:, [0, 2, 3]] != 0).all()


def test_given_experts_are_weighted_and_the_others_heard() -> None:
    x, logits = inputs()
    router, evaluation = make_router("densemixer", num_experts=N, k=2, normalize=True), LoopEvaluation(N, D)
    _, indices = router(x, logits)
    given = (indices + 1) % N
    weights = router.weights_for(x, logits, given)
    output = router.run_experts(evaluation, x, given, weights)
    expected, objective = restated(evaluation, x, logits, 2, True, given.tolist())
    torch.testing.assert_close(output, expected)
    (ours,) = torch.autograd.grad(output, logits, x.detach().cos())
    torch.testing.assert_close(ours, torch.autograd.grad(objective, logits)[0])


def test_experts_are_run_once_after_each_forward() -> None:
    x, logits = inputs()
    router, evaluation = make_router("densemixer", num_experts=N, k=2), LoopEvaluation(N, D)
    weights, indices = router(x, logits)
    for twin in (copy.deepcopy(router), pickle.loads(pickle.dumps(router))):
        with pytest.raises(ValueError, match="run_experts follows forward"):
            twin.run_experts(evaluation, x, indices, weights)
    router.run_experts(evaluation, x, indices, weights)
    with pytest.raises(ValueError, match="run_experts follows forward"):
        router.run_experts(evaluation, x, indices, weights)


@pytest.mark.parametrize(("family", "scale"), [("olmoe", 1.0), ("qwen3", 1.0), ("deepseek_v2", 2.5)])
def test_a_block_of_a_model(family: str, scale: float) -> None:
    model = swap_router(tiny(family), "densemixer").train()
    block = model.model.layers[-1].mlp
    gate, held, normalize = block.gate, block.experts, family == "qwen3"
    x = torch.randn(1, T, H, requires_grad=True)
    block(x).sum().backward()
    found = gate.weight.grad.clone(), held.down_proj.grad.clone()
    model.zero_grad()
    flat = x.detach()[0]
    logits = flat @ gate.weight.T
    p = logits.softmax(-1)
    z = torch.zeros(T, E).scatter(-1, logits.topk(K).indices, 1)
    total = (p * z).sum(-1, keepdim=True) if normalize else torch.ones(T, 1)
    matrices = zip(held.gate_up_proj, held.down_proj, strict=True)
    outputs = torch.stack([held._apply_gate(flat @ up.T) @ down.T for up, down in matrices])
    weights = z * p / total + (1 - z) * p / total.detach()
    heard = (weights * outputs.detach().sum(-1).T).sum()
    learning = (z * (p / total).detach() * outputs.sum(-1).T).sum()
    (scale * (heard + learning)).backward()
    torch.testing.assert_close(found, (gate.weight.grad, held.down_proj.grad), rtol=1e-3, atol=1e-4)
