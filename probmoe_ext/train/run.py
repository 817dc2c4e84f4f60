"""One run of a comparison: trained, evaluated and analysed, each step kept, so that it goes on behind the last one."""

from __future__ import annotations

import dataclasses
import gc
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from probmoe_ext.files import read_json, read_lines, write_json
from probmoe_ext.train.analysis import analyze, decide
from probmoe_ext.train.comparison import Run
from probmoe_ext.train.cost import PeakMemory, cost_of
from probmoe_ext.train.data import load_examples
from probmoe_ext.train.errors import UsageError
from probmoe_ext.train.evaluate import evaluate
from probmoe_ext.train.evaluation import SCORES_FILE
from probmoe_ext.train.finetune import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, finetune, load_run
from probmoe_ext.train.models import experts_of, load_model, pick_device, read_routing
from probmoe_ext.train.options import EvalConfig, TrainConfig
from probmoe_ext.train.processes import Processes
from probmoe_ext.train.protocols import FEW_SHOT, PROMPTS, ZERO_SHOT

ANALYSIS_FILE, DECISIONS_FILE, COST_FILE, DONE_FILE = "analysis.json", "decisions.json", "cost.json", "done.json"
LOCK_FILE = ".lock"
DECIDED = 4
"""Problems whose every decision is kept."""


def is_done(run: Run) -> bool:
    """Whether nothing is left to do."""
    return read_json(run.folder / DONE_FILE) is not None


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Keep other processes away from a folder; the lock goes with the process, however it ends.

    Args:
        folder: made if it is not there.
        wait: until another process is through with it.

    Yields:
        Whether the folder is ours; never false with `wait`.
    """
    import fcntl

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def perform(run: Run, processes: Processes, *, keep_checkpoints: bool, quiet: bool) -> None:
    """Do what is left of a run.

    Args:
        run: the run.
        processes: all of them train; the first one does the rest.
        keep_checkpoints: leave the checkpoints when it is done.
        quiet: no progress bars.

    Raises:
        UsageError: the folder holds a run with other settings.
    """
    train(run.train, processes, quiet=quiet)
    processes.first(lambda: _finish(run, keep_checkpoints, quiet))
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def train(config: TrainConfig, processes: Processes, *, quiet: bool) -> None:
    """Train, or go on with it, or see that it is done; the cost is written beside it.

    Raises:
        UsageError: the folder holds a run with other settings.
    """
    folder = config.folder
    begun, trained = processes.first(lambda: _state(config))
    if trained:
        return
    memory = PeakMemory(pick_device(config.device))
    summary = finetune(config, resume=begun, quiet=quiet)
    if processes.is_first:
        stepped = summary.train_loss is not None
        _write_cost(folder, memory.read() if stepped else None, None)


def _state(config: TrainConfig) -> tuple[bool, bool]:
    """Whether a training is begun, and whether it is complete."""
    folder = config.folder
    if read_json(folder / CONFIG_FILE) is None:
        return False, False
    before, now = dataclasses.asdict(load_run(folder)), dataclasses.asdict(config)
    changed = [name for name in now if name not in ("output", "model") and before[name] != now[name]]
    if changed:
        raise UsageError(
            f"{folder} holds a run with {', '.join(f'{name}={before[name]!r}' for name in changed)}, not "
            f"{', '.join(repr(now[name]) for name in changed)}: delete it, or use another output"
        )
    return True, read_json(folder / SUMMARY_FILE) is not None


def _write_cost(folder: Path, peak: int | None, evaluation: float | None) -> None:
    cost = cost_of(folder / METRICS_FILE, read_json(folder / SUMMARY_FILE), peak, evaluation)
    write_json(folder / COST_FILE, dataclasses.asdict(cost))


def _finish(run: Run, keep_checkpoints: bool, quiet: bool) -> None:
    folder, began = run.folder, time.perf_counter()
    if not is_done(run):
        if read_json(folder / "eval" / SCORES_FILE) is None:
            evaluate(run.evaluation, quiet=quiet)
        if any(read_json(folder / name) is None for name in (ANALYSIS_FILE, DECISIONS_FILE)):
            _analyze(run.evaluation, folder)
        seconds = read_json(folder / SUMMARY_FILE)["seconds"] + time.perf_counter() - began
        finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
        write_json(folder / DONE_FILE, {"seconds": round(seconds, 1), "finished": finished})
    if not keep_checkpoints:
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def _analyze(config: EvalConfig, folder: Path) -> None:
    device = pick_device(config.device)
    dtype = config.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    model, tokenizer = load_model(str(folder), read_routing(folder), dtype, config.experts)
    if experts_of(model.config) is None:
        return
    model.to(device).eval()
    test = load_examples(str(config.data), "test")[: config.limit]
    analysis, pace = analyze(model, tokenizer, test, PROMPTS["b"], config.batch_size)
    write_json(folder / ANALYSIS_FILE, analysis)
    write_json(folder / DECISIONS_FILE, decide(model, tokenizer, samples_of(folder, config.protocols[-1])[:DECIDED]))
    peak = (read_json(folder / COST_FILE) or {}).get("peak_memory_bytes")
    _write_cost(folder, peak, pace)


def samples_of(folder: Path, score: str = "b") -> list[dict[str, Any]]:
    """The samples of an evaluated run that carry a score; those of the zero-shot prompt for ``b`` and ``c``."""
    name = FEW_SHOT.name if score.startswith("a") else ZERO_SHOT.name
    return read_lines(folder / "eval" / f"samples-{name}.jsonl")
