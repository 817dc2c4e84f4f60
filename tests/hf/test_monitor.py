"""The monitor's metrics against counts by hand, without padding, replays or evaluation; in a loop, in the Trainer."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from probmoe_ext.hf import RoutingMonitor, padding_mask, swap_router
from probmoe_ext.hf.tally import SAMPLE
from tests.hf.models import FAMILIES, LAYERS, VOCABULARY, E, H, K, gates, tiny, tokens


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    return ids, mask


def by_hand(seen: list[Any], keep: torch.Tensor, first: torch.Tensor) -> dict[str, Any]:
    """The metrics of a gate from what it got and gave, in plain loops."""
    counts, sizes, sums = (
        [0] * E,
        [0] * (E + 1),
        dict.fromkeys(("entropy", "coverage", "exploration", "drift", "drift_kl"), 0.0),
    )
    total = 0
    for hidden, logits, indices in seen:
        for token in keep.nonzero().flatten().tolist():
            total += 1
            chosen = [expert for expert in indices[token].tolist() if expert < E]
            p = logits[token].double().softmax(-1).tolist()
            then = hidden[token].double() @ first.double().T
            top, top_then = (set(one.topk(K).indices.tolist()) for one in (logits[token], then))
            for expert in chosen:
                counts[expert] += 1
            sizes[len(chosen)] += 1
            sums["entropy"] -= sum(value * math.log(value) for value in p)
            sums["coverage"] += sum(p[expert] for expert in chosen)
            sums["exploration"] += len(set(chosen) - top) / max(1, len(chosen))
            sums["drift"] += 1 - len(top & top_then) / K
            q = then.softmax(-1).tolist()
            sums["drift_kl"] += sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    share = [count / sum(counts) for count in counts]
    mean = sum(counts) / E
    return {
        "tokens": total,
        "mean_k": sum(counts) / total,
        "k_histogram": [size / total for size in sizes[: max(i for i, n in enumerate(sizes) if n) + 1]],
        "load": [count / total for count in counts],
        "load_entropy": -sum(value * math.log(value) for value in share if value) / math.log(E),
        "util_ratio": sum(count > 0 for count in counts) / E,
        "max_vio": (max(counts) - mean) / mean,
        "dead_experts": counts.count(0),
        **{name: value / total for name, value in sums.items()},
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("k", [None, K, (0, 3)], ids=str)
def test_metrics_are_those_counted_by_hand(family: str, k: Any) -> None:
    ids, mask = padded()
    model = tiny(family).train()
    if k is not None:
        swap_router(model, "probmoe", k=k)
    first = gates(model)[1].weight.detach().clone()
    monitor = RoutingMonitor(model)
    with torch.no_grad():
        gates(model)[1].weight.add_(torch.randn(E, H) * 0.1)
    seen: list[Any] = []

    def keep(gate: Any, args: Any, output: Any) -> None:
        hidden = args[0].reshape(-1, H)
        seen.append((hidden, hidden @ gate.weight.T, output[2]))

    hook = gates(model)[1].register_forward_hook(keep)
    with monitor, torch.no_grad():
        for batch in (ids, ids.flip(0)):
            model(batch, attention_mask=mask)
    hook.remove()
    report = monitor.report()
    found = report["layers"]["model.layers.1.mlp.gate"]
    expected = by_hand(seen, mask.flatten().bool(), first)
    buckets = found.pop("mean_k_by_frequency")
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert found["drift"] > 0
    assert report["layers"]["model.layers.0.mlp.gate"]["drift"] == 0
    if k == K or k is None:
        assert set(buckets.values()) == {K}
    for name in ("max_vio", "entropy", "mean_k"):
        values = [layer[name] for layer in report["layers"].values()]
        assert report["mean"][name] == pytest.approx(sum(values) / LAYERS, rel=1e-6)
    assert report["worst"]["max_vio"] == max(layer["max_vio"] for layer in report["layers"].values())
    # The report took everything.
    assert monitor.report() == {"mean": {}, "worst": {}, "layers": {}}


def test_sizes_by_the_frequency_of_a_token() -> None:
    model = swap_router(tiny("olmoe").train(), "probmoe", k=(1, K))
    # 2 of 2000 tokens are one id: uncommon; ids 3 and 4 are frequent.
    ids = torch.full((4, 500), 3)
    ids[:, ::2] = 4
    ids[0, 10] = ids[1, 20] = 9
    seen: list[torch.Tensor] = []
    hooks = [gate.register_forward_hook(lambda gate, args, out: seen.append(out[2])) for gate in gates(model)]
    model.config.max_position_embeddings = 512
    with RoutingMonitor(model) as monitor, torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    report = monitor.report()
    rare = (ids == 9).flatten()
    for layer, indices in zip(report["layers"].values(), seen, strict=True):
        sizes = (indices < E).sum(-1).double()
        assert layer["mean_k_by_frequency"] == pytest.approx(
            {"frequent": float(sizes[~rare].mean()), "common": float(sizes[rare].mean())}
        )
    assert "mean_k_common" in report["mean"]
    # Entropies are measured on some of so many tokens, loads on all.
    assert layer["tokens"] == ids.numel() > SAMPLE


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_replays_are_not_counted(use_reentrant: bool) -> None:
    ids, mask = padded()
    reports = []
    for checkpointed in (False, True):
        model = swap_router(tiny("olmoe").train(), "probmoe", k=(1, K))
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        with RoutingMonitor(model) as monitor:
            torch.manual_seed(3)
            model(ids, attention_mask=mask, labels=ids).loss.backward()
        reports.append(monitor.report())
    assert reports[0] == reports[1]
    assert reports[0]["layers"]["model.layers.0.mlp.gate"]["tokens"] == mask.sum()


def test_padding_in_a_context_and_every_nth_pass() -> None:
    ids, mask = padded()
    model = swap_router(tiny("olmoe"), "probmoe", k=(1, K))
    with RoutingMonitor(model, every=2) as monitor, torch.no_grad():
        for _ in range(3):
            with padding_mask(model, mask):
                model(ids)
    assert {layer["tokens"] for layer in monitor.report()["layers"].values()} == {2 * int(mask.sum())}


def test_the_number_of_scalars_is_bounded() -> None:
    names = []
    for changes in ({}, {"num_experts": 16, "num_hidden_layers": 5}):
        model = swap_router(tiny("olmoe", **changes), "probmoe", k=(1, K))
        with RoutingMonitor(model) as monitor, torch.no_grad():
            model(tokens())
        names.append(sorted(monitor.scalars(reset=False)))
        monitor.per_layer = True
        assert len(monitor.scalars()) == len(names[-1]) + 10 * len(gates(model))
    assert names[0] == names[1]
    assert len(names[0]) <= 16
    assert all(name.startswith("routing/") for name in names[0])


def test_nothing_stays_behind() -> None:
    model = swap_router(tiny("olmoe").train(), "probmoe", k=(1, K))
    before = [(sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    monitor = RoutingMonitor(model)
    assert [(sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == before
    with monitor:
        ids, mask = padded()
        torch.manual_seed(4)
        watched = model(ids, attention_mask=mask).logits
    assert [(sorted(m.__dict__), len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()] == before
    torch.manual_seed(4)
    assert model(ids, attention_mask=mask).logits.equal(watched)
    for every, error in ((0, ValueError), (1.5, TypeError)):
        with pytest.raises(error, match="every must be"):
            RoutingMonitor(model, every=every)  # type: ignore[arg-type]


def test_it_compiles_in_one_graph() -> None:
    ids, mask = padded()
    model = swap_router(tiny("olmoe", experts_implementation="grouped_mm", num_hidden_layers=1), "probmoe", k=(1, K))
    reports = []
    torch._dynamo.reset()
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        with RoutingMonitor(model) as monitor, torch.no_grad():
            try:
                for batch in (ids, ids.flip(0)):
                    call(batch, attention_mask=mask)
            except torch._dynamo.exc.TorchDynamoException:
                with pytest.raises(torch._dynamo.exc.TorchDynamoException):
                    torch.compile(tiny("olmoe"), fullgraph=True, backend="aot_eager")(ids, attention_mask=mask)
                pytest.skip("this transformers cannot compile the model as it came, either")
        reports.append(monitor.report())
    for path, layer in reports[0]["layers"].items():
        for name, value in layer.items():
            assert reports[1]["layers"][path][name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, VOCABULARY, (8,), generator=torch.Generator().manual_seed(index))
        mask = torch.ones_like(ids)
        mask[5 + index % 4 :] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


class Reporter(TrainerCallback):  # type: ignore[misc]
    """In the place of TensorBoard: sees each log as the writers of report_to do."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def trainer(folder: Path, **changes: Any) -> Trainer:
    options: dict[str, Any] = {"max_steps": 4, "logging_steps": 2, "save_steps": 2, "report_to": [], "use_cpu": True}
    arguments = TrainingArguments(str(folder), per_device_train_batch_size=4, disable_tqdm=True, **(options | changes))
    model = swap_router(tiny("olmoe").train(), "probmoe", k=(1, K))
    return Trainer(model, arguments, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[Reporter()])


