"""The Gumbel family: ordered draws without replacement, their law, and their relaxations.

The k largest of ``logits + Gumbel`` noise are an exact ordered draw without replacement, the Plackett-Luce law. As a
law on subsets this is *not* the conditional Bernoulli law of :mod:`probmoe_ext.ops.subset`: with the same logits the
probabilities of the subsets differ wherever ``1 < k < E``.
Sources: Kool, van Hoof & Welling, "Stochastic beams and where to find them", ICML 2019; Xie & Ermon, "Reparameterizable
subset sampling via continuous relaxations", IJCAI 2019; Maddison, Mnih & Teh, "The concrete distribution", ICLR 2017.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _C, reference  # noqa: F401  (_C registers the operators)
from .arguments import HALF_TYPES, check_band, check_indices, check_logits, launch, make_seed
from .registration import refuse_derivative, register

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 1e-6, 1e6


def check_size(k: int, num_experts: int) -> None:
    """Raises unless ``k`` is one number within ``0 <= k <= E``."""
    if not isinstance(k, int | torch.SymInt) or isinstance(k, bool):
        raise TypeError(f"k must be an int, not {k!r}")
    check_band(k, num_experts)


def check_temperature(temperature: float) -> float:
    """The temperature as a float, within ``[1e-6, 1e6]``."""
    if isinstance(temperature, bool) or not isinstance(temperature, int | float | torch.SymFloat | torch.SymInt):
        raise TypeError(f"temperature must be a number, not {type(temperature).__name__}")
    if not LOWEST_TEMPERATURE <= temperature <= HIGHEST_TEMPERATURE:
        raise ValueError(f"temperature must be positive, between 1e-6 and 1e6, not {temperature}")
    return float(temperature)


# ---- the k largest keys -------------------------------------------------------------------------------------------


def _save_choice(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, *_ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.shape = logits.shape
    ctx.save_for_backward(output[1])


def _top_k_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None]:
    (indices,) = ctx.saved_tensors
    return grad.new_zeros(ctx.shape).scatter(-1, indices, grad), None, None


def _top_k_fake(logits: Tensor, seed: Tensor, k: int) -> tuple[Tensor, Tensor]:
    shape = (*logits.shape[:-1], k)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)


_top_k = register("gumbel_top_k", _top_k_fake, _top_k_backward, _save_choice, unbatched=(1,))


def gumbel_top_k(logits: Tensor, k: int, seed: int | Tensor | None = None) -> tuple[Tensor, Tensor]:
    """An ordered draw of k experts without replacement, by the k largest perturbed logits (Kool et al. 2019).

    The first expert has the law ``softmax(logits)``, each further one the softmax over what is left (Plackett-Luce; see
    :func:`plackett_luce_log_prob`). A masked expert is never drawn.

    Args:
        logits: ``[..., E]``, floating; -inf masks an expert out.
        k: How many experts, ``0 <= k <= E``.
        seed: None draws one from torch's generator; an int or an int64 scalar tensor makes the call pure. Rows draw
            independently, counted by their index (Philox4x32-10), whatever the number of threads; a GPU and a CPU with
            fused multiply-add give the same keys to the last bit, and so the same experts.

    Returns:
        ``(indices, keys)``, both ``[..., k]`` by descending key, ties to the lower index: int64 indices, and the keys
        ``logits + Gumbel(0, 1)`` in the dtype of ``logits``, which pass their gradient on to the logits. The noise
        reaches out to a probability of 2**-33 at each end (float64: 2**-65).

    Raises:
        TypeError: ``logits`` is no floating tensor, ``k`` no int, ``seed`` no int64.
        ValueError: ``k`` is out of range, the seed is on another device, or a row has fewer than ``k`` unmasked
            experts.
    """
    check_logits(logits)
    check_size(k, logits.shape[-1])
    keys, indices = launch(_top_k, logits, make_seed(seed, logits), k)
    return indices, keys


# ---- Plackett-Luce ------------------------------------------------------------------------------------------------


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _log_prob_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    logits, indices = ctx.saved_tensors
    return _log_prob_vjp(grad, logits, indices), None


def _log_prob_second(ctx: Any, cotangent: Tensor) -> tuple[Tensor, Tensor, None]:
    # Asked for by second derivatives alone: no kernel of its own.
    grad, logits, indices = ctx.saved_tensors
    with torch.enable_grad():
        upstream, leaf = (t.detach().requires_grad_() for t in (grad, logits))
        value = reference.plackett_luce_log_prob(leaf, indices)
        (first,) = torch.autograd.grad(value, leaf, upstream, create_graph=True)
        by_grad, by_logits = torch.autograd.grad(first, (upstream, leaf), cotangent.detach(), allow_unused=True)
    zeros = torch.zeros_like
    return zeros(grad) if by_grad is None else by_grad, zeros(logits) if by_logits is None else by_logits, None


_log_prob = register(
    "plackett_luce_log_prob",
    lambda logits, indices: logits.new_empty(logits.shape[:-1]),
    _log_prob_backward,
    _save_inputs,
)
_log_prob_vjp = register(
    "plackett_luce_log_prob_backward",
    lambda grad, logits, indices: logits.new_empty(logits.shape),
    _log_prob_second,
    _save_inputs,
)


def plackett_luce_log_prob(logits: Tensor, indices: Tensor) -> Tensor:
    """Log-probability of an ordered draw, ``sum_t [r_{i_t} - logsumexp(r over what is left before t)]``.

    The probability that :func:`gumbel_top_k` draws just these experts in this order. Computed as a sum of terms of one
    sign, so that nothing cancels (on the CPU in double precision).

    Args:
        logits: ``[..., E]``, floating; -inf masks an expert out.
        indices: int64 ``[..., k]``, the experts in the order in which they were drawn, ``0 <= k <= E``.

    Returns:
        ``[...]``, in nats; -inf, with gradient 0, where an expert is masked or named twice. Twice differentiable (the
        second derivative in plain torch, O(E k) memory).

    Raises:
        TypeError: ``logits`` is no floating tensor, or ``indices`` not int64.
        ValueError: Shapes or devices differ, or an index is outside 0..E-1.
    """
    check_logits(logits)
    width = indices.shape[-1] if isinstance(indices, Tensor) and indices.dim() > 0 else 0
    check_indices(indices, logits, width)
    if width > logits.shape[-1]:
        raise ValueError(f"indices must name at most E = {logits.shape[-1]} experts a row, not {width}")
    return launch(_log_prob, logits, indices)


# ---- relaxations --------------------------------------------------------------------------------------------------


def _save_keys(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, *ctx.rest = inputs
    ctx.dtype = logits.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _relaxed_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None, None, None]:
    (keys,) = ctx.saved_tensors
    return _relaxed_vjp(grad, keys, *ctx.rest).to(ctx.dtype), None, None, None


def _relaxed_fake(logits: Tensor, seed: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    wide = torch.float32 if logits.dtype in HALF_TYPES else logits.dtype
    return logits.new_empty(logits.shape), logits.new_empty(logits.shape, dtype=wide)


_relaxed = register("relaxed_top_k", _relaxed_fake, _relaxed_backward, _save_keys, unbatched=(1,))
_relaxed_vjp = register(
    "relaxed_top_k_backward",
    lambda grad, keys, k, temperature: keys.new_empty(keys.shape),
    refuse_derivative("relaxed_top_k is once differentiable"),
)


def relaxed_top_k(logits: Tensor, k: int, temperature: float, seed: int | Tensor | None = None) -> Tensor:
    """A relaxed k-hot draw, differentiable in the logits (Xie & Ermon 2019).

    ``x = logits + Gumbel(0, 1)``; k times ``a = softmax(x / temperature)``, ``x = x + log(1 - a)``; the sum of the
    ``a``. As the temperature goes to 0 it tends to the k-hot of :func:`gumbel_top_k` with the same seed. Unlike that
    draw it has entries strictly between 0 and 1, and its expectation is biased; the gradient is exact for it.

    Args:
        logits: ``[..., E]``, floating; -inf masks an expert out.
        k: How many experts, ``0 <= k <= E``.
        temperature: A positive number, from 1e-6 to 1e6.
        seed: None draws one from torch's generator; an int or an int64 scalar tensor makes the call pure.

    Returns:
        ``[..., E]``, rows sum to k; an entry may exceed 1 at high temperatures. Once differentiable: the backward pass
        takes O(E k) time and keeps one tensor of the shape of ``logits``.

    Raises:
        TypeError: ``logits`` is no floating tensor, ``k`` no int, ``temperature`` no number, ``seed`` no int64.
        ValueError: ``k`` or ``temperature`` is out of range, the seed is on another device, or a row has fewer than
            ``k`` unmasked experts.
    """
    check_logits(logits)
    check_size(k, logits.shape[-1])
    relaxed, _ = launch(_relaxed, logits, make_seed(seed, logits), k, check_temperature(temperature))
    return relaxed


def _save_gates(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, seed, ctx.temperature = inputs
    # Half precision rounds gates near 1 to it, and with it their derivative to 0: there the gates are computed anew.
    ctx.save_for_backward(*((logits, seed) if logits.dtype in HALF_TYPES else (output,)))


def _sigmoid_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    if len(ctx.saved_tensors) == 1:
        (gates,) = ctx.saved_tensors
    else:
        logits, seed = ctx.saved_tensors
        gates = _sigmoid(logits.float(), seed, ctx.temperature)
    slope = torch.ops.aten.sigmoid_backward(grad.to(gates.dtype), gates) / ctx.temperature
    return slope.to(grad.dtype), None, None


_sigmoid = register(
    "gumbel_sigmoid",
    lambda logits, seed, temperature: logits.new_empty(logits.shape),
    _sigmoid_backward,
    _save_gates,
    unbatched=(1,),
)


def gumbel_sigmoid(logits: Tensor, temperature: float, seed: int | Tensor | None = None) -> Tensor:
    """Relaxed Bernoulli draws, ``sigmoid((logits + log u - log(1 - u)) / temperature)`` (the binary concrete law).

    Elementwise, each element with a uniform of its own. As the temperature goes to 0 they tend to independent 0/1 draws
    with ``P(1) = sigmoid(logits)``.

    Args:
        logits: ``[..., E]``, floating; -inf gives 0, +inf gives 1, NaN gives NaN, without effect on other elements.
        temperature: A positive number, from 1e-6 to 1e6.
        seed: None draws one from torch's generator; an int or an int64 scalar tensor makes the call pure.

    Returns:
        ``[..., E]`` in [0, 1], in the dtype of ``logits``. Twice differentiable.

    Raises:
        TypeError: ``logits`` is no floating tensor, ``temperature`` no number, ``seed`` no int64.
        ValueError: ``temperature`` is out of range, or the seed is on another device.
    """
    check_logits(logits)
    return launch(_sigmoid, logits, make_seed(seed, logits), check_temperature(temperature))
