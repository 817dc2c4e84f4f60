"""torch.func and forward mode: what works has the right values, what does not says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from probmoe_ext import ops
from tests import oracle
from tests.inputs import Band

E = 5
BANDS: list[Band] = [(2, 2), (1, 3)]
Function = Callable[[Tensor], Tensor]


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


V, OTHER, INDICES = numbers(E, seed=1), numbers(E, seed=2), torch.tensor([0, 3])
Made = Callable[[Band], tuple[Function, Function]]


TWICE: dict[str, Made] = {
    "subset_log_partition": lambda b: (
        lambda r: ops.subset_log_partition(r, b),
        lambda r: oracle.log_partition(r[None], b)[0],
    ),
    "subset_marginals": lambda b: (lambda r: ops.subset_marginals(r, b), lambda r: oracle.marginals(r[None], b)[0]),
    "subset_entropy": lambda b: (lambda r: ops.subset_entropy(r, b), lambda r: oracle.entropy(r[None], b)[0]),
    "subset_pairwise": lambda b: (lambda r: ops.subset_pairwise(r, b), lambda r: oracle.pairwise(r[None], b)[0]),
    "subset_kl": lambda b: (lambda r: ops.subset_kl(r, OTHER, b), lambda r: oracle.kl(r[None], OTHER[None], b)[0]),
    "subset_kl, second argument": lambda b: (
        lambda r: ops.subset_kl(OTHER, r, b),
        lambda r: oracle.kl(OTHER[None], r[None], b)[0],
    ),
}
ONCE: dict[str, Made] = {
    "subset_cardinality": lambda b: (
        lambda r: ops.subset_cardinality(r, b),
        lambda r: oracle.cardinality(r[None], b)[0],
    ),
    "subset_covariance_vp": lambda b: (
        lambda r: ops.subset_covariance_vp(r, V, b),
        lambda r: oracle.covariance_vp(r[None], V[None], b)[0],
    ),
    "subset_covariance_vp, vector": lambda b: (
        lambda r: ops.subset_covariance_vp(OTHER, r, b),
        lambda r: oracle.covariance_vp(OTHER[None], r[None], b)[0],
    ),
}
BOTH = TWICE | ONCE
with_bands = pytest.mark.parametrize("band", BANDS, ids=str)


def equal(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)


def plain_jacobian(function: Function, x: Tensor) -> Tensor:
    return torch.autograd.functional.jacobian(function, x)


@with_bands
@pytest.mark.parametrize("name", BOTH)
def test_first_derivatives(name: str, band: Band) -> None:
    """grad, vjp, jvp, jacrev, jacfwd, vmap of grad, and torch.autograd's dual numbers against enumeration."""
    function, truth = BOTH[name](band)
    x, t = numbers(E, seed=3), numbers(E, seed=4)
    jacobian = plain_jacobian(truth, x)
    equal(jacrev(function)(x), jacobian)
    equal(jacfwd(function)(x), jacobian)
    value, tangent = jvp(function, (x,), (t,))
    equal(value, truth(x))
    equal(tangent, jacobian @ t)
    with forward_ad.dual_level():
        equal(forward_ad.unpack_dual(function(forward_ad.make_dual(x, t))).tangent, jacobian @ t)
    value, pull = vjp(function, x)
    equal(pull(torch.ones_like(value))[0], jacobian.reshape(-1, E).sum(0))
    batch = numbers(3, E, seed=5)
    want = torch.stack([plain_jacobian(truth, row).reshape(-1, E).sum(0) for row in batch])
    equal(vmap(grad(lambda r: function(r).sum()))(batch), want)
    equal(grad(lambda rows: vmap(function)(rows).sum())(batch), want)


@with_bands
@pytest.mark.parametrize("name", TWICE)
def test_second_derivatives(name: str, band: Band) -> None:
    function, truth = TWICE[name](band)
    x = numbers(E, seed=6)
    want = plain_jacobian(lambda r: torch.autograd.functional.jacobian(truth, r, create_graph=True), x)
    equal(hessian(function)(x), want)
    equal(jacrev(jacrev(function))(x), want)


@with_bands
def test_log_prob(band: Band) -> None:
    """By the logits; the indices are a constant."""
    indices = torch.tensor([0, 3, E])[: band[1]]
    x = numbers(E, seed=7)

    def truth(r: Tensor) -> Tensor:
        return oracle.log_prob(r[None], indices[None], band)[0]

    equal(jacfwd(lambda r: ops.subset_log_prob(r, indices, band))(x), plain_jacobian(truth, x))
    outside = torch.tensor([0, 0, E])[: band[1]]
    assert (jacfwd(lambda r: ops.subset_log_prob(r, outside, band))(x) == 0).all(), "-inf, with derivative 0"
    equal(hessian(lambda r: ops.subset_log_prob(r, indices, band))(x), torch.autograd.functional.hessian(truth, x))


@with_bands
def test_marginals_have_one_product_for_both_modes(band: Band) -> None:
    """The Jacobian is symmetric: jvp and vjp are the same call, to the bit."""
    x, t = numbers(4, E, seed=8).float(), numbers(4, E, seed=9).float()
    _, forward = jvp(lambda r: ops.subset_marginals(r, band), (x,), (t,))
    _, pull = vjp(lambda r: ops.subset_marginals(r, band), x)
    assert torch.equal(forward, pull(t)[0])
    assert torch.equal(forward, ops.subset_covariance_vp(x, t, band))


ROUTES: dict[str, Function] = {
    "route_top_k": lambda r: ops.route_top_k(r, 2)[0],
    "route_probmoe": lambda r: ops.route_probmoe(r, (1, 2), training=True, seed=5)[0],
    "subset_indicator": lambda r: ops.subset_indicator(r, 2, 5),
}


