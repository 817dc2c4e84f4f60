"""Comparisons: what they leave, that a kill changes nothing, what may be added, and two processes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from benchmarks.gsm_comparison.record import record
from probmoe_ext.cli import main
from probmoe_ext.train import compare as driver
from probmoe_ext.train.analysis import rounded
from probmoe_ext.train.compare import compare
from probmoe_ext.train.comparison import load_comparison
from probmoe_ext.train.crossed_bootstrap import crossed_bootstrap
from probmoe_ext.train.errors import UsageError
from probmoe_ext.train.significance import mean_interval

ROOT = Path(__file__).resolve().parents[2]
SETTINGS: dict = {
    "name": "a small one",
    "seeds": [1],
    "start": {
        "model": "tiny-olmoe",
        "k": 4,
        "data": "builtin:1/things",
        "tokenizer_data": "builtin:1",
        "max_steps": 2,
        "batch_size": 4,
        "limit": 8,
        "holdout": 0,
        "device": "cpu",
    },
    "train": {
        "data": "builtin:1/travel",
        "max_steps": 4,
        "batch_size": 4,
        "limit": 16,
        "holdout": 0,
        "save_steps": 2,
        "log_steps": 1,
        "device": "cpu",
    },
    "evaluation": {"protocols": "b,c", "limit": 6, "batch_size": 3, "max_new_tokens": 4, "device": "cpu"},
    "routers": [
        {"label": "topk", "title": "Top-k", "router": "topk", "k": 4},
        {"label": "dynamic", "router": "probmoe", "k": [2, 4], "train": {"learning_rate": 1e-2}},
    ],
}
TIMES = {"step_seconds", "tokens_per_second", "wall_seconds", "peak_memory_bytes", "evaluation_tokens_per_second"}


def written(folder: Path, **changes: object) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "compare.yaml"
    path.write_text(yaml.safe_dump({**SETTINGS, **changes}), "utf-8")
    return str(path)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def read(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted comparison."""
    import torch

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("compare") / "out"
    assert compare(load_comparison(written(folder.parent), str(folder)), quiet=True) == 0
    return folder


def test_what_a_comparison_leaves(whole: Path) -> None:
    record = read(whole / "compare.json")
    assert record["version"] == 1
    assert [(run["label"], run["title"], run["k"], run["seed"]) for run in record["runs"]] == [
        ("topk", "Top-k", 4, 1),
        ("dynamic", "dynamic", [2, 4], 1),
    ]
    for run in record["runs"]:
        folder = whole / run["folder"]
        assert folder == whole / "runs" / run["label"] / "seed-1"
        config = read(folder / "train_config.json")
        assert (config["router"], config["seed"], config["max_steps"]) == (run["router"], 1, 4)
        assert config["learning_rate"] == (1e-2 if run["label"] == "dynamic" else None)
        assert config["model"] == str(whole / "start")
        assert [line["step"] for line in lines(folder / "metrics.jsonl") if "loss" in line] == [1, 2, 3, 4]
        assert [line["step"] for line in lines(folder / "routing.jsonl")] == [1, 2, 3, 4]
        cost = read(folder / "cost.json")
        assert 0 < cost["step_seconds"] < cost["wall_seconds"]
        tokens = read(folder / "summary.json")["tokens_per_step"]
        assert cost["tokens_per_second"] == pytest.approx(tokens / cost["step_seconds"])
        assert cost["evaluation_tokens_per_second"] > 0
        assert len(read(folder / "decisions.json")["problems"]) == 4
        assert read(folder / "done.json")["seconds"] > 0
        assert not list(folder.glob("checkpoint-*"))
    assert read(whole / "start" / "eval" / "scores.json")["scores"]["b.exact_match"]["count"] == 6


