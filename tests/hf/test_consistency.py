"""Two passes over each batch that have to agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from probmoe_ext.hf import consistency_loss, swap_router, train_consistently
from tests.hf.models import tiny
from tests.hf.test_trainers import Rows, arguments

from transformers import Trainer  # isort: skip (test_trainers skips where there is no accelerate)


def test_the_divergence_is_both_ways_over_the_predicted_tokens() -> None:
    first, second = (torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2))
    labels = torch.randint(7, (2, 5))
    labels[0, 1] = labels[1, 4] = -100
    expected, count = torch.zeros((), dtype=torch.float64), 0
    for row in range(2):
        for place in range(4):
            if labels[row, place + 1] == -100:
                continue
            p, q = first[row, place].softmax(-1), second[row, place].softmax(-1)
            expected = expected + ((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 2
            count += 1
    loss = consistency_loss(first, second, labels)
    torch.testing.assert_close(loss, expected / count)
    torch.testing.assert_close(consistency_loss(first, second, labels, 4), expected / 4)
    ours, theirs = (torch.autograd.grad(one, (first, second)) for one in (loss, expected / count))
    torch.testing.assert_close(ours, theirs)
    assert consistency_loss(first, first, labels) == 0
    assert consistency_loss(first, second, torch.full((2, 5), -100)) == 0
    with pytest.raises(ValueError, match=r"logits \(2, 5, 7\) and \(2, 5, 7\) must agree, .* got \(2, 4\)"):
        consistency_loss(first, second, labels[:, 1:])


@pytest.mark.parametrize("items", [None, 31])
def test_a_trainer_adds_the_divergence_to_both_losses(tmp_path: Path, items: int | None) -> None:
    model = swap_router(tiny("olmoe"), "thor", k=2).train()
    trainer = train_consistently(Trainer(model, arguments(tmp_path), train_dataset=Rows()), weight=0.7)
    rows = [Rows()[index] for index in range(3)]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    torch.manual_seed(5)
    loss = trainer.compute_loss(model, batch, num_items_in_batch=items)
    torch.manual_seed(5)
    given: dict[str, Any] = {} if items is None else {"num_items_in_batch": items}
    first, second = model(**batch, **given), model(**batch, **given)
    assert not torch.allclose(first.logits, second.logits)
    expected = first.loss + second.loss + 0.7 * consistency_loss(first.logits, second.logits, batch["labels"], items)
    torch.testing.assert_close(loss, expected)
    model.eval()
    torch.manual_seed(5)
    once = trainer.compute_loss(model, batch)
    torch.manual_seed(5)
    torch.testing.assert_close(once, model(**batch).loss)


def test_training_makes_the_experts_agree(tmp_path: Path) -> None:
    found = {}
    for weight in (0.0, 5.0):
        model = swap_router(tiny("olmoe"), "thor", k=1, inference="token").train()
        settings = arguments(tmp_path, max_steps=12, gradient_accumulation_steps=2)
        train_consistently(Trainer(model, settings, train_dataset=Rows(even=True)), weight).train()
        model.eval()
        ids = Rows().ids
        with torch.no_grad():
            found[weight] = float(consistency_loss(model(ids).logits, model(ids).logits, ids))
    assert found[5.0] < 0.7 * found[0.0]


def test_a_weight_that_is_none() -> None:
    with pytest.raises(ValueError, match="weight must be finite and at least 0, got -1"):
        train_consistently(object(), -1)
