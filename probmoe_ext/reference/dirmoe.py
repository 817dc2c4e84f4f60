"""DirMoE routing (arXiv 2602.09001) in plain torch: relaxed gates, Dirichlet contributions, their prior."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from probmoe_ext.reference.dirichlet import dirichlet_kl
from probmoe_ext.reference.gamma import log_gamma_sample, with_implicit_gradient
from probmoe_ext.reference.philox import philox_open_uniform
from probmoe_ext.reference.subset import subset_indicator, subset_mode
from probmoe_ext.reference.tilt import check_band, compute_dtype

LOGISTIC_DRAWS = 18
LARGEST = 1e30
"""Bound of a gate's logit over the temperature: beyond it the gate is 0 or 1 to the last bit."""


def logistic(seed: int, shape: torch.Size, device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard logistic noise ``log u - log(1 - u)`` ``[rows, columns]`` from uniforms of 32 bits (float32) or 64."""
    u, complement = philox_open_uniform(seed, shape[0], shape[1], LOGISTIC_DRAWS, dtype)
    return torch.log(u / complement).to(device)


def draw_log_gamma(q: Tensor, seed: int, dtype: torch.dtype) -> Tensor:
    """Logarithms of Gamma draws as those of `dtype` are made, in float64 and without a derivative."""
    return log_gamma_sample(q.detach().to(dtype), seed).double()


def relaxed_gates(ell: Tensor, noise: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """``z = sigmoid((ell + noise) / temperature)`` and its logarithm; 0 and -inf where ell is -inf."""
    masked = ell == -torch.inf
    y = ((torch.where(masked, 0, ell) + noise) / temperature).clamp(-LARGEST, LARGEST)
    return torch.where(masked, 0, torch.sigmoid(y)), torch.where(masked, -torch.inf, F.logsigmoid(y))


def concentrations(
    z: Tensor, alpha_hi: Tensor, alpha_lo: Tensor, concentration: float, prior: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The posterior's and the prior's concentrations, given the gates."""
    posterior = concentration * (z * alpha_hi + (1 - z) * alpha_lo)
    return posterior, prior[0] * (z * prior[1] + (1 - z) * prior[2])


def largest_scores(scores: Tensor, k_max: int) -> Tensor:
    """Indices of the k_max largest ``log z + log g``, ties to the lower index; E where a score is -inf."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :k_max]
    return torch.where(scores.gather(-1, order) == -torch.inf, scores.shape[-1], order)


def slot_weights(scores: Tensor, indices: Tensor, normalize: bool) -> Tensor:
    """``softmax(scores)`` at the indices (0 at index E), by differences of logarithms: z theta itself may underflow.

    With `normalize` the softmax is over these slots, otherwise over all experts.
    """
    unused = indices == scores.shape[-1]
    nothing = unused.all(-1, keepdim=True)
    kept = torch.where(unused, -torch.inf, scores.gather(-1, indices.masked_fill(unused, 0)))
    whole = torch.where(nothing, 0, kept if normalize else scores)
    weights = torch.exp(torch.where(unused, -torch.inf, kept) - torch.logsumexp(whole, dim=-1, keepdim=True))
    return torch.where(unused, 0, weights)


def decided_weights(posterior: Tensor, indices: Tensor) -> Tensor:
    """The posterior mean's shares at the indices (0 at index E), divided by their sum."""
    used = indices < posterior.shape[-1]
    share = posterior.gather(-1, indices.masked_fill(~used, 0)) * used
    total = share.sum(-1, keepdim=True)
    return share / torch.where(used.any(-1, keepdim=True), total, 1)


def route_dirmoe(
    gate_logits: Tensor,
    alpha_hi: Tensor,
    alpha_lo: Tensor,
    k: int | tuple[int, int],
    *,
    temperature: float,
    concentration: float,
    prior: Sequence[float],
    training: bool,
    normalize: bool = True,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """DirMoE routing: which experts (relaxed Bernoulli gates) and how much of each (a Dirichlet draw), apart.

    Training, with ``E`` experts and everything in float64 but the random variates, which have the digits that the dtype
    of the gate logits gives them::

        z = sigmoid((gate_logits + Logistic) / temperature)
        q = concentration * (z * alpha_hi + (1 - z) * alpha_lo)         posterior
        p = prior[0] * (z * prior[1] + (1 - z) * prior[2])              prior
        theta ~ Dir(q);  r = z * theta / sum(z * theta)

    and the k_max largest r are kept, divided by their sum unless ``normalize=False``. Gradients flow through the
    kept r, the normaliser, theta (implicitly, by q), z and both concentrations; which experts are kept is a constant.

    Inference: z is 1 for the experts with a positive gate logit, their number clamped to the band along the descending
    order (`subset_mode`), and constant; theta is its posterior mean ``q / sum(q)``; the weights are theta on the
    chosen, divided by their sum (so that ``normalize`` makes no difference).

    Args:
        gate_logits: ``[..., E]``; -inf closes a gate.
        alpha_hi: that of open gates, positive, broadcastable to the gate logits (``[..., E]`` or ``[..., 1]``).
        alpha_lo: that of closed gates, likewise; the paper has ``alpha_hi > alpha_lo``, which is not required.
        k: the number of slots k_max, or the band ``(k_min, k_max)``, of which k_min matters at inference alone.
        temperature: tau > 0.
        concentration: lambda_q > 0, the posterior's overall concentration.
        prior: ``(lambda_p, alpha_hi, alpha_lo)`` of the prior, positive numbers.
        training: see above.
        normalize: see above.
        seed: an int or a scalar int64 tensor; None takes one from torch's default generator. Read when training.

    Returns:
        weights ``[..., k_max]`` in the gate logits' dtype; int64 indices ``[..., k_max]``, by descending r
        (inference: by descending gate logit; ties go to the lower index); ``KL(Dir(q) || Dir(p))`` ``[...]``; and the
        expected number of active experts ``sum(z)`` ``[...]``. Slots without an expert (fewer than k_max gates above
        -inf, or at inference fewer chosen) hold index E and weight 0.
    """
    k_min, k_max = check_band(k, gate_logits.shape[-1])
    dtype, shape = gate_logits.dtype, gate_logits.shape
    ell, hi, lo = (t.double().expand(shape) for t in (gate_logits, alpha_hi, alpha_lo))
    good = (ell < torch.inf) & (hi > 0) & (hi < torch.inf) & (lo > 0) & (lo < torch.inf)
    ell = torch.where(good.all(-1, keepdim=True), ell, torch.nan)
    if training:
        key = int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)) if seed is None else int(seed)
        drawn_in = compute_dtype(gate_logits).dtype
        noise = logistic(key, ell.reshape(-1, shape[-1]).shape, ell.device, drawn_in).reshape(shape)
        z, log_z = relaxed_gates(ell, noise.double(), temperature)
        q, p = concentrations(z, hi, lo, concentration, prior)
        scores = log_z + with_implicit_gradient(q, draw_log_gamma(q, key, drawn_in))
        indices = largest_scores(scores.detach(), k_max)
        weights = slot_weights(scores, indices, normalize)
    else:
        indices = subset_mode(gate_logits.detach(), (k_min, k_max))
        z = subset_indicator(indices, shape[-1], torch.float64) + 0 * ell.masked_fill(ell == -torch.inf, 0)
        q, p = concentrations(z, hi, lo, concentration, prior)
        weights = decided_weights(q, indices)
    return weights.to(dtype), indices, dirichlet_kl(q, p).to(dtype), z.sum(-1).to(dtype)