def test_the_results_are_those_of_the_files(whole: Path) -> None:
    found = read(whole / "results.json")
    assert (found["score"], found["baseline"]) == ("b.exact_match", "topk")
    correct = {}
    for one in found["routers"]:
        folder = whole / "runs" / one["label"] / "seed-1"
        scores = read(folder / "eval" / "scores.json")
        assert one["scores"]["c.numeric"]["values"] == [scores["scores"]["c.numeric"]["value"]]
        assert one["measures"]["loss"]["mean"] == scores["statistics"]["loss"]
        assert one["measures"]["mean_k"]["mean"] == read(folder / "analysis.json")["mean_k"]
        assert one["measures"]["share_of_k"]["mean"] == one["measures"]["mean_k"]["mean"] / 4
        samples = lines(folder / "eval" / "samples-zero-shot.jsonl")
        correct[one["label"]] = [float(line["scores"]["b.exact_match"]["correct"]) for line in samples]
    pair = next(pair for pair in found["pairs"] if (pair["a"], pair["b"]) == ("dynamic", "topk"))
    direct = crossed_bootstrap([correct["dynamic"]], [correct["topk"]])
    assert (pair["difference"], pair["low"], pair["high"], pair["p"]) == (
        direct.difference,
        direct.low,
        direct.high,
        direct.p,
    )
    assert pair["by_seed"]["mean"] == mean_interval([direct.difference]).mean
    text = (whole / "results.md").read_text("utf-8")
    assert "| Top-k " in text
    assert "± half of Student's 95 % interval" in text


def test_the_compact_copy_has_what_a_report_reads(whole: Path, tmp_path: Path) -> None:
    record(whole, tmp_path)
    for name in ("compare.json", "results.json"):
        assert read(tmp_path / name) == rounded(read(whole / name))
    for label in ("topk", "dynamic"):
        first, second = (folder / "runs" / label / "seed-1" for folder in (whole, tmp_path))
        right = [line["scores"]["b.exact_match"]["correct"] for line in lines(first / "eval/samples-zero-shot.jsonl")]
        kept = lines(second / "eval/samples-zero-shot.jsonl")
        assert [line["scores"]["b.exact_match"]["correct"] for line in kept] == right
        assert read(second / "eval/scores.json")["scores"] == rounded(read(first / "eval/scores.json")["scores"])
        assert [line["step"] for line in lines(second / "metrics.jsonl")] == [1, 2, 3, 4]
        assert read(second / "analysis.json")["layers"] == read(first / "analysis.json")["layers"]
        assert read(second / "decisions.json") == read(first / "decisions.json")
        assert not list(second.glob("*.safetensors"))


def test_a_killed_comparison_ends_like_a_whole_one(whole: Path, tmp_path: Path) -> None:
    out, config = tmp_path / "out", written(tmp_path)
    # The common start writes one checkpoint, each run two; a run is evaluated in two batches of three.
    for place, count in (("checkpoint", "3"), ("sample", "5")):
        command = ["tests.train.workers.killed", place, count, "compare", "--config", config, "--output", str(out)]
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
        run = out / "runs" / "topk" / "seed-1"
        if place == "checkpoint":
            assert (run / "checkpoint-4").is_dir()
            assert not (run / "checkpoint-4" / "trainer_state.json").exists()
        else:
            assert len(lines(run / "eval" / "samples-zero-shot.jsonl")) == 4
    assert compare(load_comparison(config, str(out)), quiet=True) == 0

    for label in ("topk", "dynamic"):
        first, second = (folder / "runs" / label / "seed-1" for folder in (whole, out))
        before, after = (load_file(folder / "model.safetensors") for folder in (first, second))
        assert all(before[name].equal(after[name]) for name in before)
        for name in ("analysis.json", "decisions.json", "routing.jsonl", "eval/samples-zero-shot.jsonl"):
            assert (first / name).read_text("utf-8") == (second / name).read_text("utf-8"), name
        losses = [[(line["step"], line.get("loss")) for line in lines(at / "metrics.jsonl")] for at in (first, second)]
        assert losses[0] == losses[1]
    first, second = read(whole / "results.json"), read(out / "results.json")
    for found in (first, second):
        for one in found["routers"]:
            one["measures"] = {name: value for name, value in one["measures"].items() if name not in TIMES}
    assert first == second


