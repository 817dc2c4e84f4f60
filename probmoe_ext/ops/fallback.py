"""Operators on a GPU where this build has no kernel: the plain-torch reference, correct and slow.

A row costs a pass over the experts in Python-launched operations, so a forward pass takes milliseconds rather than
microseconds. Samples are the same as on the CPU, and everything built on the operators works. Unlike a kernel, the
reference looks at the data, which waits for the device and rules out CUDA graphs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _C, reference  # noqa: F401  (_C registers the kernels that the build has)
from ..reference import dirmoe
from ..reference.gamma import with_implicit_gradient
from .subset import k_hot


def cardinality_backward(grad: Tensor, logits: Tensor, k_min: int, k_max: int) -> Tensor:
    """The vector-Jacobian product of the sizes' probabilities."""
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        (grad_logits,) = torch.autograd.grad(reference.subset_cardinality(leaf, (k_min, k_max)), leaf, grad)
    return grad_logits


def route_probmoe(
    logits: Tensor, seed: Tensor | None, k_min: int, k_max: int, sample: bool, normalize: bool, marginal: bool
) -> tuple[Tensor, Tensor]:
    """Weights and experts; the gradient is an operator of its own, so ``marginal`` is not needed here."""
    forward: Any = "sample" if sample else "topk"
    with torch.no_grad():
        return reference.route_probmoe(
            logits, (k_min, k_max), training=sample, normalize=normalize, forward=forward, backward="ste", seed=seed
        )


def route_probmoe_backward(
    grad_weights: Tensor, logits: Tensor, indices: Tensor, k_min: int, k_max: int, normalize: bool, marginal: bool
) -> Tensor:
    """``C (h s) + J_softmax^T (h z)``, h the upstream gradient on S (with ``normalize``, what reaches each expert)."""
    experts = logits.shape[-1]
    r = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    s = torch.softmax(r, dim=-1)
    slots = s.new_zeros((*s.shape[:-1], experts + 1))  # unused slots fall into the last column
    z = k_hot(indices, experts, s.dtype)
    h = slots.scatter(-1, indices, grad_weights.to(s.dtype))[..., :experts]
    if normalize:
        total = (z * s).sum(-1, keepdim=True)
        total = torch.where(total > 0, total, 1)
        h = (h - (h * s).sum(-1, keepdim=True) / total) / total
    direct = h * s * z
    grad = direct - s * direct.sum(-1, keepdim=True)
    if marginal:
        grad = grad + reference.subset_covariance_vp(r, h * s, (k_min, k_max))
    return grad.to(logits.dtype)


