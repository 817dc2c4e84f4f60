"""The Dirichlet law: draws with pathwise gradients, density, entropy and divergence.

``theta = g / sum(g)`` with the Gamma variates of :func:`probmoe_ext.ops.log_gamma_sample`. The closed forms are
computed in double precision whatever the dtype, and twice differentiable (the second derivative in plain torch).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _C, reference  # noqa: F401  (_C registers the operators)
from .arguments import check_like, check_logits, make_seed, single
from .registration import refuse_derivative, register

# ---- draws --------------------------------------------------------------------------------------------------------


def _save_draw(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(inputs[0], *output)


def _sample_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None]:
    return _sample_vjp(grad, *ctx.saved_tensors), None


_sample_vjp = register(
    "dirichlet_sample_backward",
    lambda grad, concentration, sample, log_total: concentration.new_empty(concentration.shape),
    refuse_derivative("a Dirichlet draw is once differentiable"),
)
_sample = register(
    "dirichlet_sample",
    lambda c, seed: (c.new_empty(c.shape), c.new_empty(c.shape[:-1])),
    _sample_backward,
    _save_draw,
    unbatched=(1,),
)


def dirichlet_sample(concentration: Tensor, seed: int | Tensor | None = None) -> Tensor:
    """A draw from ``Dir(alpha)`` with its pathwise gradient.

    Args:
        concentration: ``[..., E]``, floating, alpha > 0. A zero's share is 0; a row of zeros alone, or with a negative,
            infinite or NaN entry, gives NaN.
        seed: None draws one from torch's generator; an int or an int64 scalar tensor makes the call pure. Rows draw
            independently, counted by their index (Philox4x32-10), whatever the number of threads.

    Returns:
        ``[..., E]`` on the simplex; a share below the normal range is 0. Once differentiable: from ``h = dL/dtheta``,
        ``(d log g_j / d alpha_j) theta_j (h_j - h.theta)`` (Figurnov, Mohamed & Mnih, NeurIPS 2018).

    Raises:
        TypeError: ``concentration`` is no floating tensor, or ``seed`` no int64.
        ValueError: There are no experts, or the seed is on another device.
    """
    check_logits(concentration, "concentration")
    draw: Tensor = _sample(single(concentration), make_seed(seed, concentration))[0]
    return draw.to(concentration.dtype)


# ---- closed forms -------------------------------------------------------------------------------------------------


def _save_all(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _second_derivative(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """The backward of a gradient operator ``(grad, *tensors)``, by the reference: it has no kernel of its own."""

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            upstream, *tensors = (t.detach().requires_grad_() for t in ctx.saved_tensors)
            first = torch.autograd.grad(function(*tensors), tensors, upstream, create_graph=True)
            return torch.autograd.grad(first, (upstream, *tensors), grads, materialize_grads=True)

    return backward


def _like_rows(*tensors: Tensor) -> Tensor:
    return tensors[0].new_empty(tensors[0].shape[:-1])


def _like_both(grad: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    return first.new_empty(first.shape), first.new_empty(first.shape)


def _log_prob_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    by_concentration, by_value = _log_prob_vjp(grad, *ctx.saved_tensors)
    return by_concentration, by_value


def _entropy_backward(ctx: Any, grad: Tensor) -> Tensor:
    by_concentration: Tensor = _entropy_vjp(grad, *ctx.saved_tensors)
    return by_concentration


def _kl_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    by_p, by_q = _kl_vjp(grad, *ctx.saved_tensors)
    return by_p, by_q


_log_prob = register("dirichlet_log_prob", _like_rows, _log_prob_backward, _save_all)
_log_prob_vjp = register(
    "dirichlet_log_prob_backward",
    _like_both,
    _second_derivative(reference.dirichlet_log_prob),
    _save_all,
)
_entropy = register("dirichlet_entropy", _like_rows, _entropy_backward, _save_all)
_entropy_vjp = register(
    "dirichlet_entropy_backward",
    lambda grad, concentration: concentration.new_empty(concentration.shape),
    _second_derivative(reference.dirichlet_entropy),
    _save_all,
)
_kl = register("dirichlet_kl", _like_rows, _kl_backward, _save_all)
_kl_vjp = register(
    "dirichlet_kl_backward",
    _like_both,
    _second_derivative(reference.dirichlet_kl),
    _save_all,
)


def dirichlet_log_prob(concentration: Tensor, value: Tensor) -> Tensor:
    """Log-density ``log Gamma(A) - sum log Gamma(alpha_i) + sum (alpha_i - 1) log theta_i``, ``A = sum alpha_i``.

    Args:
        concentration: ``[..., E]``, floating, alpha > 0; a row with any other gives NaN.
        value: Same shape, theta on the simplex (that its sum is 1 is not checked); ``0 log 0 = 0`` where alpha is 1.

    Returns:
        ``[...]``, in nats, computed in double precision. Twice differentiable in both.

    Raises:
        TypeError: An argument is no floating tensor.
        ValueError: Shapes or devices differ, or there are no experts.
    """
    check_logits(concentration, "concentration")
    check_like(value, concentration, "value", "concentration")
    log_prob: Tensor = _log_prob(concentration, value)
    return log_prob


def dirichlet_entropy(concentration: Tensor) -> Tensor:
    """Differential entropy of ``Dir(alpha)`` in nats.

    ``sum log Gamma(alpha_i) - log Gamma(A) + (A - E) psi(A) - sum (alpha_i - 1) psi(alpha_i)``.

    Args:
        concentration: ``[..., E]``, floating, alpha > 0; a row with any other gives NaN.

    Returns:
        ``[...]``, computed in double precision. Twice differentiable.

    Raises:
        TypeError: ``concentration`` is no floating tensor.
        ValueError: There are no experts.
    """
    check_logits(concentration, "concentration")
    entropy: Tensor = _entropy(concentration)
    return entropy


def dirichlet_kl(p_concentration: Tensor, q_concentration: Tensor) -> Tensor:
    """Divergence ``KL(Dir(p) || Dir(q))`` in nats.

    ``log Gamma(P) - log Gamma(Q) + sum_i [log Gamma(q_i) - log Gamma(p_i) + (p_i - q_i) (psi(p_i) - psi(P))]``.

    Args:
        p_concentration: ``[..., E]``, floating, positive; a row with any other entry gives NaN.
        q_concentration: Same shape, likewise.

    Returns:
        ``[...]``, computed in double precision, in the dtype of ``p_concentration``; exactly 0 where both are equal.
        Twice differentiable in both.

    Raises:
        TypeError: An argument is no floating tensor.
        ValueError: Shapes or devices differ, or there are no experts.
    """
    check_logits(p_concentration, "p_concentration")
    check_like(q_concentration, p_concentration, "q_concentration", "p_concentration")
    divergence: Tensor = _kl(p_concentration, q_concentration)
    return divergence