@pytest.mark.parametrize("name", ROUTES)
def test_reverse_mode_of_routing(name: str) -> None:
    """torch.func gives what backward gives, mapped and not."""
    function, batch = ROUTES[name], numbers(3, E, seed=10)
    leaf = batch.clone().requires_grad_()
    out = function(leaf)
    upstream = torch.randn_like(out)
    (want,) = torch.autograd.grad(out, leaf, upstream)
    assert torch.equal(vjp(function, batch)[1](upstream)[0], want)
    assert torch.equal(grad(lambda r: (function(r) * upstream).sum())(batch), want)
    rows = vmap(jacrev(function))(batch.unsqueeze(1)).squeeze(3).squeeze(1)  # numbered along the mapped dimension
    equal(torch.einsum("bk,bke->be", upstream, rows), want)


def refused(words: str, call: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError, match=words):
        call()


@pytest.mark.parametrize("name", ["route_top_k", "route_probmoe"])
def test_forward_mode_of_routing_is_refused(name: str) -> None:
    function, x = ROUTES[name], numbers(3, E, seed=11)
    words = rf"{name} has no forward-mode derivative; use reverse mode \(backward, torch.func.vjp, grad or jacrev\)"
    refused(words, lambda: jvp(function, (x,), (x,)))
    refused(words, lambda: jacfwd(function)(x))
    with forward_ad.dual_level():
        refused(words, lambda: function(forward_ad.make_dual(x, x)))
    refused("routing is once differentiable", lambda: jacrev(jacrev(function))(x))


@with_bands
@pytest.mark.parametrize(
    "name", ["subset_log_partition", "subset_cardinality", "subset_marginals", "subset_entropy", "subset_log_prob"]
)
def test_raw_operators_carry_tangents(name: str, band: Band) -> None:
    """What torch.library registers by itself would answer with a tangent of zeros, or none."""
    x, t = numbers(E, seed=15), numbers(E, seed=16)
    others = (torch.tensor([0, 3, E])[: band[1]],) if name == "subset_log_prob" else ()
    public, raw = getattr(ops, name), getattr(torch.ops.probmoe_ext, name)
    want = jvp(lambda r: public(r, *others, band), (x,), (t,))[1]
    for leaf in (x, x.clone().requires_grad_()):
        with forward_ad.dual_level():
            equal(forward_ad.unpack_dual(raw(forward_ad.make_dual(leaf, t), *others, *band)).tangent, want)


def test_raw_operators_without_forward_mode_say_so() -> None:
    x = numbers(3, E, seed=17)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        refused("route_top_k has no forward-mode", lambda: torch.ops.probmoe_ext.route_top_k(dual, 2, True))
        refused(
            "subset_cardinality_backward has no forward-mode",
            lambda: torch.ops.probmoe_ext.subset_cardinality_backward(x[:, :2], dual, 1, 2),
        )


@pytest.mark.parametrize("transform", [grad, lambda f: lambda r: jvp(f, (r,), (r,))], ids=["grad", "jvp"])
def test_raw_operators_have_no_derivative_under_transforms(transform: Any) -> None:
    """And say so; vmap, and what the transform does not differentiate, pass."""
    raw, x = torch.ops.probmoe_ext.subset_marginals, numbers(3, E, seed=18)
    refused(r"subset_marginals has no derivative under torch.func", lambda: transform(lambda r: raw(r, 2, 2).max())(x))
    want = ops.subset_marginals(x, 2)
    assert torch.equal(vmap(lambda r: raw(r, 2, 2))(x), want)
    seen: list[Tensor] = []
    transform(lambda r: (seen.append(raw(x, 2, 2)), r.sum())[1])(x)
    assert torch.equal(seen[0], want)


def test_derivatives_that_end_say_so() -> None:
    x = numbers(E, seed=12)
    refused(
        "subset_cardinality is once differentiable", lambda: jacrev(jacrev(lambda r: ops.subset_cardinality(r, 2)))(x)
    )
    refused("fourth derivative of log Z", lambda: jacrev(jacrev(lambda r: ops.subset_covariance_vp(r, V, 2)))(x))
    refused("fourth derivative of log Z", lambda: hessian(lambda r: ops.subset_covariance_vp(r, V, 2))(x))


def test_draws_have_no_derivative_and_pass_transforms() -> None:
    """Integer results come through grad and jvp as constants."""
    x = numbers(3, E, seed=13)
    gradient, indices = grad(lambda r: (ops.subset_log_partition(r, 2).sum(), ops.subset_mode(r, 2)), has_aux=True)(x)
    assert torch.equal(indices, ops.subset_mode(x, 2)) and torch.equal(gradient, ops.subset_marginals(x, 2))
    _, _, indices = jvp(
        lambda r: (ops.subset_log_partition(r, 2), ops.subset_sample(r, 2, 5)), (x,), (x,), has_aux=True
    )
    assert torch.equal(indices, ops.subset_sample(x, 2, 5))


def test_a_seed_for_each_mapped_row_is_refused() -> None:
    x = numbers(3, E, seed=14)
    with pytest.raises(ValueError, match="argument 1 is shared by all rows and cannot be batched by vmap"):
        vmap(lambda r, s: ops.subset_sample(r, 2, s))(x, torch.arange(3))
    with pytest.raises(ValueError, match="argument 1 is shared by all rows and cannot be batched by vmap"):
        vmap(lambda r, s: ops.route_probmoe(r, 2, training=True, seed=s)[0])(x, torch.arange(3))
