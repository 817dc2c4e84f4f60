"""Expert choice: each expert's best tokens by a plain loop over the experts, and what evaluation does instead."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch

from probmoe_ext.hf import swap_router
from probmoe_ext.routers import expert_choice, make_router
from probmoe_ext.routers.context import Batch
from tests.hf.models import E as EXPERTS
from tests.hf.models import K, tiny, tokens

T, E, H = 13, 5, 4
normalizes = pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])


def choice(k: int, **options: Any) -> Any:
    return make_router("expert_choice", num_experts=E, k=k, **options).train()


@normalizes
@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradient(k: int, masked: bool, normalize: bool) -> None:
    router = choice(k, normalize=normalize)
    rows = [t for t in range(T) if not masked or t % 4 != 2]
    if masked:
        router.batch = Batch(mask=torch.tensor([t in rows for t in range(T)]))
    logits = torch.randn(T, E, dtype=torch.float64, requires_grad=True)
    weights, indices = router(torch.zeros(T, H), logits)
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    capacity = math.ceil(len(rows) * k / E)
    taken = torch.zeros(T, E, dtype=torch.float64)
    for expert in range(E):
        for t in sorted(rows, key=lambda t: -p[t, expert].item())[:capacity]:
            taken[t, expert] = 1
    assert taken.sum(0).eq(capacity).all()
    dense = p * taken
    if normalize:
        dense = dense / dense.sum(-1, keepdim=True).clamp(min=1e-30)
    assert weights.shape == indices.shape == (T, E)
    for t in range(T):
        assert sorted(indices[t].tolist()) == sorted(e if taken[t, e] else E for e in range(E))
    found = torch.zeros(T, E + 1, dtype=torch.float64).scatter(-1, indices, weights)[:, :E]
    torch.testing.assert_close(found, dense)
    g = torch.randn(T, E, dtype=torch.float64)
    padded = torch.nn.functional.pad(g, (0, 1)).gather(-1, indices)
    (ours,) = torch.autograd.grad((weights * padded).sum(), logits)
    torch.testing.assert_close(ours, torch.autograd.grad((dense * g).sum(), logits)[0])
    assert router.weights_for(logits, logits, indices).equal(weights)


def test_with_all_experts_it_is_the_dense_layer() -> None:
    logits = torch.randn(T, E)
    weights, indices = choice(E)(logits, logits)
    assert indices.equal(torch.arange(E).expand(T, E))
    torch.testing.assert_close(weights, logits.softmax(-1))


def test_it_is_not_causal_and_evaluation_is() -> None:
    logits = torch.randn(T, E)
    changed = torch.cat([logits[:-1], logits[-1:] + torch.tensor([50.0, 0, 0, 0, 0])])
    router = choice(1)
    assert not router(logits, logits)[1][:-1].equal(router(changed, changed)[1][:-1])
    router.eval()
    assert router.width == 1
    assert router.top_k_in_evaluation() == (1, False)
    assert router(logits, logits)[1][:-1].equal(router(changed, changed)[1][:-1])
    kept = choice(1, evaluation="expert_choice").eval()
    assert kept.width == E
    assert kept.top_k_in_evaluation() is None
    assert kept(logits, logits)[1].equal(choice(1)(logits, logits)[1])
    # A token alone gets every expert.
    assert kept(logits[:1], logits[:1])[1].tolist() == [list(range(E))]


def test_generation_is_that_of_top_k() -> None:
    ids = tokens(2, 5)
    texts = [
        swap_router(tiny("olmoe"), name, k=2).generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
        for name in ("expert_choice", "topk")
    ]
    assert texts[0].equal(texts[1])


def test_masked_experts_take_no_token() -> None:
    logits = torch.randn(T, E).index_fill(1, torch.tensor([3]), -torch.inf)
    _, indices = choice(2)(logits, logits)
    assert not (indices == 3).any()


def test_the_warning_comes_once() -> None:
    expert_choice._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        swap_router(tiny("olmoe"), "expert_choice", k=K)
    told = [one for one in caught if "not causal" in str(one.message)]
    assert len(told) == 1


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="takes one k"):
        make_router("expert_choice", num_experts=EXPERTS, k=(1, 2))
    with pytest.raises(ValueError, match=r"evaluation of router .* must be one of topk, expert_choice; got"):
        choice(1, evaluation="tokens")
