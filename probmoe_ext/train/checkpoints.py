"""The checkpoints of a run: which of them are whole, and the final weights, put into the run's folder in one piece."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

STATE_FILE = "trainer_state.json"
"""What the Trainer writes last into a checkpoint."""


def last_checkpoint(folder: Path) -> Path | None:
    """The latest whole checkpoint of a run; None if there is none."""
    whole = [path for path in _checkpoints(folder) if _is_whole(path)]
    return max(whole, key=_step, default=None)


def remove_unfinished(folder: Path) -> None:
    """Delete the checkpoints whose writing was cut short."""
    for path in _checkpoints(folder):
        if not _is_whole(path):
            shutil.rmtree(path, ignore_errors=True)


def save_final(trainer: Any, folder: Path) -> None:
    """Save model and tokenizer beside their place and move them into it, the configuration last.

    Args:
        trainer: a `transformers.Trainer`; every process of it has to call.
        folder: the run's.

    Raises:
        OSError: they cannot be written; the folder is as it was then.
    """
    scratch = folder / ".unfinished"
    try:
        trainer.save_model(str(scratch))
        if trainer.is_world_process_zero():
            for path in sorted(
                scratch.iterdir(), key=lambda path: (path.suffix == ".json", path.name == "config.json")
            ):
                path.replace(folder / path.name)
    finally:
        if trainer.is_world_process_zero():
            shutil.rmtree(scratch, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and _step(path) >= 0]


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
