"""log Gamma, digamma and trigamma on the positive reals, to the last digits and to any derivative.

torch's own trigamma, which is what its digamma differentiates to, is accurate to about 1e-9 in float64 as well; the
Hurwitz zeta function gives the same derivative in full.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _LogGamma(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.lgamma(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * digamma(*ctx.saved_tensors)


class _Digamma(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.digamma(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * trigamma(*ctx.saved_tensors)


def log_gamma(x: Tensor) -> Tensor:
    """The logarithm of the Gamma function, x > 0."""
    return _LogGamma.apply(x)


def digamma(x: Tensor) -> Tensor:
    """Its derivative."""
    return _Digamma.apply(x)


def trigamma(x: Tensor) -> Tensor:
    """Its second derivative, ``zeta(2, x)``."""
    return torch.special.zeta(2.0, x)
