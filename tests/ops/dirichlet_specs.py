"""The Gamma and Dirichlet families and DirMoE routing, as the contract's checks see them."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from probmoe_ext import reference
from tests.contract import SEED, Band, OpSpec, Tensors, cotangents, floats_of


def concentrations(logits: Tensor) -> Tensor:
    """Positive numbers from 2e-2 to 50 from logits of any kind; masks become the smallest."""
    return torch.exp(logits.clamp(-4, 4))


def other_concentrations(logits: Tensor) -> Tensor:
    """The same, unrelated to the first, row by row."""
    return concentrations(logits.flip(-1) / 2 + 0.25)


def on_simplex(logits: Tensor) -> Tensor:
    """A point of the simplex for each row, away from its faces."""
    return torch.softmax(logits.flip(-1).clamp(-4, 4) / 2, dim=-1)


def with_value(logits: Tensor, band: Band) -> Tensors:
    return concentrations(logits), on_simplex(logits)


def with_variate(logits: Tensor, band: Band) -> Tensors:
    """A variate somewhere in the law: alpha times 0.1 to 10."""
    alpha = concentrations(logits)
    return alpha, alpha * torch.exp(logits.flip(-1).clamp(-2, 2))


def row_scale(function: Any) -> Any:
    """Errors in units of the largest entry of a row, as the reference has it in float64."""

    def scale(tensors: Tensors, band: Band) -> Tensor:
        result = function(*(t.detach().double() for t in tensors))
        result = result.unsqueeze(-1) if result.dim() < tensors[0].dim() else result
        return result.abs().amax(-1, keepdim=True).clamp(min=1)

    return scale


def slope_scale(name: str, *, banded: bool = False, **options: Any) -> Any:
    """Errors of gradients in units of the row's largest entry, as the reference has it in float64."""

    def scale(tensors: Tensors, band: Band) -> Tensor:
        leaves = [t.detach().double().requires_grad_() for t in tensors]
        result = getattr(reference, name)(*leaves, *([band] if banded else []), **options)
        outputs = floats_of(result if isinstance(result, tuple) else (result,))
        grads = torch.autograd.grad(outputs, leaves, cotangents(tuple(outputs)))
        return torch.cat(grads, -1).abs().amax(-1, keepdim=True).clamp(min=1)

    return scale


def magnitude(tensors: Tensors, band: Band) -> Tensor:
    """Closed forms are sums of log Gamma's, which in float32 are rounded once."""
    alpha = torch.stack([t.detach().double() for t in tensors if t.dtype.is_floating_point]).abs()
    return (1 + torch.lgamma(alpha.sum(-1)).abs()).amax(0).unsqueeze(-1)


def law(name: str, **settings: Any) -> OpSpec:
    """An operator of the family, without a band."""
    return OpSpec(name, banded=False, **{"sets": ("spread 1", "spread 10", "constant", "ties"), **settings})


def only_concentrations(logits: Tensor, band: Band) -> Tensors:
    return (concentrations(logits),)


SAMPLED = {"options": {"seed": SEED}, "tensors": only_concentrations, "own_draws": True, "sampled": True}
GAMMA = [
    law(
        "log_gamma_sample",
        elementwise=True,
        finite_differences=False,
        scale=row_scale(lambda a: 4 / a),
        grad_scale=slope_scale("log_gamma_sample", seed=SEED),
        **SAMPLED,
    ),
    law(
        "standard_gamma_grad",
        tensors=with_variate,
        differentiable=(),
        elementwise=True,
        scale=row_scale(lambda a, g: g / a),
    ),
    law(
        "dirichlet_sample",
        finite_differences=False,
        grad_scale=slope_scale("dirichlet_sample", seed=SEED),
        **SAMPLED,
    ),
    law(
        "dirichlet_log_prob",
        tensors=with_value,
        differentiable=(0, 1),
        twice=True,
        scale=magnitude,
        grad_scale=slope_scale("dirichlet_log_prob"),
    ),
    law(
        "dirichlet_entropy",
        tensors=only_concentrations,
        twice=True,
        scale=magnitude,
        grad_scale=slope_scale("dirichlet_entropy"),
    ),
    law(
        "dirichlet_kl",
        tensors=lambda x, band: (concentrations(x), other_concentrations(x)),
        differentiable=(0, 1),
        twice=True,
        scale=magnitude,
        grad_scale=slope_scale("dirichlet_kl"),
    ),
]


def with_heads(logits: Tensor, band: Band) -> Tensors:
    """Gate logits, and two heads of concentrations."""
    return logits, other_concentrations(logits), concentrations(logits / 2 - 2)


def divergence(tensors: Tensors, band: Band, options: dict[str, Any]) -> Tensor:
    """The posterior's from the prior, which is a sum of terms of one sign: its error is relative."""
    return reference.route_dirmoe(*(t.detach().double() for t in tensors), band, **options)[2].abs().unsqueeze(-1)


def dirmoe_spec(training: bool, normalize: bool) -> OpSpec:
    """One setting of DirMoE routing."""
    options: dict[str, Any] = {"training": training, "normalize": normalize, "seed": SEED}
    options |= {"temperature": 0.7, "concentration": 2.0, "prior": (1.5, 2.0, 0.125)}
    return OpSpec(
        "route_dirmoe",
        label=("training" if training else "inference") + ", normalize" * normalize,
        options=options,
        tensors=with_heads,
        differentiable=(0, 1, 2),
        sampled=training,
        finite_differences=not training,
        scale=lambda t, band: 4 * magnitude(t[1:], band) + divergence(t, band, options),
        grad_scale=slope_scale("route_dirmoe", banded=True, **options),
        raw_values={"prior_concentration": 1.5, "prior_hi": 2.0, "prior_lo": 0.125},
    )


SPECS = [*GAMMA, *(dirmoe_spec(training, normalize) for training, normalize in product((True, False), repeat=2))]
