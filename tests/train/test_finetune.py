"""Training runs: what they leave behind, that they can be interrupted, and that they learn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from probmoe_ext.hf import routing_of
from probmoe_ext.train.errors import UsageError
from probmoe_ext.train.finetune import finetune, load_run
from probmoe_ext.train.models import Routing, load_model, read_routing
from tests.train.conftest import small


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_what_a_run_leaves(tiny_run: Path) -> None:
    AutoModelForCausalLM.from_pretrained(tiny_run)
    losses = [line["loss"] for line in metrics(tiny_run) if "loss" in line]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert [line["step"] for line in metrics(tiny_run) if "loss" in line] == [1, 2, 3, 4]
    summary = json.loads((tiny_run / "summary.json").read_text(encoding="utf-8"))
    assert (summary["steps"], summary["examples"], summary["routing"]) == (4, 64, "topk")
    assert summary["heldout_loss"] > 0
    assert read_routing(tiny_run) == Routing("topk", None, {})
    assert {path.name for path in tiny_run.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert read_routing(tiny_run / "checkpoint-2") == Routing("topk", None, {})


@pytest.mark.parametrize(("router", "k"), [("topk", None), ("probmoe", 4), ("probmoe", (2, 4))])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, router: str, k: object) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    finetune(small(whole, router=router, k=k), quiet=True)
    shutil.copytree(whole, parted)
    # As an interruption after step 3 leaves it: the checkpoint of step 2 and three lines of metrics.
    shutil.rmtree(parted / "checkpoint-4")
    for name in ("model.safetensors", "summary.json", "routing.json", "config.json"):
        (parted / name).unlink()
    lines = (parted / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (parted / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= 3), "utf-8")

    summary = finetune(load_run(parted), resume=True, quiet=True)

    assert summary.steps == 4
    before, after = load_file(whole / "model.safetensors"), load_file(parted / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]), name
    steps = [(line["step"], line["loss"]) for line in metrics(parted) if "loss" in line]
    assert steps == [(line["step"], line["loss"]) for line in metrics(whole) if "loss" in line]
    assert read_routing(parted) == Routing(router, k, {})  # type: ignore[arg-type]


def test_the_router_trains_and_comes_back_with_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    finetune(small(folder, router="probmoe", k="2,4", router_options={"backward": "ste"}, max_steps=2), quiet=True)
    model, _ = load_model(str(folder), read_routing(folder), "float32")
    layers = list(routing_of(model).values())
    assert len(layers) == 2
    for layer in layers:
        assert (layer["router"], layer["k"], layer["options"]["backward"]) == ("probmoe", [2, 4], "ste")
    assert read_routing(folder / "checkpoint-2") == read_routing(folder)


def test_the_seed_decides(tmp_path: Path) -> None:
    weights = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        finetune(small(tmp_path / name, router="probmoe", k=4, seed=seed, max_steps=2), quiet=True)
        weights.append(load_file(tmp_path / name / "model.safetensors")["model.layers.0.mlp.gate.weight"])
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_run_goes_on_from_another_run(tiny_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "second"
    summary = finetune(
        small(folder, model=str(tiny_run), router="probmoe", k=2, max_steps=2, total_batch=8, learning_rate=0.0),
        quiet=True,
    )
    assert summary.routing == "probmoe k=2"
    first, second = load_file(tiny_run / "model.safetensors"), load_file(folder / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_selection_keeps_the_best_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    finetune(small(folder, select="best", learning_rate=0.3, schedule="constant", keep=3, save_steps=1), quiet=True)
    lines = [line for line in metrics(folder) if "eval_loss" in line]
    heldout = {line["step"]: line["eval_loss"] for line in lines[:-1]}
    best = min(heldout, key=heldout.__getitem__)
    final, kept = (
        load_file(folder / "model.safetensors"),
        load_file(folder / f"checkpoint-{best}" / "model.safetensors"),
    )
    assert best < 4
    assert all(torch.equal(final[name], kept[name]) for name in final)
    assert lines[-1]["eval_loss"] == pytest.approx(heldout[best], rel=1e-6)


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path: Path) -> None:
    losses = []
    for name, value in (("without", False), ("with", True)):
        finetune(small(tmp_path / name, router="probmoe", k=4, gradient_checkpointing=value, max_steps=2), quiet=True)
        losses.append([line["loss"] for line in metrics(tmp_path / name) if "loss" in line])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_auxiliary_loss_is_switched_on(tmp_path: Path) -> None:
    losses = []
    for name, value in (("without", 0.0), ("with", 1.0)):
        finetune(small(tmp_path / name, aux_loss=value, max_steps=1, save_steps=None), quiet=True)
        losses.append(metrics(tmp_path / name)[0]["loss"])
    # The model's own load-balancing loss is at least k (4) when summed over top-k slots.
    assert losses[1] > losses[0] + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"router": "nope"}, "--router 'nope' is unknown; known: "),
        ({"k": 17}, "--k 17 is more than the 16 experts of tiny-olmoe"),
        ({"k": (2, 17), "router": "probmoe"}, "--k 17 is more than the 16 experts"),
        ({"router": "topk", "k": (2, 4)}, "router 'topk' takes one k"),
        ({"router": "probmoe", "router_options": {"speed": 1}}, "no option 'speed'"),
        ({"experts": "nope"}, "experts='nope'"),
        ({"model": "runs/none"}, "--model 'runs/none' does not exist"),
        ({"model": "../none"}, "--model '../none' does not exist"),
        ({"holdout": 20_000}, "holdout=20000 leaves nothing"),
    ],
)
def test_wrong_requests_write_nothing(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        finetune(small(tmp_path / "run", **changes), quiet=True)
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten_unasked(tiny_run: Path) -> None:
    with pytest.raises(UsageError, match="holds a run: use --resume"):
        finetune(small(tiny_run), quiet=True)


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no run"):
        load_run(tmp_path)


def test_what_a_kill_leaves_is_passed_over(tmp_path: Path) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    settings = {"router": "probmoe", "k": 4, "monitor": 1}
    finetune(small(whole, **settings), quiet=True)
    shutil.copytree(whole, parted)
    # As a kill leaves it while the checkpoint of step 4 is written: no state yet, and lines that were being appended.
    (parted / "checkpoint-4" / "trainer_state.json").unlink()
    (parted / "summary.json").unlink()
    for name in ("metrics.jsonl", "routing.jsonl"):
        text = (parted / name).read_text("utf-8")
        (parted / name).write_text(text[: len(text) - 30], "utf-8")

    finetune(load_run(parted), resume=True, quiet=True)

    before, after = load_file(whole / "model.safetensors"), load_file(parted / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (parted / "routing.jsonl").read_text("utf-8") == (whole / "routing.jsonl").read_text("utf-8")
    timed = ("seconds", "step_seconds", "train_runtime", "train_samples_per_second", "train_steps_per_second")
    first, second = (
        [{name: value for name, value in line.items() if name not in (*timed, "eval_runtime")} for line in lines]
        for lines in (metrics(whole), metrics(parted))
    )
    assert [line["step"] for line in first] == [line["step"] for line in second]
    assert [line.get("loss") for line in first] == [line.get("loss") for line in second]
    assert [line["seconds"] for line in metrics(parted)] == sorted(line["seconds"] for line in metrics(parted))


def test_the_built_in_models(tmp_path: Path) -> None:
    summary = finetune(small(tmp_path / "run", model="small-olmoe", max_steps=1, limit=4), quiet=True)
    assert 9.5e6 < summary.parameters < 10.5e6
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "run").config
    assert (config.num_experts, config.num_experts_per_tok) == (48, 8)
    with pytest.raises(UsageError, match="--k 49 is more than the 48 experts of small-olmoe"):
        finetune(small(tmp_path / "other", model="small-olmoe", k=49), quiet=True)


def test_lora_trains_routers_and_adapters_and_leaves_an_ordinary_model(tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is an optional dependency")
    base, whole, parted = tmp_path / "base", tmp_path / "whole", tmp_path / "parted"
    finetune(small(base, max_steps=1), quiet=True)
    settings = {"model": str(base), "router": "probmoe", "k": "2,4", "lora_rank": 2, "learning_rate": 1e-2}
    finetune(small(whole, **settings), quiet=True)
    before, after = load_file(base / "model.safetensors"), load_file(whole / "model.safetensors")
    assert before.keys() == after.keys() - {name for name in after if ".probmoe." in name}
    for name in before:
        difference = after[name].float() - before[name].float()
        if name.endswith(".gate.weight"):
            assert difference.abs().sum(-1).gt(0).all()
        elif ".experts." in name or "_proj" in name:
            # The difference of an adapter has its rank.
            assert 0 < torch.linalg.matrix_rank(difference, rtol=1e-4) <= 2, name
        else:
            assert not difference.any(), name
    model, _ = load_model(str(whole), read_routing(whole), "float32")
    assert {one["router"] for one in routing_of(model).values()} == {"probmoe"}

    shutil.copytree(whole, parted)
    for name in ("checkpoint-4/trainer_state.json", "summary.json"):
        (parted / name).unlink()
    finetune(load_run(parted), resume=True, quiet=True)
    again = load_file(parted / "model.safetensors")
    assert all(after[name].equal(again[name]) for name in after)
