"""The demo with a very small budget, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path

from probmoe_ext.train.demo import Budget, run_demo


def test_the_demo_makes_one_table_and_can_be_repeated(tmp_path: Path) -> None:
    budget = Budget(base_steps=3, steps=2, batch_size=4, problems=4)
    for _ in range(2):
        text = run_demo(tmp_path, budget=budget, quiet=True)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows] == [
        "router",
        "-" * 20,
        "before fine-tuning",
        "top-k",
        "ProbMoE exact",
        "ProbMoE dynamic",
    ]
    assert text + "\n" == (tmp_path / "results.md").read_text("utf-8")
    record = json.loads((tmp_path / "results.json").read_text("utf-8"))
    assert [row["training"]["routing"] for row in record["rows"]] == [
        "topk k=4",
        "topk k=4",
        "probmoe k=4",
        "probmoe k=2,4",
    ]
    for row in record["rows"]:
        assert row["evaluation"]["scores"]["b.exact_match"]["count"] == 4
        assert row["training"]["step_seconds"] > 0
    assert record["rows"][2]["evaluation"]["statistics"]["active_experts"] == 4
    assert 2 <= record["rows"][3]["evaluation"]["statistics"]["active_experts"] <= 4
