"""Experts by importance: against loops over tokens, queries and keys, and in a model that generates with a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from probmoe_ext.hf import swap_router
from probmoe_ext.routers import make_router
from probmoe_ext.routers.context import Batch, LayerContext
from tests.hf.models import gates, tiny, tokens

B, HEADS, L, E, H = 2, 3, 5, 8, 4
BAND = (1, 6)
normalizes = pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])


def attention(length: int = L, padding: int = 0, causal: bool = True) -> torch.Tensor:
    """Random attention; the first tokens of the last row are padding, and nobody attends to them."""
    scores = torch.randn(B, HEADS, length, length, dtype=torch.float64)
    if causal:
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    if padding:
        scores[-1, :, :, :padding] = -torch.inf
        scores[-1, :, :padding, 0] = 0  # padding attends to something, as in models
    return scores.softmax(-1)


def restated(weights: torch.Tensor, own: bool, real: list[list[bool]]) -> list[float]:
    found = []
    mean = weights.mean(1)
    for b in range(len(mean)):
        for i in range(mean.shape[1]):
            judged = []
            for q in range(mean.shape[1]):
                seen = [j for j in range(mean.shape[2]) if mean[b, q, j] > 0]
                if (q == i) if own else (real[b][q] and i in seen):
                    judged.append(len(seen) * mean[b, q, i].item())
            found.append(sum(judged) / max(len(judged), 1))
    return found


@normalizes
@pytest.mark.parametrize("causal", [True, False], ids=["own query", "all queries"])
@pytest.mark.parametrize("padding", [0, 2])
def test_values_and_gradient(causal: bool, padding: int, normalize: bool) -> None:
    router: Any = make_router("da_moe", num_experts=E, k=BAND, causal=causal, normalize=normalize)
    real = [[True] * L, [place >= padding for place in range(L)]]
    if padding:
        router.batch = Batch(mask=torch.tensor(real).flatten())
    router.layer = LayerContext(attention=attention(padding=padding, causal=causal))
    logits = torch.randn(B * L, E, dtype=torch.float64, requires_grad=True)
    weights, indices = router(torch.zeros(B * L, H), logits)
    importance = restated(router.layer.attention, causal, real)
    torch.testing.assert_close(router.importance(router.layer.attention).tolist(), importance)
    g, target = torch.randn(B * L, BAND[1], dtype=torch.float64), 0
    for t, score in enumerate(importance):
        count = BAND[0] + round((BAND[1] - BAND[0]) * score / (1 + score))
        best = sorted(range(E), key=lambda expert: -logits[t, expert].item())[:count]
        assert indices[t].tolist() == best + [E] * (BAND[1] - count)
        p = logits[t].exp() / logits[t].exp().sum()
        expected = p[best] / p[best].sum() if normalize else p[best]
        torch.testing.assert_close(weights[t, :count], expected)
        assert weights[t, count:].eq(0).all()
        target = target + (expected * g[t, :count]).sum()
    (ours,) = torch.autograd.grad((weights * g).sum(), logits)
    torch.testing.assert_close(ours, torch.autograd.grad(target, logits)[0])
    assert router.weights_for(logits, logits, indices).equal(weights)


@pytest.mark.parametrize("causal", [True, False])
def test_the_limits(causal: bool) -> None:
    router: Any = make_router("da_moe", num_experts=E, k=(1, 5), causal=causal)
    logits = torch.randn(L, E)
    uniform = torch.ones(1, 1, L, L).tril()
    for weights, count in (
        (uniform / uniform.sum(-1, keepdim=True), 3),  # the middle
        (torch.eye(L)[None, None].repeat(1, 1, 1, 1), 3),  # each attends to itself alone
    ):
        router.layer = LayerContext(attention=weights)
        assert (router(logits, logits)[1] < E).sum(-1).tolist() == [count] * L
    # All attend to the first token: it gets more than the others, which get the least.
    first = torch.full((1, 1, L, L), 1e-9).tril()
    first[..., 0] = 1
    router.layer = LayerContext(attention=first)
    counts = (router(logits, logits)[1] < E).sum(-1).tolist()
    assert counts[1:] == [1] * (L - 1)
    assert counts[0] == (3 if causal else 4)  # 1 + round(4 * 3 / (1 + 3)) by the mean of 1 .. 5 keys


def test_one_number_is_top_k() -> None:
    router: Any = make_router("da_moe", num_experts=E, k=3, normalize=True)
    router.layer = LayerContext(attention=attention())
    logits = torch.randn(B * L, E)
    plain = make_router("topk", num_experts=E, k=3, normalize=True)
    for one, other in zip(router(logits, logits), plain(logits, logits), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache_chooses_as_a_pass_over_the_text(cache: str) -> None:
    model = swap_router(tiny("olmoe", attn_implementation="eager"), "da_moe", k=(1, 8))
    seen: list[list[torch.Tensor]] = [[] for _ in gates(model)]
    for gate, found in zip(gates(model), seen, strict=True):
        gate.register_forward_hook(lambda module, args, output, found=found: found.append(output[2]))
    text = model.generate(
        tokens(2, 5), max_new_tokens=4, do_sample=False, eos_token_id=None, cache_implementation=cache
    )
    generated = [torch.cat([one.unflatten(0, (2, -1)) for one in found], 1) for found in seen]
    for found in seen:
        found.clear()
    model(text[:, :-1])
    for one, found in zip(generated, seen, strict=True):
        assert one.equal(found[0].unflatten(0, (2, -1)))
    assert (generated[0] == 8).sum(-1).unique().numel() > 1


def test_what_is_missing_is_said() -> None:
    with pytest.raises(ValueError, match=r'needs attention weights.*attn_implementation="eager"'):
        swap_router(tiny("olmoe", attn_implementation="sdpa"), "da_moe", k=(1, 2))
    router = make_router("da_moe", num_experts=E, k=BAND)
    router.layer = LayerContext(attention=attention())
    with pytest.raises(ValueError, match="got the attention of 10 tokens for 4 hidden states"):
        router(torch.zeros(4, H), torch.zeros(4, E))
