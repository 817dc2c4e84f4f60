"""Routing weights in plain torch: softmax top-k, and ProbMoE (arXiv 2606.01509) by its defining expression."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from probmoe_ext.reference.sample import subset_sample
from probmoe_ext.reference.subset import subset_indicator, subset_marginals, subset_mode
from probmoe_ext.reference.tilt import check_band, check_unmasked, compute_dtype, poison


def _softmax(r: Tensor) -> Tensor:
    """Probabilities of the experts; zeros, with zero gradients, in a row that masks all of them."""
    nothing = (r == -torch.inf).all(-1, keepdim=True)
    return torch.where(nothing, 0, torch.softmax(torch.where(nothing, 0, poison(r)), dim=-1))


def _take(dense: Tensor, indices: Tensor) -> Tensor:
    """Gather ``dense[..., E]`` at the indices; unused slots (index E) get 0."""
    padded = torch.cat([dense, torch.zeros_like(dense[..., :1])], dim=-1)
    return padded.gather(-1, indices)


def route_top_k(logits: Tensor, k: int, normalize: bool = False) -> tuple[Tensor, Tensor]:
    """Softmax over the experts, then the k most probable ones.

    Args:
        logits: ``[..., E]``.
        k: how many experts each row gets.
        normalize: divide the weights by their sum.

    Returns:
        weights ``[..., k]`` of the logits' dtype and int64 indices ``[..., k]``, by descending probability; ties go to
        the lower index.
    """
    k, _ = check_band(k, logits.shape[-1])
    check_unmasked(logits, k)
    probabilities = _softmax(compute_dtype(logits))
    weights, indices = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    weights, indices = weights[..., :k], indices[..., :k]
    if normalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights.to(logits.dtype), indices


def route_probmoe(
    logits: Tensor,
    k: int | tuple[int, int],
    *,
    training: bool,
    normalize: bool = False,
    forward: Literal["sample", "topk"] = "sample",
    backward: Literal["marginal", "ste"] = "marginal",
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """ProbMoE routing: the value is the softmax at the chosen experts, the gradient sees the marginals.

    With ``s = softmax(r)``, ``z`` the indicator of the chosen experts and ``m`` the marginals, the weights are

    * ``backward="marginal"``: ``u = (stop_gradient(z - m) + m) * s``;
    * ``backward="ste"``: ``u = z * s``, the choice held constant, so that only the dense softmax carries gradients

    read off at the chosen experts, and divided by the sum of u over all experts with ``normalize=True``. Autograd of
    these expressions is the definition of the op's gradient. With ``training=False`` it is always that of ``z * s``.

    Args:
        logits: ``[..., E]``.
        k: the number of experts, or the band ``(k_min, k_max)``.
        training: False routes to the mode, whatever `forward` says.
        normalize: divide by the sum of the chosen weights (a row that chose nothing keeps weights 0).
        forward: ``"sample"`` draws the subset, ``"topk"`` takes the mode.
        backward: see above.
        seed: an int or a scalar int64 tensor for ``forward="sample"``; None takes one from torch's default generator.

    Returns:
        weights ``[..., k_max]`` of the logits' dtype and int64 indices ``[..., k_max]``: ascending if sampled, else by
        descending logit. Unused slots hold index E and weight 0.
    """
    num_experts = logits.shape[-1]
    sampled = training and forward == "sample"
    indices = subset_sample(logits, k, seed) if sampled else subset_mode(logits.detach(), k)
    r = compute_dtype(logits)
    z = subset_indicator(indices, num_experts, r.dtype)
    s = _softmax(r)
    u = z * s
    if training and backward == "marginal":
        m = subset_marginals(r, k)
        u = ((z - m).detach() + m) * s
    if normalize:
        total = u.sum(-1, keepdim=True)
        u = torch.where(z.any(-1, keepdim=True), u / torch.where(total == 0, 1, total), 0)
    return _take(u, indices).to(logits.dtype), indices
