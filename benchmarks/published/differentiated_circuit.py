"""The published circuit, whose marginals are the derivative that autograd finds of its value."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.published.circuit import SENTINEL, Circuit, draw, exactly, literals
from benchmarks.published.weights import log_complement, straight_through

LEAST_MARGINAL = 1e-30


def route_by_differentiated_circuit(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Draws k experts and weighs them by the published circuit (`models/OLMoE/v2/ProbMoE_V2_olmoe_exact.py`).

    The steps of the circuit are those of `models/OLMoE/v2/circuit_layer.py`: a pass from the literals up that keeps
    autograd's graph, the derivative of its end, the logarithm of that and back, a draw from the root down, the
    straight-through weights. Left out: a second pass up, which is compiled there (for a GPU alone) and whose weights
    the draw takes here from the first one; a write of constants to no nodes; a gather of the literals into the order
    that they have here; casts to float32 and back.

    Args:
        logits: ``[T, E]``, E a power of two; gradients must be enabled.
        k: experts a row, 1 to E.

    Returns:
        Weights and indices, ``[T, k]``.

    Raises:
        ValueError: if there is no circuit of this size.
    """
    circuit = exactly(k, logits.shape[-1])
    m, log_weights = marginals(circuit, F.logsigmoid(logits))
    return straight_through(logits, draw(circuit, log_weights), m, k)


def marginals(circuit: Circuit, log_p: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The derivative of ``log P(N = k)`` by ``log p``, itself differentiable, and the weights found on the way."""
    log_p.requires_grad_()
    log_partition, log_weights = upward(circuit, log_p)
    (m,) = torch.autograd.grad(log_partition.sum(), log_p, create_graph=True)
    return m.clamp_min(LEAST_MARGINAL).log().exp(), log_weights


def upward(circuit: Circuit, log_p: Tensor) -> tuple[Tensor, list[Tensor]]:
    """``log P(N = k)`` with a constant ``log(1 - p)``, ``[T]``, and the log-weights of each level's elements.

    Each level gathers two nodes for each element, and writes its own nodes into a copy of all.
    """
    values = log_p.new_full((circuit.sentinel + 1, log_p.shape[0]), SENTINEL)
    of_literals = literals(log_p, log_complement(log_p.detach()))
    values = values.index_put((torch.arange(len(of_literals)),), of_literals)
    log_weights = []
    for nodes in circuit.levels:
        log_weights.append(values[circuit.elements[nodes]].sum(-2))
        values = values.index_put((nodes,), log_weights[-1].logsumexp(-2))
    return values[circuit.levels[-1]].squeeze(0), log_weights
