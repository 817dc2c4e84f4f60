"""Record which experts each token got, and use the same ones again: in another run, another mode, after training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import nn

from probmoe_ext.hf.gate import SwappedGate
from probmoe_ext.hf.layers import moe_layers
from probmoe_ext.routers import Router


class RoutingRecord:
    """The decisions of a number of forward passes of a model.

    Attributes:
        passes: For each forward pass, the experts ``[T, K]`` of each gate, int16 on the CPU, by the gate's path; index
            ``E`` is a slot that is not used.
    """

    def __init__(self, passes: list[dict[str, torch.Tensor]] | None = None) -> None:
        """Start with none, or with those given."""
        self.passes = passes or []

    def __len__(self) -> int:
        """How many forward passes there are."""
        return len(self.passes)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the record to a file, for :meth:`load`."""
        torch.save(self.passes, path)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> RoutingRecord:
        """Read what :meth:`save` wrote; nothing else than tensors is loaded."""
        return cls(torch.load(path, weights_only=True))


class _Passes:
    """Counts the forward passes of a model, and tells them from the replays of activation checkpointing."""

    def __init__(self, model: nn.Module) -> None:
        self.number = -1
        self.running = False
        self.handles = [model.register_forward_pre_hook(self.before), model.register_forward_hook(self.after)]

    def before(self, model: nn.Module, args: Any) -> None:
        self.number += 1
        self.running = True

    def after(self, model: nn.Module, args: Any, output: Any) -> None:
        self.running = False


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecord]:
    """Record the decisions of a model's routers in each of its forward passes.

    Works in training and evaluation, for swapped models and for those with their own routers. Copying the decisions
    to the CPU waits for the device. A layer that activation checkpointing runs again is recorded once.

    Args:
        model: What is called inside the context; a model with mixture-of-experts layers.

    Yields:
        The record, which fills as the model runs.

    Raises:
        ValueError: If the model has no such layer.
    """
    record, passes = RoutingRecord(), _Passes(model)

    def keep(path: str) -> Any:
        def hook(gate: nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> None:
            if passes.running:
                while len(record.passes) <= passes.number:
                    record.passes.append({})
                record.passes[passes.number][path] = output[2].detach().to("cpu", torch.int16)

        return hook

    try:
        for layer in moe_layers(model):
            passes.handles.append(layer.gate.register_forward_hook(keep(layer.path)))
        yield record
    finally:
        for handle in passes.handles:
            handle.remove()


@contextmanager
def replay_routing(model: nn.Module, record: RoutingRecord) -> Iterator[None]:
    """Let the n-th forward pass inside the context use the experts of the n-th recorded one.

    Only the choice is fixed. Logits are computed anew, and weights and gradients are those of the router for these
    experts: they flow through the softmax scores, and through the marginals in the training mode of ProbMoE. Seeds
    are drawn as without the replay, so dropout and what else draws stays the same. Forward passes and their backward
    passes must alternate if layers are checkpointed, as they do in every trainer.

    Args:
        model: What is called inside the context; its routers are swapped (``swap_router(model, "topk")`` routes as
            the model does by itself).
        record: What :func:`record_routing` gave, of the same batches.

    Raises:
        ValueError: If a router was not swapped, cannot weight given experts, or is not in the record; when a pass is
            run that the record does not have, or has for other tokens.
    """
    layers = moe_layers(model)
    for layer in layers:
        if not isinstance(layer.gate, SwappedGate):
            raise ValueError(f'{layer.path} was not swapped; swap_router(model, "topk") routes as the model does')
        if type(layer.gate.probmoe).weights_for is Router.weights_for:
            raise ValueError(f"router {layer.gate.probmoe.name!r} cannot replay decisions")
        if record.passes and layer.path not in record.passes[0]:
            raise ValueError(f"{layer.path} is not in the record, which has {', '.join(record.passes[0]) or 'nothing'}")
    passes = _Passes(model)

    def choose(path: str) -> Any:
        def hook(router: Router, args: tuple[torch.Tensor, ...], output: Any) -> tuple[torch.Tensor, torch.Tensor]:
            if passes.number >= len(record):
                raise ValueError(f"the record has {len(record)} forward passes, and this is another one")
            hidden_states, logits = args[:2]
            indices = record.passes[passes.number][path].to(logits.device, torch.int64)
            if len(indices) != len(logits):
                raise ValueError(
                    f"forward pass {passes.number} was recorded with {len(indices)} tokens; {path} sees {len(logits)}"
                )
            return router.weights_for(hidden_states, logits, indices, *args[2:]), indices

        return hook

    routers: list[Any] = [layer.gate.probmoe for layer in layers]
    try:
        for layer, router in zip(layers, routers, strict=True):
            # In evaluation, too, the router decides, and not the original in its place.
            router.top_k_in_evaluation = _not_the_usual
            passes.handles.append(router.register_forward_hook(choose(layer.path)))
        yield
    finally:
        for handle in passes.handles:
            handle.remove()
        for router in routers:
            router.__dict__.pop("top_k_in_evaluation", None)


def _not_the_usual() -> None:
    return None