def test_seeds_and_routers_are_added_and_the_rest_stays(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    done = (out / "runs" / "topk" / "seed-1" / "done.json").read_text("utf-8")
    # What the finished ones were trained from is not needed for their results.
    more = [*SETTINGS["routers"], {"router": "probmoe", "k": 4, "options": {"backward": "ste"}}]
    added = load_comparison(written(tmp_path, seeds=[1, 2], routers=more), str(out))
    assert compare(added, only=["probmoe"], seeds=[2], quiet=True) == 0
    found = {one["label"]: one for one in read(out / "results.json")["routers"]}
    assert {label: one["seeds"] for label, one in found.items()} == {"topk": [1], "dynamic": [1], "probmoe": [2]}
    assert (out / "runs" / "topk" / "seed-1" / "done.json").read_text("utf-8") == done
    assert len(read(out / "compare.json")["runs"]) == 6
    changed = {**SETTINGS["train"], "max_steps": 5}
    with pytest.raises(UsageError) as caught:
        compare(load_comparison(written(tmp_path, seeds=[2], train=changed, routers=more[:2]), str(out)), quiet=True)
    for part in ("seed 1 is gone", "router 'probmoe' is gone", "routers.topk.max_steps is 5, was 4"):
        assert part in str(caught.value)
    assert len(read(out / "compare.json")["runs"]) == 6


def test_a_dry_run_writes_nothing(whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(load_comparison(written(tmp_path), str(tmp_path / "out")), dry_run=True) == 0
    assert "left: 2 runs, the time is not known yet" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert compare(load_comparison(written(tmp_path, seeds=[1, 2]), str(whole)), dry_run=True) == 0
    text = capsys.readouterr().out
    assert "| Top-k   |      topk k=4 |  1, 2 | 1 of 2 |" in text
    assert "left: 2 runs, about" in text
    assert len(read(whole / "compare.json")["runs"]) == 2
    # Nothing is finished, but the common start is there: a few batches are measured.
    shutil.copytree(whole / "start", tmp_path / "fresh" / "start")
    compare(load_comparison(written(tmp_path), str(tmp_path / "fresh")), dry_run=True)
    assert "(by a few batches of the first run)" in capsys.readouterr().out


def test_a_run_that_fails_does_not_stop_the_others(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    for label in ("topk", "dynamic"):
        (out / "runs" / label / "seed-1" / "done.json").unlink()

    def fail(run: object, *arguments: object, **options: object) -> None:
        if "topk" in str(run):
            raise RuntimeError("the loss is not finite")
        original(run, *arguments, **options)  # type: ignore[arg-type]

    original = driver.perform
    monkeypatch.setattr(driver, "perform", fail)
    config = load_comparison(written(tmp_path), str(out))
    assert compare(config, quiet=True) == 1
    assert "the loss is not finite" in (out / "runs" / "topk" / "seed-1" / "error.txt").read_text("utf-8")
    assert (out / "runs" / "dynamic" / "seed-1" / "done.json").is_file()
    monkeypatch.setattr(driver, "perform", original)
    assert compare(config, quiet=True) == 0
    assert not (out / "runs" / "topk" / "seed-1" / "error.txt").exists()


def test_another_process_at_a_run_is_left_alone(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    run = out / "runs" / "topk" / "seed-1"
    (run / "done.json").unlink()
    with driver.locked(run) as ours:
        assert ours
        compare(load_comparison(written(tmp_path), str(out)))
    assert "[1/2] topk, seed 1: another process is at it" in capsys.readouterr().out
    assert not (run / "done.json").exists()


def test_two_processes_train_together(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole / "start", out / "start")
    routers = [{"label": "dynamic", "router": "probmoe", "k": [2, 4]}]
    train = {**SETTINGS["train"], "batch_size": 2, "total_batch": 8, "max_steps": 2}
    config = written(tmp_path, routers=routers, train=train)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", f"--master-port={port}"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", "probmoe_ext", "compare", "--config", config, "--output", str(out)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert done.stdout.count("[1/1] dynamic, seed 1: B exact match") == 1
    run = out / "runs" / "dynamic" / "seed-1"
    assert [line["step"] for line in lines(run / "metrics.jsonl") if "loss" in line] == [1, 2]
    # Two examples on each of two processes, twice: eight in a step of about seventy tokens each.
    assert 8 * 40 < read(run / "summary.json")["tokens_per_step"] < 8 * 100
    assert len(lines(run / "eval" / "samples-zero-shot.jsonl")) == 6
    assert read(run / "done.json")["seconds"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routrs": []}, r"unknown key 'routrs' in .* \(did you mean 'routers'\?\)"),
        ({"routers": []}, "must be a list of at least one router"),
        ({"routers": [{"router": "topk", "kk": 4}]}, r"unknown key 'kk' in router 1 .* \(did you mean 'k'\?\)"),
        ({"routers": [{"k": 4}]}, "router 1 in .* must name its router"),
        ({"routers": ["topk", "topk"]}, "label 'topk' of router 2 in .* is taken"),
        ({"routers": [{"router": "topk", "label": "../x"}]}, "names a folder"),
        ({"routers": [{"router": "topk", "train": {"seed": 1}}]}, "train of router 1 in .* must not set 'seed'"),
        ({"train": {"learning_rte": 1}}, "unknown setting 'learning_rte' .did you mean 'learning_rate'"),
        ({"train": {"model": "x"}}, "the runs begin from the common start"),
        ({"start": {"output": "x"}}, "start.output in .*: the comparison sets it"),
        ({"start": 4}, "start in .* must be a model"),
        ({"evaluation": {"router": "topk"}}, "evaluation.router in .*: the comparison sets it"),
        ({"seeds": [1, 1]}, "seeds in .* must be different whole numbers"),
        ({"seeds": [-1]}, "seeds in .* must be different whole numbers"),
        ({"keep_checkpoints": "yes"}, "must be true or false"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load_comparison(written(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routers": ["nope"]}, "nope: --router 'nope' is unknown; known: "),
        ({"routers": [{"router": "topk", "k": 17}]}, "topk: k=17 is more than the 16 experts of tiny-olmoe"),
        ({"routers": [{"router": "probmoe", "k": [2, 17]}]}, "k=17 is more than the 16 experts"),
        ({"routers": [{"router": "probmoe", "options": {"speed": 1}}]}, "router 'probmoe' has no option 'speed'"),
        ({"routers": [{"router": "topk", "k": [2, 4]}]}, "router 'topk' takes one k"),
        ({"start": "runs/none"}, "--model 'runs/none' does not exist"),
        ({"evaluation": {"data": "none.jsonl"}}, "--data 'none.jsonl' does not exist"),
        ({"train": {"data": "builtin:1", "batch_size": 4, "total_batch": 6}}, "total_batch=6 must be a multiple"),
    ],
)
def test_wrong_requests_write_nothing(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        compare(load_comparison(written(tmp_path, **changes), str(tmp_path / "out")), quiet=True)
    assert not (tmp_path / "out").exists()


def test_other_wrong_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_comparison(written(tmp_path), str(tmp_path / "out"))
    with pytest.raises(UsageError, match=r"--only 'dynamik' is no label of the file .did you mean 'dynamic'"):
        compare(config, only=["dynamik"], quiet=True)
    with pytest.raises(UsageError, match="--seeds 7 is not among 1; add it to the file"):
        compare(config, seeds=[7], quiet=True)
    (tmp_path / "file").write_text("", "utf-8")
    with pytest.raises(UsageError, match=r"cannot write to .*; choose another --output"):
        compare(load_comparison(written(tmp_path), str(tmp_path / "file" / "out")), quiet=True)


def test_the_command(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["compare", "--help"]) == 0
    assert "probmoe compare --config" in capsys.readouterr().out.partition("examples:")[2]
    assert main(["compare", "--config", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.startswith(f"probmoe compare: cannot read the configuration {tmp_path}/none.yaml")
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    command = ["compare", "--config", written(tmp_path), "--output", str(out)]
    assert main([*command, "--quiet", "--only", "topk", "--seeds", "1"]) == 0
    said = capsys.readouterr()
    # Quiet leaves the results, and those of all that is finished.
    assert said.out.lstrip().startswith("# a small one")
    assert "| dynamic " in said.out
    assert said.err == ""
    (out / "runs" / "topk" / "seed-1" / "done.json").unlink()

    def stopped(error: BaseException) -> str:
        def stop(*arguments: object, **options: object) -> None:
            raise error

        monkeypatch.setattr(driver, "perform", stop)
        assert main(command) == 1
        return capsys.readouterr().err

    assert stopped(KeyboardInterrupt("after step 3 of 4")).endswith(
        "probmoe compare: interrupted after step 3 of 4; the same command goes on\n"
    )
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/somewhere")
    assert stopped(full).endswith("/somewhere: No space left on device; the same command goes on\n")
    failed = stopped(RuntimeError("no"))
    assert failed == "probmoe compare: 1 runs failed; the same command tries them again\n"
