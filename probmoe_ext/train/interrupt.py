"""Signals that end a training in order: the step that is under way is finished and saved."""

from __future__ import annotations

import signal
import threading
from typing import Any

from transformers import TrainerCallback

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal(TrainerCallback):
    """Ends training behind the current step, with a checkpoint, when SIGINT or SIGTERM comes; a second ends it at once.

    A context manager around ``trainer.train()``. Where several processes train together nothing is caught: they would
    have to agree on the step, and have their last checkpoint.
    """

    def __init__(self) -> None:
        """Catch nothing yet."""
        self.stopped = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopOnSignal:
        """Catch the signals, if this is the main thread; one that is ignored stays so."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *failure: object) -> None:
        """Handle the signals as before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _receive(self, number: int, frame: Any) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the signals alone where several processes train together."""
        if args.world_size > 1:
            self.__exit__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop."""
        if self.stopped:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What an epoch ends with comes after the whole of it."""
        if self.stopped:
            control.should_save = control.should_evaluate = False
