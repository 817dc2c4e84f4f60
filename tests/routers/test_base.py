"""The contract of a router and its registry."""

from __future__ import annotations

import pytest
import torch

from probmoe_ext.routers import (
    ProbMoERouter,
    Router,
    TopKRouter,
    available_routers,
    make_router,
    register_router,
)


def test_the_registry_knows_the_routers_of_the_package() -> None:
    assert {"topk", "probmoe"} <= set(available_routers())
    assert list(available_routers()) == sorted(available_routers())
    assert isinstance(make_router("topk", num_experts=4, k=2), TopKRouter)
    assert isinstance(make_router("probmoe", num_experts=4, k=(1, 2)), ProbMoERouter)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"one of .*probmoe.*topk.*; got 'top_k'"):
        make_router("top_k", num_experts=4, k=2)


def test_an_unknown_option_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'probmoe' has no option 'temperature'; its options: normalize, forward, "):
        make_router("probmoe", num_experts=4, k=2, temperature=1.0)


@pytest.mark.parametrize(
    ("k", "message"),
    [
        (5, "at most the number of experts, 4, got 5"),
        ((1, 5), r"at most the number of experts, 4, got \(1, 5\)"),
        (0, "at least 1"),
        ((0, 0), "at least 1"),
        ((-1, 2), "at least 1"),
        ((3, 2), r"ascending, got \(3, 2\)"),
        ((1, 2, 3), "pair"),
    ],
)
def test_k_out_of_range(k: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_router("probmoe", num_experts=4, k=k)  # type: ignore[arg-type]


@pytest.mark.parametrize("k", [True, 2.0, "2", None, (1, "2")])
def test_k_that_is_no_integer(k: object) -> None:
    with pytest.raises(TypeError, match="must be an int"):
        make_router("probmoe", num_experts=4, k=k)  # type: ignore[arg-type]


def test_no_experts() -> None:
    with pytest.raises(ValueError, match="num_experts must be at least 1, got 0"):
        make_router("topk", num_experts=0, k=1)


def test_k_and_width() -> None:
    exact, band, degenerate = (make_router("probmoe", num_experts=8, k=k) for k in (2, [1, 3], (2, 2)))
    assert (exact.k, exact.width, exact.leaves_slots_unused) == (2, 2, False)
    assert (band.k, band.width, band.leaves_slots_unused) == ((1, 3), 3, True)
    assert degenerate.k == 2


def test_the_repr_shows_the_options() -> None:
    shown = repr(make_router("probmoe", num_experts=8, k=(1, 3), normalize=True))
    assert "num_experts=8, k=(1, 3), normalize=True, forward='sample', backward='marginal'" in shown


def test_a_router_of_ones_own() -> None:
    @register_router("first_experts")
    class FirstExperts(Router):
        def __init__(self, num_experts: int, k: int, *, weight: float = 1.0) -> None:
            super().__init__(num_experts, k, weight=weight)

        def forward(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            indices = torch.arange(self.k_max).expand(len(logits), -1)
            return torch.full(indices.shape, self.options["weight"], dtype=logits.dtype), indices

    router = make_router("first_experts", num_experts=4, k=2, weight=0.5)
    weights, indices = router(torch.zeros(3, 8), torch.zeros(3, 4))
    assert router.name == "first_experts"
    assert weights.tolist() == [[0.5, 0.5]] * 3
    assert indices.tolist() == [[0, 1]] * 3
    assert router.top_k_in_evaluation() is None


def test_what_may_be_registered() -> None:
    with pytest.raises(ValueError, match=r"'topk' is already registered, by probmoe_ext\.routers\.topk\.TopKRouter"):
        register_router("topk")(type("Another", (Router,), {}))
    with pytest.raises(TypeError, match="subclass of Router"):
        register_router("dictionary")(dict)  # type: ignore[type-var]


def test_the_contract_alone_routes_nothing() -> None:
    with pytest.raises(NotImplementedError, match="forward"):
        Router(4, 2)(torch.zeros(1, 8), torch.zeros(1, 4))
