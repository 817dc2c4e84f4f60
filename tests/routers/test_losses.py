"""Auxiliary losses against their definitions, the library's, finite differences, and what a mask must do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from probmoe_ext.ops import subset_marginals, subset_sample
from probmoe_ext.routers import load_balancing_loss, z_loss

T, E = 40, 8
ks = pytest.mark.parametrize("k", [1, 3, (1, 4)], ids=str)


def drawn(k: Any, tokens: int = T, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    logits = (2 * torch.randn(tokens, E, dtype=torch.float64)).to(dtype)
    return logits, subset_sample(logits, k, seed=1)


@ks
@pytest.mark.parametrize("probabilities", ["marginals", "softmax"])
def test_the_definition(k: Any, probabilities: str) -> None:
    logits, indices = drawn(k)
    mask = torch.rand(T) < 0.7
    counts, mass = torch.zeros(E, dtype=torch.float64), torch.zeros(E, dtype=torch.float64)
    for token in mask.nonzero().flatten().tolist():
        for expert in indices[token].tolist():
            if expert < E:
                counts[expert] += 1
        row = logits[token]
        mass += subset_marginals(row, k) if probabilities == "marginals" else row.softmax(-1)
    expected = E * (counts / counts.sum() * mass / mass.sum()).sum()
    options: dict[str, Any] = {"mask": mask, "probabilities": probabilities}
    torch.testing.assert_close(load_balancing_loss(logits, indices, k, **options), expected)
    torch.testing.assert_close(
        load_balancing_loss(logits, indices, k, normalization="transformers", **options),
        expected * counts.sum() / mask.sum(),
    )


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_the_librarys_for_softmax_and_top_k(k: int, masked: bool) -> None:
    modeling = pytest.importorskip("transformers.models.olmoe.modeling_olmoe")
    layers = [torch.randn(T, E) for _ in range(3)]
    mask = (torch.rand(4, T // 4) < 0.6).long() if masked else None
    expected = modeling.load_balancing_loss_func(tuple(layers), E, k, mask)
    logits = torch.cat(layers)
    got = load_balancing_loss(
        logits,
        logits.topk(k).indices,
        k,
        mask=None if mask is None else mask.flatten().repeat(3),
        probabilities="softmax",
        normalization="transformers",
    )
    torch.testing.assert_close(got, expected.float())


def test_subsets_of_size_1_have_the_softmax_as_marginals() -> None:
    logits, indices = drawn(1)
    torch.testing.assert_close(
        load_balancing_loss(logits, indices, 1), load_balancing_loss(logits, indices, 1, probabilities="softmax")
    )


@ks
def test_the_gradient(k: Any) -> None:
    logits, indices = drawn(k, 5)
    mask = torch.tensor([1, 0, 1, 1, 1])
    for probabilities in ("marginals", "softmax"):
        assert torch.autograd.gradcheck(
            lambda x, p=probabilities: load_balancing_loss(x, indices, k, mask=mask, probabilities=p),
            logits.requires_grad_(),
        )
    assert torch.autograd.gradcheck(lambda x: z_loss(x, mask=mask), logits)


def test_even_routing_has_loss_1_and_uneven_more() -> None:
    logits = torch.zeros(E, E)
    even = torch.arange(E).unsqueeze(1)
    torch.testing.assert_close(load_balancing_loss(logits, even, 1), torch.tensor(1.0))
    logits[:, 0] = 5.0
    uneven = load_balancing_loss(logits, torch.zeros(E, 1, dtype=torch.long), 1)
    assert uneven > 7
    # Descent makes the crowded expert less probable.
    logits.requires_grad_()
    load_balancing_loss(logits, torch.zeros(E, 1, dtype=torch.long), 1).backward()
    assert logits.grad is not None
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()


@ks
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_masked_tokens_change_nothing(k: Any, dtype: torch.dtype) -> None:
    logits, indices = drawn(k, dtype=dtype)
    kept = 25
    mask = torch.arange(T) < kept
    spoilt = logits.masked_fill(~mask.unsqueeze(-1), 300.0).requires_grad_()
    for loss, alone in (
        (load_balancing_loss(spoilt, indices, k, mask=mask), load_balancing_loss(logits[:kept], indices[:kept], k)),
        (z_loss(spoilt, mask=mask), z_loss(logits[:kept])),
    ):
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, alone)
        (gradient,) = torch.autograd.grad(loss, spoilt)
        assert (gradient[kept:] == 0).all()
        assert (gradient[:kept] != 0).any()
    none = torch.zeros(T, dtype=torch.bool)
    assert load_balancing_loss(logits, indices, k, mask=none) == 0
    assert z_loss(logits, mask=none) == 0


def test_leading_dimensions_and_the_z_loss() -> None:
    logits, indices = drawn(3)
    shaped = load_balancing_loss(logits.view(4, 10, E), indices.view(4, 10, 3), 3, mask=torch.ones(4, 10))
    torch.testing.assert_close(shaped, load_balancing_loss(logits, indices, 3))
    torch.testing.assert_close(z_loss(logits), logits.exp().sum(-1).log().square().mean())


def test_it_compiles_in_one_graph() -> None:
    logits, indices = drawn((1, 4), dtype=torch.float32)
    mask = torch.arange(T) < 30

    def both(logits: torch.Tensor) -> torch.Tensor:
        return load_balancing_loss(logits, indices, (1, 4), mask=mask) + z_loss(logits, mask=mask)

    torch.testing.assert_close(torch.compile(both, fullgraph=True, backend="aot_eager")(logits), both(logits))


def test_what_is_refused() -> None:
    logits, indices = drawn(3)
    with pytest.raises(ValueError, match="probabilities must be one of marginals, softmax; got 'sigmoid'"):
        load_balancing_loss(logits, indices, 3, probabilities="sigmoid")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="normalization must be one of switch, transformers; got 'none'"):
        load_balancing_loss(logits, indices, 3, normalization="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="k must be at most the number of experts, 8, got 9"):
        load_balancing_loss(logits, indices, 9)
    with pytest.raises(ValueError, match=r"indices \(40, 3\) and logits \(39, 8\) must agree"):
        load_balancing_loss(logits[1:], indices, 3)
    with pytest.raises(ValueError, match=r"mask must have one value for each of 40 tokens, got shape \(39,\)"):
        z_loss(logits, mask=torch.ones(39))
    with pytest.raises(ValueError, match=r"logits must have shape \[\.\.\., E\]"):
        z_loss(logits[0])
