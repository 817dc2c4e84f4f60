"""What is true of the Gumbel family, by its definitions: 50 digits, or all ordered draws enumerated.

The random words come from Philox as the reference has it (which the published vectors judge); all else is done anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import permutations

import mpmath
import torch
from torch import Tensor

from probmoe_ext.reference.philox import philox4x32

_DIGITS = 50
_MASK = 2**32 - 1


def _word(seed: int, row: int, draw: int, purpose: int) -> int:
    counter = (draw // 4, row & _MASK, row >> 32, purpose)
    words = philox4x32(tuple(torch.tensor([word]) for word in counter), (seed & _MASK, (seed >> 32) & _MASK))  # type: ignore[arg-type]
    return int(words[draw % 4])


def exact_uniform(seed: int, row: int, draw: int, purpose: int, bits: int) -> mpmath.mpf:
    """The uniform behind a variate, without rounding: (w + 1/2) / 2**bits, for 32 or 64 bits."""
    word = _word(seed, row, draw, purpose)
    if bits == 64:
        word = word << 32 | _word(seed, row, draw, purpose + 1)
    return (mpmath.mpf(word) + mpmath.mpf(1) / 2) / mpmath.mpf(2) ** bits


@cache
def gumbel_variate(seed: int, row: int, draw: int, bits: int = 64) -> float:
    """``-log(-log(1 - u))``."""
    with mpmath.workdps(_DIGITS):
        return float(-mpmath.log(-mpmath.log(1 - exact_uniform(seed, row, draw, 4, bits))))


@cache
def logistic_variate(seed: int, row: int, draw: int, bits: int = 64) -> float:
    """``log(u / (1 - u))``."""
    with mpmath.workdps(_DIGITS):
        u = exact_uniform(seed, row, draw, 6, bits)
        return float(mpmath.log(u / (1 - u)))


def _variates(shape: Sequence[int], seed: int, variate: object) -> Tensor:
    rows = int(torch.Size(shape[:-1]).numel())
    values = [[variate(seed, row, draw) for draw in range(shape[-1])] for row in range(rows)]  # type: ignore[operator]
    return torch.tensor(values, dtype=torch.float64).reshape(torch.Size(shape))


def keys(logits: Tensor, seed: int) -> Tensor:
    """``logits + Gumbel``, float64."""
    return logits.double() + _variates(logits.shape, seed, gumbel_variate)


def logistic(shape: Sequence[int], seed: int) -> Tensor:
    """Logistic variates, float64."""
    return _variates(shape, seed, logistic_variate)


def log_prob(logits: Tensor, indices: Tensor) -> Tensor:
    """Plackett-Luce by its definition: at each step the log-softmax over what is left."""
    r = logits.double()
    total = 0 * r.nan_to_num(neginf=0).sum(-1)
    left = torch.ones_like(r, dtype=torch.bool)
    for t in range(indices.shape[-1]):
        index = indices[..., t : t + 1]
        step = torch.log_softmax(torch.where(left, r, -torch.inf), -1).gather(-1, index).squeeze(-1)
        total = total + step
        left = left.scatter(-1, index, False)
    return total


def ordered_draws(num_experts: int, k: int) -> Tensor:
    """All ordered draws, ``[N, k]``, in lexicographic order."""
    draws = list(permutations(range(num_experts), k))
    return torch.tensor(draws, dtype=torch.int64).reshape(len(draws), k)


def probabilities(logits: Tensor, k: int) -> Tensor:
    """Of each of `ordered_draws`, for one row of logits, float64."""
    draws = ordered_draws(logits.shape[-1], k)
    return torch.nan_to_num(log_prob(logits.expand(len(draws), -1), draws).exp(), nan=0.0)


def relaxed(keys: Sequence[float], k: int, temperature: float) -> list[float]:
    """The rounds of relaxed top-k by the published recursion, in as many digits as they take."""
    gap = (max(keys) - min(x for x in keys if x > float("-inf"))) / temperature
    with mpmath.workdps(_DIGITS + int(k * gap)):
        x = [mpmath.mpf(value) for value in keys]
        result = [mpmath.mpf(0) for _ in x]
        for t in range(k):
            weights = [mpmath.exp(value / mpmath.mpf(temperature)) for value in x]
            a = [weight / sum(weights) for weight in weights]
            result = [total + share for total, share in zip(result, a, strict=True)]
            if t + 1 < k:
                x = [value + mpmath.log(1 - share) for value, share in zip(x, a, strict=True)]
        return [float(value) for value in result]


def exact_log_prob(logits: Sequence[float], order: Sequence[int]) -> tuple[float, list[float]]:
    """The log-probability of a possible draw and its gradient, in as many digits as the logits span."""
    with mpmath.workdps(_DIGITS + int(max(logits) - min(x for x in logits if x > float("-inf")))):
        weight = [mpmath.exp(x) for x in logits]
        left, total = mpmath.fsum(weight), mpmath.mpf(0)
        reciprocals, gradient, later = mpmath.mpf(0), [mpmath.mpf(0) for _ in logits], set(range(len(logits)))
        for i in order:
            total += mpmath.log(weight[i] / left)
            reciprocals += 1 / left
            gradient[i] = 1 - weight[i] * reciprocals
            later.discard(i)
            left -= weight[i]
        for i in later:
            gradient[i] = -weight[i] * reciprocals
        return float(total), [float(g) for g in gradient]
