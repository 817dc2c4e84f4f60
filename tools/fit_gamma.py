"""Writes csrc/rows/gamma_tables.h: the polynomials behind the Gamma family, fitted to exact values.

    python tools/fit_gamma.py | clang-format > csrc/rows/gamma_tables.h

All are Chebyshev interpolants, expanded into powers. The functions, with s = 1 / (1 + alpha) in (0, 1]:

* alpha * d log g / d alpha at log g = log(1 + alpha) + delta, delta from LOWEST to HIGHEST: smooth in (s, delta) down
  to s = 0, where Temme's uniform expansion (SIAM J. Math. Anal. 13, 1982) has its first term, and up to s = 1, where it
  is that of the exponential integral. Values from `probmoe_ext.reference.log_gamma_grad`.
* (log(1 + f) - f + f^2 / 2) / f^3 for 1 + f in [sqrt(1/2), sqrt(2)], and sin(2 pi sqrt(z)) / sqrt(z) for z
  in [0, 1/16].
* psi(1 + alpha) - log(1 + alpha), and, with s = 1 / (2 + x) in (0, 1/2], the remainders of Stirling's series for
  log Gamma(2 + x), psi(2 + x) and psi'(2 + x), the last over s^2. Values from mpmath.
"""

from __future__ import annotations

from collections.abc import Callable

import mpmath
import numpy as np
import torch
from numpy.polynomial import chebyshev

from probmoe_ext.reference import log_gamma_grad

LOWEST, HIGHEST = -2.0, 1.5
POINTS = (40, 48)
mpmath.mp.dps = 40
Function = Callable[[mpmath.mpf], mpmath.mpf]


def nodes(count: int, low: float, high: float) -> np.ndarray:
    """Chebyshev points of an interval, ascending."""
    return low + (high - low) * (1 - np.cos(np.pi * (np.arange(count) + 0.5) / count)) / 2


def slope_coefficients(tolerance: float) -> tuple[list[list[float]], float]:
    """Rows of coefficients of powers of v = (delta - middle) / half, by power of u = 2 s - 1; and the fit's error."""
    s, delta = nodes(POINTS[0], 0, 1), nodes(POINTS[1], LOWEST, HIGHEST)
    alpha = torch.tensor(1 / s - 1)[:, None]
    log_value = torch.log1p(alpha) + torch.tensor(delta)
    values = torch.stack([log_gamma_grad(a, y) * a for a, y in zip(alpha, log_value, strict=True)]).numpy()
    by_u = np.linalg.inv(chebyshev.chebvander(2 * s - 1, POINTS[0] - 1))
    v = 2 * (delta - LOWEST) / (HIGHEST - LOWEST) - 1
    by_v = np.linalg.inv(chebyshev.chebvander(v, POINTS[1] - 1))
    table = by_u @ values @ by_v.T
    table[np.abs(table) < tolerance] = 0
    error = np.abs(chebyshev.chebgrid2d(2 * s - 1, v, table) / values - 1).max()
    rows = int(np.abs(table).max(1).nonzero()[0].max()) + 1
    powers_of_v = np.array([np.pad(p, (0, POINTS[1] - len(p))) for p in map(chebyshev.cheb2poly, table[:rows])])
    powers = np.array([np.pad(p, (0, rows - len(p))) for p in map(chebyshev.cheb2poly, powers_of_v.T)]).T
    lengths = [int(np.abs(table[i:]).max(0).nonzero()[0].max()) + 1 for i in range(rows)]
    return [list(powers[i][: lengths[i]]) for i in range(rows)], float(error)


def one_variable(function: Function, low: float, high: float, tolerance: float) -> tuple[list[float], float]:
    """Coefficients of powers of the variable, constant first, of the least degree that meets the tolerance."""
    degree = 2
    while True:
        degree += 1
        coefficients, error = mpmath.chebyfit(function, [mpmath.mpf(low), mpmath.mpf(high)], degree, error=True)
        if error < tolerance:
            return [float(c) for c in reversed(coefficients)], float(error)


def log_tail(f: mpmath.mpf) -> mpmath.mpf:
    """What is left of log(1 + f) after its first two terms, over f^3."""
    return (mpmath.log1p(f) - f + f * f / 2) / f**3 if abs(f) > 1e-9 else mpmath.mpf(1) / 3 - f / 4


