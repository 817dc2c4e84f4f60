"""DirMoE routing (arXiv 2602.09001) in plain torch: relaxed gates, Dirichlet contributions, their prior."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from probmoe_ext.reference.dirichlet import dirichlet_kl
from probmoe_ext.reference.gamma import element_words, exponential, log_gamma_sample
from probmoe_ext.reference.subset import subset_indicator, subset_mode
from probmoe_ext.reference.tilt import check_band, poison

LOGISTIC_DRAWS = 18
LARGEST = 1e30
"""Bound of a gate's logit over the temperature: beyond it the gate is 0 or 1 to the last bit."""


def logistic(seed: int, shape: torch.Size, device: torch.device) -> Tensor:
    """Standard logistic noise ``[rows, columns]``, float64: the difference of two exponential variates.

    These are the words 0 and 1 of each element's counter at attempt 0.
    """
    high, low = (element_words(seed, shape, 0, LOGISTIC_DRAWS + part, device) for part in (0, 1))
    return exponential(high[1], low[1]) - exponential(high[0], low[0])


def route_dirmoe(
    gate_logits: Tensor,
    alpha_hi: Tensor,
    alpha_lo: Tensor,
    k: int | tuple[int, int],
    *,
    temperature: float,
    concentration: float,
    prior: tuple[float, float, float],
    training: bool,
    normalize: bool = True,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """DirMoE routing: which experts (relaxed Bernoulli gates) and how much of each (a Dirichlet draw), apart.

    Training, with ``E`` experts and everything in float64::

        z = sigmoid((gate_logits + Logistic) / temperature)
        q = concentration * (z * alpha_hi + (1 - z) * alpha_lo)         posterior
        p = prior[0] * (z * prior[1] + (1 - z) * prior[2])              prior
        theta ~ Dir(q);  r = z * theta / sum(z * theta)

    and the k_max largest r are kept, divided by their sum unless ``normalize=False``. Gradients flow through the kept r,
    the normaliser, theta (implicitly, by q), z and both concentrations; which experts are kept is a constant.

    Inference: z is 1 for the experts with a positive gate logit, their number clamped to the band along the descending
    order (`subset_mode`), and constant; theta is its posterior mean ``q / sum(q)``; the weights are theta on the chosen,
    divided by their sum (so that ``normalize`` makes no difference).

    Args:
        gate_logits: ``[..., E]``; -inf closes a gate.
        alpha_hi: concentration of open gates, broadcastable to the gate logits (``[..., E]`` or ``[..., 1]``), positive.
        alpha_lo: that of closed gates, likewise; the paper has ``alpha_hi > alpha_lo``, which is not required.
        k: the number of slots k_max, or the band ``(k_min, k_max)``, of which k_min matters at inference alone.
        temperature: tau > 0.
        concentration: lambda_q > 0, the posterior's overall concentration.
        prior: ``(lambda_p, alpha_hi, alpha_lo)`` of the prior, positive numbers.
        training: see above.
        normalize: see above.
        seed: an int or a scalar int64 tensor; None takes one from torch's default generator. Read when training.

    Returns:
        weights ``[..., k_max]`` in the gate logits' dtype; int64 indices ``[..., k_max]``, by descending r (inference: by
        descending gate logit; ties go to the lower index); ``KL(Dir(q) || Dir(p))`` ``[...]``; and the expected number of
        active experts ``sum(z)`` ``[...]``. Slots without an expert (fewer than k_max gates above -inf, or at inference
        fewer chosen) hold index E and weight 0.
    """
    num_experts = gate_logits.shape[-1]
    k_min, k_max = check_band(k, num_experts)
    dtype, shape = gate_logits.dtype, gate_logits.shape
    ell = poison(gate_logits.double())
    hi, lo = (alpha.double().expand(shape) for alpha in (alpha_hi, alpha_lo))
    masked = ell == -torch.inf
    if training:
        key = int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)) if seed is None else int(seed)
        noise = logistic(key, torch.Size((ell.numel() // num_experts, num_experts)), ell.device).reshape(shape)
        y = ((torch.where(masked, 0, ell) + noise) / temperature).clamp(-LARGEST, LARGEST)
        z = torch.where(masked, 0, torch.sigmoid(y))
        log_z = torch.where(masked, -torch.inf, F.logsigmoid(y))
    else:
        z = subset_indicator(subset_mode(gate_logits.detach(), (k_min, k_max)), num_experts, torch.float64)
    q = concentration * (z * hi + (1 - z) * lo)
    p = prior[0] * (z * prior[1] + (1 - z) * prior[2])
    kl = torch.where(ell.isnan().any(-1), torch.nan, dirichlet_kl(q, p))
    if training:
        logs = log_z + log_gamma_sample(q, key)
        logs = torch.where(logs.isnan().any(-1, keepdim=True), torch.nan, logs)
        r = torch.softmax(torch.where(masked.all(-1, keepdim=True), 0, logs), dim=-1)
        order = torch.sort(logs.detach(), dim=-1, descending=True, stable=True).indices[..., :k_max]
        unused = masked.gather(-1, order)
        kept = r.gather(-1, order)
        if normalize:
            # The same quotient, by differences of logarithms: r itself may underflow.
            chosen = torch.where(unused, -torch.inf, logs.gather(-1, order))
            safe = torch.where(unused.all(-1, keepdim=True), 0, chosen)
            kept = torch.softmax(safe, dim=-1)
        weights = torch.where(unused, 0, kept)
        indices = torch.where(unused, num_experts, order)
    else:
        indices = subset_mode(gate_logits.detach(), (k_min, k_max))
        used = indices < num_experts
        theta = q.gather(-1, indices.clamp(max=num_experts - 1)) * used
        total = theta.sum(-1, keepdim=True)
        weights = theta / torch.where(total > 0, total, 1)
    return weights.to(dtype), indices, kl.to(dtype), z.sum(-1).to(dtype)
