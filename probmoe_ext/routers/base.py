"""The contract that every router keeps."""

from __future__ import annotations

import operator
from typing import Any, ClassVar

import torch

from probmoe_ext.routers.auxiliary import AuxiliaryLosses
from probmoe_ext.routers.context import Batch, LayerContext
from probmoe_ext.routers.experts import Evaluation

ExpertsPerToken = int | tuple[int, int]


class Router(AuxiliaryLosses):
    """Turns the hidden states and logits of a batch of tokens into experts and their weights.

    A subclass implements :meth:`forward`, hands its options to this constructor (they are what a saved model
    remembers), and is registered with :func:`~probmoe_ext.routers.register_router`. Its constructor takes
    ``num_experts`` and ``k`` first and options by keyword; the swap fills in two of them from the model if they are
    named there and not given: ``normalize`` (does the model renormalise its weights) and ``hidden_size``. Parameters
    and submodules are allowed: they are cast to the gate's dtype, and travel in the state dict.

    An auxiliary loss joins the backward pass by :meth:`join_loss`, in a class that says ``has_loss = True``. What the
    router reads beside its arguments it names in ``needs``; what it keeps from batch to batch it updates in
    :meth:`begin_pass`; and if the experts are to do something else than evaluate the chosen ones, it says
    ``runs_experts = True`` and implements :meth:`run_experts`.

    Routing mathematics is done in float32 whatever the dtype of the logits, and the weights come back in that dtype.

    Args:
        num_experts: Number of experts ``E``, at least 1.
        k: Experts per token, an int, or a band ``(k_min, k_max)``; ``0 <= k_min <= k_max <= E`` and ``k_max >= 1``.
        **options: What else is needed to build this router again; values that JSON can hold.

    Raises:
        TypeError: If ``num_experts`` or ``k`` is no integer (or pair of integers).
        ValueError: If ``k`` is out of range.
    """

    name: ClassVar[str] = ""
    """The registered name."""

    takes_scores: ClassVar[bool] = False
    """Whether :meth:`forward` takes scores as a third argument, see there."""

    needs: ClassVar[frozenset[str]] = frozenset()
    """What it reads of :mod:`probmoe_ext.routers.context`: names of the properties below."""

    adapts: ClassVar[bool] = False
    """Whether :meth:`begin_pass` does something."""

    runs_experts: ClassVar[bool] = False
    """Whether :meth:`run_experts` does something else than evaluate the chosen experts."""

    merges_experts: ClassVar[bool] = False
    """Whether :meth:`run_experts` merges experts, which must then be stacked in one tensor each."""

    batch: Batch | None = None
    """The batch that is under way, while somebody notes it."""

    layer: LayerContext | None = None
    """What the layer has computed in this pass, if this router or that of the layer behind needs it."""

    peers: tuple[Router, ...] = ()
    """The routers of the model in the order of its layers, this one among them, if this one adapts."""

    def __init__(self, num_experts: int, k: ExpertsPerToken, **options: Any) -> None:
        super().__init__()
        self.num_experts = _integer("num_experts", num_experts)
        if self.num_experts < 1:
            raise ValueError(f"num_experts must be at least 1, got {num_experts}")
        self.k_min, self.k_max = check_k(k, self.num_experts)
        self.options = options

    @property
    def k(self) -> ExpertsPerToken:
        """Experts per token: an int, or ``(k_min, k_max)`` if the number varies."""
        return self.k_min if self.k_min == self.k_max else (self.k_min, self.k_max)

    @property
    def width(self) -> int:
        """``K``, the number of slots in the results: ``k_max``."""
        return self.k_max

    @property
    def leaves_slots_unused(self) -> bool:
        """Whether some slots may carry index ``E`` and weight 0."""
        return self.k_min < self.k_max

    def one_k(self) -> int:
        """``k`` of a router that takes no band.

        Raises:
            ValueError: If it was given one.
        """
        if self.k_min != self.k_max:
            raise ValueError(f"router {self.name!r} takes one k, got the band ({self.k_min}, {self.k_max})")
        return self.k_max

    @property
    def token_mask(self) -> torch.Tensor | None:
        """``[T]`` bool, the tokens that a loss of this router may count (the others are padding); ``None`` for all."""
        return None if self.batch is None else self.batch.mask

    @property
    def token_ids(self) -> torch.Tensor:
        """``[T]`` int64, the tokens' ids; for a router that needs ``"token_ids"``."""
        ids = None if self.batch is None else self.batch.token_ids
        if ids is None:
            raise self._missing("token ids", "call the model with input_ids (not inputs_embeds)")
        return ids.flatten()

    @property
    def batch_shape(self) -> tuple[int, int]:
        """``(batch, length)`` of the tokens; for a router that needs ``"batch_shape"``."""
        if self.batch is None or self.batch.shape is None:
            raise self._missing("the shape of the batch", "call it inside of a swapped model")
        return self.batch.shape

    @property
    def continues(self) -> bool:
        """Whether the tokens follow others that are in a cache, as in generation; needs ``"batch_shape"``."""
        return self.batch is not None and self.batch.continues

    @property
    def attention(self) -> torch.Tensor:
        """``[batch, heads, length, keys]``, this layer's attention; for a router that needs ``"attention"``."""
        if self.layer is None or self.layer.attention is None:
            raise self._missing("attention weights", 'load the model with attn_implementation="eager"')
        return self.layer.attention

    @property
    def previous_logits(self) -> torch.Tensor | None:
        """``[T, E]``, the logits of the layer before; ``None`` in the first; needs ``"previous_logits"``."""
        previous = None if self.layer is None else self.layer.previous
        return None if previous is None else previous.logits

    @property
    def previous_residual(self) -> torch.Tensor | None:
        """What the router of the layer before left by ``self.layer.leave``; needs ``"previous_logits"``."""
        previous = None if self.layer is None else self.layer.previous
        return None if previous is None else previous.taken()

    def _missing(self, what: str, remedy: str) -> ValueError:
        return ValueError(f"router {self.name!r} needs {what}, and has none: {remedy}, or fill its context")

    def top_k_in_evaluation(self) -> tuple[int, bool] | None:
        """Say whether this router, in evaluation mode, is the usual one.

        Returns:
            ``(k, normalize)`` if the evaluation mode is softmax, the ``k`` largest, and renormalisation if
            ``normalize``; ``None`` otherwise. A model whose own router does the same runs that one, bit for bit.
        """
        return None

    def gate_input(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What the gate computes the logits of, ``[T, H]``; a router may add noise to it in training."""
        return hidden_states

    def forward(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route.

        A router that says ``takes_scores = True`` has a third argument, ``scores: torch.Tensor | None = None``: what
        the weights are made of, ``[T, E]`` float32, in place of the softmax of the logits. That is what models with
        sigmoid scores, a correction bias or groups of experts need.

        Args:
            hidden_states: ``[T, H]``, what the gate saw.
            logits: ``[T, E]`` in any floating dtype, the gate's output; -inf for an expert that must not be chosen.

        Returns:
            Weights ``[T, K]`` in the dtype of the logits, and indices ``[T, K]`` in int64, ``K = self.width``.
            A slot that is not used has weight 0 and index ``E``.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement forward(hidden_states, logits)")

    def weights_for(
        self,
        hidden_states: torch.Tensor,
        logits: torch.Tensor,
        indices: torch.Tensor,
        scores: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The weights that :meth:`forward` returns, values and gradient, had it chosen given experts.

        Args:
            hidden_states: ``[T, H]``.
            logits: ``[T, E]``.
            indices: ``[T, K]``, int64; index ``E`` is a slot that is not used.
            scores: As in :meth:`forward`, for routers that take them.

        Returns:
            ``[T, K]`` in the dtype of the logits; 0 where a slot is not used.

        Raises:
            ValueError: If the router has no such weights.
        """
        raise ValueError(f"router {self.name!r} cannot replay decisions: it does not implement weights_for")

    def begin_pass(self) -> None:
        """Update what this router keeps from batch to batch, if it says ``adapts = True``.

        Called before each forward pass of a swapped model in training mode, once: not again when activation
        checkpointing replays a layer, which has to see what the first run saw. Other callers call it themselves.
        What has to follow all layers of a model reads what ``peers`` noted, and changes nothing that they read.
        """

    def run_experts(
        self, evaluate: Evaluation, hidden_states: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """Evaluate the experts of tokens that :meth:`forward` has just routed; asked if ``runs_experts`` is true.

        Args:
            evaluate: The experts; called with the other three arguments, it does what they do by themselves.
            hidden_states: ``[T, H]``, what the experts see.
            indices: ``[T, K]``, from :meth:`forward`.
            weights: ``[T, K]``, from :meth:`forward`, perhaps times a factor of the model.

        Returns:
            ``[T, H]``, the weighted sum of the experts' outputs.
        """
        return evaluate(hidden_states, indices, weights)

    def extra_repr(self) -> str:
        """The arguments that build this router."""
        options = "".join(f", {name}={value!r}" for name, value in self.options.items())
        return f"num_experts={self.num_experts}, k={self.k}{options}"


def check_k(k: ExpertsPerToken, num_experts: int) -> tuple[int, int]:
    """Check the experts per token.

    Args:
        k: An int or a pair ``(k_min, k_max)``.
        num_experts: ``E``.

    Returns:
        ``(k_min, k_max)``.

    Raises:
        TypeError: If ``k`` is neither an int nor a pair of them.
        ValueError: If it is out of range.
    """
    if isinstance(k, list | tuple):
        if len(k) != 2:
            raise ValueError(f"k must be an int or a pair (k_min, k_max), got {len(k)} values: {k!r}")
        k_min, k_max = _integer("k_min", k[0]), _integer("k_max", k[1])
    else:
        k_min = k_max = _integer("k", k)
    if k_min > k_max:
        raise ValueError(f"k = (k_min, k_max) must be ascending, got ({k_min}, {k_max})")
    if k_min < 0 or k_max < 1:
        raise ValueError(f"k must be at least 1 (k_min at least 0), got {k!r}")
    if k_max > num_experts:
        raise ValueError(f"k must be at most the number of experts, {num_experts}, got {k!r}")
    return k_min, k_max


def _integer(argument: str, value: object) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{argument} must be an int, got {value!r}")
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{argument} must be an int, got {value!r}") from None
