"""The published circuit: "exactly k of E" as a decision diagram over a balanced tree of experts, and a draw from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

SENTINEL = -1000.0
"""The log-weight of the node that stands where a list of elements or of parents is padded."""


@dataclass(frozen=True)
class Circuit:
    """A diagram as index tables.

    Nodes ``2 i`` and ``2 i + 1`` are the literals "expert i is out" and "is in". A decision node "j of this range of
    experts" has an element for each way to have some of the j in the left half (the prime) and the others in the right
    one (the sub). The last node is the sentinel.

    Attributes:
        num_experts: E.
        sentinel: its number, which is also the number of the other nodes.
        levels: the decision nodes of each level of the tree, ``[n]``, the root's last.
        elements: prime and sub of each element of a node, ``[nodes, most elements, 2]``, padded with the sentinel.
        parents: a parent, and which of its elements, ``[nodes, most parents, 2]``, padded with the sentinel and 0.
    """

    num_experts: int
    sentinel: int
    levels: tuple[Tensor, ...]
    elements: Tensor
    parents: Tensor


@cache
def exactly(k: int, num_experts: int) -> Circuit:
    """The diagram of subsets of size k, less the decisions that its root does not reach.

    As in `train/olmoe/open_instruct/OLMoE/v2/create_simple_constaint.py`; the tables hold 64-bit integers, which the
    published ones are cast to at each use.

    Raises:
        ValueError: if the number of experts is not a power of two of at least 2, or k is not in 1 to that number.
    """
    if num_experts < 2 or num_experts & (num_experts - 1):
        raise ValueError(f"num_experts: {num_experts} is not a power of two of at least 2, which the circuit needs")
    if not 1 <= k <= num_experts:
        raise ValueError(f"k: {k} is not in 1 to {num_experts}")
    elements: list[list[tuple[int, int]]] = [[] for _ in range(2 * num_experts)]
    by_size = [{0: 2 * expert, 1: 2 * expert + 1} for expert in range(num_experts)]
    levels = []
    while len(by_size) > 1:
        first = len(elements)
        outside = num_experts - 2 * num_experts // len(by_size)  # experts beside a range of this level
        ranges = []
        for left, right in zip(by_size[0::2], by_size[1::2], strict=True):
            sizes = range(max(0, k - outside), min(k, max(left) + max(right)) + 1)
            ranges.append({j: len(elements) + n for n, j in enumerate(sizes)})
            elements += [[(left[i], right[j - i]) for i in left if j - i in right] for j in sizes]
        levels.append(torch.arange(first, len(elements)))
        by_size = ranges
    sentinel = len(elements)
    parents: list[list[tuple[int, int]]] = [[] for _ in elements]
    for node, pairs in enumerate(elements):
        for position, pair in enumerate(pairs):
            for child in pair:
                parents[child].append((node, position))
    return Circuit(
        num_experts, sentinel, tuple(levels), _padded(elements, (sentinel, sentinel)), _padded(parents, (sentinel, 0))
    )


def _padded(lists: list[list[tuple[int, int]]], padding: tuple[int, int]) -> Tensor:
    width = max(map(len, lists))
    return torch.tensor([(entries + [padding] * width)[:width] for entries in lists])


def literals(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The log-weights of the literals' nodes, ``[2 E, T]`` from ``[T, E]``: a circuit has rows of logits last."""
    return torch.stack((log_q.mT, log_p.mT), dim=1).flatten(0, 1)


@torch.no_grad()
def draw(circuit: Circuit, log_weights: list[Tensor]) -> Tensor:
    """Ones at k experts a row, ``[T, E]``: from the root down, one element of every node, by their weights.

    A node that nothing chose draws all the same, but has no vote; an expert is in if its literal is chosen. Both
    published draws do this; the masks that one of them puts on padding and on nodes without a vote are left out.

    Args:
        circuit: the diagram.
        log_weights: of the elements of each level's nodes, ``[n, most elements, T]``.
    """
    num_rows = log_weights[0].shape[-1]
    votes = torch.zeros(circuit.sentinel + 1, num_rows, dtype=torch.long)
    votes[circuit.levels[-1]] = 1
    for nodes, log_weight in zip(reversed(circuit.levels), reversed(log_weights), strict=True):
        weights = log_weight.softmax(-2).mT.flatten(0, 1)
        element = torch.multinomial(weights, 1).view(len(nodes), num_rows, 1)
        children = circuit.elements[nodes].gather(1, element.expand(-1, -1, 2))
        vote = (votes[nodes] > 0).long().flatten()
        rows = torch.arange(num_rows).expand(len(nodes), -1).flatten()
        for child in children.unbind(-1):
            votes.index_put_((child.flatten(), rows), vote, accumulate=True)
    return (votes[1 : 2 * circuit.num_experts : 2] > 0).mT.to(log_weights[0].dtype)
