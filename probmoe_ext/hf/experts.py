"""Slots that a token does not use: what the experts of a model do with them.

A router that gives each token a number of experts of its own leaves slots unused, with index ``E`` and weight 0.
Recent versions of transformers skip such rows, because expert parallelism needs it; where they do not, the slot gets a
real expert at weight 0, which is correct and saves nothing.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from probmoe_ext.hf.gate import RouterForm
from probmoe_ext.hf.reclass import Reclassed, check_reclassable, original_class, reclass, restore_class

PARALLEL_FLAG = "_is_expert_parallel"
"""Experts mask rows of index ``E`` if they have this attribute and it is true; nothing else depends on it."""


class SwappedExperts(Reclassed):
    """Experts whose router leaves slots unused."""

    probmoe_skips: frozenset[str]
    """The expert implementations that can be given index ``E``."""
    probmoe_num_experts: int

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Evaluate the experts: ``[T, H]`` hidden states, indices and weights ``[T, K]``, to ``[T, H]``."""
        if implementation_of(self) not in self.probmoe_skips:
            used = top_k_index < self.probmoe_num_experts
            # The token's own first expert, so that no expert has to see another token; expert 0 if there is none.
            first = torch.where(used[:, :1], top_k_index[:, :1], 0)
            top_k_index = torch.where(used, top_k_index, first)
            # The weight is 0 already; this keeps the slot out of its gradient.
            top_k_weights = torch.where(used, top_k_weights, 0)
        result: torch.Tensor = super().forward(hidden_states, top_k_index, top_k_weights)
        return result


def check_experts(experts: nn.Module, path: str) -> None:
    """Check that the experts of a layer can be given unused slots.

    Raises:
        ValueError: If they are split over processes, or wrapped; the message says so.
    """
    split = getattr(experts, PARALLEL_FLAG, False) and not isinstance(experts, SwappedExperts)
    if split:
        raise ValueError(f"{path} is split over processes (expert parallelism), which takes one k and no band")
    check_reclassable(experts, path)


def skip_unused_slots(experts: nn.Module, form: RouterForm) -> bool:
    """Let experts take index ``E`` for slots that are not used.

    Returns:
        Whether the implementation that runs skips them; if not, they are computed at weight 0.
    """
    if not isinstance(experts, SwappedExperts):
        skips = skipping_implementations(experts, form)
        reclass(experts, SwappedExperts)
        swapped: Any = experts
        swapped.probmoe_skips = skips
        swapped.probmoe_num_experts = form.num_experts
        if hasattr(experts, PARALLEL_FLAG):
            setattr(experts, PARALLEL_FLAG, True)
    return implementation_of(experts) in _skips(experts)


def unused_slots_cost(experts: nn.Module) -> str:
    """The warning for experts that compute slots which are not used."""
    return (
        f"the {implementation_of(experts)!r} implementation of {original_class(experts).__name__} computes slots that "
        "a token does not use, at weight 0: results are right, but a band of k saves no time. Implementations of the "
        f"installed transformers that skip them: {', '.join(sorted(_skips(experts))) or 'none'}"
    )


def restore_experts(experts: nn.Module) -> None:
    """Undo :func:`skip_unused_slots`; nothing if it was not done."""
    if not isinstance(experts, SwappedExperts):
        return
    restore_class(experts)
    for name in ("probmoe_skips", "probmoe_num_experts"):
        delattr(experts, name)
    if hasattr(experts, PARALLEL_FLAG):
        setattr(experts, PARALLEL_FLAG, False)


def implementation_of(experts: nn.Module) -> str:
    """The name of the expert implementation that runs, ``"eager"`` if there is no choice."""
    config = getattr(experts, "config", None)
    return getattr(config, "_experts_implementation", None) or "eager"


def skipping_implementations(experts: nn.Module, form: RouterForm) -> frozenset[str]:
    """The expert implementations of the installed transformers that can be given index ``E`` for these experts.

    The loop of the model's own class is tried, since it raises where it cannot. The others would read memory that no
    kernel wrote, which a trial may miss: those that mask such rows are known by the local variable for the mask. A
    version that calls it otherwise is taken as one that does not, which is correct and slower.
    """
    names = {"eager"} if _eager_skips(experts, form) else set()
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError:
        return frozenset(names)
    for name in ALL_EXPERTS_FUNCTIONS.keys():  # noqa: SIM118 - it is no dict in every version
        code = getattr(inspect.unwrap(ALL_EXPERTS_FUNCTIONS[name]), "__code__", None)
        if code is not None and "sentinel_mask" in code.co_varnames:
            names.add(name)
    return frozenset(names)


def _skips(experts: Any) -> frozenset[str]:
    skips: frozenset[str] = experts.probmoe_skips
    return skips


def _eager_skips(experts: nn.Module, form: RouterForm) -> bool:
    cls = original_class(experts)
    twin: Any = object.__new__(cls)
    twin.__dict__.update(experts.__dict__)
    # One zero seen as the whole tensor: no memory, and no look at the model's own, which may be anywhere. On the CPU
    # whatever the default is: an index out of range is an exception here, and the end of the process on a GPU.
    zero = torch.zeros((), device="cpu", dtype=torch.float32)
    twin.__dict__["_parameters"] = {
        name: None if value is None else zero.expand(value.shape)
        for name, value in experts.__dict__["_parameters"].items()
    }
    indices = torch.tensor([[0, form.num_experts]], device="cpu")
    forward = getattr(cls.forward, "__wrapped__", cls.forward)
    try:
        with torch.no_grad():
            forward(twin, zero.expand(1, form.hidden_size), indices, zero.expand(1, 2))
    except Exception:
        return False
    return True
