"""Single decisions: what goes into the page, how much of it, and damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from probmoe_ext.report import decisions
from probmoe_ext.report.decisions import SCALE, collect, read_problems
from probmoe_ext.report.study import Study, read_study
from probmoe_ext.train.errors import UsageError
from tests.report.synthetic import ROUTERS, write_comparison

LARGE = 10**9


def test_all_of_them_fit(study: Study, comparison: Path) -> None:
    found = collect(study, LARGE)
    assert found.notes == []
    assert [(run["title"], run["seed"]) for run in found.runs[:10]] == [(one.title, 42) for one in ROUTERS]
    assert len(found.runs) == 20 and all(len(run["problems"]) == 2 for run in found.runs)
    written = json.loads((comparison / "runs/topk/seed-42/decisions.json").read_text())["problems"][1]
    problem = found.runs[0]["problems"][1]
    assert problem["tokens"] == written["tokens"] and problem["prompt"] == written["prompt_tokens"]
    assert problem["layers"][2]["i"] == written["layers"][2]["indices"]
    assert problem["layers"][2]["w"][5] == [round(SCALE * one) for one in written["layers"][2]["weights"][5]]
    assert found.runs[0]["experts"] == 16


def test_a_limit_takes_the_same_problem_of_every_router_first(study: Study) -> None:
    whole = collect(study, LARGE)
    size = max(len(json.dumps(run["problems"][0], separators=(",", ":"))) for run in whole.runs)
    found = collect(study, 10 * size)
    assert [run["title"] for run in found.runs] == [one.title for one in ROUTERS]
    assert [problem["index"] for run in found.runs[:9] for problem in run["problems"]][:9] == [0] * 9
    assert len(json.dumps(found.runs, separators=(",", ":"))) < 11 * size
    assert len(found.notes) == 1
    assert "Left out: " in found.notes[0] and "the files of 10 more runs" in found.notes[0]


def test_none_are_asked_for(study: Study) -> None:
    found = collect(study, 0)
    assert found.runs == [] and found.notes == ["Left out, as asked."]


def test_a_very_large_file_is_not_read(study: Study, comparison: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decisions, "READ_LIMIT", 100)
    found = collect(study, LARGE)
    assert found.runs == []
    assert str(comparison / "runs/topk/seed-42/decisions.json") in found.notes[0]
    assert "Left out" in found.notes[0]


def test_runs_without_decisions_are_named(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "c", ROUTERS[:2], seeds=(1,), layers=2, problems=10, steps=8)
    (folder / "runs/topk/seed-1/decisions.json").unlink()
    assert collect(read_study([folder]), LARGE).notes == ["Not recorded for: top-k."]


def broken(change: Callable[[dict[str, Any]], object]) -> str:
    layer = {"gate": "g", "indices": [[0, 1], []], "weights": [[0.5, 0.25], []]}
    facts = {"index": 0, "question": "q", "answer": "a", "output": "o"}
    problem = {**facts, "tokens": ["a", "b"], "prompt_tokens": 1, "layers": [layer]}
    change(problem)
    return json.dumps({"problems": [problem]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(tokens=["a"]), "must have indices and weights of equal lengths for 1 tokens"),
        (lambda p: p.update(prompt_tokens=3), "prompt_tokens is 3, with 2 tokens"),
        (lambda p: p.update(tokens=["a", 3]), "tokens must be a list of strings"),
        (lambda p: p["layers"][0].update(indices=[[0, 1], [2]]), "equal lengths"),
        (lambda p: p["layers"][0].update(indices=[[0, -1], []]), "indices must be whole numbers of at least 0"),
        (lambda p: p["layers"][0].update(indices=[[0, "1"], []]), "indices must be whole numbers"),
        (lambda p: p["layers"][0].update(weights=[[0.5, None], []]), "weights must be numbers"),
        (lambda p: p["layers"][0].update(weights=3), "weights must be a list of lists"),
        (lambda p: p.pop("layers"), "layers must be a list, got nothing"),
    ],
)
def test_damage_names_file_and_place(change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "decisions.json"
    path.write_text(broken(change))
    with pytest.raises(UsageError) as error:
        read_problems(path)
    assert str(error.value).startswith(f"{path} is damaged: problems[0]")
    assert message in str(error.value)


def test_what_is_no_number_becomes_null(tmp_path: Path) -> None:
    path = tmp_path / "decisions.json"
    path.write_text(broken(lambda p: p["layers"][0].update(weights=[[float("nan"), 1e300], []])))
    assert read_problems(path)[0]["layers"][0]["w"] == [[None, None], []]