def test_the_trainer_logs_the_metrics(tmp_path: Path) -> None:
    one = trainer(tmp_path / "run", eval_strategy="steps", eval_steps=2)
    path = tmp_path / "routing.jsonl"
    monitor = RoutingMonitor(one.model, path).attach(one)
    one.train()
    (reporter,) = (c for c in one.callback_handler.callbacks if isinstance(c, Reporter))
    logged = [log for log in reporter.logs if "loss" in log]
    assert len(logged) == 2
    assert all(1 <= log["routing/mean_k"] <= K for log in logged)
    assert all("routing/max_vio" in entry for entry in one.state.log_history if "loss" in entry)
    # Evaluation is not counted: its log brings nothing.
    assert not any("routing/mean_k" in log for log in reporter.logs if "eval_loss" in log)
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(len(layer["load"]) == E for line in lines for layer in line["layers"].values())
    per_step = sum(int(Rows()[index]["attention_mask"].sum()) for index in range(64)) / 64 * 4
    assert lines[0]["layers"]["model.layers.0.mlp.gate"]["tokens"] == pytest.approx(2 * per_step, rel=0.2)
    assert not monitor.handles

    again = trainer(tmp_path / "run", max_steps=6)
    RoutingMonitor(again.model, path).attach(again)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    # The reference is the model as it came, not the checkpoint.
    assert lines[-1]["mean"]["drift_kl"] > 0


def test_tensorboard_gets_the_metrics(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is an optional dependency")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    one = trainer(tmp_path / "run", report_to=["tensorboard"])
    RoutingMonitor(one.model).attach(one)
    one.train()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    (tag,) = (tag for tag in events.Tags()["scalars"] if tag.endswith("routing/mean_k"))
    assert [event.step for event in events.Scalars(tag)] == [2, 4]


def test_a_monitor_that_comes_too_late_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trainer(tmp_path / "run", max_steps=1, logging_steps=1)
    one.add_callback(RoutingMonitor(one.model))
    one.args.report_to = ["somewhere"]
    with pytest.warns(UserWarning, match=r"too late for somewhere: use RoutingMonitor\(model\)\.attach\(trainer\)"):
        one.train()
    assert any("routing/mean_k" in entry for entry in one.state.log_history)
