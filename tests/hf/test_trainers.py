"""Training loops that people have: the loss falls, a resumed run is the uninterrupted one, auxiliary losses add up."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

import probmoe_ext
from probmoe_ext.hf import save_pretrained, swap_router, watch_trainer
from probmoe_ext.hf.trainers import label_share
from probmoe_ext.routers import register_router
from tests.hf.models import VOCABULARY, E, H, K, gates, tiny, tokens
from tests.routers.balance import BalanceRouter, BiasedRouter

pytest.importorskip("accelerate", reason="accelerate is an optional dependency")
from transformers import Trainer, TrainerCallback, TrainingArguments

pytestmark = pytest.mark.filterwarnings("ignore:the '.*' implementation of .* computes slots")
STEPS, LENGTH = 6, 10


@pytest.fixture(autouse=True)
def _own_routers() -> None:
    register_router("balance")(BalanceRouter)
    register_router("biased")(BiasedRouter)


class Rows(Dataset[dict[str, torch.Tensor]]):
    """Rows of the same length, of which the loss counts more and more tokens."""

    def __init__(self, even: bool = False) -> None:
        self.ids = tokens(16, LENGTH)
        self.even = even

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index]
        labels = ids.clone()
        if not self.even:
            labels[: (7 * index) % (LENGTH - 2)] = -100
        return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "save_strategy": "no",
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
    "remove_unused_columns": False,
    "dataloader_pin_memory": False,
    "seed": 3,
}


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    return TrainingArguments(**(SETTINGS | {"output_dir": str(folder)} | changes))


def losses(trainer: Any) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def same(one: Any, other: Any) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(first[name].equal(second[name]) for name in first)


def test_the_trainer_lowers_the_loss(tmp_path: Path) -> None:
    model = swap_router(tiny("olmoe"), "probmoe", k=(1, K))
    trainer = Trainer(model=model, args=arguments(tmp_path, max_steps=15), train_dataset=Rows(even=True))
    trainer.train()
    assert losses(trainer)[-1] < 0.7 * losses(trainer)[0]


@pytest.mark.parametrize(("family", "name", "k"), [("olmoe", "probmoe", (1, K)), ("mixtral", "biased", 2)])
def test_a_resumed_run_is_the_uninterrupted_one(family: str, name: str, k: Any, tmp_path: Path) -> None:
    settings = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    whole = swap_router(tiny(family), name, k=k)
    Trainer(model=whole, args=arguments(tmp_path, **settings), train_dataset=Rows()).train()
    checkpoint = tmp_path / "checkpoint-3"
    resumed = probmoe_ext.from_pretrained(checkpoint)
    assert not same(resumed, whole)
    trainer = Trainer(model=resumed, args=arguments(tmp_path, **settings), train_dataset=Rows())
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == STEPS
    assert same(resumed, whole)


class Gradients(TrainerCallback):
    """Keeps the gradient of a parameter of each optimizer step."""

    def __init__(self, parameter: torch.nn.Parameter) -> None:
        self.parameter = parameter
        self.kept: list[torch.Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.parameter.grad is not None
        self.kept.append(self.parameter.grad.clone())


def one_step(
    coefficient: float, folder: Path, trainer_class: Any = Trainer, watched: bool = False, **changes: Any
) -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    """The gradient of the last gate in the first step, and the batches that it was of."""
    model = swap_router(tiny("olmoe"), "balance", coefficient=coefficient)
    keeper = Gradients(gates(model)[-1].weight)
    settings = {"max_steps": 1, "gradient_accumulation_steps": 4, "max_grad_norm": 0.0} | changes
    trainer = trainer_class(model=model, args=arguments(folder, **settings), train_dataset=Rows(), callbacks=[keeper])
    if watched:
        watch_trainer(trainer)
    batches = []
    step = trainer.training_step

    def training_step(model: Any, inputs: Any, num_items_in_batch: Any) -> Any:
        batches.append({name: value.clone() for name, value in inputs.items()} | {"items": num_items_in_batch})
        return step(model, inputs, num_items_in_batch)

    trainer.training_step = training_step
    trainer.train()
    return keeper.kept[0], batches


def expected_share_of(batches: list[dict[str, torch.Tensor]], coefficient: float, by_tokens: bool) -> torch.Tensor:
    """The gradient of the auxiliary losses alone, each batch weighted as its own loss is."""
    model = swap_router(tiny("olmoe").train(), "topk")
    weight = gates(model)[-1].weight
    counts = [batch["labels"][:, 1:].ne(-100).sum() for batch in batches]
    result = torch.zeros_like(weight)
    for batch, count in zip(batches, counts, strict=True):
        seen: list[torch.Tensor] = []
        hook = gates(model)[-1].register_forward_pre_hook(lambda gate, args, seen=seen: seen.append(args[0]))
        model(batch["input_ids"])
        hook.remove()
        probs = torch.softmax(seen[0].detach().reshape(-1, H) @ weight.T, -1)
        loss = coefficient * E * probs.mean(0).square().sum()
        # Early versions count the first token of a row too, which no loss predicts.
        assert int(batch.get("items", sum(counts))) in (
            sum(counts),
            sum(one["labels"].ne(-100).sum() for one in batches),
        )
        share = count / batch["items"] if by_tokens else 1 / len(batches)
        result += share * torch.autograd.grad(loss, weight)[0]
    return result


class OwnLoss(Trainer):
    """A trainer that takes the logits and computes the loss by itself, as TRL's does."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        loss = loss / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("trainer_class", [Trainer, OwnLoss])
