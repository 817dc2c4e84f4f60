"""The Dirichlet law in plain torch: draws, density, entropy and divergence. Closed forms are summed in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from probmoe_ext.reference.gamma import log_gamma_sample
from probmoe_ext.reference.polygamma import digamma, log_gamma
from probmoe_ext.reference.tilt import compute_dtype


def dirichlet_sample(concentration: Tensor, seed: int | Tensor | None = None) -> Tensor:
    """A draw on the simplex, ``softmax(log g)`` with `log_gamma_sample`'s g and derivative; ``[..., E]``."""
    log_g = log_gamma_sample(compute_dtype(concentration), seed)
    return torch.softmax(log_g, dim=-1).to(concentration.dtype)


def dirichlet_log_prob(concentration: Tensor, value: Tensor) -> Tensor:
    """``log Gamma(A) - sum log Gamma(alpha_i) + sum (alpha_i - 1) log theta_i`` with ``A = sum alpha_i``; ``[...]``.

    ``0 log 0 = 0``, so that a zero counts for nothing where ``alpha_i = 1``.
    """
    alpha, theta = concentration.double(), value.double()
    kernel = torch.special.xlogy(alpha - 1, theta).sum(-1)
    return (kernel + log_gamma(alpha.sum(-1)) - log_gamma(alpha).sum(-1)).to(concentration.dtype)


def dirichlet_entropy(concentration: Tensor) -> Tensor:
    """``sum log Gamma(alpha_i) - log Gamma(A) + (A - E) psi(A) - sum (alpha_i - 1) psi(alpha_i)``, nats; ``[...]``."""
    alpha = concentration.double()
    total, count = alpha.sum(-1), alpha.shape[-1]
    moments = (total - count) * digamma(total) - ((alpha - 1) * digamma(alpha)).sum(-1)
    return (log_gamma(alpha).sum(-1) - log_gamma(total) + moments).to(concentration.dtype)


def dirichlet_kl(p_concentration: Tensor, q_concentration: Tensor) -> Tensor:
    """``KL(Dir(p) || Dir(q))``; ``[...]``.

    ``log Gamma(P) - log Gamma(Q) - sum (log Gamma(p_i) - log Gamma(q_i)) + sum (p_i - q_i)(psi(p_i) - psi(P))``.
    """
    p, q = p_concentration.double(), q_concentration.double()
    total_p, total_q = p.sum(-1, keepdim=True), q.sum(-1, keepdim=True)
    normalisers = (log_gamma(total_p) - log_gamma(total_q)).squeeze(-1) - (log_gamma(p) - log_gamma(q)).sum(-1)
    moments = ((p - q) * (digamma(p) - digamma(total_p))).sum(-1)
    return (normalisers + moments).to(p_concentration.dtype)
