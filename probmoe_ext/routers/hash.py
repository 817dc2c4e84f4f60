"""Hash routing: the experts of a token are fixed by its id."""

from __future__ import annotations

import torch

from probmoe_ext.routers.base import ExpertsPerToken, Router
from probmoe_ext.routers.registry import register_router

_GOLDEN, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15
"""The odd constants of splitmix64 (Steele, Lea & Flood 2014), as signed integers."""


@register_router("hash")
class HashRouter(Router):
    """Experts by a fixed balanced hash of the token id, each at weight ``1 / k``; nothing is learnt.

    Roller et al. 2021 (Hash Layers For Large Sparse Models, arXiv 2106.04426, section 3.2), for ``k = 1``. The ids are
    cut into blocks of ``E`` in a row, and each block is dealt to the experts in an order of its own, which the seed
    fixes. So any vocabulary is balanced: of ``E`` ids in a row every expert gets ``k``, and no table is needed. With
    more than one expert a token gets ``k`` neighbours of that order; the paper splits the experts instead (MultiHash).

    The paper's balanced hash deals by the tokens' frequencies in the training data; this one knows none, so the load is
    even over the vocabulary, not over a text. There is no option for frequencies.

    The logits have no part in it, not even as a mask, and get no gradient: freeze the gates
    (``probmoe_ext.hf.freeze_router``) where a trainer asks for one of every parameter. All layers with one seed group
    the tokens alike; swap them one by one with different seeds for other groups in each.

    Args:
        num_experts: ``E``.
        k: Experts per token, one number.
        seed: Which hash; an integer of 64 bits.

    Raises:
        TypeError: If the seed is no integer.
        ValueError: If ``k`` is a band or out of range, or the seed is.
    """

    needs = frozenset({"token_ids"})

    def __init__(self, num_experts: int, k: ExpertsPerToken, *, seed: int = 0) -> None:
        super().__init__(num_experts, k, seed=seed)
        self.one_k()
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed of router 'hash' must be an int, got {seed!r}")
        if not -(1 << 63) <= seed < 1 << 63:
            raise ValueError(f"seed of router 'hash' must fit a signed 64-bit integer, got {seed}")
        # Seeds in a row must not give the same orders, moved by a block.
        self.key = int(_mix(torch.tensor(seed, device="cpu")))

    def experts_of(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The experts ``[T, k]`` of token ids ``[T]``, both int64."""
        block = token_ids.div(self.num_experts, rounding_mode="floor")
        place = token_ids - block * self.num_experts
        experts = torch.arange(self.num_experts, device=token_ids.device)
        # The experts in the order of random numbers are a random order of the experts.
        order = _mix(_mix(block + self.key).unsqueeze(-1) + experts).argsort(dim=-1, stable=True)
        slots = (place.unsqueeze(-1) + experts[: self.k_max]) % self.num_experts
        return order.gather(-1, slots)

    def forward(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Route the tokens of the batch to weights and indices ``[T, k]``; of the logits only the dtype is used.

        Raises:
            ValueError: If there are no token ids, or another number of them than of hidden states.
        """
        ids = self.token_ids
        if len(ids) != len(logits):
            raise ValueError(f"router 'hash' got {len(ids)} token ids for {len(logits)} hidden states")
        indices = self.experts_of(ids)
        return self.weights_for(hidden_states, logits, indices), indices

    def weights_for(
        self,
        hidden_states: torch.Tensor,
        logits: torch.Tensor,
        indices: torch.Tensor,
        scores: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``1 / k`` for every expert of ``[T, K]``."""
        return (indices < self.num_experts).to(logits.dtype) / self.k_max


def _mix(number: torch.Tensor) -> torch.Tensor:
    """The number of splitmix64 for a state, int64 to int64; products wrap around."""
    number = number * _GOLDEN
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        number = (number ^ _shift_right(number, shift)) * factor
    return number ^ _shift_right(number, 31)


def _shift_right(number: torch.Tensor, bits: int) -> torch.Tensor:
    """As for an unsigned integer: zeros come in from the left."""
    return (number >> bits) & ((1 << (64 - bits)) - 1)
