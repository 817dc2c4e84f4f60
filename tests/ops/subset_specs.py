"""The subset family, as the contract's checks see it."""

from __future__ import annotations

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


def by_vector(tensors: Tensors, band: Band) -> Tensor:
    """Errors of C v are measured in units of the largest entry of v."""
    return tensors[1].double().abs().amax(-1, keepdim=True).clamp(min=1e-30)


def by_log_z(tensors: Tensors, band: Band) -> Tensor:
    """Errors of logarithms are measured in units of log Z, or 1."""
    return reference.subset_log_partition(tensors[0].detach().double(), band).abs().clamp(min=1).unsqueeze(-1)


def by_logit(tensors: Tensors, band: Band) -> Tensor:
    """The entropy's gradient is C r: its errors are measured in units of the largest finite logit."""
    return tensors[0].detach().double().nan_to_num(neginf=0).abs().amax(-1, keepdim=True).clamp(min=1)


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
    OpSpec("subset_marginals", oracle=lambda t, band: oracle.marginals(t[0], band)),
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
        value_tolerance=3e-6,
        scale=by_log_z,
        grad_scale=by_logit,
    ),
]
