"""Lory: one merged expert for each segment, by the routing of the segment before."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from probmoe_ext.hf import swap_router
from probmoe_ext.hf.merging import merged_experts_forward
from probmoe_ext.routers import make_router
from probmoe_ext.routers.context import Batch
from tests.hf.models import E as MODEL_E
from tests.hf.models import H as MODEL_H
from tests.hf.models import K, experts, gates, tiny, tokens
from tests.routers.experts import LoopEvaluation

B, L, E, D = 3, 11, 4, 5


def routed(
    segment: int, x: torch.Tensor, logits: torch.Tensor, evaluation: LoopEvaluation, mask: torch.Tensor | None
) -> torch.Tensor:
    router = make_router("lory", num_experts=E, k=E, segment=segment)
    router.batch = Batch(shape=(B, L), mask=None if mask is None else mask.flatten())
    weights, indices = router(x.flatten(0, 1), logits.flatten(0, 1))
    assert indices.equal(torch.arange(E).expand(B * L, E))
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[:, 0]))
    return router.run_experts(evaluation, x.flatten(0, 1), indices, weights).view(B, L, D)


def restated(
    segment: int, x: torch.Tensor, logits: torch.Tensor, evaluation: LoopEvaluation, mask: torch.Tensor
) -> dict[tuple[int, int], torch.Tensor]:
    """The output of each token that is no padding."""
    found = {}
    for row in range(B):
        places = mask[row].nonzero().flatten().tolist()
        segments = [places[i : i + segment] for i in range(0, len(places), segment)]
        own = [torch.stack([logits[row, place] for place in one]).mean(0).softmax(-1) for one in segments]
        for number, one in enumerate(segments):
            mixture = own[number - 1] if number else own[0].detach()
            up, down = ((mixture[:, None, None] * stack).sum(0) for stack in (evaluation.up, evaluation.down))
            for place in one:
                output = torch.nn.functional.silu(x[row, place] @ up) @ down
                found[row, place] = evaluation.scale * output
    return found


@pytest.mark.parametrize("segment", [1, 3, 4, L, 100])
@pytest.mark.parametrize("masked", [False, True])
def test_segments_go_through_experts_merged_by_the_segment_before(segment: int, masked: bool) -> None:
    x = torch.randn(B, L, D, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(B, L, E, dtype=torch.float64, requires_grad=True)
    evaluation = LoopEvaluation(E, D, scale=1.5)
    mask = torch.ones(B, L, dtype=torch.bool)
    if masked:
        mask[0, :5] = mask[1, 7:] = mask[2, 3] = False
    output = routed(segment, x, logits, evaluation, mask if masked else None)
    expected = restated(segment, x, logits, evaluation, mask)
    for (row, place), one in expected.items():
        torch.testing.assert_close(output[row, place], one)
    leaves = (x, logits, evaluation.up, evaluation.down)
    ours = torch.autograd.grad(output[mask].cos().sum(), leaves, allow_unused=True)
    theirs = torch.autograd.grad(sum(one.cos().sum() for one in expected.values()), leaves, allow_unused=True)
    if segment >= L:  # one segment, by which no gate learns
        assert all(one[1] is None or not one[1].any() for one in (ours, theirs))
    else:
        torch.testing.assert_close(ours[1], theirs[1])
    for one, two in zip(ours[::2] + ours[3:], theirs[::2] + theirs[3:], strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_merged_experts_of_a_model(family: str) -> None:
    held = experts(tiny(family))[0]
    x = torch.randn(3, 5, MODEL_H)
    # An expert alone is that expert.
    for index in range(MODEL_E):
        alone = torch.zeros(3, MODEL_E)
        alone[:, index] = 1
        expected = held(x.flatten(0, 1), torch.full((15, 1), index), torch.ones(15, 1))
        torch.testing.assert_close(merged_experts_forward(held, x, alone).flatten(0, 1), expected, rtol=1e-4, atol=1e-5)
    # A mixture is an expert with the mixed parameters, biases as well.
    mixture = torch.randn(3, MODEL_E).softmax(-1)
    output = merged_experts_forward(held, x, mixture)
    with torch.no_grad():
        for group in range(3):
            twin = experts(tiny(family))[0]
            for mixed, parameter in zip(twin.parameters(), held.parameters(), strict=True):
                mixed[0] = torch.tensordot(mixture[group], parameter, 1)
            expected = twin(x[group], torch.zeros(5, 1, dtype=torch.long), torch.ones(5, 1))
            torch.testing.assert_close(output[group], expected, rtol=1e-4, atol=1e-5)


def swapped(segment: int = 4) -> Any:
    return swap_router(tiny("olmoe"), "lory", k=MODEL_E, segment=segment)


def test_behind_the_first_segment_nothing_sees_a_later_token() -> None:
    model, ids = swapped(), tokens(2, 12)
    expected = model(ids).logits
    for place in (5, 8, 11):
        other = ids.clone()
        other[:, place] = 3 + (ids[:, place] + 1) % 50
        assert model(other).logits[:, :place].equal(expected[:, :place])
        assert not model(other).logits[:, place:].equal(expected[:, place:])
    # Within it, the values do.
    other = ids.clone()
    other[:, 2] = 3 + (ids[:, 2] + 1) % 50
    assert not model(other).logits[:, 0].equal(expected[:, 0])


def test_padding_on_the_left_moves_no_segment() -> None:
    model, ids = swapped(), tokens(2, 12)
    alone = model(ids[:1, :9]).logits
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    padded = torch.cat((torch.cat((torch.zeros(1, 3, dtype=torch.long), ids[:1, :9]), 1), ids[1:]))
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(padded, attention_mask=mask, position_ids=positions).logits[:1, 3:]
    torch.testing.assert_close(output, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_routes_by_the_prompt(beams: int) -> None:
    model, prompt = swapped(), tokens(2, 7)
    with torch.no_grad():
        recorded: list[tuple[torch.Tensor, torch.Tensor]] = []
        hook = gates(model)[1].register_forward_hook(lambda gate, args, output: recorded.append(output[:2]))
        model.generate(prompt, max_new_tokens=4, do_sample=False, eos_token_id=None, num_beams=beams)
        hook.remove()
    (first, _), *others = recorded
    wanted = first.view(2 * beams, 7, -1).mean(1).softmax(-1)
    assert len(others) == 3
    for _, weights in others:
        torch.testing.assert_close(weights, wanted)
    # A prompt of another size begins anew, and is not taken for the one before.
    cache = model(prompt, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="of which there were 1, and now are 2 rows"):
        model(prompt[:1])
        model(prompt[:, :1], past_key_values=cache)


def test_what_is_not_allowed() -> None:
    with pytest.raises(ValueError, match="router 'lory' merges all experts: k must be 8, got 4"):
        swap_router(tiny("olmoe"), "lory", k=K)
    with pytest.raises(ValueError, match="segment of router 'lory' must be at least 1, got 0"):
        make_router("lory", num_experts=E, k=E, segment=0)
    with pytest.raises(ValueError, match="router 'lory' needs the shape of the batch"):
        make_router("lory", num_experts=E, k=E)(torch.zeros(3, D), torch.zeros(3, E))
    model = tiny("olmoe")
    held = experts(model)[0]
    held.down_proj = torch.nn.Parameter(held.down_proj.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"'lory' merges experts, and those at .* do not keep theirs stacked"):
        swap_router(model, "lory", k=MODEL_E)
