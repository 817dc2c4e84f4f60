"""Gamma draws in log space and their implicit derivative, as the compiled kernels make them, decision by decision.

Marsaglia and Tsang, "A simple method for generating gamma variables" (ACM TOMS 26, 2000), in log space, with every
attempt counted; Figurnov, Mohamed and Mnih, "Implicit reparameterization gradients" (NeurIPS 2018) for the derivative.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from probmoe_ext.reference.philox import philox4x32
from probmoe_ext.reference.tilt import compute_dtype

GAMMA_DRAWS = 16
ATTEMPTS = 64
"""After so many attempts the last one is taken: each fails with a probability below 0.05."""

_WORD = 0xFFFFFFFF


def element_words(seed: int, shape: torch.Size, attempt: int, purpose: int, device: torch.device) -> Tensor:
    """The four 32-bit words of every element of a ``[rows, columns]`` block of draws, int64 ``[4, rows, columns]``.

    The counter is ``(attempt * 65536 + column, row low, row high, purpose)``.
    """
    rows = torch.arange(shape[0], dtype=torch.int64, device=device)[:, None]
    columns = torch.arange(shape[1], dtype=torch.int64, device=device)
    counter = (columns + 65536 * attempt, rows & _WORD, rows >> 32, torch.full_like(columns, purpose))
    return torch.stack(philox4x32(counter, (seed & _WORD, (seed >> 32) & _WORD)))


def exponential(high: Tensor, low: Tensor | None) -> Tensor:
    """``-log U``, with neither end of (0, 1) cut short.

    Without `low`, float32: ``U = (n + 1/2) / 2**31`` for the leading 31 bits n of the word; near 1 the
    logarithm is that of the complement, which is as fine. With `low`, float64: ``U = (n + 1/2) / 2**52`` for 52 bits.
    """
    if low is not None:
        return -torch.log((((high << 20) | (low >> 12)).double() + 0.5) * 2.0**-52)
    n = high >> 1
    near_zero, near_one = (((m.float() + 0.5) * 2.0**-31) for m in (n, 2**31 - 1 - n))
    return torch.where(near_zero < math.sqrt(0.5), -torch.log(near_zero), -torch.log1p(-near_one))


def normal(radius: Tensor, high: Tensor, low: Tensor | None) -> Tensor:
    """``sqrt(2 radius) cos(2 pi V)`` (Box and Muller 1958), radius an exponential variate, V from 32 or 52 bits."""
    if low is not None:
        centred = ((high << 20) | (low >> 12)).double() * 2.0**-52 - 0.5
    else:
        centred = ((high.double() - 2.0**31) * 2.0**-32).float()
    return torch.sqrt(2 * radius) * torch.sin(2 * math.pi * (centred.abs() - 0.25))


def _draw(alpha: Tensor, seed: int) -> Tensor:
    """Logarithms of Gamma(alpha, 1) draws ``[rows, columns]``, without derivative."""
    boosted = alpha < 1
    d = torch.where(boosted, alpha + 1, alpha) - 1 / 3
    c = 1 / torch.sqrt(9 * d)
    result = torch.zeros_like(alpha)
    pending = alpha > 0
    for attempt in range(ATTEMPTS):
        words = element_words(seed, alpha.shape, attempt, GAMMA_DRAWS, alpha.device)
        lows: Any = (None,) * 4
        if alpha.dtype == torch.float64:
            lows = element_words(seed, alpha.shape, attempt, GAMMA_DRAWS + 1, alpha.device)
        if attempt == 0:
            boost = torch.where(boosted, exponential(words[3], lows[3]) / alpha, 0)
        x = normal(exponential(words[0], lows[0]), words[1], lows[1])
        t = c * x
        log_root = torch.log1p(t.clamp(min=-1))
        # log U < x^2/2 + d - d v + d log v, v = (1 + t)^3, written in t so that nothing large cancels.
        bound = d * (3 * (log_root - t) + t * t * (1.5 - t))
        accepted = pending & (t > -1) & (-exponential(words[2], lows[2]) < bound)
        result = torch.where(accepted | (pending & (attempt == ATTEMPTS - 1)), torch.log(d) + 3 * log_root, result)
        pending = pending & ~accepted
        if not pending.any():
            break
    drawn = (result - boost).clamp(min=torch.finfo(alpha.dtype).min)
    return torch.where((alpha > 0) & (alpha < torch.inf), drawn, torch.where(alpha == 0, -torch.inf, torch.nan))


def _series(alpha: Tensor, log_x: Tensor, x: Tensor) -> Tensor:
    """``-(S (log x - psi(alpha + 1)) + S') / alpha``, S the series of P(alpha, x) / (x^alpha e^-x / Gamma)."""
    term, harmonic = torch.ones_like(x), torch.zeros_like(x)
    total, slope = torch.ones_like(x), torch.zeros_like(x)
    for n in range(1, 80 + int(12 * float(alpha.amax()) ** 0.5)):
        term = term * x / (alpha + n)
        harmonic = harmonic + 1 / (alpha + n)
        total, slope = total + term, slope - term * harmonic
    return -(total * (log_x - torch.digamma(alpha + 1)) + slope) / alpha


def _fraction(alpha: Tensor, log_x: Tensor, x: Tensor) -> Tensor:
    """``h (log x - psi(alpha)) + dh/dalpha``, h the fraction of Q(alpha, x) / (x^alpha e^-x / Gamma)."""
    last = 200 + int(15 * float(alpha.amax()) ** 0.5)
    h, slope = 1 / (x + 2 * last + 1 - alpha), torch.zeros_like(x)
    for n in range(last, 0, -1):
        factor = n * (n - alpha)
        inverse = 1 / (x + 2 * n - 1 - alpha - factor * h)
        slope = inverse * inverse * (1 + factor * slope - n * h)
        h = inverse
    return h * (log_x - torch.digamma(alpha)) + slope


def log_gamma_grad(concentration: Tensor, log_value: Tensor) -> Tensor:
    """``d log g / d alpha`` at a fixed quantile, from the logarithm of the draw; ``[...]`` of its dtype.

    ``-(dP/dalpha) / (g p(g))``, P the regularised lower incomplete gamma function. By the power series of P below
    ``alpha + 1`` and the continued fraction of ``1 - P`` above (and beyond 2), both differentiated term by term, in
    float64: relative errors below 1e-11.
    """
    alpha, log_x = torch.broadcast_tensors(concentration.detach().double(), log_value.detach().double())
    usable = (alpha > 0) & (alpha < torch.inf) & log_x.isfinite()
    a, y = torch.where(usable, alpha, 1), torch.where(usable, log_x, 0)
    x = torch.exp(y)
    result = torch.where(x < (a + 1).clamp(min=2), _series(a, y, x.clamp(max=2e8)), _fraction(a, y, x.clamp(min=1)))
    nothing = torch.where((alpha == 0) & (log_x == -torch.inf), 0, torch.nan)
    return torch.where(usable, result, nothing).to(log_value.dtype)


class _Implicit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, alpha: Tensor, drawn: Tensor) -> Tensor:
        ctx.save_for_backward(alpha, drawn)
        return drawn.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * log_gamma_grad(*ctx.saved_tensors), None