def relaxed_top_k(logits: Tensor, seed: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """The relaxed k-hot, and the keys for its gradient."""
    keys = reference.gumbel.perturbed(logits, k, seed)
    return reference.gumbel.relaxed_from_keys(keys, k, temperature).to(logits.dtype), keys


def _gradient(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``(grad, *arguments)`` to the vector-Jacobian product by the first argument, by autograd."""

    def op(grad: Tensor, first: Tensor, *args: Any) -> Tensor:
        with torch.enable_grad():
            leaf = first.detach().requires_grad_()
            value = function(leaf, *args)
            (product,) = torch.autograd.grad(value, leaf, grad.to(value.dtype), materialize_grads=True)
        # Autograd stops where a row that has no answer was set to NaN; the product must show it.
        lost = value.isnan() if value.dim() < leaf.dim() else value.isnan().any(-1)
        return torch.where(lost.unsqueeze(-1), torch.nan, product)

    return op


def _banded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reference function of ``(logits, ..., k)`` as an operator of ``(logits, ..., k_min, k_max)``."""

    def op(*args: Any) -> Any:
        *tensors, k_min, k_max = args
        with torch.no_grad():
            return function(*tensors, (k_min, k_max))

    return op


def _vjp(function: Callable[..., Any]) -> Callable[..., Any]:
    """A reference function of tensors as its gradient operator ``(grad, *tensors)``."""

    def op(grad: Tensor, *tensors: Tensor) -> Any:
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in tensors]
            grads = torch.autograd.grad(function(*leaves), leaves, grad)
        return grads if len(grads) > 1 else grads[0]

    return op


def dirichlet_sample(concentration: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Shares and the logarithm of the variates' sum."""
    with torch.no_grad():
        wide = concentration if concentration.dtype == torch.float64 else concentration.float()
        log_g = reference.log_gamma_sample(wide, seed)
        shares, total = torch.softmax(log_g, -1), torch.logsumexp(log_g, -1)
    return shares.to(concentration.dtype), total.to(concentration.dtype)


def dirichlet_sample_backward(grad: Tensor, concentration: Tensor, sample: Tensor, log_total: Tensor) -> Tensor:
    """``D_j theta_j (h_j - h.theta)``; a share of 0 has gradient 0."""
    theta, h = sample.double(), grad.double()
    slope = reference.log_gamma_grad(concentration.double(), torch.log(theta) + log_total.double().unsqueeze(-1))
    centred = theta * (h - (h * theta).sum(-1, keepdim=True))
    return torch.where(theta == 0, 0, slope * centred).to(concentration.dtype)


def route_dirmoe(logits: Tensor, hi: Tensor, lo: Tensor, seed: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    """The outputs, and the noise and draws that the gradient needs."""
    k_min, k_max, temperature, concentration, *prior, training, normalize = rest
    numbers: dict[str, Any] = {"temperature": temperature, "concentration": concentration, "prior": prior}
    state = torch.float64 if logits.dtype == torch.float64 else torch.float32
    noise = logits.new_empty((*logits.shape[:-1], 0), dtype=torch.float64)
    log_gamma = noise
    with torch.no_grad():
        outputs = reference.route_dirmoe(
            logits, hi, lo, (k_min, k_max), **numbers, training=training, normalize=normalize, seed=seed
        )
        if training:
            assert seed is not None
            flat = logits.reshape(-1, logits.shape[-1]).shape
            noise = dirmoe.logistic(int(seed), flat, logits.device, state).reshape(logits.shape)
            z, _ = dirmoe.relaxed_gates(logits.double(), noise.double(), temperature)
            q, _ = dirmoe.concentrations(z, hi.double(), lo.double(), concentration, prior)
            log_gamma = dirmoe.draw_log_gamma(q, int(seed), state)
    return *outputs, noise.to(state), log_gamma.to(state)


def route_dirmoe_backward(
    grad_weights: Tensor,
    grad_kl: Tensor,
    grad_expected_k: Tensor,
    logits: Tensor,
    hi: Tensor,
    lo: Tensor,
    indices: Tensor,
    noise: Tensor,
    log_gamma: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """Autograd through the reference's expressions, from the draws that were kept."""
    _, _, temperature, concentration, *prior, training, normalize = rest
    with torch.enable_grad():
        leaves = [t.detach().double().requires_grad_() for t in (logits, hi, lo)]
        ell, alpha_hi, alpha_lo = leaves
        if training:
            z, log_z = dirmoe.relaxed_gates(ell, noise.double(), temperature)
            q, p = dirmoe.concentrations(z, alpha_hi, alpha_lo, concentration, prior)
            scores = log_z + with_implicit_gradient(q, log_gamma.double())
            weights = dirmoe.slot_weights(scores, indices, normalize)
        else:
            z = k_hot(indices, logits.shape[-1], torch.float64) + 0 * ell.masked_fill(ell == -torch.inf, 0)
            q, p = dirmoe.concentrations(z, alpha_hi, alpha_lo, concentration, prior)
            weights = dirmoe.decided_weights(q, indices)
        outputs = [weights, reference.dirichlet_kl(q, p), z.sum(-1)]
        if not training:
            outputs.pop()
        upstream = [g.double() for g in (grad_weights, grad_kl, grad_expected_k)][: len(outputs)]
        grads = torch.autograd.grad(outputs, leaves, upstream, materialize_grads=True)
    return tuple(g.to(logits.dtype) for g in grads)


FALLBACKS: dict[str, Callable[..., Any]] = {
    **{
        f"subset_{name}": _banded(getattr(reference, f"subset_{name}"))
        for name in ("log_partition", "cardinality", "marginals", "covariance_vp", "entropy", "log_prob", "mode")
    },
    "subset_cardinality_backward": cardinality_backward,
    "subset_sample": lambda logits, seed, k_min, k_max: reference.subset_sample(logits, (k_min, k_max), seed),
    "route_top_k": lambda logits, k, normalize: route_probmoe(logits, None, k, k, False, normalize, False),
    "route_top_k_backward": lambda grad, logits, indices, normalize: route_probmoe_backward(
        grad, logits, indices, indices.shape[-1], indices.shape[-1], normalize, False
    ),
    "route_probmoe": route_probmoe,
    "route_probmoe_backward": route_probmoe_backward,
    "log_gamma_sample": reference.log_gamma_sample,
    "log_gamma_sample_backward": lambda grad, c, log_value: grad * reference.log_gamma_grad(c, log_value),
    "standard_gamma_grad": reference.standard_gamma_grad,
    "dirichlet_sample": dirichlet_sample,
    "dirichlet_sample_backward": dirichlet_sample_backward,
    **{f"dirichlet_{name}": getattr(reference, f"dirichlet_{name}") for name in ("log_prob", "entropy", "kl")},
    **{
        f"dirichlet_{name}_backward": _vjp(getattr(reference, f"dirichlet_{name}"))
        for name in ("log_prob", "entropy", "kl")
    },
    "route_dirmoe": route_dirmoe,
    "route_dirmoe_backward": route_dirmoe_backward,
    "gumbel_top_k": lambda logits, seed, k: reference.gumbel_top_k(logits, k, seed)[::-1],
    "gumbel_sigmoid": lambda logits, seed, temperature: reference.gumbel_sigmoid(logits, temperature, seed),
    "plackett_luce_log_prob": reference.plackett_luce_log_prob,
    "plackett_luce_log_prob_backward": _gradient(reference.plackett_luce_log_prob),
    "relaxed_top_k": relaxed_top_k,
    "relaxed_top_k_backward": _gradient(reference.gumbel.relaxed_from_keys),
}
"""By raw operator, with its arguments."""

COMPILED = frozenset(
    name for name in FALLBACKS if torch._C._dispatch_has_kernel_for_dispatch_key(f"probmoe_ext::{name}", "CUDA")
)
"""Those with CUDA kernels in this build, as far as it has been compiled with nvcc: all of them. The rest fall back."""


def _warning_once(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def op(*args: Any) -> Any:
        if not _warned:
            _warned.append(name)
            warnings.warn(
                f"probmoe_ext::{name} has no CUDA kernel in this build and runs as plain torch, correct but slow",
                stacklevel=2,
            )
        return function(*args)

    return op


_warned: list[str] = []


def register_fallbacks() -> None:
    """Registers, for CUDA tensors, every fallback whose operator has no kernel; called once, on import."""
    for name, function in FALLBACKS.items():
        if name not in COMPILED:
            torch.library.impl(f"probmoe_ext::{name}", "CUDA")(_warning_once(name, function))
