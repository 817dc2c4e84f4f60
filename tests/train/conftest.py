"""Fixtures for training and evaluation: no network, a tiny model on disk, and the GSM8K files where they are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from probmoe_ext.train.options import TrainConfig


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's clients read the variable at import, so the constants are set as well."""
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Same sums in each run, and no waiting for a core that other tests use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a top-k run of a few steps."""
    from probmoe_ext.train.finetune import finetune

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "topk"
    finetune(small(folder), quiet=True)
    return folder


@pytest.fixture
def gsm8k() -> str:
    """The folder with GSM8K's train.jsonl and test.jsonl: PROBMOE_GSM8K, or shared/data/gsm8k beside the repository."""
    root = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("PROBMOE_GSM8K", root.parent / "shared" / "data" / "gsm8k"))
    if not (folder / "train.jsonl").is_file():
        pytest.skip(f"no GSM8K files in {folder}: set PROBMOE_GSM8K to a folder with train.jsonl and test.jsonl")
    return str(folder)


def small(folder: Path, **changes: object) -> TrainConfig:
    """Settings of a run of a second or two."""
    settings: dict[str, object] = {
        "data": "builtin:1",
        "output": str(folder),
        "limit": 64,
        "holdout": 8,
        "max_steps": 4,
        "batch_size": 4,
        "save_steps": 2,
        "log_steps": 1,
        "device": "cpu",
    }
    return TrainConfig(**{**settings, **changes})  # type: ignore[arg-type]
