"""Routing: which experts a token uses, and with what weights, as one fused operator each way."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .. import _C  # noqa: F401  (registers the operators)
from .arguments import Cardinality, apply_mask, check_band, check_logits, launch, make_seed, nothing_watches
from .registration import refuse_derivative, register
from .streams import sample_stream

Forward = Literal["sample", "topk"]
Backward = Literal["marginal", "ste"]


def _slots(logits: Tensor, k_max: int) -> tuple[Tensor, Tensor]:
    shape = (*logits.shape[:-1], k_max)
    return logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)


_probmoe_vjp = register(
    "route_probmoe_backward",
    lambda grad_weights, logits, indices, k_min, k_max, normalize, marginal: logits.new_empty(logits.shape),
    refuse_derivative("routing is once differentiable"),
)


_top_k_vjp = register(
    "route_top_k_backward",
    lambda grad_weights, logits, indices, normalize: logits.new_empty(logits.shape),
    refuse_derivative("routing is once differentiable"),
)


def _save_top_k(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, ctx.normalize = inputs
    ctx.set_materialize_grads(False)  # spares a gradient of zeros for the indices
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, output[1])


def _top_k_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, None, None]:
    if grad is None:
        return None, None, None
    logits, indices = ctx.saved_tensors
    return _top_k_vjp(grad, logits, indices, ctx.normalize), None, None


_top_k = register("route_top_k", lambda logits, k, normalize: _slots(logits, k), _top_k_backward, _save_top_k)


def _probmoe_fake(
    logits: Tensor, seed: Tensor | None, k_min: int, k_max: int, sample: bool, normalize: bool, marginal: bool
) -> tuple[Tensor, Tensor]:
    if sample and seed is None:
        raise ValueError("route_probmoe needs a seed outside eager mode: what is traced must be a pure function")
    return _slots(logits, k_max)


def _save_probmoe(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    logits, _, ctx.k_min, ctx.k_max, _, ctx.normalize, ctx.marginal = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, output[1])


def _probmoe_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None, None, None, None
    logits, indices = ctx.saved_tensors
    grad_logits = _probmoe_vjp(grad, logits, indices, ctx.k_min, ctx.k_max, ctx.normalize, ctx.marginal)
    return grad_logits, None, None, None, None, None, None


_probmoe = register(
    "route_probmoe",
    _probmoe_fake,
    _probmoe_backward,
    _save_probmoe,
    unbatched=(1,),
)


def route_top_k(
    logits: Tensor, k: int, normalize: bool = False, *, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Conventional routing, fused: softmax over all experts, the k largest probabilities.

    Args:
        logits: ``[..., E]``, floating; -inf masks an expert out.
        k: How many experts, ``0 <= k <= E``.
        normalize: Divide the weights by their sum.
        mask: bool, broadcastable with ``logits``: True keeps an expert, False is a logit of -inf. A TypeError if it is
            not bool, a ValueError if it does not fit.

    Returns:
        ``(weights, indices)``, both ``[..., k]``, by descending weight, ties to the lower index; weights in the dtype
        of ``logits``, indices int64. The gradient flows through the kept softmax weights (the selection is a constant).

    Raises:
        TypeError: ``logits`` is no floating tensor, or ``k`` no int.
        ValueError: ``k`` is out of range, or a row has fewer than ``k`` unmasked experts.
    """
    check_logits(logits)
    logits = apply_mask(logits, mask)
    if not isinstance(k, int | torch.SymInt) or isinstance(k, bool):
        raise TypeError(f"k must be an int, not {k!r}")
    check_band(k, logits.shape[-1])
    return launch(_top_k, logits, k, bool(normalize))


def route_probmoe(
    logits: Tensor,
    k: Cardinality,
    *,
    training: bool,
    normalize: bool = False,
    forward: Forward = "sample",
    backward: Backward = "marginal",
    seed: int | Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """ProbMoE routing (arXiv 2606.01509): a sampled subset forward, exact marginals backward.

    With ``s = softmax(logits)``, ``z`` the indicator of S and ``m`` the marginals, the weights are
    ``u = (stopgrad(z - m) + m) * s`` on S, divided by their sum if ``normalize``. The value on S is ``s_i``; the
    gradient ``C (g s) + J_softmax^T (g z)`` is computed in closed form from the logits and the indices, the only
    things kept.

    Args:
        logits: ``[..., E]``, floating; -inf masks an expert out.
        k: The size, or ``(k_min, k_max)`` for a size chosen by token (dynamic k).
        training: True routes by ``forward``; False by the mode of the law (exact k: the k largest, as
            :func:`route_top_k`; a band: :func:`subset_mode`), with the gradient of the kept softmax weights.
        normalize: Divide the weights by their sum (models with ``norm_topk_prob``).
        forward: ``"sample"`` draws S; ``"topk"`` takes the mode (the paper's ablation).
        backward: ``"marginal"`` as above; ``"ste"`` treats the selection as a constant and passes the gradient straight
            through to the softmax, ``J_softmax^T (g z)`` alone.
        seed: For ``"sample"``: None draws one from torch's generator; an int or an int64 scalar tensor makes the call
            pure.
        mask: bool, broadcastable with ``logits``: True keeps an expert, False is a logit of -inf. A TypeError if it is
            not bool, a ValueError if it does not fit.

    Returns:
        ``(weights, indices)``, both ``[..., k_max]``: weights in the dtype of ``logits``, indices int64, ascending when
        sampled and by descending logit otherwise. Unused slots carry index E and weight 0.

    Raises:
        TypeError: ``logits`` is no floating tensor, ``k`` no int or pair of ints, ``seed`` no int64.
        ValueError: ``k`` is out of range, ``forward`` or ``backward`` is unknown, the seed is on another device, or a
            row has fewer than ``k_min`` unmasked experts.
    """
    check_logits(logits)
    logits = apply_mask(logits, mask)
    k_min, k_max = check_band(k, logits.shape[-1])
    if forward not in ("sample", "topk"):
        raise ValueError(f"forward must be 'sample' or 'topk', not {forward!r}")
    if backward not in ("marginal", "ste"):
        raise ValueError(f"backward must be 'marginal' or 'ste', not {backward!r}")
    sample = training and forward == "sample"
    # In eager mode the operator draws one itself, which is that of the first stream.
    if sample and not (seed is None and sample_stream() == 0 and nothing_watches(logits)):
        seed = make_seed(seed, logits)
    return launch(
        _probmoe,
        logits,
        seed if sample else None,
        k_min,
        k_max,
        sample,
        bool(normalize),
        training and backward == "marginal",
    )
