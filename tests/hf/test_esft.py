"""Experts picked by affinity and trained alone: the others do not move, whoever trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from probmoe_ext import from_pretrained
from probmoe_ext.hf import (
    expert_affinity,
    save_pretrained,
    select_experts,
    swap_router,
    train_experts_only,
)
from tests.hf.models import LAYERS, E, K, experts, gates, tiny, tokens
from tests.hf.test_trainers import Rows, arguments

from transformers import Trainer  # isort: skip (test_trainers skips where there is no accelerate)

PATHS = [f"model.layers.{index}.mlp.gate" for index in range(LAYERS)]


@pytest.mark.parametrize("router", [None, "probmoe"])
@pytest.mark.parametrize("score", ["gate", "token"])
def test_affinity_is_what_one_counts(router: str | None, score: Any) -> None:
    model = tiny("olmoe").train()
    if router is not None:
        swap_router(model, router, k=(1, K))
    ids = tokens(4)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    found = expert_affinity(model, [{"input_ids": ids[:2], "attention_mask": mask[:2]}, ids[2:]], score)
    assert model.training
    assert list(found) == PATHS
    outputs: list[Any] = []
    model.eval()
    for gate in gates(model):
        gate.register_forward_hook(lambda gate, args, output: outputs.append((output[1].detach(), output[2])))
    model(ids[:2], attention_mask=mask[:2])
    model(ids[2:])
    sizes = set()
    for layer in range(LAYERS):
        wanted = [0.0] * E
        for batch in range(2):
            weights, indices = outputs[batch * LAYERS + layer]
            for token in range(len(indices)):
                if not mask[2 * batch : 2 * batch + 2].flatten()[token]:
                    continue
                used = [slot for slot in range(indices.shape[1]) if indices[token, slot] < E]
                sizes.add(len(used))
                for slot in used:
                    share = float(weights[token, slot]) if score == "gate" else 1 / len(used)
                    wanted[indices[token, slot]] += share
        expected = torch.tensor(wanted, dtype=torch.float64)
        torch.testing.assert_close(found[PATHS[layer]], expected / expected.sum())
    assert (len(sizes) > 1) == (router is not None)


def test_selection_takes_the_fewest_that_reach_p() -> None:
    affinity = {"a": torch.tensor([0.1, 0.4, 0.1, 0.4]), "b": torch.tensor([0.0, 1.0, 0.0, 0.0])}
    assert select_experts(affinity, 0.1) == {"a": [1], "b": [1]}
    assert select_experts(affinity, 0.4) == {"a": [1], "b": [1]}
    assert select_experts(affinity, 0.5) == {"a": [1, 3], "b": [1]}
    assert select_experts(affinity, 0.85) == {"a": [1, 3, 0], "b": [1]}
    assert select_experts(affinity, 1.0) == {"a": [1, 3, 0, 2], "b": [1]}


def moved(model: Any, before: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    """For each tensor that is not what it was, the slices that are not."""
    changes = {}
    for name, parameter in model.named_parameters():
        differ = (parameter != before[name]).flatten(1).any(1) if parameter.dim() > 1 else parameter != before[name]
        if differ.any():
            changes[name] = differ.nonzero().flatten().tolist()
    return changes


SELECTION = {PATHS[0]: [2, 5], PATHS[2]: [0]}
EXPECTED = {
    f"model.layers.{layer}.mlp.experts.{name}": chosen
    for layer, chosen in ((0, [2, 5]), (2, [0]))
    for name in ("gate_up_proj", "down_proj")
}


def copied(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["AdamW", "SGD", "RMSprop"])
@pytest.mark.parametrize("swapped", [False, True])
def test_nothing_else_moves_in_a_bare_loop(name: str, swapped: bool) -> None:
    model, ids = tiny("olmoe").train(), tokens(8)
    if swapped:
        swap_router(model, "probmoe", k=(1, K))
    extra = {} if name == "AdamW" else {"momentum": 0.9}
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=1e-2, weight_decay=0.5, **extra)

    def step() -> None:
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    step()  # now there is momentum, too
    train_experts_only(model, SELECTION)
    before = copied(model)
    for _ in range(3):
        step()
    assert moved(model, before) == EXPECTED
    frozen = [index for index in range(E) if index not in (2, 5)]
    assert not experts(model)[0].down_proj.grad[frozen].any()
    # Others are frozen instead, and the first ones trained again, when it is called again.
    train_experts_only(model, {PATHS[0]: list(range(E))}, others=True)
    before = copied(model)
    step()
    changes = moved(model, before)
    assert changes["model.layers.0.mlp.experts.down_proj"] == list(range(E))
    assert not any("layers.1.mlp.experts" in name or "layers.2.mlp.experts" in name for name in changes)


def test_others_go_on_being_trained() -> None:
    model, ids = train_experts_only(tiny("olmoe").train(), SELECTION, others=True), tokens(8)
    before = copied(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    changes = moved(model, before)
    assert {name: slices for name, slices in changes.items() if ".experts." in name} == EXPECTED
    assert "model.layers.1.mlp.gate.weight" in changes


def test_a_trainer_and_a_saved_model(tmp_path: Path) -> None:
    model = swap_router(tiny("olmoe"), "topk").train()
    selection = select_experts(expert_affinity(model, [Rows().ids]), 0.3)
    assert all(0 < len(chosen) < E for chosen in selection.values())
    train_experts_only(model, selection)
    before = copied(model)
    settings = arguments(tmp_path, weight_decay=0.5, gradient_accumulation_steps=2)
    trainer = Trainer(model, settings, train_dataset=Rows())
    trainer.train()
    expected = {
        f"model.layers.{layer}.mlp.experts.{name}": sorted(selection[path])
        for layer, path in enumerate(PATHS)
        for name in ("gate_up_proj", "down_proj")
    }
    assert moved(model, before) == expected
    save_pretrained(model, tmp_path / "model")
    loaded = from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert moved(loaded, before) == expected
    assert loaded(tokens()).logits.equal(model.eval()(tokens()).logits)


def test_what_is_not_allowed() -> None:
    model = tiny("olmoe")
    before = [parameter.requires_grad for parameter in model.parameters()]
    for selection, message in (
        ({"model.layers.9.mlp.gate": [0]}, "is none of the model's gates"),
        ({PATHS[0]: [E]}, f"experts of {PATHS[0]} must be ints from 0 to 7, got 8"),
        ({PATHS[0]: []}, "selection names no expert"),
    ):
        with pytest.raises(ValueError, match=message):
            train_experts_only(model, selection)
    with pytest.raises(ValueError, match="score must be one of gate, token; got 'loss'"):
        expert_affinity(model, [tokens()], "loss")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batches must hold a token that counts"):
        expert_affinity(model, [])
    for p in (0.0, 1.1):
        with pytest.raises(ValueError, match=f"p must be above 0 and at most 1, got {p}"):
            select_experts({}, p)
    assert [parameter.requires_grad for parameter in model.parameters()] == before
