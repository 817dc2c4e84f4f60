"""The Gumbel family, as the contract's checks see it."""

from __future__ import annotations

import torch
from torch import Tensor

from probmoe_ext import reference
from tests import gumbel_oracle as oracle
from tests.contract import SEED, Band, OpSpec, Tensors

TEMPERATURE = 0.7


def with_order(logits: Tensor, band: Band) -> Tensors:
    """Logits and an ordered draw from them."""
    return logits, reference.gumbel_top_k(logits, band[0], SEED)[0]


def by_log_prob(tensors: Tensors, band: Band) -> Tensor:
    """Errors of log-probabilities are measured in their own units, or 1."""
    logits, indices = tensors
    value = oracle.log_prob(logits.detach().double(), indices)
    return value.abs().nan_to_num(posinf=1.0).clamp(min=1).unsqueeze(-1)


def by_key(tensors: Tensors, band: Band) -> Tensor:
    """A key has the rounding of its logit."""
    return tensors[0].detach().double().nan_to_num(neginf=0).abs().amax(-1, keepdim=True).clamp(min=1)


def ranked(tensors: Tensors, band: Band) -> Tensor:
    """The experts of the largest keys, in order."""
    keys = oracle.keys(tensors[0].detach(), SEED)
    return torch.sort(keys, dim=-1, descending=True, stable=True).indices[..., : band[0]]


# float32 noise ends where float64 noise goes on: a variate from u is off by 2**-33 / u, and thousands are compared.
SPECS = [
    OpSpec(
        "gumbel_top_k",
        exact_only=True,
        sampled=True,
        options={"seed": SEED},
        oracle=lambda t, band: oracle.keys(t[0], SEED).gather(-1, ranked(t, band)),
        oracle_indices=ranked,
        value_tolerance=4e-6,
        scale=by_key,
    ),
    OpSpec(
        "plackett_luce_log_prob",
        exact_only=True,
        banded=False,
        tensors=with_order,
        oracle=lambda t, band: oracle.log_prob(t[0], t[1]),
        twice=True,
        value_tolerance=3e-6,
        scale=by_log_prob,
        grad_scale=lambda t, band: torch.full((*t[0].shape[:-1], 1), max(1, band[1]), dtype=torch.float64),
    ),
    OpSpec(
        "relaxed_top_k",
        exact_only=True,
        sampled=True,
        options={"seed": SEED, "temperature": TEMPERATURE},
        value_tolerance=2e-5,
        grad_tolerance=2e-4,
        scale=by_key,
        grad_scale=by_key,
    ),
    OpSpec(
        "gumbel_sigmoid",
        exact_only=True,
        sampled=True,
        banded=False,
        elementwise=True,
        options={"seed": SEED, "temperature": TEMPERATURE},
        oracle=lambda t, band: torch.sigmoid((t[0] + oracle.logistic(t[0].shape, SEED)) / TEMPERATURE),
        twice=True,
        value_tolerance=4e-6,
        scale=by_key,
        grad_scale=by_key,
    ),
]