def sine(z: mpmath.mpf) -> mpmath.mpf:
    """Sine of 2 pi t over t, as a function of t^2."""
    t = mpmath.sqrt(z)
    return mpmath.sin(2 * mpmath.pi * t) / t if t > 1e-9 else 2 * mpmath.pi


def stirling(x: mpmath.mpf) -> mpmath.mpf:
    """Log Gamma(x) less the leading part of Stirling's series."""
    return mpmath.loggamma(x) - ((x - mpmath.mpf(1) / 2) * mpmath.log(x) - x + mpmath.log(2 * mpmath.pi) / 2)


def at(function: Function, limit: float = 0.0) -> Function:
    """The function of x as one of s = 1 / x, with its limit at s = 0."""
    return lambda s: function(1 / s) if s > mpmath.mpf(10) ** -12 else mpmath.mpf(limit)


def excess(x: mpmath.mpf) -> mpmath.mpf:
    """Digamma less the logarithm."""
    return mpmath.digamma(x) - mpmath.log(x)


def wrap(numbers: list[float], suffix: str) -> str:
    """The numbers as C constants in lines of three."""
    text = [f"{x:.17g}{suffix}" if suffix == "" else f"{x:.9g}{suffix}" for x in numbers]
    text = [t if any(c in t for c in ".e") else t.replace(suffix, "") + ".0" + suffix for t in text]
    return ",\n".join("    " + ", ".join(text[i : i + 5]) for i in range(0, len(text), 5))


def main() -> None:
    """Prints the header."""
    print("/* Coefficients of numerics.h and gamma_numerics.h, made by tools/fit_gamma.py, which says of what.")
    print(" * No guard: see precision.h. */\n")
    print(f"#define PM_SLOPE_LOWEST ((real){LOWEST})\n#define PM_SLOPE_HIGHEST ((real){HIGHEST})\n")
    for bits, tolerance, suffix in ((32, 3e-8, "f"), (64, 4e-14, "")):
        print(f"#if PM_REAL_BITS == {bits}")
        rows, error = slope_coefficients(tolerance)
        lengths = [len(row) for row in rows]
        print(f"/* alpha d log g / d alpha, within {error:.1g} (relative): {sum(lengths)} coefficients. */")
        print(f"enum {{ SLOPE_ROWS = {len(rows)}, SLOPE_COLUMNS = {max(lengths)} }};")
        print(f"PM_CONSTANT int slope_lengths[SLOPE_ROWS] = {{{', '.join(map(str, lengths))}}};")
        print("PM_CONSTANT real slope_table[SLOPE_ROWS][SLOPE_COLUMNS] = {")
        print(",\n".join("    {\n" + wrap(row, suffix) + "}" for row in rows) + "};\n")
        small, root = bits == 32, mpmath.sqrt(2)
        one = [
            ("log_tail", "(log(1 + f) - f + f^2/2) / f^3", log_tail, 1 / root - 1, root - 1, 3e-8 if small else 1e-16),
            ("sine", "sin(2 pi t) / t in powers of t^2", sine, 0, 1 / 16, 2e-8 if small else 2e-16),
            ("digamma_excess", "psi(x) - log x, s = 1/x in (0, 1]", at(excess), 0, 1, 2e-8 if small else 2e-13),
        ]
        remainders = (
            ("stirling_log_gamma", "log Gamma(x) less Stirling's leading terms", at(stirling)),
            ("stirling_digamma", "psi(x) - log x", at(excess)),
            # times a difference as large as x in the divergence's gradient: the remainder has to vanish with s
            ("stirling_trigamma", "(psi'(x) - 1/x) x^2", at(lambda x: (mpmath.psi(1, x) - 1 / x) * x**2, 0.5)),
        )
        wanted = 1e-8 if small else 4e-17
        one += [(n, f"{text}, s = 1/x in (0, 1/2]", f, 0, 0.5, wanted) for n, text, f in remainders]
        for name, text, function, low, high, wanted in one:
            coefficients, error = one_variable(function, low, high, wanted)
            print(f"/* {text}, within {error:.1g}. */")
            print(f"PM_CONSTANT real {name}[{len(coefficients)}] = {{\n{wrap(coefficients, suffix)}}};\n")
        print("#endif\n")


if __name__ == "__main__":
    main()
