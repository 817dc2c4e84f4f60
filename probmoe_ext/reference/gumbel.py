"""Gumbel-top-k and its relaxations in plain torch.

Kool, van Hoof and Welling, "Stochastic beams and where to find them" (ICML 2019): the k largest of ``r + Gumbel`` are
an ordered draw without replacement, the Plackett-Luce law. Xie and Ermon, "Reparameterizable subset sampling via
continuous relaxations" (IJCAI 2019), relax the draw; Maddison, Mnih and Teh, "The concrete distribution" (ICLR 2017),
the Bernoulli variable. `logits` is ``[..., E]``; ``-inf`` masks an expert out; NaN or ``+inf`` spoils its row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from probmoe_ext.reference.philox import philox_open_uniform
from probmoe_ext.reference.tilt import check_band, check_unmasked, compute_dtype, poison

GUMBEL_DRAWS = 4
LOGISTIC_DRAWS = 6


def _uniforms(logits: Tensor, seed: int | Tensor | None, purpose: int) -> tuple[Tensor, Tensor]:
    """One uniform and its complement for each element of the logits, rows numbered over the flattened batch."""
    key = torch.randint(-(2**63), 2**63 - 1, ()) if seed is None else seed
    num_experts = logits.shape[-1]
    pair = philox_open_uniform(key, logits.numel() // num_experts, num_experts, purpose, logits.dtype)
    u, complement = (part.to(logits.device).reshape(logits.shape) for part in pair)
    return u, complement


def gumbel_noise(logits: Tensor, seed: int | Tensor | None) -> Tensor:
    """Standard Gumbel variates ``-log(-log(1 - u))`` of the logits' shape and (float32 or float64) dtype.

    ``-log(1 - u)`` is an exponential variate: small where u is, so that the upper tail has the digits that u has near 0
    (up to 22.9 in float32, 45.1 in float64; a probability of 2**-33 or 2**-65 is beyond).
    """
    u, complement = _uniforms(logits, seed, GUMBEL_DRAWS)
    exponential = torch.where(u < 0.5, -torch.log1p(-u), -torch.log(complement))
    return -torch.log(exponential)


def perturbed(logits: Tensor, k: int, seed: int | Tensor | None) -> Tensor:
    """The keys ``logits + Gumbel`` of rows that can give k experts, in the dtype of computation."""
    check_band(k, logits.shape[-1])
    check_unmasked(torch.where(poison(logits).isnan(), 0, logits), k)
    r = compute_dtype(logits)
    return poison(r) + gumbel_noise(r, seed)


def gumbel_top_k(logits: Tensor, k: int, seed: int | Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The k largest perturbed logits, an ordered draw from the Plackett-Luce law.

    Returns:
        int64 indices ``[..., k]`` by descending key, ties to the lower index, and their keys ``logits + Gumbel``
        ``[..., k]``, differentiable. A spoilt row has keys NaN and indices 0, 1, 2, ...
    """
    keys = perturbed(logits, k, seed)
    spoilt = keys.isnan()
    order = torch.sort(torch.where(spoilt, 0, keys.detach()), dim=-1, descending=True, stable=True).indices[..., :k]
    return order, keys.gather(-1, order).to(logits.dtype)


def plackett_luce_log_prob(logits: Tensor, indices: Tensor) -> Tensor:
    """``sum over t of r_{i_t} - logsumexp(r over what is left before t)`` for ordered int64 `indices` ``[..., k]``.

    With L_t the logsumexp of what is left *after* t, each term is ``-log(1 + exp(L_t - r_{i_t}))``: nothing cancels.
    ``-inf``, with gradient 0, where an expert is masked out or named twice; ``[...]``.
    """
    r = poison(compute_dtype(logits))
    masked = r == -torch.inf
    left = ~masked
    total = 0 * torch.where(masked, 0, r).sum(-1)  # of the graph even where nothing is chosen
    possible = torch.ones_like(total, dtype=torch.bool)
    for t in range(indices.shape[-1]):
        index = indices[..., t : t + 1]
        possible = possible & left.gather(-1, index).squeeze(-1)
        left = left.scatter(-1, index, False)
        some = left.any(-1)
        # Stand-ins keep infinities, and with them NaN, out of the gradient.
        rest = torch.where(left, r, torch.where(some, -torch.inf, 0).unsqueeze(-1)).logsumexp(-1)
        chosen = torch.where(masked, 0, r).gather(-1, index).squeeze(-1)
        total = total + torch.where(some, F.logsigmoid(chosen - rest), 0)
    spoilt = r.isnan().any(-1)
    return torch.where(spoilt, torch.nan, torch.where(possible, total, -torch.inf)).to(logits.dtype)


def relaxed_from_keys(keys: Tensor, k: int, temperature: float) -> Tensor:
    """The rounds of `relaxed_top_k`, from the perturbed keys (float32 or float64); a row with NaN gives NaN."""
    spoilt = keys.isnan().any(-1, keepdim=True)
    x = torch.where(spoilt, 0, keys)
    result = torch.zeros_like(x)
    for t in range(k):
        # The largest entry apart: 1 - a is then a sum of positive terms for it, and at least 1/2 for all others.
        largest = x.detach().argmax(-1, keepdim=True)
        others = x.scatter(-1, largest, -torch.inf)
        alone = (others == -torch.inf).all(-1, keepdim=True)
        others = torch.where(alone, 0, others) / temperature
        odds = x.gather(-1, largest) / temperature - others.logsumexp(-1, keepdim=True)
        log_rest = torch.where(alone, -torch.inf, F.logsigmoid(-odds))
        rest = log_rest.exp() * torch.softmax(others, -1)
        a = rest.scatter(-1, largest, torch.where(alone, 1, torch.sigmoid(odds)))
        result = result + a
        if t < k - 1:
            x = x + torch.log1p(-rest).scatter(-1, largest, log_rest)
    return torch.where(spoilt, torch.nan, result)


def relaxed_top_k(logits: Tensor, k: int, temperature: float, seed: int | Tensor | None = None) -> Tensor:
    """A relaxed k-hot ``[..., E]``: k rounds of softmax, each taking out what the rounds before have chosen.

    ``x^1 = logits + Gumbel``, ``a^t = softmax(x^t / temperature)``, ``x^(t+1) = x^t + log(1 - a^t)``; the result is the
    sum of the ``a^t``, which tends to the k-hot of `gumbel_top_k` with the same seed as the temperature goes to 0.
    """
    return relaxed_from_keys(perturbed(logits, k, seed), k, temperature).to(logits.dtype)


def gumbel_sigmoid(logits: Tensor, temperature: float, seed: int | Tensor | None = None) -> Tensor:
    """``sigmoid((logits + log u - log(1 - u)) / temperature)``, elementwise; ``[..., E]`` in [0, 1].

    A logit of ``-inf`` gives 0, one of ``+inf`` gives 1, NaN gives NaN; nothing else in its row is affected.
    """
    r = compute_dtype(logits)
    u, complement = _uniforms(r, seed, LOGISTIC_DRAWS)
    return torch.sigmoid((r + torch.log(u / complement)) / temperature).to(logits.dtype)
