"""Evaluation: generation, scores and samples, interruption, and the routing that is measured."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import OlmoeForCausalLM

from probmoe_ext.train.data import load_examples
from probmoe_ext.train.errors import UsageError
from probmoe_ext.train.evaluate import evaluate
from probmoe_ext.train.finetune import finetune
from probmoe_ext.train.generate import batches_by_length, generate_outputs
from probmoe_ext.train.models import Routing, load_model
from probmoe_ext.train.options import EvalConfig
from probmoe_ext.train.protocols import few_shot_prompts, prompt_a, prompt_b
from probmoe_ext.train.routing_stats import measure
from probmoe_ext.train.scoring import SCORERS
from tests.train.conftest import small


def settings(run: Path, output: Path, **changes: object) -> EvalConfig:
    given: dict[str, object] = {"model": str(run), "output": str(output), "limit": 6, "batch_size": 4, "device": "cpu"}
    return EvalConfig(**{**given, "max_new_tokens": 8, **changes})  # type: ignore[arg-type]


def samples(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"samples-{name}.jsonl").read_text("utf-8").splitlines()]


def test_all_three_protocols(tiny_run: Path, tmp_path: Path) -> None:
    result = evaluate(settings(tiny_run, tmp_path), quiet=True)
    assert list(result.scores) == list(SCORERS)
    assert all(mean.count == 6 and mean.error is not None for mean in result.scores.values())
    assert result.statistics.active_experts == 4
    test, shots = load_examples("builtin:1", "test")[:6], load_examples("builtin:1", "train")
    for name, prompts in (
        ("few-shot", list(few_shot_prompts(test, shots))),
        ("zero-shot", [prompt_b(one.question) for one in test]),
    ):
        kept = samples(tmp_path, name)
        assert [sample["prompt"] for sample in kept] == prompts
        assert [sample["index"] for sample in kept] == list(range(6))
        for sample in kept:
            for key, score in sample["scores"].items():
                found = SCORERS[key][1](sample["output"], sample["answer"])
                assert (found.prediction, found.correct) == (score["prediction"], score["correct"])
    table = result.table()
    assert all(heading in table for heading, _ in SCORERS.values())
    assert "±" in table
    written = json.loads((tmp_path / "scores.json").read_text("utf-8"))
    assert written["scores"]["c.numeric"]["count"] == 6


def test_an_interrupted_evaluation_goes_on(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(tiny_run, tmp_path, protocols=("b", "c"))
    whole = evaluate(config, quiet=True)
    path = tmp_path / "samples-zero-shot.jsonl"
    lines = path.read_text("utf-8").splitlines()
    _, tokenizer = load_model(str(tiny_run), Routing(), "float32")
    lengths = [len(tokenizer(json.loads(line)["prompt"])["input_ids"]) for line in lines]
    first, second = batches_by_length(lengths, config.batch_size)
    # As in a crash: the first batch is written, and of the second one sample, and a piece of another.
    kept = [{name: json.loads(lines[index])[name] for name in ("index", "output")} for index in (*first, second[0])]
    path.write_text("".join(json.dumps(sample) + "\n" for sample in kept) + '{"index": 5, "out', "utf-8")
    batches: list[int] = []

    def watched(self: object, input_ids: torch.Tensor, **rest: object) -> torch.Tensor:
        batches.append(len(input_ids))
        return generate(self, input_ids=input_ids, **rest)

    generate = OlmoeForCausalLM.generate
    monkeypatch.setattr(OlmoeForCausalLM, "generate", watched)
    again = evaluate(config, quiet=True)
    assert batches == [len(second)]
    assert again.scores == whole.scores
    assert path.read_text("utf-8").splitlines() == lines


def test_samples_of_another_evaluation_are_not_mixed_in(tiny_run: Path, tmp_path: Path) -> None:
    evaluate(settings(tiny_run, tmp_path, protocols=("c",), limit=2), quiet=True)
    with pytest.raises(UsageError, match="holds samples with another limit"):
        evaluate(settings(tiny_run, tmp_path, protocols=("c",), limit=3), quiet=True)
    with pytest.raises(UsageError, match="holds samples with another routing"):
        evaluate(settings(tiny_run, tmp_path, protocols=("c",), limit=2, k=2), quiet=True)
    (tmp_path / "eval_config.json").write_text('{"model"', "utf-8")
    with pytest.raises(UsageError, match=r"eval_config\.json is damaged"):
        evaluate(settings(tiny_run, tmp_path, protocols=("c",), limit=2), quiet=True)
    assert (
        evaluate(settings(tiny_run, tmp_path, protocols=("c",), limit=3), overwrite=True, quiet=True)
        .scores["c.numeric"]
        .count
        == 3
    )


def test_left_padding_does_not_change_outputs(tiny_run: Path) -> None:
    model, tokenizer = load_model(str(tiny_run), Routing(), "float32")
    prompts = [prompt_a("How many? " * repeats) for repeats in (1, 9, 4)]
    options = {"max_new_tokens": 12, "stop": ("Question:",)}
    together = dict(generate_outputs(model, tokenizer, prompts, batch_size=3, **options))  # type: ignore[arg-type]
    alone = dict(generate_outputs(model, tokenizer, prompts, batch_size=1, **options))  # type: ignore[arg-type]
    assert together == alone
    assert sorted(together) == [0, 1, 2]


def test_outputs_end_where_they_should(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load_model(str(tiny_run), Routing(), "float32")
    script = [" Ben has 7. Question: 8", f" 7{tokenizer.eos_token} 9"]
    lengths: list[int] = []

    def scripted(input_ids: torch.Tensor, generation_config: object, **rest: object) -> torch.Tensor:
        lengths.append(input_ids.shape[1])
        rows = [tokenizer(text)["input_ids"] for text in script]
        longest = max(map(len, rows))
        return torch.cat([input_ids, torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])], dim=1)

    monkeypatch.setattr(model, "generate", scripted)
    outputs = generate_outputs(
        model, tokenizer, ["a " * 5000, "a " * 4000], max_new_tokens=64, stop=("Question:",), batch_size=2
    )
    assert dict(outputs) == {0: " Ben has 7. ", 1: " 7"}
    # The context is cut on the left, to the model's positions less the new tokens.
    assert lengths == [model.config.max_position_embeddings - 64]


def test_statistics_against_a_count_by_hand(tiny_run: Path) -> None:
    model, tokenizer = load_model(str(tiny_run), Routing(), "float32")
    examples = load_examples("builtin:1", "test")[:5]
    chosen: list[list[int]] = [[0] * 16, [0] * 16]
    loss, tokens = 0.0, 0
    for example in examples:
        prompt = tokenizer(prompt_b(example.question))["input_ids"]
        ids = torch.tensor(
            [tokenizer(f"{prompt_b(example.question)} {example.answer}")["input_ids"] + [tokenizer.eos_token_id]]
        )
        with torch.inference_mode():
            output = model(input_ids=ids, output_router_logits=True)
        for layer, logits in enumerate(output.router_logits):
            for expert in logits.topk(4).indices.flatten().tolist():
                chosen[layer][expert] += 1
        log_probabilities = output.logits[0, :-1].log_softmax(-1)
        for place in range(len(prompt), ids.shape[1]):
            loss -= log_probabilities[place - 1, ids[0, place]].item()
            tokens += 1
    entropies = [
        -sum(count / sum(layer) * math.log(count / sum(layer)) for count in layer if count) / math.log(16)
        for layer in chosen
    ]
    found = measure(model, tokenizer, examples, prompt_b, batch_size=2)
    assert found.active_experts == 4
    assert found.load_entropy == pytest.approx(sum(entropies) / 2, rel=1e-6)
    assert found.loss == pytest.approx(loss / tokens, rel=1e-4)


def test_the_router_of_the_run_is_used_and_can_be_changed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    finetune(small(run, router="probmoe", k="1,3", max_steps=1, save_steps=None), quiet=True)
    own = evaluate(settings(run, tmp_path / "own", protocols=("c",), limit=2), quiet=True)
    assert own.routing == "probmoe k=1,3"
    assert own.statistics.active_experts is not None
    assert 1 <= own.statistics.active_experts <= 3
    other = evaluate(settings(run, tmp_path / "other", protocols=("c",), limit=2, router="topk", k=5), quiet=True)
    assert (other.routing, other.statistics.active_experts) == ("topk k=5", 5)


def test_one_file_has_no_shots(tiny_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text('{"question": "q", "answer": "#### 1"}\n', "utf-8")
    with pytest.raises(UsageError, match="protocol a takes its shots"):
        evaluate(settings(tiny_run, tmp_path / "out", data=str(path)), quiet=True)
    result = evaluate(settings(tiny_run, tmp_path / "out", data=str(path), protocols=("b",)), quiet=True)
    assert result.scores["b.exact_match"].error is None
