"""``probmoe report``: files, exit codes, one line for a wrong call; and the template in the wheel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from probmoe_ext.cli import main
from tests.report.synthetic import ROUTERS, write_comparison
from tests.train.conftest import small

ROOT = Path(__file__).parents[2]


def test_writes_beside_the_runs_and_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_comparison(tmp_path / "c", ROUTERS[:2], seeds=(1,), layers=2, problems=10, steps=8, decisions=1)
    assert main(["report", str(folder), "--quiet", "--formats", "none", "--title", "Mine & <yours>"]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert str(folder / "report" / "index.html") in said.out
    assert "nothing recorded for: Experts against token frequency, Ablation of ProbMoE" in said.out
    assert "<title>Mine &amp; &lt;yours&gt;</title>" in (folder / "report" / "index.html").read_text()


def test_a_run_of_probmoe_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from probmoe_ext.train.finetune import finetune

    tiny_run = tmp_path / "run"
    finetune(small(tiny_run, limit=16, max_steps=2), quiet=True)
    assert main(["report", str(tiny_run), "--output", str(tmp_path / "out"), "--formats", "png"]) == 0
    said = capsys.readouterr()
    assert "probmoe report: reading the runs" in said.err
    text = (tmp_path / "out" / "index.html").read_text()
    assert "topk" in text and "Loss while training" in text
    assert (tmp_path / "out" / "figures" / "training-loss.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: RUNS"),
        (["none"], "none is not there; give the folder of a run"),
        (["."], ". holds no run"),
        (["page.txt"], "page.txt is a file"),
        ([".", "--decisions", "-1"], "--decisions must be from 0 to 1000 megabytes, got -1"),
        ([".", "--decisions", "nan"], "--decisions must be from 0 to 1000 megabytes, got nan"),
        ([".", "--formats", "gif"], "invalid choice: 'gif'"),
        ([".", "--output", "page.txt"], "--output 'page.txt' is a file; give a folder"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "page.txt").touch()
    assert main(["report", *arguments]) == 2
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line != "probmoe report: reading the runs"]
    assert len(lines) == 1 and message in lines[0]
    assert not list(tmp_path.glob("*/index.html"))


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--help"]) == 0
    assert "probmoe report runs/compare" in capsys.readouterr().out


def test_templates_are_in_the_wheel(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    built = {path.name for path in (tmp_path / "probmoe_ext" / "report" / "templates").iterdir()}
    assert built == {"page.html", "page.css", "page.js"}
