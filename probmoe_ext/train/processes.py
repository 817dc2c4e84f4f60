"""The processes of ``torchrun`` or ``accelerate launch``: all train together, the first one decides and writes."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from probmoe_ext.train.errors import UsageError

Result = TypeVar("Result")
PATIENCE = timedelta(days=2)
"""How long the others wait while the first process evaluates."""


class Processes:
    """All processes of this call; one, if no launcher started it."""

    def __init__(self, device: torch.device) -> None:
        """Meet the others.

        Args:
            device: where the training will run; decides the backend.
        """
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.group: Any = None
        if self.count > 1:
            from accelerate import PartialState

            PartialState(cpu=device.type == "cpu")
            # Of its own: a GPU backend's patience ends before a long evaluation does.
            self.group = dist.new_group(backend="gloo", timeout=PATIENCE)

    @property
    def is_first(self) -> bool:
        """Whether this process decides and writes."""
        return self.count == 1 or dist.get_rank() == 0

    def first(self, work: Callable[[], Result]) -> Result:
        """Let the first process do something while the others wait; all get what it returns.

        Raises:
            UsageError: in all processes, if the work raised it. After another error the launcher ends the others.
        """
        if self.count == 1:
            return work()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = work()
            except UsageError as error:
                outcome[1] = str(error)
        dist.broadcast_object_list(outcome, src=0, group=self.group)
        if outcome[1] is not None:
            raise UsageError(outcome[1])
        result: Result = outcome[0]
        return result
