"""What a router may know beside hidden states and logits: the batch that is under way, and the layer around it.

A gate sees tokens in a row, ``[T, H]``. Whose they are, which of them are padding, what they attended to, and how the
layer before routed is noted by hooks of the swap, in two cells that a router holds: no global variable, and seen from
the threads in which autograd replays a checkpointed layer. A router says what it reads in ``Router.needs``, and reads
it by properties of the same names. Outside of a swapped model, whoever calls the router fills the cells::

    router.batch = Batch(token_ids=ids)
    router.layer = LayerContext(attention=attention)
"""

from __future__ import annotations

from typing import Any

import torch

TOKEN_IDS, BATCH_SHAPE, ATTENTION, PREVIOUS_LOGITS = "token_ids", "batch_shape", "attention", "previous_logits"
NEEDS = (TOKEN_IDS, BATCH_SHAPE, ATTENTION, PREVIOUS_LOGITS)
"""What a router may say that it needs."""


class Batch:
    """The batch that a model is running, in a cell that all its gates and routers share.

    Attributes:
        mask: ``[T]`` bool, the tokens that count; ``None`` for all.
        token_ids: ``[batch, length]`` int64, ``None`` where the model was given embeddings.
        shape: ``(batch, length)``; ``T = batch * length``, the tokens of a sequence in a row.
        continues: Whether the tokens follow others, which are in a cache.
        given: Whether a caller said which tokens count, and no hook may change it.
        users: How many want the cell kept.
    """

    def __init__(
        self,
        mask: torch.Tensor | None = None,
        token_ids: torch.Tensor | None = None,
        shape: tuple[int, int] | None = None,
    ) -> None:
        self.mask = mask
        self.token_ids = token_ids
        self.shape = (token_ids.shape[0], token_ids.shape[1]) if shape is None and token_ids is not None else shape
        self.continues = False
        self.given = False
        self.users = 0


class LayerContext:
    """What the layer of a router has computed before the router runs; a cell of each router.

    Attributes:
        attention: ``[batch, heads, length, keys]``, the attention weights of this layer.
        logits: ``[T, E]``, the gate's logits in this pass, for the layer behind.
        residual: What the router itself leaves for that of the layer behind, see :meth:`leave`.
        previous: The cell of the layer before that routes; ``None`` in the first.
    """

    def __init__(self, attention: torch.Tensor | None = None, previous: LayerContext | None = None) -> None:
        self.attention = attention
        self.previous = previous
        self.logits: torch.Tensor | None = None
        self.residual: torch.Tensor | None = None
        self._with_graph = False

    def leave(self, residual: torch.Tensor) -> None:
        """Leave a tensor for the router of the layer behind, whose gradient is to come back here."""
        self.residual, self._with_graph = residual, torch.is_grad_enabled()

    def taken(self) -> torch.Tensor | None:
        """What the router of this layer left, for that of the layer behind; ``None`` if it left nothing.

        Raises:
            ValueError: If its gradient could not come back: reentrant activation checkpointing runs each layer without
                a graph, and differentiates it by itself.
        """
        if self.residual is not None and torch.is_grad_enabled() and not self._with_graph:
            raise ValueError(
                "a router learns through the logits of the layer before, which reentrant activation checkpointing cuts "
                'off: use gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        return self.residual

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold no tensors: they are of a pass that is over, and may be parts of its graph."""
        return {
            "attention": None,
            "previous": self.previous,
            "logits": None,
            "residual": None,
            "_with_graph": False,
        }
