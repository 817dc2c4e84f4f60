"""The main job on real GSM8K text, where the files are."""

from __future__ import annotations

import json
from pathlib import Path

from probmoe_ext.cli import main
from probmoe_ext.train.data import load_examples
from probmoe_ext.train.scoring import SCORERS


def test_train_and_evaluate_on_gsm8k(gsm8k: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train = [
        "train",
        "--model",
        "tiny-olmoe",
        "--router",
        "probmoe",
        "--k",
        "2,4",
        "--data",
        gsm8k,
        "--output",
        str(run),
    ]
    assert main([*train, "--max-steps", "3", "--batch-size", "4", "--limit", "400", "--holdout", "8", "--quiet"]) == 0
    assert main(["eval", "--model", str(run), "--limit", "4", "--max-new-tokens", "16", "--quiet"]) == 0
    scores = json.loads((run / "eval" / "scores.json").read_text("utf-8"))
    assert scores["routing"] == "probmoe k=2,4"
    assert set(scores["scores"]) == set(SCORERS)
    assert 2 <= scores["statistics"]["active_experts"] <= 4


def test_every_reference_answer_is_right_for_every_scorer(gsm8k: str) -> None:
    for example in load_examples(gsm8k, "test"):
        output = f" {example.answer}"
        for key, (_, scorer) in SCORERS.items():
            assert scorer(output, example.answer).correct, (key, example.answer)
