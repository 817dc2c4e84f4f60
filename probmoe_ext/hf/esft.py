"""Expert-specialised fine-tuning: train the experts that a task uses, and nothing else (ESFT, arXiv 2407.01906)."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.weak import WeakTensorKeyDictionary

from probmoe_ext.hf.context import BatchCarrier
from probmoe_ext.hf.gate import tensor_of
from probmoe_ext.hf.layers import MoELayer, gate_weight, moe_layers, shape_of
from probmoe_ext.hf.padding import mask_of

Model = TypeVar("Model", bound=nn.Module)
SCORES = ("gate", "token")
ROUNDING = 1e-9


@torch.no_grad()
def expert_affinity(
    model: nn.Module, batches: Iterable[Mapping[str, Any] | torch.Tensor], score: Literal["gate", "token"] = "gate"
) -> dict[str, torch.Tensor]:
    """How much of a task each expert does, measured on a sample of its data.

    Args:
        model: A model with mixture-of-experts layers, swapped or not. It runs in evaluation mode, and is left in the
            mode that it had.
        batches: What the model is called with, one after another: keyword arguments, or ``input_ids`` alone. Tokens
            that the attention mask excludes do not count.
        score: ``"gate"``: the mean weight that tokens give an expert (eq. 6, 0 where it is not chosen); ``"token"``:
            the share of tokens' slots that it has (eq. 7).

    Returns:
        By the path of each gate, ``[E]`` float64 on the CPU, divided by its sum, so that each layer's is 1. The mean
        is over all tokens of the sample, as in the authors' code; the paper takes each sequence's mean first.

    Raises:
        ValueError: If the model has no mixture-of-experts layer, ``score`` is unknown, or no token counted.
    """
    if score not in SCORES:
        raise ValueError(f"score must be one of {', '.join(SCORES)}; got {score!r}")
    layers = moe_layers(model)
    sums: dict[str, torch.Tensor] = {}

    def count(path: str, num_experts: int) -> Any:
        def hook(gate: nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> None:
            _, weights, indices = output
            used = indices < num_experts
            given = weights.double() if score == "gate" else used / used.sum(-1, keepdim=True).clamp(min=1).double()
            mask = mask_of(gate, len(indices))
            given = given * used if mask is None else given * used * mask.unsqueeze(-1)
            found = given.new_zeros(num_experts + 1).index_add(0, indices.flatten(), given.flatten())[:-1].cpu()
            sums[path] = sums[path] + found if path in sums else found

        return hook

    carrier, training = BatchCarrier(model), model.training
    handles = [one.gate.register_forward_hook(count(one.path, _num_experts(one))) for one in layers]
    device = next(model.parameters()).device
    try:
        model.eval()
        for batch in batches:
            named = {"input_ids": batch} if isinstance(batch, torch.Tensor) else batch
            model(**{name: one.to(device) if isinstance(one, torch.Tensor) else one for name, one in named.items()})
    finally:
        model.train(training)
        carrier.remove()
        for handle in handles:
            handle.remove()
    if any(one.path not in sums or not float(sums[one.path].sum()) for one in layers):
        raise ValueError("batches must hold a token that counts, and reach every mixture-of-experts layer")
    return {one.path: sums[one.path] / sums[one.path].sum() for one in layers}


def select_experts(affinity: Mapping[str, torch.Tensor], p: float = 0.1) -> dict[str, list[int]]:
    """The experts to train: in each layer the fewest whose affinity adds up to ``p`` (eq. 8).

    Args:
        affinity: What :func:`expert_affinity` gave, ``[E]`` for each gate.
        p: Above 0 and at most 1.

    Returns:
        By the path of each gate, experts by descending affinity, ties to the lower index; at least one. It can be
        written as JSON.

    Raises:
        ValueError: If ``p`` is out of range.
    """
    if not 0 < p <= 1:
        raise ValueError(f"p must be above 0 and at most 1, got {p}")
    found = {}
    for path, scores in affinity.items():
        values, order = scores.double().sort(descending=True, stable=True)
        before = values.cumsum(0) - values
        found[path] = order[before < p * float(values.sum()) - ROUNDING].tolist()
    return found


def train_experts_only(model: Model, selection: Mapping[str, Iterable[int]], *, others: bool = False) -> Model:
    """Freeze all of a model but the selected experts, in place.

    Experts are slices of tensors ``[E, …]``, which an optimizer knows as a whole. The gradient of a frozen slice is 0
    from here on; and since weight decay, and momentum of earlier steps, would move it all the same, every optimizer of
    ``torch.optim`` (or derived from its base class) puts frozen slices back after a step, bit for bit. Its state still
    has the size of the whole tensor, and a step holds a copy of the frozen slices. Optimizers that do not see the
    model's own parameters (DeepSpeed's, FSDP with flat parameters) would move them.

    What is frozen is a property of these parameters in this process: call this again for a copy of the model, or after
    loading it.

    Args:
        model: A model with mixture-of-experts layers, swapped or not.
        selection: What :func:`select_experts` gave: by the path of a gate, the experts to train. All experts of layers
            that are not named are frozen.
        others: Whether what is no routed expert (routers, attention, shared experts, …) keeps being trained.

    Returns:
        ``model``.

    Raises:
        ValueError: If a path or an expert is not in the model, nothing is selected, or a layer's experts are neither
            stacked in tensors ``[E, …]`` nor modules of a list.
    """
    layers = {one.path: one for one in moe_layers(model)}
    chosen = {path: sorted(set(experts)) for path, experts in selection.items()}
    for path, experts in chosen.items():
        if path not in layers:
            raise ValueError(f"{path!r} in selection is none of the model's gates, {', '.join(layers)}")
        number = _num_experts(layers[path])
        wrong = [one for one in experts if isinstance(one, bool) or not isinstance(one, int) or not 0 <= one < number]
        if wrong:
            raise ValueError(f"experts of {path} must be ints from 0 to {number - 1}, got {wrong[0]!r}")
    if not any(chosen.values()):
        raise ValueError("selection names no expert: there would be nothing to train")
    planned = [(one, list(_expert_parameters(one))) for one in layers.values()]
    if not others:
        model.requires_grad_(False)
    for layer, parameters in planned:
        trained = chosen.get(layer.path, [])
        for parameter, expert in parameters:
            _thaw(parameter)
            if expert is not None:  # of one expert alone
                parameter.requires_grad_(expert in trained)
                continue
            parameter.requires_grad_(bool(trained))
            frozen = [one for one in range(_num_experts(layer)) if one not in trained]
            if trained and frozen:
                _freeze(parameter, torch.tensor(frozen))
    return model


_FROZEN: Any = WeakTensorKeyDictionary()
"""By parameter: the slices that no optimizer may move, and the hook on its gradient."""
_saved: Any = WeakTensorKeyDictionary()


def _thaw(parameter: nn.Parameter) -> None:
    """Let all slices of a parameter be trained again; nothing if none was frozen."""
    held = _FROZEN.pop(parameter, None)
    if held is not None:
        held[1].remove()


def _freeze(parameter: nn.Parameter, slices: torch.Tensor) -> None:
    slices = slices.to(parameter.device)
    handle = parameter.register_hook(lambda gradient: gradient.index_fill(0, slices.to(gradient.device), 0))
    _FROZEN[parameter] = (slices, handle)
    _watch_optimizers()


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for parameter, slices in _held(optimizer):
        _saved[parameter] = parameter.detach()[slices]


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for parameter, slices in _held(optimizer):
        parameter.detach().index_copy_(0, slices, _saved.pop(parameter))


def _held(optimizer: torch.optim.Optimizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The parameters of an optimizer that have frozen slices, and these."""
    if len(_FROZEN):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter in _FROZEN:
                    yield parameter, _FROZEN[parameter][0].to(parameter.device)


@functools.cache
def _watch_optimizers() -> None:
    """Let every optimizer of this process put frozen slices back, from the first one that there is."""
    register_optimizer_step_pre_hook(_before_step)
    register_optimizer_step_post_hook(_after_step)


def _num_experts(layer: MoELayer) -> int:
    name = gate_weight(layer.gate)
    assert name is not None  # it is how the layer was found
    return int(shape_of(tensor_of(layer.gate, name))[0])


def _expert_parameters(layer: MoELayer) -> Iterator[tuple[nn.Parameter, int | None]]:
    """The parameters of a layer's experts, with the number of the expert, or ``None`` for a stack of all."""
    number = _num_experts(layer)
    for name, parameter in layer.experts.named_parameters():
        first = name.split(".")[0]
        if first.isdigit():
            yield parameter, int(first)
        elif parameter.dim() > 1 and parameter.shape[0] == number:
            yield parameter, None
        else:
            raise ValueError(
                f"the experts beside {layer.path} are not stacked: {name} has shape {list(parameter.shape)}, and not "
                f"[{number}, …]"
            )
