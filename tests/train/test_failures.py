"""Runs that are interrupted, killed, or find no room: one line, an exit code, and a state to go on from."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from probmoe_ext.cli import main
from probmoe_ext.files import read_lines
from probmoe_ext.train.callbacks import StepClock
from probmoe_ext.train.checkpoints import last_checkpoint
from probmoe_ext.train.evaluate import evaluate
from probmoe_ext.train.finetune import finetune
from probmoe_ext.train.options import EvalConfig
from tests.train.conftest import small

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (
    "--router probmoe --k 2,4 --data builtin:1 --limit 64 --holdout 8 --max-steps 4 --batch-size 4 --save-steps 2 "
    "--log-steps 1 --device cpu --quiet"
)
TRAIN = ["train", *SETTINGS.split()]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_lines(folder / "metrics.jsonl") if "loss" in line]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT as a terminal sends it: a shell starts what it puts into the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_training_goes_on(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    finetune(small(whole, router="probmoe", k=(2, 4)), quiet=True)
    capsys.readouterr()
    handlers = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]

    def interrupted(self: StepClock, args: object, state: object, control: object, **kwargs: object) -> None:
        if state.global_step == 2:  # type: ignore[attr-defined]
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(StepClock, "on_step_begin", interrupted)
        assert main([*TRAIN, "--output", str(parted)]) == 1
    assert capsys.readouterr().err == (
        f"probmoe train: interrupted after step 3 of 4; go on with: probmoe train --resume {parted}\n"
    )
    assert [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert last_checkpoint(parted) == parted / "checkpoint-3"
    assert not (parted / "model.safetensors").exists()
    assert main(["train", "--resume", str(parted), "--quiet"]) == 0
    before, after = load_file(whole / "model.safetensors"), load_file(parted / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert losses(parted) == losses(whole)
    assert sum("train_runtime" in line for line in read_lines(parted / "metrics.jsonl")) == 1


def test_a_checkpoint_that_was_cut_short_is_not_resumed_from(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    finetune(small(folder), quiet=True)
    (folder / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4, "log_his', "utf-8")
    (folder / "checkpoint-2" / "routing.json").unlink()
    (folder / "checkpoint-none").mkdir()
    assert last_checkpoint(folder) == folder / "checkpoint-2"
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')
    assert main(["train", "--resume", str(folder), "--quiet"]) == 0
    assert last_checkpoint(folder) == folder / "checkpoint-4"
    assert (folder / "checkpoint-2" / "routing.json").is_file()
    assert [step for step, _ in losses(folder)] == [1, 2, 3, 4]
    assert last_checkpoint(tmp_path / "none") is None


def test_a_killed_evaluation_goes_on(tiny_run: Path, tmp_path: Path) -> None:
    settings = {"limit": 8, "batch_size": 2, "max_new_tokens": 8, "protocols": "b,c", "device": "cpu"}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killer = [sys.executable, "-m", "tests.train.workers.killed", "sample", "4"]
    command = ["eval", "--model", str(tiny_run), "--output", str(killed)]
    arguments = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    done = subprocess.run([*killer, *command, *arguments], cwd=ROOT, env=ENVIRONMENT, check=False, timeout=300)
    assert done.returncode == -signal.SIGKILL
    path = killed / "samples-zero-shot.jsonl"
    before = read_lines(path)
    assert len(before) == 3
    assert "scores" not in before[0]
    results = [
        evaluate(EvalConfig(model=str(tiny_run), output=str(folder), **settings), quiet=True)  # type: ignore[arg-type]
        for folder in (killed, whole)
    ]
    assert results[0].scores == results[1].scores
    assert path.read_bytes() == (whole / path.name).read_bytes()


def test_an_interrupted_evaluation_says_how_to_go_on(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*arguments: object, **options: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    monkeypatch.setattr("probmoe_ext.train.evaluate.generate_outputs", stop)
    command = ["eval", "--model", str(tiny_run), "--output", str(tmp_path), "--limit", "2", "--device", "cpu"]
    assert main([*command, "--quiet"]) == 1
    assert capsys.readouterr().err == "probmoe eval: interrupted; the same command goes on\n"
    assert main([*command, "--quiet", "--overwrite"]) == 1
    assert capsys.readouterr().err == "probmoe eval: interrupted; the same command without --overwrite goes on\n"


def test_a_full_disk_while_training(tmp_path: Path) -> None:
    def no_large_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    folder = tmp_path / "run"
    command = [sys.executable, "-m", "probmoe_ext", *TRAIN, "--output", str(folder)]
    done = subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, check=False, preexec_fn=no_large_files
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "File too large" in done.stderr
    assert f"go on with: probmoe train --resume {folder}" in done.stderr
    # The weights do not fit, so there is no checkpoint, and nothing of one.
    assert {path.name for path in folder.iterdir()} == {"train_config.json", "metrics.jsonl"}
    assert json.loads((folder / "train_config.json").read_text("utf-8"))["max_steps"] == 4


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(28, "No space left on device", "a/b"), "a/b: No space left on device"),
        (OSError("the hub is\nfar away"), "the hub is far away"),
        (RuntimeError("I/O error: x (os error 28)"), "cannot write weights: No space left on device"),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file"), "cannot write a checkpoint: is the"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of GPU memory: set a smaller --batch-size"),
    ],
)
def test_what_fails_outside_is_one_line(
    error: Exception, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("probmoe_ext.train.finetune.finetune", fail)
    assert main(["train", "--output", str(tmp_path / "run")]) == 1
    text = capsys.readouterr().err
    assert text.startswith(f"probmoe train: {line}")
    assert text.count("\n") == 1


def test_a_fault_of_our_own_shows_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise ZeroDivisionError("by design")

    monkeypatch.setattr("probmoe_ext.train.finetune.finetune", fail)
    assert main(["train", "--output", str(tmp_path / "run")]) == 1
    text = capsys.readouterr().err
    assert text.startswith("Traceback")
    assert text.endswith("probmoe train: failed: ZeroDivisionError: by design\n")


def test_a_folder_that_cannot_be_written(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Permissions do not stop the administrator, whom the tests may run as.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    for command in (
        [*TRAIN, "--output", str(tmp_path / "a" / "b")],
        ["eval", "--model", str(tiny_run), "--output", str(tmp_path / "a"), "--quiet"],
        ["demo", "--output", str(tmp_path / "a"), "--quiet"],
    ):
        assert main(command) == 1
        assert capsys.readouterr().err == f"probmoe {command[0]}: {tmp_path}: Permission denied\n"
    assert not list(tmp_path.iterdir())
    file = tmp_path / "file"
    file.touch()
    assert main([*TRAIN, "--output", str(file / "run")]) == 1
    assert capsys.readouterr().err == f"probmoe train: {file}: Not a directory\n"
