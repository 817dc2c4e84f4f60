"""Runs a command of ``probmoe`` and kills the process, as `kill -9` does, at a place that a test chooses.

``python -m tests.train.workers.killed (checkpoint|sample) N COMMAND ARGUMENTS``: in the N-th checkpoint between the
weights and the optimizer, or before the N-th generated sample is kept.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

from probmoe_ext.cli import main


def kill_at(owner: Any, name: str, count: int) -> None:
    """Replace a function by one that kills the process in its n-th call."""
    original, calls = getattr(owner, name), 0

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **options)

    setattr(owner, name, counted)


if __name__ == "__main__":
    torch.set_num_threads(1)
    place, count, *arguments = sys.argv[1:]
    if place == "checkpoint":
        from transformers import Trainer

        kill_at(Trainer, "_save_optimizer_and_scheduler", int(count))
    else:
        import probmoe_ext.train.evaluate as evaluate

        kill_at(evaluate, "append_line", int(count))
    sys.exit(main([*arguments, "--quiet"]))
