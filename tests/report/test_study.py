"""Reading runs: what is found and grouped, what is missing, and damage that names its file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from probmoe_ext.report.study import Study, read_study
from probmoe_ext.train.errors import UsageError
from tests.report.synthetic import ROUTERS, Invented, write_comparison

TOPK, PROBMOE = ROUTERS[0], ROUTERS[5]


def small(folder: Path, routers: tuple[Invented, ...] = (TOPK, PROBMOE), seeds: tuple[int, ...] = (1, 2)) -> Path:
    return write_comparison(folder, routers, seeds=seeds, layers=2, problems=10, steps=8, decisions=1)


def test_groups_seeds_and_baseline(study: Study) -> None:
    assert [group.title for group in study.groups] == [one.title for one in ROUTERS]
    assert all([run.seed for run in group.runs] == [42, 43] for group in study.groups)
    assert [group.title for group in study.groups if group.is_ablation] == [one.title for one in ROUTERS[7:]]
    assert study.main == study.groups[:7]
    assert all(study.baseline(group) is study.groups[0] for group in study.groups)
    assert [group.style for group in study.groups] == list(range(10))


def test_top_k_is_first_and_unfinished_runs_are_left_out(tmp_path: Path) -> None:
    folder = small(tmp_path / "c", (PROBMOE, TOPK))
    (folder / "runs/topk/seed-2/done.json").unlink()
    study = read_study([folder])
    assert [(group.title, len(group.runs)) for group in study.groups] == [("top-k", 1), ("ProbMoE exact", 2)]
    assert study.unfinished == [folder / "runs/topk/seed-2"]


def test_a_comparison_may_be_moved_and_given_twice(tmp_path: Path) -> None:
    folder = small(tmp_path / "c")
    content = json.loads((folder / "compare.json").read_text())
    for run in content["runs"]:
        run["folder"] = f"/nowhere/{run['folder']}"
    (folder / "compare.json").write_text(json.dumps(content))
    moved = folder.rename(tmp_path / "moved")
    assert len(read_study([moved, moved / "."]).runs) == 4


def test_two_comparisons_have_their_own_top_k(tmp_path: Path) -> None:
    study = read_study([small(tmp_path / "a"), small(tmp_path / "b")])
    assert len(study.comparisons) == 2
    assert len({group.title for group in study.groups}) == 4
    for group in study.groups:
        baseline = study.baseline(group)
        assert baseline is not None and baseline.source == group.source


def test_single_runs_and_a_folder_of_them(tmp_path: Path) -> None:
    folder = small(tmp_path / "c")
    for place in folder.glob("runs/*/seed-*"):
        (place / "done.json").unlink()
    study = read_study([folder / "runs/topk", folder / "runs/probmoe-exact/seed-1"])
    assert [(group.title, len(group.runs)) for group in study.groups] == [("topk k=4", 2), ("probmoe k=4", 1)]


def test_runs_with_other_settings_are_other_groups(tmp_path: Path) -> None:
    folder = small(tmp_path / "c", (TOPK,))
    path = folder / "runs/topk/seed-2/train_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "learning_rate": 1.0}))
    study = read_study([folder / "runs/topk"])
    assert [group.title for group in study.groups] == ["topk k=4 (seed-1)", "topk k=4 (seed-2)"]


def test_optional_files_may_be_missing(tmp_path: Path) -> None:
    folder = small(tmp_path / "c", (TOPK,), (1,))
    run = folder / "runs/topk/seed-1"
    for name in ("analysis.json", "decisions.json", "routing.jsonl", "cost.json", "metrics.jsonl", "summary.json"):
        (run / name).unlink()
    shutil.rmtree(run / "eval")
    found = read_study([folder]).runs[0]
    assert (found.losses, found.scores, found.cost, found.analysis, found.routing) == ([], {}, {}, None, [])
    assert found.decisions is None


def test_a_line_that_was_cut_off_at_the_end_is_no_damage(tmp_path: Path) -> None:
    folder = small(tmp_path / "c", (TOPK,), (1,))
    path = folder / "runs/topk/seed-1/metrics.jsonl"
    before = len(read_study([folder]).runs[0].losses)
    path.write_text(path.read_text() + '{"step": 9')
    assert len(read_study([folder]).runs[0].losses) == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("compare.json", "{", "no JSON"),
        ("compare.json", '{"version": 2, "runs": []}', "version 2 is not known"),
        ("compare.json", '{"version": 1, "name": "c", "runs": [{"label": "a"}]}', "runs[0].folder must be a string"),
        ("RUN/train_config.json", "[]", "must hold a JSON object, got []"),
        ("RUN/train_config.json", '{"k": 4, "router": 7}', "router must be a string, got 7"),
        ("RUN/metrics.jsonl", '{"step": 1}\nbroken\n{"step": 2}\n', "line 2 is no JSON"),
        ("RUN/metrics.jsonl", '{"step": -1, "loss": 1}\n', "line 1.step must be a whole number of at least 0, got -1"),
        ("RUN/summary.json", '{"heldout_loss": "low"}', 'heldout_loss must be a number, got "low"'),
        ("RUN/cost.json", '{"step_seconds": [1]}', "step_seconds must be a number, got [1]"),
        ("RUN/eval/scores.json", '{"scores": {"b.exact_match": {"count": 3}}}', "value must be a number"),
        ("RUN/eval/samples-zero-shot.jsonl", '{"index": 0, "scores": {"c.numeric": {}}}\n', "must be true or false"),
        ("RUN/analysis.json", '{"layers": []}', "layers must be at least one"),
        ("RUN/analysis.json", '{"layers": [{"load": [1, "x"]}]}', "layers[0].load must be a list of numbers"),
        ("RUN/routing.jsonl", '{"step": 1, "mean": 3}\n', "line 1.mean must hold a JSON object, got 3"),
        ("RUN/summary.json", b"\xff\xfe", "no UTF-8"),
        ("RUN/summary.json", "[" * 100_000, "no JSON"),
    ],
)
def test_damage_names_the_file(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    folder = small(tmp_path / "c", (TOPK,), (1,))
    path = folder / name.replace("RUN", "runs/topk/seed-1")
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as error:
        read_study([folder])
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_folders_that_hold_no_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name, message in (("empty", "holds no run"), ("file", "is a file"), ("none", "is not there")):
        with pytest.raises(UsageError, match=message):
            read_study([tmp_path / name])
    folder = small(tmp_path / "c", (TOPK,), (1,))
    (folder / "runs/topk/seed-1/done.json").unlink()
    with pytest.raises(UsageError, match=r"no finished run in .*; 1 are unfinished"):
        read_study([folder])
