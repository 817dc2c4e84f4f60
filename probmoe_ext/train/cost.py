"""What a run costs: time, throughput and memory, as ``cost.json`` holds them."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from probmoe_ext.files import read_lines

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Cost:
    """The cost of a run.

    Attributes:
        tokens_per_second: of training: tokens of a mean optimizer step, padding left out, by its median time.
        step_seconds: median over the log lines of the median optimizer step; None if nothing was measured.
        wall_seconds: of training, without what an interruption has lost.
        peak_memory_bytes: in training: what torch had allocated on the GPU, or the resident set of the process on a
            CPU; None where the system does not tell, or the training was interrupted.
        evaluation_tokens_per_second: of forward passes in evaluation mode; None if not measured.
        device: where it ran.
        parameters: the model's.
    """

    tokens_per_second: float | None
    step_seconds: float | None
    wall_seconds: float
    peak_memory_bytes: int | None
    evaluation_tokens_per_second: float | None
    device: str
    parameters: int


def cost_of(metrics: Path, summary: dict[str, Any], peak: int | None, evaluation: float | None) -> Cost:
    """Put a run's cost together.

    Args:
        metrics: its ``metrics.jsonl``.
        summary: what its ``summary.json`` holds.
        peak: bytes, from `PeakMemory`.
        evaluation: tokens a second of forward passes in evaluation mode.
    """
    steps = [line["step_seconds"] for line in read_lines(metrics) if "step_seconds" in line]
    median = statistics.median(steps) if steps else None
    return Cost(
        tokens_per_second=None if median is None else summary["tokens_per_step"] / median,
        step_seconds=median,
        wall_seconds=summary["seconds"],
        peak_memory_bytes=peak,
        evaluation_tokens_per_second=evaluation,
        device=summary["device"],
        parameters=summary["parameters"],
    )


class PeakMemory:
    """The most memory in use since it was made: torch's allocator on a GPU, the resident set on a Linux CPU."""

    def __init__(self, device: torch.device) -> None:
        """Forget the earlier peak."""
        self.device = device
        self.known = device.type == "cuda"
        if self.known:
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            _CLEAR.write_text("5", encoding="ascii")
            self.known = True
        except OSError:
            pass

    def read(self) -> int | None:
        """Bytes; None where the system does not tell."""
        if not self.known:
            return None
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
