"""Hash routing: the same experts as a plain restatement in Python's integers, balanced, and with a cache."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

from probmoe_ext.hf import swap_router
from probmoe_ext.routers import make_router
from probmoe_ext.routers.context import Batch
from tests.hf.models import E as EXPERTS
from tests.hf.models import H, K, gates, tiny, tokens

E, WORD = 6, (1 << 64) - 1


def mixed(number: int) -> int:
    number = number * 0x9E3779B97F4A7C15 & WORD
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & WORD
    number = (number ^ number >> 27) * 0x94D049BB133111EB & WORD
    return number ^ number >> 31


def restated(token: int, k: int, seed: int) -> list[int]:
    block, place = divmod(token, E)
    start = mixed(block + mixed(seed & WORD) & WORD)
    keys = [mixed(start + expert & WORD) for expert in range(E)]
    signed = [key - (1 << 64) if key >> 63 else key for key in keys]
    order = sorted(range(E), key=lambda expert: signed[expert])
    return [order[(place + j) % E] for j in range(k)]


@pytest.mark.parametrize("seed", [0, 1, -5, (1 << 63) - 1, -(1 << 63)])
@pytest.mark.parametrize("k", [1, 2, E])
def test_the_experts_of_a_token(k: int, seed: int) -> None:
    router = make_router("hash", num_experts=E, k=k, seed=seed)
    ids = torch.tensor([[0, 1, 5, 6, 7], [151935, 128, 128, 3, 10**9]])
    router.batch = Batch(token_ids=ids)
    weights, indices = router(torch.zeros(10, H), torch.zeros(10, E, dtype=torch.bfloat16))
    assert indices.tolist() == [restated(token, k, seed) for token in ids.flatten().tolist()]
    assert weights.dtype == torch.bfloat16
    assert weights.eq(torch.tensor(1 / k).bfloat16()).all()
    assert all(len(set(row)) == k for row in indices.tolist())


@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("vocabulary", [50304, 997])
def test_the_vocabulary_is_balanced(k: int, vocabulary: int) -> None:
    experts: Any = make_router("hash", num_experts=E, k=k)
    indices = experts.experts_of(torch.arange(vocabulary))
    load = indices.flatten().bincount(minlength=E)
    assert (load - vocabulary * k / E).abs().max() < E  # whole blocks are even, the last may be cut
    # And within a pair of experts, the tokens are as mixed as chance has them: no expert follows another.
    first = indices[:, 0]
    pairs = Counter(zip(first[:-1].tolist(), first[1:].tolist(), strict=True))
    within = (vocabulary - vocabulary / E) / (E * (E - 1))
    assert all(0.5 * within < pairs[a, b] < 2 * within for a in range(E) for b in range(E) if a != b)


def test_seeds_are_different_hashes() -> None:
    ids = torch.arange(3000)
    found = [make_router("hash", num_experts=E, k=1, seed=seed).experts_of(ids).flatten() for seed in range(3)]
    assert found[0].equal(make_router("hash", num_experts=E, k=1).experts_of(ids).flatten())
    for one, other in ((0, 1), (1, 2), (0, 2)):
        same = (found[one] == found[other]).float().mean().item()
        assert same == pytest.approx(1 / E, abs=0.03)
        # Nor is one the other moved by a block.
        moved = (found[one][E:] == found[other][:-E]).float().mean().item()
        assert moved == pytest.approx(1 / E, abs=0.03)


def test_generation_with_a_cache_goes_to_the_experts_of_each_token() -> None:
    model = swap_router(tiny("olmoe"), "hash", k=K)
    seen: list[torch.Tensor] = []
    gates(model)[0].register_forward_hook(lambda module, args, output: seen.append(output[2]))
    generated = model.generate(tokens(2, 5), max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert [len(one) for one in seen] == [10, 2, 2, 2]
    router = gates(model)[0].probmoe
    chosen = torch.cat([one.unflatten(0, (2, -1)) for one in seen], 1)
    assert chosen.equal(router.experts_of(generated[:, :-1].flatten()).unflatten(0, (2, -1)))
    # Without the cache the same text comes out.
    again = model.generate(tokens(2, 5), max_new_tokens=4, do_sample=False, eos_token_id=None, use_cache=False)
    assert again.equal(generated)


def test_what_is_missing_is_said() -> None:
    model = swap_router(tiny("olmoe"), "hash", k=K)
    with pytest.raises(ValueError, match="router 'hash' needs token ids"):
        model(inputs_embeds=torch.randn(1, 4, H))
    router = make_router("hash", num_experts=EXPERTS, k=1)
    router.batch = Batch(token_ids=torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="got 3 token ids for 4 hidden states"):
        router(torch.zeros(4, H), torch.zeros(4, EXPERTS))


def test_given_experts() -> None:
    router = make_router("hash", num_experts=E, k=2)
    assert router.weights_for(torch.zeros(1, H), torch.zeros(1, E), torch.tensor([[3, E]])).tolist() == [[0.5, 0]]


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="takes one k"):
        make_router("hash", num_experts=E, k=(1, 2))
    with pytest.raises(TypeError, match=r"seed of router 'hash' must be an int, got 0\.5"):
        make_router("hash", num_experts=E, k=1, seed=0.5)
    with pytest.raises(ValueError, match="must fit a signed 64-bit integer"):
        make_router("hash", num_experts=E, k=1, seed=1 << 63)
