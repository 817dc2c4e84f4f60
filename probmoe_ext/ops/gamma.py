"""Gamma variates in log space, and their implicit derivative.

Draws: Marsaglia & Tsang, "A simple method for generating gamma variables", ACM TOMS 26 (2000), every attempt counted.
Derivatives: Figurnov, Mohamed & Mnih, "Implicit reparameterization gradients", NeurIPS 2018. Accuracy: docs/gamma.md.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _C  # noqa: F401  (registers the operators)
from .arguments import check_like, check_logits, make_seed, single
from .registration import refuse_derivative, register


def _save_draw(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)


def _sample_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    concentration, log_value = ctx.saved_tensors
    return _sample_vjp(grad, concentration, log_value), None


_sample_vjp = register(
    "log_gamma_sample_backward",
    lambda grad, concentration, log_value: concentration.new_empty(concentration.shape),
    refuse_derivative("a Gamma draw is once differentiable"),
)
_sample = register(
    "log_gamma_sample",
    lambda concentration, seed: concentration.new_empty(concentration.shape),
    _sample_backward,
    _save_draw,
    unbatched=(1,),
)
_grad = register(
    "standard_gamma_grad",
    lambda concentration, value: concentration.new_empty(concentration.shape),
    refuse_derivative("standard_gamma_grad has no derivative"),
)


def log_gamma_sample(concentration: Tensor, seed: int | Tensor | None = None) -> Tensor:
    """The logarithm of a Gamma draw, ``log g`` with ``g ~ Gamma(alpha, 1)``, and its implicit derivative.

    In log space a concentration of 1e-3, whose draws are mostly below 1e-300, is like any other.

    Args:
        concentration: ``[..., E]``, floating, the shapes alpha > 0. 0 gives -inf; negative, infinite and NaN give NaN.
        seed: None draws one from torch's generator; an int or an int64 scalar tensor makes the call pure. An element's
            draw depends on the seed, its row's number and its column (Philox4x32-10), and on nothing else.

    Returns:
        ``[..., E]``. Once differentiable, by ``d log g / d alpha`` at the draw's quantile.

    Raises:
        TypeError: ``concentration`` is no floating tensor, or ``seed`` no int64.
        ValueError: There are no experts, or the seed is on another device.
    """
    check_logits(concentration, "concentration")
    draw: Tensor = _sample(single(concentration), make_seed(seed, concentration))
    return draw.to(concentration.dtype)


def standard_gamma_grad(concentration: Tensor, value: Tensor) -> Tensor:
    """``dg / dalpha`` of a Gamma(alpha, 1) variate at its fixed quantile, ``-(dP/dalpha) / p(g)``.

    Args:
        concentration: ``[..., E]``, floating, the shapes alpha > 0; negative, infinite and NaN give NaN.
        value: Same shape, the variates g >= 0.

    Returns:
        ``[..., E]`` in the dtype of ``concentration``; 0 where g is 0 or below the normal range. Any quantile is
        allowed, 1e-300 as well as 1 - 1e-16. Not differentiable.

    Raises:
        TypeError: An argument is no floating tensor.
        ValueError: Shapes or devices differ.
    """
    check_logits(concentration, "concentration")
    check_like(value, concentration, "value", "concentration")
    grad: Tensor = _grad(concentration, value)
    return grad
