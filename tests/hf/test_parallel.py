"""Two processes over gloo, started as users start them; the checks themselves are in tests/hf/workers."""

from __future__ import annotations

import inspect
import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.hf.models import E, K, tiny

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("accelerate-*.yaml"))


def launch(*command: str, **environment: str) -> str:
    """Run a command on this machine with two processes, and return what it says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = tuple(part.replace("PORT", port) for part in command)
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=settings, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return done.stdout


def check(*names: str) -> None:
    said = launch(
        *("torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1", "--master-port=PORT"),
        *("-m", "tests.hf.workers.parallel", *names),
    )
    for name in names:
        assert all(f"{name}: ok on process {rank}" in said for rank in range(2))


def splits_experts() -> bool:
    """Whether the installed transformers has the plans that the workers ask for."""
    try:
        from transformers.distributed import DistributedConfig
    except ImportError:
        return False
    return "ep_size" in inspect.signature(DistributedConfig).parameters


def test_data_parallel_sharded_and_split() -> None:
    check("ddp", "fsdp2", *(("ep", "tp") if splits_experts() else ()))


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="deepspeed is an optional dependency")
def test_zero() -> None:
    check("zero2", "zero3")


def test_the_trainer_under_accelerate(tmp_path: Path) -> None:
    tiny("olmoe").save_pretrained(tmp_path / "model")
    launch(
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"),
        *("--dynamo_backend=no", "--main_process_port=PORT", "-m", "tests.hf.workers.trainer", str(tmp_path)),
        ACCELERATE_USE_CPU="true",
    )
    results = [json.loads((tmp_path / f"process-{rank}.json").read_text("utf-8")) for rank in range(2)]
    assert {one["wrapper"] for one in results} == {"DistributedDataParallel"}
    assert {one["processes"] for one in results} == {2}
    logs = [[entry for entry in one["history"] if "loss" in entry] for one in results]
    assert logs[0] == logs[1]
    assert all(1 <= entry["routing/mean_k"] <= K for entry in logs[0])
    lines = [json.loads(line) for line in (tmp_path / "routing.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    # Both processes are in it: some tokens are padding, and what is left has its experts counted.
    layer, chosen = lines[0]["layers"]["model.layers.0.mlp.gate"], [one["choices"][0] for one in results]
    tokens = [len(one) for one in chosen]
    assert max(tokens) < layer["tokens"] < sum(tokens)
    assert len(layer["load"]) == E
    assert sum(layer["load"]) == pytest.approx(layer["mean_k"], rel=1e-4)
    assert chosen[0] != chosen[1]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configuration_files_can_be_read(path: Path) -> None:
    config = pytest.importorskip(
        "accelerate.commands.config.config_args", reason="accelerate is an optional dependency"
    )
    read = config.load_config_from_file(str(path))
    assert read.num_processes == 2
    name = getattr(read, "deepspeed_config", {}).get("deepspeed_config_file")
    if name is not None:
        assert json.loads((ROOT / name).read_text("utf-8"))["zero_optimization"]["stage"] == 3
