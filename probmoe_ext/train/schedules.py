"""DirMoE's schedules in transformers' Trainer."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from probmoe_ext.routers.calibration import annealed_concentration, annealed_temperature
from probmoe_ext.routers.dirmoe import DirMoERouter, dirmoe_routers, set_temperature


class DirMoESchedule(TrainerCallback):
    """Anneals the temperature and the concentrations of every DirMoE router, as functions of the optimizer step.

    Before each step the temperature is ``max(temperature_floor, start * temperature_rate**step)``, and each router's
    concentration (the posterior's and the prior's) its value at the start times ``concentration_rate**step``, but no
    less than ``concentration_floor`` of it. A resumed run goes on where it was: the step is the Trainer's.

    Args:
        temperature: At step 0; None for what the routers have.
        temperature_rate: Factor for each step, above 0 and at most 1.
        temperature_floor: The lowest temperature.
        concentration_rate: Factor for each step, above 0 and at most 1.
        concentration_floor: The least fraction of the concentration at the start.

    Raises:
        ValueError: At the start of training, if a number is out of range or the model has no DirMoE router.
    """

    def __init__(
        self,
        temperature: float | None = None,
        temperature_rate: float = 1.0,
        temperature_floor: float = 0.05,
        concentration_rate: float = 1.0,
        concentration_floor: float = 0.1,
    ) -> None:
        """Remember the numbers."""
        self.temperature = temperature
        self.temperature_rate = temperature_rate
        self.temperature_floor = temperature_floor
        self.concentration_rate = concentration_rate
        self.concentration_floor = concentration_floor
        self._started: list[tuple[DirMoERouter, float, float, float]] = []

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Note where each router starts."""
        routers = list(dirmoe_routers(model)) if model is not None else []
        if not routers:
            raise ValueError("DirMoESchedule found no router 'dirmoe' in the model; swap it in before training")
        if not self._started:
            self._started = [
                (
                    router,
                    router.temperature if self.temperature is None else self.temperature,
                    router.concentration,
                    router.prior_concentration,
                )
                for router in routers
            ]
        self._apply(state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the numbers of this step."""
        self._apply(state.global_step)

    def _apply(self, step: int) -> None:
        factor = annealed_concentration(step, 1.0, self.concentration_rate, self.concentration_floor)
        for router, temperature, concentration, prior_concentration in self._started:
            start = max(temperature, self.temperature_floor)
            set_temperature(router, annealed_temperature(step, start, self.temperature_rate, self.temperature_floor))
            router.concentration = concentration * factor
            router.prior_concentration = prior_concentration * factor
