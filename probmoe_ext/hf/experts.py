"""What the experts of a model do with a router that is not the usual one.

A router may evaluate them in its own way (``Router.runs_experts``): it gets them as an :class:`Evaluation`.

A router that gives each token a number of experts of its own leaves slots unused, with index ``E`` and weight 0. What
happens to them depends on the expert implementation that the model was given:

- ``eager``, ``grouped_mm`` and ``batched_mm`` run :func:`~probmoe_ext.hf.dispatch.grouped_experts_forward` in their
  place, which costs nothing for a slot that is not used, on every version of transformers.
- The kernels of others (``deepgemm``, ``sonicmoe``, what a user registered) run if they know such slots, which
  expert parallelism needs, too.
- Where neither is possible, the loop of the model's own class gets the used slots alone; and experts that are split
  over processes, or a kernel that knows no such slots, get a real expert at weight 0: right, and nothing is saved.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from probmoe_ext.hf.dispatch import NAME, follows_interface, grouped_experts_forward, register_implementation
from probmoe_ext.hf.gate import RouterForm
from probmoe_ext.hf.merging import merged_experts_forward
from probmoe_ext.hf.reclass import Reclassed, check_reclassable, original_class, reclass, restore_class
from probmoe_ext.routers import Router

PARALLEL_FLAG = "_is_expert_parallel"
"""Library kernels mask rows of index ``E`` if the experts have this attribute and it is true; nothing else reads it."""

REPLACED = ("eager", "grouped_mm", "batched_mm", NAME)
"""Implementations that the grouped dispatch computes the same as, but for rounding."""


class SwappedExperts(Reclassed):
    """Experts whose router leaves slots unused, or runs them itself."""

    probmoe_num_experts: int
    probmoe_runner: tuple[Router, Evaluation] | None
    """The router that runs them, if it does, and how it sees them; in a tuple, so that neither is a child."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Evaluate the experts: ``[T, H]`` hidden states, indices and weights ``[T, K]``, to ``[T, H]``."""
        if self.probmoe_runner is not None:
            router, evaluation = self.probmoe_runner
            return router.run_experts(evaluation, hidden_states, top_k_index, top_k_weights)
        return self.evaluate_used(hidden_states, top_k_index, top_k_weights)

    def evaluate_used(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum over the slots that are used."""
        way = _way(self)
        if way == "grouped":
            return grouped_experts_forward(self, hidden_states, top_k_index, top_k_weights)
        if way == "used slots":
            # The loop over experts synchronises by itself, so the shape may depend on the data.
            token, place = (top_k_index < self.probmoe_num_experts).nonzero(as_tuple=True)
            rows = super().forward(
                hidden_states[token], top_k_index[token, place, None], top_k_weights[token, place, None]
            )
            return torch.zeros_like(hidden_states).index_add(0, token, rows)
        if way == "padded":
            top_k_index, top_k_weights = _pad(top_k_index, top_k_weights, self.probmoe_num_experts)
        result: torch.Tensor = super().forward(hidden_states, top_k_index, top_k_weights)
        return result


class Evaluation(nn.Module):
    """The experts of a layer, to be evaluated by its router; see :class:`probmoe_ext.routers.experts.Evaluation`."""

    def __init__(self, module: nn.Module, scale: float = 1.0) -> None:
        super().__init__()
        self.module = module
        self.scale = scale

    def forward(self, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The weighted sum ``[T, H]`` of the experts ``[T, K]`` of each token."""
        experts: Any = self.module
        result: torch.Tensor = experts.evaluate_used(hidden_states, indices, weights)
        return result

    def frozen(self, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """The same, with no gradient to the experts' parameters."""
        constants = {name: parameter.detach() for name, parameter in self.named_parameters()}
        result: torch.Tensor = torch.func.functional_call(self, constants, (hidden_states, indices, weights))
        return result

    def merged(self, hidden_states: torch.Tensor, mixture: torch.Tensor) -> torch.Tensor:
        """Groups ``[G, n, H]``, each through one expert whose parameters are the sum ``[G, E]`` of the experts'."""
        return merged_experts_forward(self.module, hidden_states, mixture)


def check_experts(experts: nn.Module, path: str, router: Router) -> None:
    """Check that the experts of a layer can do what a router asks of them.

    Raises:
        ValueError: If their forward was replaced by something that is not known to call it, they are split over
            processes and the router is to run them, or are to be merged and not stacked; the message says so.
    """
    if router.runs_experts and is_split(experts):
        raise ValueError(
            f"router {router.name!r} evaluates the experts itself, which are split over processes at {path}: load the "
            "model without a tensor- or expert-parallel plan"
        )
    if router.merges_experts and not follows_interface(experts):
        raise ValueError(
            f"router {router.name!r} merges experts, and those at {path} ({original_class(experts).__name__}) do not "
            "keep theirs stacked, in tensors gate_up_proj (or up_proj) and down_proj of a floating dtype"
        )
    if not is_split(experts) and (router.leaves_slots_unused or router.runs_experts):
        check_reclassable(experts, path)


def is_split(experts: nn.Module) -> bool:
    """Whether the library's tensor- or expert-parallel plan was applied to experts."""
    split = getattr(experts, "_is_hooked", False) or getattr(experts, PARALLEL_FLAG, False)
    return bool(split) and not isinstance(experts, SwappedExperts)


def take_router(experts: Any, form: RouterForm, router: Router) -> bool:
    """Let experts take index ``E`` for slots that are not used, or their router run them, if it does either.

    Returns:
        Whether slots that are not used cost nothing; if not, they are computed at weight 0.
    """
    if not (router.leaves_slots_unused or router.runs_experts):
        restore_experts(experts)
        return True
    if is_split(experts):
        if not hasattr(experts, "probmoe_padding"):
            # The plan sends each slot to the process that has its expert: before it does, each gets one.
            experts.probmoe_padding = experts.register_forward_pre_hook(_Padding(form.num_experts))
        return False
    if not isinstance(experts, SwappedExperts):
        register_implementation()
        reclass(experts, SwappedExperts)
        experts.probmoe_num_experts = form.num_experts
        if hasattr(experts, PARALLEL_FLAG):
            setattr(experts, PARALLEL_FLAG, True)
    experts.probmoe_runner = (router, Evaluation(experts, form.scale)) if router.runs_experts else None
    return not router.leaves_slots_unused or _way(experts) != "padded"


def unused_slots_cost(experts: nn.Module) -> str:
    """The warning for experts that compute slots which are not used."""
    what = (
        "experts split over processes compute"
        if is_split(experts)
        else f"the {implementation_of(experts)!r} implementation of {original_class(experts).__name__} computes"
    )
    return (
        f"{what} slots that a token does not use, at weight 0: results are right, but a band of k saves no time; "
        f"these save it: {', '.join(REPLACED)} (model.set_experts_implementation), without splitting the experts"
    )


def restore_experts(experts: Any) -> None:
    """Undo :func:`take_router`; nothing if it was not done."""
    if hasattr(experts, "probmoe_padding"):
        experts.probmoe_padding.remove()
        del experts.probmoe_padding
    if not isinstance(experts, SwappedExperts):
        return
    restore_class(experts)
    del experts.probmoe_num_experts
    del experts.probmoe_runner
    if hasattr(experts, PARALLEL_FLAG):
        setattr(experts, PARALLEL_FLAG, False)


def implementation_of(experts: nn.Module) -> str:
    """The name of the expert implementation that the model was given, ``"eager"`` if there is no choice."""
    config = getattr(experts, "config", None)
    return getattr(config, "_experts_implementation", None) or "eager"


def kernel_knows_unused_slots(name: str) -> bool:
    """Whether an expert implementation of the installed transformers can be given index ``E``.

    Such an index is what the library's expert parallelism calls a sentinel, in the code of every implementation that
    expects one. To try it out instead would tell nothing: a kernel that does not may read memory that nobody wrote.
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        return "sentinel" in inspect.getsource(inspect.unwrap(ALL_EXPERTS_FUNCTIONS[name]))
    except (ImportError, KeyError, OSError, TypeError):
        return False


def _way(experts: SwappedExperts) -> str:
    """How a forward pass goes: ``"grouped"``, ``"used slots"``, ``"own"`` or ``"padded"``."""
    name = implementation_of(experts)
    if name in REPLACED and follows_interface(experts):
        return "grouped"
    if name == "eager":
        return "used slots"
    return "own" if _knows(name) else "padded"


_KNOWN: dict[str, bool] = {}


def _knows(name: str) -> bool:
    if name not in _KNOWN:
        _KNOWN[name] = kernel_knows_unused_slots(name)
    return _KNOWN[name]


class _Padding:
    """A forward pre-hook that fills slots which are not used."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def __call__(self, experts: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden_states, top_k_index, top_k_weights = args
        return (hidden_states, *_pad(top_k_index, top_k_weights, self.num_experts))


def _pad(top_k_index: torch.Tensor, top_k_weights: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Give each slot that is not used a real expert and weight 0."""
    used = top_k_index < num_experts
    # The token's own first expert, so that no expert has to see another token; expert 0 if there is none.
    first = torch.where(used[:, :1], top_k_index[:, :1], 0)
    # The weight is 0 already; this keeps the slot out of its gradient.
    return torch.where(used, top_k_index, first), torch.where(used, top_k_weights, 0)
