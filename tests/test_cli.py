"""The command line: help, exit codes, and wrong calls that end in one line."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from probmoe_ext.cli import main
from probmoe_ext.train.errors import UsageError
from probmoe_ext.train.options import EvalConfig, TrainConfig, describe, load_config, parse_k

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("command", ["train", "eval", "demo", "doctor"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert f"probmoe {command}" in text


def test_every_setting_is_described() -> None:
    for kind in (TrainConfig, EvalConfig):
        assert set(describe(kind)) == {one.name for one in dataclasses.fields(kind)}


@pytest.mark.parametrize("start", ["-m", "script"])
def test_help_comes_without_torch(start: str, tmp_path: Path) -> None:
    script = tmp_path / "probmoe"
    script.write_text("import sys\nfrom probmoe_ext.cli import main\nsys.exit(main())\n", "utf-8")
    command = ["-m", "probmoe_ext"] if start == "-m" else [str(script)]
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command, "train", "--help"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "examples:" in done.stdout
    assert "probmoe_ext.commands.train" in imported
    assert not {"torch", "transformers", "datasets", "tokenizers", "accelerate", "yaml"} & imported


def test_the_package_registers_its_operators_on_import() -> None:
    code = "import torch, probmoe_ext; torch.ops.probmoe_ext.subset_log_partition; probmoe_ext.routers.make_router"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "probmoe_ext"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "probmoe: the following arguments are required: COMMAND (see probmoe --help)\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "COMMAND"),
        ("fly", "invalid choice: 'fly'"),
        ("train --fast", "unrecognized arguments: --fast"),
        ("train --max-steps many", "argument --max-steps: invalid int value: 'many'"),
        ("train --max-steps 0", "max_steps must be at least 1, got 0"),
        ("train --router nope", "--router 'nope' is unknown; known: "),
        (
            "train --router probmo",
            "--router 'probmo' is unknown (did you mean 'probmoe'?); known: ",
        ),
        (
            "train --router probmoe --router-option backwards=ste",
            "no option 'backwards' (did you mean 'backward'?)",
        ),
        ("train --k 17", "--k 17 is more than the 16 experts of tiny-olmoe"),
        ("train --k 4,2", "a band must rise"),
        ("train --k four", "--k must be a number (4) or a band (2,4), got 'four'"),
        ("train --k 1,2,3", "--k must be a number"),
        ("train --data none.jsonl", "--data 'none.jsonl' does not exist"),
        ("train --model ./none", "--model './none' does not exist"),
        ("train --config none.yaml", "cannot read the configuration none.yaml"),
        ("train --resume none", "none holds no run to go on with"),
        ("train --resume none --k 4", "--resume takes the settings from the run"),
        ("train --router-option backward", "--router-option must be NAME=VALUE"),
        ("train --router probmoe --router-option backward=up", "backward of router 'probmoe' must be one of"),
        ("train --total-batch 48", "total_batch=48 must be a multiple of batch_size=32"),
        ("train --schedule wavy", "schedule must be one of linear, cosine, constant"),
        ("train --select best --holdout 0", "select=best needs a held-out slice"),
        ("eval", "--model tiny-olmoe has random weights"),
        ("eval --model runs/none", "--model 'runs/none' does not exist"),
        ("eval --protocols d", "protocols must be among a, b, c"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments.split()) == 2
    text = capsys.readouterr().err
    assert message in text
    assert text.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_line_of_data_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "q", "answer": "#### 1"}\n{"question": "q"}\n', "utf-8")
    assert main(["train", "--data", str(path), "--output", str(tmp_path / "run")]) == 2
    assert f"{path}, line 2: 'answer' is missing" in capsys.readouterr().err


def test_train_and_evaluate_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    run, config = tmp_path / "run", tmp_path / "run.yaml"
    config.write_text(
        "router: probmoe\nk: [2, 4]\nmax-steps: 9\nlimit: 32\nbatch_size: 4\nlearning_rate: 3e-3\n", "utf-8"
    )
    train = ["train", "--config", str(config), "--output", str(run), "--max-steps", "2", "--device", "cpu", "--quiet"]
    assert main(train) == 0
    assert "probmoe k=2,4: 2 steps on 32 examples" in capsys.readouterr().out
    recorded = json.loads((run / "train_config.json").read_text("utf-8"))
    assert (recorded["max_steps"], recorded["k"], recorded["learning_rate"]) == (2, [2, 4], 0.003)
    assert main(train) == 2
    assert "holds a run" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--quiet"]) == 0
    capsys.readouterr()
    evaluate = ["eval", "--model", str(run), "--limit", "3", "--max-new-tokens", "4", "--device", "cpu", "--quiet"]
    assert main(evaluate) == 0
    text = capsys.readouterr().out
    assert "A strict-match" in text
    assert "C numeric" in text
    assert "probmoe k=2,4" in text


def test_configuration_files(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"k": "2,4", "router": "probmoe"}), "utf-8")
    config = load_config(TrainConfig, str(path), {"seed": 7})
    assert (config.k, config.router, config.seed) == ((2, 4), "probmoe", 7)
    for text, message in [
        ('{"routr": "topk"}', "unknown setting 'routr' in .* .did you mean 'router'"),
        ('{"seed": "many"}', "seed must be int, got 'many'"),
        ('{"learning_rate": "fast"}', "learning_rate must be a number"),
        ("[1]", "must hold a mapping"),
        ("{", "no valid JSON"),
    ]:
        path.write_text(text, "utf-8")
        with pytest.raises(UsageError, match=message):
            load_config(TrainConfig, str(path), {})


def test_the_configurations_of_the_repository_are_valid() -> None:
    folder = ROOT / "configs"
    # Those of accelerate are read by tests/hf/test_parallel.py.
    names = sorted(path.name for path in folder.glob("*.yaml") if not path.name.startswith("accelerate"))
    assert names
    for name in names:
        load_config(TrainConfig, str(folder / name), {})


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, None), (4, 4), ("4", 4), ("2,4", (2, 4)), ([2, 4], (2, 4)), ("3,3", 3), ("0,2", (0, 2))],
)
def test_parse_k(value: object, expected: object) -> None:
    assert parse_k(value) == expected


@pytest.mark.parametrize("value", [0, -1, "0", "", "4,", True, 2.5, (4, 2), (0, 0), [1, 2, 3], {}])
def test_parse_k_refuses(value: object) -> None:
    with pytest.raises(UsageError, match="--k must be"):
        parse_k(value)