def with_implicit_gradient(concentration: Tensor, log_value: Tensor) -> Tensor:
    """A draw of log g that was made before, with its implicit derivative by the concentration."""
    return _Implicit.apply(concentration, log_value)


def log_gamma_sample(concentration: Tensor, seed: int | Tensor | None = None) -> Tensor:
    """The logarithm of a Gamma(alpha, 1) draw, with its implicit derivative by alpha; ``[..., E]``.

    For ``alpha < 1`` a draw for ``alpha + 1`` is multiplied by ``U**(1/alpha)``, which in log space cannot underflow.
    An element's attempt t reads the four words of the counter ``(65536 t + column, row, purpose 16)`` (in float64 also
    those of purpose 17, the low halves): radius and angle of the normal variate, acceptance, and at the first attempt
    the boost.

    Args:
        concentration: ``[..., E]``, positive; rows are numbered over the flattened batch. 0 gives -inf; a negative
            number, +inf and NaN give NaN.
        seed: an int or a scalar int64 tensor; None takes one from torch's default generator.
    """
    alpha = compute_dtype(concentration)
    key = int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64)) if seed is None else int(seed)
    rows = alpha.reshape(-1, alpha.shape[-1])
    drawn = with_implicit_gradient(rows, _draw(rows.detach(), key))
    return drawn.reshape(alpha.shape).to(concentration.dtype)


def standard_gamma_grad(concentration: Tensor, value: Tensor) -> Tensor:
    """``dg/dalpha`` of a Gamma(alpha, 1) draw ``value`` at its fixed quantile; broadcast, in the dtype of `value`.

    0 at ``value = 0``. Not differentiable.
    """
    g = compute_dtype(value.detach())
    slope = log_gamma_grad(compute_dtype(concentration), torch.log(g.double()))
    return torch.where(g == 0, 0, g * slope).to(value.dtype)