def test_auxiliary_losses_are_weighted_as_the_batches_are(trainer_class: Any, tmp_path: Path) -> None:
    watched = trainer_class is OwnLoss
    with_loss, batches = one_step(2.0, tmp_path, trainer_class, watched)
    without, same_batches = one_step(0.0, tmp_path, trainer_class, watched)
    assert len(batches) == 4
    assert all(one["labels"].equal(two["labels"]) for one, two in zip(batches, same_batches, strict=True))
    counts = {int(batch["labels"].ne(-100).sum()) for batch in batches}
    assert len(counts) > 1
    expected = expected_share_of(batches, 2.0, by_tokens=True)
    torch.testing.assert_close(with_loss - without, expected, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(expected, expected_share_of(batches, 2.0, by_tokens=False), rtol=1e-2)


def test_a_trainer_with_its_own_loss_has_to_be_watched(tmp_path: Path) -> None:
    with_loss, batches = one_step(2.0, tmp_path, OwnLoss)
    without, _ = one_step(0.0, tmp_path, OwnLoss)
    found = (with_loss - without).norm() / expected_share_of(batches, 2.0, by_tokens=True).norm()
    assert found > 3


def test_auxiliary_losses_in_a_loop_with_accelerate() -> None:
    from accelerate import Accelerator

    rows = Rows()
    batches = [
        {name: torch.stack([rows[i][name] for i in range(start, start + 4)]) for name in rows[0]}
        for start in (0, 4, 8, 12)
    ]
    gradients = []
    for coefficient in (2.0, 0.0):
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
        model = accelerator.prepare(swap_router(tiny("olmoe").train(), "balance", coefficient=coefficient))
        for batch in batches:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch).loss)
        gradients.append(gates(model)[-1].weight.grad)
    expected = expected_share_of(batches, 2.0, by_tokens=False)
    torch.testing.assert_close(gradients[0] - gradients[1], expected, rtol=1e-3, atol=1e-6)


def test_the_share_of_a_batch() -> None:
    labels = torch.tensor([[1, -100, 2, 3], [-100, -100, -100, 5]])
    assert label_share({"labels": labels}) is None
    assert label_share({"num_items_in_batch": 6}) is None
    assert float(label_share({"labels": labels, "num_items_in_batch": 6})) == 0.5
    assert float(label_share({"labels": labels, "num_items_in_batch": torch.tensor([6, 6])})) == 0.5
    assert float(label_share({"labels": labels, "shift_labels": labels, "num_items_in_batch": 8})) == 0.5
    assert float(label_share({"labels": labels.fill_(-100), "num_items_in_batch": 0})) == 0


def test_a_resumed_loop_is_the_uninterrupted_one(tmp_path: Path) -> None:
    ids = tokens(4)

    def steps(model: Any, optimizer: Any, count: int) -> list[float]:
        found = []
        for _ in range(count):
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    whole = swap_router(tiny("olmoe").train(), "probmoe", k=(1, K))
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-2)
    torch.manual_seed(4)
    first = steps(whole, optimizer, 5)
    save_pretrained(whole, tmp_path / "model")
    kept = copy.deepcopy(optimizer.state_dict()), torch.random.get_rng_state()
    second = steps(whole, optimizer, 10)
    assert second[-1] < 0.7 * first[0]

    resumed = probmoe_ext.from_pretrained(tmp_path / "model").train()
    optimizer = torch.optim.AdamW(resumed.parameters(), lr=1e-2)
    optimizer.load_state_dict(kept[0])
    torch.random.set_rng_state(kept[1])
    assert steps(resumed, optimizer, 10) == second
    assert same(resumed, whole)


def test_sft_trainer_lowers_the_loss_and_resumes(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is an optional dependency")
    from datasets import Dataset as Table

    from probmoe_ext.train.tiny import train_tokenizer

    tokenizer = train_tokenizer(["1 + 1 = 2", "two apples and three pears"], vocab_size=300)
    size = max(VOCABULARY, len(tokenizer))
    text = [f"{a} + {b} = {a + b}" for a in range(4) for b in range(4)]
    config = {**SETTINGS, "output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 6, "max_steps": 12}
    config |= {"gradient_accumulation_steps": 2, "max_length": 32, "bf16": False, "remove_unused_columns": True}

    def trainer(model: Any) -> Any:
        return watch_trainer(
            trl.SFTTrainer(
                model=model,
                args=trl.SFTConfig(**config),
                train_dataset=Table.from_dict({"text": text}),
                processing_class=tokenizer,
            )
        )

    whole = swap_router(tiny("olmoe", vocab_size=size), "probmoe", k=(1, K))
    run = trainer(whole)
    run.train()
    assert losses(run)[-1] < 0.8 * losses(run)[0]
    resumed = probmoe_ext.from_pretrained(tmp_path / "checkpoint-6")
    again = trainer(resumed)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert losses(again)[-1] == losses(run)[-1]
    assert same(resumed, whole)
