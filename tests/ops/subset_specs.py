"""The subset family, as the contract's checks see it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from probmoe_ext import reference
from tests import oracle
from tests.contract import SEED, Band, OpSpec, Tensors


def with_vector(logits: Tensor, band: Band) -> Tensors:
    """Logits and a random vector."""
    generator = torch.Generator().manual_seed(11)
    return logits, torch.randn(logits.shape, generator=generator, dtype=torch.float64).float().to(logits.dtype)


def with_subset(logits: Tensor, band: Band) -> Tensors:
    """Logits and a subset drawn from them."""
    return logits, reference.subset_sample(logits, band, seed=SEED)


def with_other(logits: Tensor, band: Band) -> Tensors:
    """Logits and others, near them, that mask fewer experts."""
    generator = torch.Generator().manual_seed(13)
    noise = torch.randn(logits.shape, generator=generator, dtype=torch.float64)
    unmasked = torch.rand(logits.shape, generator=generator) < 0.5
    other = torch.where(unmasked, logits.double().nan_to_num(neginf=0.0), logits.double() / 2) + noise
    return logits, other.float().to(logits.dtype)


def by_vector(tensors: Tensors, band: Band) -> Tensor:
    """Errors of C v are measured in units of the largest entry of v."""
    return tensors[1].double().abs().amax(-1, keepdim=True).clamp(min=1e-30)


def by_log_z(tensors: Tensors, band: Band) -> Tensor:
    """Errors of logarithms are measured in units of log Z, or 1."""
    return reference.subset_log_partition(tensors[0].detach().double(), band).abs().clamp(min=1).unsqueeze(-1)


def by_logit(tensors: Tensors, band: Band) -> Tensor:
    """The entropy's gradient is C r: its errors are measured in units of the largest finite logit."""
    return tensors[0].detach().double().nan_to_num(neginf=0).abs().amax(-1, keepdim=True).clamp(min=1)


def by_matrix_entry(tensors: Tensors, band: Band) -> Tensor:
    """Probabilities of pairs: a unit for each matrix."""
    return torch.ones((*tensors[0].shape[:-1], 1, 1), dtype=torch.float64)


def by_size(tensors: Tensors, band: Band) -> Tensor:
    """A cotangent of ones on P(i, j in S) makes the square of the size of S, whose gradient grows with the size."""
    return torch.full((*tensors[0].shape[:-1], 1), max(1, 2 * band[1]), dtype=torch.float64)


def by_both(tensors: Tensors, band: Band) -> Tensor:
    """Errors of a divergence are measured in units of the log Z's and of the largest difference of logits, or 1."""
    log_z = torch.maximum(by_log_z(tensors[:1], band), by_log_z(tensors[1:], band))
    return torch.maximum(log_z, by_difference(tensors, band))


def by_difference(tensors: Tensors, band: Band) -> Tensor:
    """The gradient of KL(P, Q) is C (p - q): its errors are measured in units of the largest finite p - q."""
    p, q = (t.detach().double() for t in tensors)
    return (p - q).nan_to_num(nan=0, neginf=0, posinf=0).abs().amax(-1, keepdim=True).clamp(min=1)


# A draw's derivative is not that of its value: this spec is for the checks of values and of the stated gradient.
INDICATOR = OpSpec(
    "subset_indicator",
    label="gradient",
    composite=True,
    options={"seed": SEED},
    sampled=True,
    oracle=lambda t, band: oracle.straight_through(t[0], reference.subset_sample(t[0].detach(), band, SEED), band),
)

SPECS = [
    OpSpec(
        "subset_log_partition",
        oracle=lambda t, band: oracle.log_partition(t[0], band),
        twice=True,
        value_tolerance=3e-6,
        grad_tolerance=1e-6,
        scale=by_log_z,
    ),
    OpSpec("subset_cardinality", oracle=lambda t, band: oracle.cardinality(t[0], band)),
    OpSpec("subset_marginals", oracle=lambda t, band: oracle.marginals(t[0], band), twice=True),
    OpSpec(
        "subset_covariance_vp",
        tensors=with_vector,
        oracle=lambda t, band: oracle.covariance_vp(t[0], t[1], band),
        differentiable=(1,),
        value_tolerance=5e-6,
        scale=by_vector,
    ),
    OpSpec("subset_sample", differentiable=(), sampled=True, options={"seed": SEED}),
    OpSpec("subset_mode", differentiable=(), oracle_indices=lambda t, band: oracle.mode(t[0], band)),
    OpSpec(
        "subset_log_prob",
        composite=True,
        tensors=with_subset,
        oracle=lambda t, band: oracle.log_prob(t[0], t[1], band),
        twice=True,
        value_tolerance=3e-6,
        grad_tolerance=1e-6,
        scale=by_log_z,
    ),
    OpSpec(
        "subset_entropy",
        oracle=lambda t, band: oracle.entropy(t[0], band),
        twice=True,
        value_tolerance=3e-6,
        scale=by_log_z,
        grad_scale=by_logit,
    ),
    OpSpec(
        "subset_pairwise",
        composite=True,
        oracle=lambda t, band: oracle.pairwise(t[0], band),
        scale=by_matrix_entry,
        grad_scale=by_size,
    ),
    OpSpec(
        "subset_kl",
        composite=True,
        tensors=with_other,
        oracle=lambda t, band: oracle.kl(t[0], t[1], band),
        differentiable=(0, 1),
        scale=by_both,
        grad_tolerance=1e-6,
        grad_scale=by_difference,
    ),
    replace(INDICATOR, label="", differentiable=()),
]
