"""The routing of a trained model, and its cost, against direct counting."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch

from probmoe_ext.files import write_lines
from probmoe_ext.train.analysis import SHARE, analyze, decide
from probmoe_ext.train.cost import cost_of
from probmoe_ext.train.data import load_examples
from probmoe_ext.train.models import Routing, load_model
from probmoe_ext.train.protocols import prompt_b


@pytest.mark.parametrize("routing", [Routing(), Routing("probmoe", (1, 6))], ids=str)
def test_analysis_against_a_count_by_hand(tiny_run: Path, routing: Routing) -> None:
    model, tokenizer = load_model(str(tiny_run), routing, "float32")
    with torch.no_grad():
        for layer in model.model.layers:
            # Spread out, so that sizes and the experts that hold the mass vary.
            layer.mlp.gate.weight.mul_(40)
    examples = load_examples("builtin:1", "test")[:5]
    load = [[0] * 16 for _ in range(2)]
    cardinality = [[0] * 17 for _ in range(2)]
    entropy, mass, holders, tokens = [0.0, 0.0], [0.0, 0.0], [0, 0], 0
    sizes: dict[int, list[int]] = defaultdict(list)
    for example in examples:
        text = f"{prompt_b(example.question)} {example.answer}"
        ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        tokens += len(ids)
        with torch.inference_mode():
            output = model(input_ids=torch.tensor([ids]), output_router_logits=True)
        for layer, logits in enumerate(output.router_logits):
            for token, row in zip(ids, logits.double().tolist(), strict=True):
                order = sorted(range(16), key=lambda expert: -row[expert])
                positive = sum(value > 0 for value in row)
                k = 4 if routing.router == "topk" else min(max(positive, 1), 6)
                total = sum(map(math.exp, row))
                p = [math.exp(value) / total for value in row]
                for expert in order[:k]:
                    load[layer][expert] += 1
                    mass[layer] += p[expert]
                cardinality[layer][k] += 1
                sizes[token].append(k)
                entropy[layer] -= sum(one * math.log(one) for one in p if one)
                held, count = 0.0, 0
                while held < SHARE:
                    held += p[order[count]]
                    count += 1
                holders[layer] += count
    found, pace = analyze(model, tokenizer, examples, prompt_b, batch_size=2)
    assert pace > 0
    for layer, one in enumerate(found["layers"]):
        slots = sum(load[layer])
        assert (one["gate"], one["index"]) == (f"model.layers.{layer}.mlp.gate", layer)
        assert one["load"] == pytest.approx([count / slots for count in load[layer]], rel=1e-4)
        assert one["cardinality"] == pytest.approx([count / tokens for count in cardinality[layer]], rel=1e-4)
        assert one["mean_k"] == pytest.approx(slots / tokens, rel=1e-4)
        assert one["entropy"] == pytest.approx(entropy[layer] / tokens, rel=1e-4)
        assert one["mass"] == pytest.approx(mass[layer] / tokens, rel=1e-4)
        assert one["experts_99"] == pytest.approx(holders[layer] / tokens, rel=1e-4)
    assert found["dead_experts"] == sum(count == 0 for one in load for count in one)
    evenness = [
        -sum(count / sum(one) * math.log(count / sum(one)) for count in one if count) / math.log(16) for one in load
    ]
    assert found["load_entropy"] == pytest.approx(sum(evenness) / 2, rel=1e-4)
    by_text = {tokenizer.decode([token]): ks for token, ks in sizes.items()}
    assert sum(one["count"] for one in found["tokens"]) == tokens
    counts = [one["count"] for one in found["tokens"]]
    assert counts == sorted(counts, reverse=True)
    for one in found["tokens"]:
        ks = by_text[one["token"]]
        assert (2 * one["count"], one["mean_k"]) == (len(ks), pytest.approx(sum(ks) / len(ks), rel=1e-4))
    if routing.router == "probmoe":
        assert len(Counter(k for ks in sizes.values() for k in ks)) > 2


def test_every_decision_of_a_problem(tiny_run: Path) -> None:
    model, tokenizer = load_model(str(tiny_run), Routing("probmoe", (1, 6)), "float32")
    question = "Ada has 3 apples. How many?"
    sample = {"index": 7, "question": question, "answer": "#### 3", "prompt": prompt_b(question), "output": " Ada 3."}
    (problem,) = decide(model, tokenizer, [sample])["problems"]
    ids = tokenizer(sample["prompt"] + sample["output"])["input_ids"]
    assert "".join(problem["tokens"]) == sample["prompt"] + sample["output"]
    assert "".join(problem["tokens"][: problem["prompt_tokens"]]) == sample["prompt"]
    assert (problem["index"], problem["output"]) == (7, " Ada 3.")
    chosen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handles = [
        layer.mlp.gate.register_forward_hook(lambda gate, args, output: chosen.append(output[1:]))
        for layer in model.model.layers
    ]
    with torch.inference_mode():
        model(input_ids=torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    for layer, (weights, indices) in zip(problem["layers"], chosen, strict=True):
        assert len(layer["indices"]) == len(layer["weights"]) == len(ids)
        for row, (experts, values) in enumerate(zip(layer["indices"], layer["weights"], strict=True)):
            used = indices[row] < 16
            assert experts == indices[row][used].tolist()
            assert values == pytest.approx(weights[row][used].tolist(), rel=1e-4)


def test_cost(tmp_path: Path) -> None:
    logged = [{"step": 1, "step_seconds": 0.5}, {"step": 2, "step_seconds": 0.3}, {"step": 3}, {"step_seconds": 9.0}]
    write_lines(tmp_path / "metrics.jsonl", logged)
    summary = {"tokens_per_step": 100.0, "seconds": 12.0, "device": "cpu", "parameters": 5}
    cost = cost_of(tmp_path / "metrics.jsonl", summary, 1000, None)
    assert (cost.step_seconds, cost.tokens_per_second, cost.wall_seconds) == (0.5, 200.0, 12.0)
    nothing = cost_of(tmp_path / "none.jsonl", summary, None, None)
    assert (nothing.step_seconds, nothing.tokens_per_second) == (None, None)


def test_peak_memory_forgets_what_was_before() -> None:
    """In a process of its own: what other tests leave behind is given back at any time."""
    code = """
        import torch
        from probmoe_ext.train.cost import PeakMemory

        memory = PeakMemory(torch.device("cpu"))
        before = memory.read()
        held = torch.ones(40_000_000)
        after = memory.read()
        del held
        print(before, after, PeakMemory(torch.device("cpu")).read())
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    if done.stdout.split()[0] == "None":
        pytest.skip("the system does not tell a process's peak")
    before, after, again = map(int, done.stdout.split())
    assert after - before > 0.9 * 160e6
    assert again < after - 0.5 * 160e6
