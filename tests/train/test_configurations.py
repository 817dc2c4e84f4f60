"""The comparisons in configs/compare, on their models' configuration classes at tiny sizes: no hub, no GPU here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedConfig, Qwen2MoeConfig

from probmoe_ext.train.compare import compare
from probmoe_ext.train.comparison import load_comparison
from probmoe_ext.train.data import load_examples
from probmoe_ext.train.tiny import train_tokenizer

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "compare"
PATHS = sorted(FOLDER.glob("*.yaml"))
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
MODELS: dict[str, tuple[type[PreTrainedConfig], dict[str, int]]] = {
    "allenai/OLMoE-1B-7B-0125": (
        OlmoeConfig,
        {**SIZES, "intermediate_size": 16, "num_experts": 16, "num_experts_per_tok": 8},
    ),
    "Qwen/Qwen1.5-MoE-A2.7B": (
        Qwen2MoeConfig,
        {
            **SIZES,
            "intermediate_size": 32,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 32,
            "num_experts": 8,
            "num_experts_per_tok": 4,
        },
    ),
}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_the_hyper_parameters_are_those_of_the_papers(path: Path) -> None:
    for one in load_comparison(str(path)).contestants:
        config = one.train
        olmoe = "OLMoE" in config.model
        assert (config.epochs, config.max_length, config.data) == (4, 4096, "openai/gsm8k")
        assert (config.total_batch, config.warmup) == ((256, 0.03) if olmoe else (64, 0.1))
        assert config.schedule == ("linear" if olmoe else "cosine")
        if config.lora_rank is None:
            assert config.learning_rate == (1e-6 if olmoe else 3e-6)
        most = 8 if olmoe else 4
        assert config.k == ((most - 2, most) if one.label == "probmoe-dynamic" else most)
        # Four GPUs take no more at once than a step has.
        assert config.total_batch % (4 * config.batch_size) == 0


@pytest.mark.parametrize("path", [path for path in PATHS if "one-gpu" not in path.stem], ids=lambda path: path.stem)
def test_a_step_of_each_with_its_configuration_class(path: Path, tmp_path: Path) -> None:
    content = yaml.safe_load(path.read_text("utf-8"))
    kind, sizes = MODELS[content["train"]["model"]]
    if "lora_rank" in content["train"]:
        pytest.importorskip("peft", reason="peft is an optional dependency")
    examples = load_examples("builtin:1", "train")[:200]
    tokenizer = train_tokenizer((f"{one.question} {one.answer}" for one in examples), vocab_size=400)
    torch.manual_seed(0)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = AutoModelForCausalLM.from_config(kind(vocab_size=len(tokenizer), **sizes, **ends))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for split in ("train", "test"):
        rows = [json.dumps({"question": one.question, "answer": one.answer}) for one in examples[:12]]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows), "utf-8")
    # All of the file but what the machine decides: where model and data are, and how much of them.
    here = {"model": str(tmp_path / "model"), "data": str(tmp_path), "device": "cpu"}
    content["train"].update(here, holdout=2, max_steps=1, batch_size=1, total_batch=2)
    content["evaluation"].update(device="cpu", limit=2, max_new_tokens=2)
    content["seeds"] = content["seeds"][:1]
    content["routers"] = [one for one in content["routers"] if one["label"] == "probmoe-dynamic"]
    config = tmp_path / "compare.yaml"
    config.write_text(yaml.safe_dump(content), "utf-8")
    assert compare(load_comparison(str(config), str(tmp_path / "out")), quiet=True) == 0
    run = tmp_path / "out" / "runs" / "probmoe-dynamic" / "seed-42"
    assert set(json.loads((run / "eval" / "scores.json").read_text("utf-8"))["scores"]) == {
        "a.strict_match",
        "a.flexible_extract",
        "b.exact_match",
        "c.numeric",
    }
    band = sizes["num_experts_per_tok"] - 2, sizes["num_experts_per_tok"]
    assert band[0] <= json.loads((run / "analysis.json").read_text("utf-8"))["mean_k"] <= band[1]
