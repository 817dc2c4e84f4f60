"""See what the routers of a model do while it trains: load, sizes, entropy, drift, by layer and over all processes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from probmoe_ext.files import append_line, read_lines, write_lines
from probmoe_ext.hf.context import BatchCarrier
from probmoe_ext.hf.form import read_form
from probmoe_ext.hf.gate import SwappedGate
from probmoe_ext.hf.layers import MoELayer, moe_layers
from probmoe_ext.hf.padding import mask_of
from probmoe_ext.hf.tally import BOUNDS, BUCKETS, Gate, Tally, summarize

SCALARS = (
    "mean_k",
    "load_entropy",
    "util_ratio",
    "max_vio",
    "dead_experts",
    "entropy",
    "coverage",
    "exploration",
    "drift",
    "drift_kl",
)
PREFIX = "routing/"
STATE_FILE = "routing_monitor.pt"
"""Beside a checkpoint: what a resumed run measures drift from, and the frequencies of tokens."""


class RoutingMonitor(TrainerCallback):
    """Counts what the routers of a model choose, swapped or the model's own, without padding and over all processes.

    In a training loop of one's own, a context::

        with RoutingMonitor(model) as monitor:
            for batch in batches:
                ...
                if step % 50 == 0:
                    writer.add_scalars("routing", monitor.scalars(), step)

    With the Trainer (TRL's too), a callback that adds its metrics to every log, so that they reach whatever
    ``report_to`` names::

        RoutingMonitor(model, path="routing.jsonl").attach(trainer)

    Outside of the context, or before and after training, it costs nothing. Inside, sums stay on the device until a
    report is asked for. Replays of activation checkpointing are not counted again.

    Args:
        model: What is called: a model with mixture-of-experts layers. The gates as they are now are what ``drift`` is
            measured from.
        path: A JSONL file that gets a line for each report: all metrics of all layers, the loads of all experts.
        every: Only every n-th forward pass is counted.
        per_layer: Let :meth:`scalars` give every layer's numbers, and not only the mean over layers and the worst.
        together: Let reports be over all processes, each of which must ask for them; ``False`` for what one process
            runs by itself while the others wait.

    Raises:
        TypeError: If ``every`` is no int.
        ValueError: If the model has no mixture-of-experts layer, or ``every`` is below 1.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str | Path | None = None,
        *,
        every: int = 1,
        per_layer: bool = False,
        together: bool = True,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int):
            raise TypeError(f"every must be an int, got {every!r}")
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.model = model
        self.path = None if path is None else Path(path)
        self.every = every
        self.per_layer = per_layer
        self.together = together
        self.layers = moe_layers(model)
        self.tallies = [Tally(gate_of(layer), layer.gate) for layer in self.layers]
        self.ids: torch.Tensor | None = None
        self.buckets: torch.Tensor | None = None
        self.passes = 0
        self.counting = False
        self.training_only = False
        self.first = False
        self.handles: list[Any] = []

    def __enter__(self) -> RoutingMonitor:
        """Start to count."""
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop; what was counted can still be read."""
        self.stop()

    def start(self) -> None:
        """Put the hooks on the model; nothing if they are there."""
        if self.handles:
            return
        # The carrier first: its hook has to know the padding before this one's does.
        self.handles = [
            BatchCarrier(self.model),
            self.model.register_forward_pre_hook(self._before, with_kwargs=True),
            self.model.register_forward_hook(self._after),
        ]
        for layer, tally in zip(self.layers, self.tallies, strict=True):
            self.handles.append(layer.gate.register_forward_hook(_GateHook(self, tally)))

    def stop(self) -> None:
        """Take the hooks away."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.counting = False

    def reset(self) -> None:
        """Forget what was counted; the references of drift and the frequencies of tokens stay."""
        for tally in self.tallies:
            tally.sums.zero_()

    def report(self, reset: bool = True) -> dict[str, Any]:
        """All metrics since the last report, over all processes; every process must ask for it.

        Args:
            reset: Start to count anew.

        Returns:
            ``mean``: each scalar's mean over the layers; ``worst``: its value in the layer with the largest
            ``max_vio``, and ``layer``, that layer's path; ``layers``: all metrics of each, by path. Without any token
            so far ``layers`` is empty.
        """
        device = self.tallies[0].sums.device
        sums = torch.cat([tally.sums.to(device) for tally in self.tallies])
        if self.together and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        parts = sums.split([len(tally.sums) for tally in self.tallies])
        if reset:
            self.reset()
        layers = {
            tally.gate.path: found
            for tally, part in zip(self.tallies, parts, strict=True)
            if (found := summarize(tally.gate, part))["tokens"]
        }
        if not layers:
            return {"mean": {}, "worst": {}, "layers": {}}
        every = list(layers.values())
        mean: dict[str, Any] = {name: sum(one[name] for one in every) / len(every) for name in SCALARS}
        for name in BUCKETS:
            sizes = [one["mean_k_by_frequency"][name] for one in every if name in one.get("mean_k_by_frequency", {})]
            if sizes:
                mean[f"mean_k_{name}"] = sum(sizes) / len(sizes)
        path = max(layers, key=lambda path: layers[path]["max_vio"])
        worst = {"layer": path, **{name: layers[path][name] for name in SCALARS}}
        return {"mean": mean, "worst": worst, "layers": layers}

    def scalars(self, reset: bool = True) -> dict[str, float]:
        """The numbers of :meth:`report` that a logger draws, by names that do not grow with the number of experts.

        Args:
            reset: Start to count anew.

        Returns:
            ``"routing/<metric>"`` for the mean over layers, ``"routing/worst/max_vio"`` and
            ``"routing/worst/dead_experts"``; with ``per_layer`` also ``"routing/<number of the layer>/<metric>"``.
        """
        return self._flat(self.report(reset))

    def write(self, report: dict[str, Any], step: int) -> None:
        """Append a report to the JSONL file, if there is one."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append_line(self.path, {"step": step, **_rounded(report)})

    def attach(self, trainer: Any) -> RoutingMonitor:
        """Add this callback to a Trainer, before those that write logs, so that they see the metrics too.

        Args:
            trainer: A ``transformers.Trainer``, before ``train``.
        """
        callbacks: list[Any] = trainer.callback_handler.callbacks
        if self in callbacks:
            callbacks.remove(self)
        callbacks.insert(0, self)
        self.first = True
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count training passes from here; a resumed run writes behind the lines that it has."""
        if self.path is not None and state.is_world_process_zero:
            kept = [line for line in read_lines(self.path) if state.global_step and line["step"] <= state.global_step]
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_lines(self.path, kept)
        if args.report_to and not self.first and state.is_world_process_zero:
            warnings.warn(
                f"the routing metrics come too late for {', '.join(args.report_to)}: "
                "use RoutingMonitor(model).attach(trainer) in the place of callbacks=[...]",
                stacklevel=2,
            )
        path = _state_path(args, state)
        if state.global_step and path.is_file():
            kept = torch.load(path, weights_only=True)
            self.ids = kept["ids"]
            for tally, reference in zip(self.tallies, kept["references"], strict=True):
                tally.reference = reference
        self.training_only = True
        self.start()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep with the checkpoint what a resumed run cannot find out anew."""
        if state.is_world_process_zero:
            path = _state_path(args, state)
            part = path.with_suffix(".part")
            torch.save({"ids": self.ids, "references": [tally.reference for tally in self.tallies]}, part)
            part.replace(path)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the metrics since the last log."""
        if not self.handles:
            return
        report = self.report()
        if not report["layers"] or logs is None:
            return
        flat = self._flat(report)
        logs.update(flat)
        if state.log_history:
            state.log_history[-1].update(flat)
        if state.is_world_process_zero:
            self.write(report, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop to count."""
        self.stop()
        self.training_only = False

    def _flat(self, report: dict[str, Any]) -> dict[str, float]:
        flat = {f"{PREFIX}{name}": float(value) for name, value in report["mean"].items()}
        if report["worst"]:
            flat.update({f"{PREFIX}worst/{name}": float(report["worst"][name]) for name in ("max_vio", "dead_experts")})
        if self.per_layer:
            for layer in self.layers:
                found = report["layers"].get(layer.path, {})
                flat.update({f"{PREFIX}{layer.index}/{name}": float(found[name]) for name in SCALARS if found})
        return flat

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.counting = model.training or not self.training_only
        if self.every > 1:
            self.counting = self.counting and self.passes % self.every == 0
            self.passes += 1
        self.buckets = None
        ids = args[0] if args else kwargs.get("input_ids")
        if self.counting and isinstance(ids, torch.Tensor) and not ids.is_floating_point():
            self.buckets = self._buckets(ids.flatten())

    def _after(self, model: nn.Module, args: Any, output: Any) -> None:
        # What runs later is a replay of activation checkpointing.
        self.counting = False

    @torch.no_grad()
    def _buckets(self, ids: torch.Tensor) -> torch.Tensor:
        """The place of each token in ``BUCKETS``, by its share among those seen so far."""
        if self.ids is None or self.ids.device != ids.device:
            size = self.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
            self.ids = torch.zeros(size, device=ids.device) if self.ids is None else self.ids.to(ids.device)
        mask = mask_of(self.layers[0].gate, len(ids))
        self.ids.scatter_add_(0, ids, torch.ones_like(ids, dtype=torch.float32) if mask is None else mask.float())
        share = self.ids[ids] / self.ids.sum().clamp(min=1)
        return sum((share < bound).long() for bound in BOUNDS)  # type: ignore[return-value]


class _GateHook:
    """Adds what a gate returns to the tally of its layer."""

    def __init__(self, monitor: RoutingMonitor, tally: Tally) -> None:
        self.monitor = monitor
        self.tally = tally

    def __call__(self, gate: nn.Module, args: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
        if self.monitor.counting:
            recorded, indices = output[0].detach(), output[2]
            mask = mask_of(gate, len(indices))
            self.tally.add(args[0].detach(), recorded, indices, mask, self.monitor.buckets)


def gate_of(layer: MoELayer) -> Gate:
    """What a tally has to know of the gate of a layer, swapped or the model's own."""
    form = layer.gate.probmoe_form if isinstance(layer.gate, SwappedGate) else read_form(layer)
    return Gate(layer.path, form.num_experts, form.k, form.records == "probabilities", form.weight, form.bias)


def _state_path(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / STATE_FILE


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
