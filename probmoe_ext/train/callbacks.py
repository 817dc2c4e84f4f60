"""What a run writes while it goes on: metrics, a calm progress bar, the routing beside each checkpoint."""

from __future__ import annotations

import statistics
import time
from itertools import takewhile
from pathlib import Path
from typing import Any

from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from probmoe_ext.files import append_line, read_lines, write_lines
from probmoe_ext.train.models import Routing, write_routing


class StepClock(TrainerCallback):
    """Measures each optimizer step (forward, backward, update), in seconds; data, evaluation and saving are outside."""

    def __init__(self) -> None:
        """Start without measurements."""
        self.seconds: list[float] = []
        self._begun = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._begun = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self.seconds.append(time.perf_counter() - self._begun)


class MetricsFile(TrainerCallback):
    """Appends each of the Trainer's logs to a JSONL file, with step, seconds, and the median time of its steps.

    Lines of steps that a resumed run repeats are taken out first, and its seconds go on from the last line that stays,
    so the file reads like that of an uninterrupted run.
    """

    def __init__(self, path: Path, clock: StepClock) -> None:
        """Remember where to write, and what measures the steps."""
        self.path = path
        self.clock = clock
        self.started = time.perf_counter()
        self.written = 0

    @property
    def seconds(self) -> float:
        """Wall-clock time of training, without what an interruption has lost."""
        return time.perf_counter() - self.started

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep only the lines up to the step at which training starts."""
        self.started = time.perf_counter()
        self.written = len(self.clock.seconds)
        if state.is_world_process_zero:
            kept = [line for line in read_lines(self.path) if line["step"] <= state.global_step]
            # The Trainer's closing words on a part of the run, and what came behind them, are left out as well.
            kept = list(takewhile(lambda line: "train_runtime" not in line, kept)) if state.global_step else []
            write_lines(self.path, kept)
            self.started -= kept[-1]["seconds"] if kept else 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Write one line."""
        if not state.is_world_process_zero:
            return
        line = {"step": state.global_step, "seconds": round(self.seconds, 3), **(logs or {})}
        if steps := self.clock.seconds[self.written :]:
            line["step_seconds"] = statistics.median(steps)
            self.written += len(steps)
        append_line(self.path, line)


class LossProgress(ProgressCallback):
    """transformers' progress bar with the latest loss in it, in place of a printed line for each log."""

    def __init__(self, description: str) -> None:
        """Remember what to write before the bar."""
        super().__init__()
        self.description = description

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.description)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the loss in the bar."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}", refresh=False)


class RoutingBesideCheckpoints(TrainerCallback):
    """Writes the routing into each checkpoint, so that a checkpoint is evaluated as it was trained."""

    def __init__(self, routing: Routing) -> None:
        """Remember the routing."""
        self.routing = routing

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write it beside the checkpoint that was just saved."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            write_routing(folder, self.routing)
