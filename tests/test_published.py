"""The restatements of published routing compute the published law: what is timed against is the same function."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch import Tensor

from benchmarks import published
from benchmarks.published import chain, circuit, differentiated_circuit, walked_circuit
from benchmarks.published.weights import clamped_log_p
from probmoe_ext import reference


def by_differentiated_circuit(logits: Tensor, k: int) -> Tensor:
    diagram = circuit.exactly(k, logits.shape[-1])
    return differentiated_circuit.marginals(diagram, torch.nn.functional.logsigmoid(logits))[0]


def by_walked_circuit(logits: Tensor, k: int) -> Tensor:
    diagram = circuit.exactly(k, logits.shape[-1])
    return walked_circuit.downward(diagram, *walked_circuit.upward(diagram, clamped_log_p(logits)))


MARGINALS = (chain.marginals, by_differentiated_circuit, by_walked_circuit)
ROUTES = (published.route_by_chain, published.route_by_differentiated_circuit, published.route_by_walked_circuit)


def normal(rows: int, experts: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, experts, generator=torch.Generator().manual_seed(experts), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("marginals", MARGINALS)
@pytest.mark.parametrize(("experts", "k"), [(2, 1), (8, 1), (8, 3), (16, 12), (4, 4), (64, 8)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_marginals(
    marginals: Callable[[Tensor, int], Tensor], experts: int, k: int, dtype: torch.dtype, tolerance: float
) -> None:
    logits = normal(20, experts, dtype)
    want = reference.subset_marginals(logits.double(), k).to(dtype)
    torch.testing.assert_close(marginals(logits, k).detach(), want, rtol=0, atol=tolerance)


def test_a_chain_needs_no_power_of_two() -> None:
    logits = normal(5, 11)
    want = reference.subset_marginals(logits, 4)
    torch.testing.assert_close(chain.marginals(logits, 4).detach(), want, rtol=0, atol=1e-12)
    assert published.route_by_chain(logits, 4)[1].shape == (5, 4)


@pytest.mark.parametrize("route", ROUTES)
def test_weights_are_the_softmax_and_their_gradient_is_ours_but_for_the_fixed_complement(
    route: Callable[[Tensor, int], tuple[Tensor, Tensor]],
) -> None:
    """Where ``log(1 - p)`` is fixed, ``m`` depends on r through ``log p`` alone, and ``d log p / dr = 1 - sigmoid(r)``.

    In ours ``r = log p - log(1 - p)`` moves as a whole. What comes through the softmax is the same in all.
    """
    torch.manual_seed(3)
    logits = normal(6, 16).requires_grad_()
    weights, indices = route(logits, 4)
    softmax = torch.softmax(logits, -1).gather(-1, indices)
    torch.testing.assert_close(weights, softmax)
    upstream = normal(6, 4)
    (got,) = torch.autograd.grad(weights, logits, upstream)
    (through_softmax,) = torch.autograd.grad(softmax, logits, upstream)
    ours = torch.ops.probmoe_ext.route_probmoe_backward(upstream, logits.detach(), indices, 4, 4, False, True)
    through_marginals = ours - through_softmax
    if route is not published.route_by_walked_circuit:
        through_marginals = through_marginals * torch.sigmoid(-logits.detach())
    assert through_marginals.abs().amax() > 1e-3
    torch.testing.assert_close(got - through_softmax, through_marginals, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("route", ROUTES)
def test_subsets_are_drawn_by_their_probabilities(route: Callable[[Tensor, int], tuple[Tensor, Tensor]]) -> None:
    """Pearson's statistic over all subsets: 56 of 3 out of 8, expected at least 10 times each; p = 1e-6 at 120."""
    torch.manual_seed(4)
    logits, num_rows = normal(1, 8), 20000
    subsets = torch.tensor(list(combinations(range(8), 3)))
    expected = num_rows * torch.softmax(logits[0][subsets].sum(-1), -1)
    assert expected.min() > 10
    indices = route(logits.expand(num_rows, -1), 3)[1].sort(-1).values
    found = (indices.unsqueeze(1) == subsets).all(-1)
    assert found.sum(-1).eq(1).all(), "three different experts a row"
    assert ((found.sum(0) - expected) ** 2 / expected).sum() < 120


@pytest.mark.parametrize("draw", ["chain", "circuit"])
def test_every_draw_is_k_hot(draw: str) -> None:
    """At the size that is timed, in its precision; and the experts are in as often as the marginals say."""
    torch.manual_seed(5)
    num_rows, k = 4000, 8
    row = normal(1, 64, torch.float32)
    logits = row.expand(num_rows, -1)
    if draw == "chain":
        log_p = clamped_log_p(logits)
        z = chain.draw(chain.states(log_p, torch.log(-torch.expm1(log_p)), k), log_p, k)
    else:
        diagram = circuit.exactly(k, 64)
        z = circuit.draw(diagram, differentiated_circuit.upward(diagram, torch.nn.functional.logsigmoid(logits))[1])
    assert ((z == 0) | (z == 1)).all() and (z.sum(-1) == k).all()
    m = reference.subset_marginals(row.double(), k)[0]
    deviations = (z.double().mean(0) - m) / (m * (1 - m) / num_rows).sqrt()
    assert deviations.abs().max() < 4.9, "64 normal deviates: beyond by chance once in 16000 runs"


def test_the_circuit_of_olmoe() -> None:
    """Sizes 0 to 2 of each pair of experts, and so on to all of the root's; no node has more than nine elements."""
    diagram = circuit.exactly(8, 64)
    assert [len(level) for level in diagram.levels] == [32 * 3, 16 * 5, 8 * 9, 4 * 9, 2 * 9, 1]
    assert diagram.elements.shape == (diagram.sentinel, 9, 2) and diagram.sentinel == 128 + 303
    assert [len(level) for level in circuit.exactly(4, 4).levels] == [2, 1], "less what the root does not reach"


@pytest.mark.parametrize(("experts", "k", "message"), [(12, 3, "num_experts: 12"), (1, 1, "1 is"), (8, 9, "k: 9")])
def test_sizes_without_a_circuit_are_refused(experts: int, k: int, message: str) -> None:
    for route in ROUTES[1:]:
        with pytest.raises(ValueError, match=message):
            route(normal(2, experts), k)
