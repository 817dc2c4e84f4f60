"""The published circuit, walked up and down once: weights of elements on the way up, marginals on the way down."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.published.circuit import SENTINEL, Circuit, draw, exactly, literals
from benchmarks.published.weights import clamped_log_p, log_complement, straight_through


def route_by_walked_circuit(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Draws k experts and weighs them by the published circuit (`train/olmoe/open_instruct/OLMoE/v2/probmoe_v2.py`).

    The steps of the circuit are those of `simple_v2.py` beside it: a pass up that writes into two tables in place, a
    draw from the second, a pass down that overwrites the first, the straight-through weights. Autograd records the
    passes, and goes back through each write. They are compiled there (for a GPU alone) and not here. Left out: the
    draw's masks, a write of constants to no nodes, a gather of the literals into the order that they have here, a cast
    to float32.

    Args:
        logits: ``[T, E]``, E a power of two.
        k: experts a row, 1 to E.

    Returns:
        Weights and indices, ``[T, k]``.

    Raises:
        ValueError: if there is no circuit of this size.
    """
    circuit = exactly(k, logits.shape[-1])
    values, shares = upward(circuit, clamped_log_p(logits))
    z = draw(circuit, [shares.detach()[nodes] for nodes in circuit.levels])
    return straight_through(logits, z, downward(circuit, values, shares), k)


def upward(circuit: Circuit, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """The log-value of each node, ``[nodes, T]``, and of each node's elements as shares of it, ``[nodes, most, T]``."""
    num_nodes, num_rows = circuit.sentinel + 1, log_p.shape[0]
    values = log_p.new_empty(num_nodes, num_rows)
    shares = log_p.new_zeros(num_nodes, circuit.elements.shape[1], num_rows)
    values[circuit.sentinel] = SENTINEL
    values[torch.arange(2 * circuit.num_experts)] = literals(log_p, log_complement(log_p))
    for nodes in circuit.levels:
        shares[nodes] = values[circuit.elements[nodes]].sum(-2)
        values[nodes] = shares[nodes].logsumexp(-2)
        shares[nodes] -= values[nodes].unsqueeze(1)
    return values, shares


def downward(circuit: Circuit, values: Tensor, shares: Tensor) -> Tensor:
    """The marginals, ``[T, E]``: the root is certain, and what is in a node is what its parents give it.

    ``values`` is overwritten.
    """
    root = circuit.levels[-1]
    values[root] -= values[root]
    for nodes in (*reversed(circuit.levels[:-1]), torch.arange(2 * circuit.num_experts)):
        parent, element = circuit.parents[nodes].unbind(-1)
        values[nodes] = (shares[parent, element] + values[parent]).logsumexp(-2)
    return values[torch.arange(1, 2 * circuit.num_experts, 2)].exp().mT
