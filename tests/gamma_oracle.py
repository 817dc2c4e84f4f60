"""The implicit derivative of Gamma and Beta variates with many digits."""

from __future__ import annotations

from functools import lru_cache

import mpmath
import numpy as np
from scipy import special

ALPHAS = (1e-3, 1e-2, 0.1, 0.5, 1.0, 1.7, 3.0, 6.0, 10.0, 30.0, 100.0, 1e3, 1e4)
QUANTILES = (1e-3, 1e-2, 0.1, 0.5, 0.9, 0.99, 1 - 1e-3)


def log_quantile(alpha: float, probability: float) -> float:
    """The logarithm of the Gamma(alpha, 1) quantile, below the range of numbers as well."""
    lowest = (np.log(probability) + special.gammaln(alpha + 1)) / alpha
    return float(lowest if lowest < -40 else np.log(special.gammaincinv(alpha, probability)))


@lru_cache(maxsize=4096)
def log_gamma_slope(alpha: float, log_value: float | mpmath.mpf) -> mpmath.mpf:
    """``d log g / d alpha`` to 30 digits, by the power series of P(alpha, g), whose terms all have one sign.

    ``P = g^alpha e^-g / Gamma(alpha + 1) sum_n g^n / (alpha + 1)_n``; what cancels between its two derivatives is
    at most the size of 1 / (1 - P), for which 90 digits leave room.
    """
    with mpmath.workdps(90):
        a, y = mpmath.mpf(alpha), mpmath.mpf(log_value)
        x = mpmath.exp(y)
        term, harmonic, total, slope, n = mpmath.mpf(1), mpmath.mpf(0), mpmath.mpf(1), mpmath.mpf(0), 0
        while n < 10 or n < x or term * (1 + harmonic) > total * mpmath.mpf(10) ** -88:
            n += 1
            term *= x / (a + n)
            harmonic += 1 / (a + n)
            total += term
            slope -= term * harmonic
        return -(total * (y - mpmath.digamma(a + 1)) + slope) / a


@lru_cache(maxsize=1024)
def beta_slope(alpha: float, beta: float, value: float) -> mpmath.mpf:
    """``dx / dalpha`` of a Beta(alpha, beta) variate at its fixed quantile, by a difference quotient of 60 digits."""
    with mpmath.workdps(60):
        a, b, x, step = mpmath.mpf(alpha), mpmath.mpf(beta), mpmath.mpf(value), mpmath.mpf(10) ** -20

        def distribution(p: mpmath.mpf) -> mpmath.mpf:
            return mpmath.betainc(p, b, 0, x, regularized=True)

        change = (distribution(a + step) - distribution(a - step)) / (2 * step)
        return -change * mpmath.beta(a, b) / (x ** (a - 1) * (1 - x) ** (b - 1))
