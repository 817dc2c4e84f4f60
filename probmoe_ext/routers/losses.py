"""Auxiliary losses of routing, as functions: load balance of what was really chosen, size and entropy of the logits."""

from __future__ import annotations

from typing import Literal

import torch

from probmoe_ext.ops import subset_marginals
from probmoe_ext.ops.arguments import single
from probmoe_ext.routers.base import ExpertsPerToken, check_k

PROBABILITIES = ("marginals", "softmax")
NORMALIZATIONS = ("switch", "transformers")


def load_balancing_loss(
    logits: torch.Tensor,
    indices: torch.Tensor,
    k: ExpertsPerToken,
    *,
    mask: torch.Tensor | None = None,
    probabilities: Literal["marginals", "softmax"] = "marginals",
    normalization: Literal["switch", "transformers"] = "switch",
) -> torch.Tensor:
    """The load-balancing loss of Switch Transformers (arXiv 2101.03961, eq. 4-6), for sampled subsets of any size.

    With ``f_e`` the share of all used slots that went to expert ``e``, counted from ``indices`` (a constant for the
    gradient), and ``P_e`` the share of the probability that it had, the loss is ``E * sum_e f_e P_e``. It is 1 when
    either is uniform, and larger when both favour the same experts.

    Args:
        logits: ``[..., E]``, the gate's output, in any floating dtype.
        indices: ``[..., K]``, the experts that were chosen; index ``E`` is a slot that is not used.
        k: Experts per token, an int or a band ``(k_min, k_max)``: the law that the marginals are of.
        mask: ``[...]``, bool or 0/1: the tokens that count; all by default. Without any the loss is 0.
        probabilities: ``"marginals"``: the exact ``P(e in S)``, the law that ProbMoE draws from; ``"softmax"``.
        normalization: ``"switch"`` as above; ``"transformers"``: ``f_e`` is the share of tokens that chose ``e``, as in
            ``load_balancing_loss_func`` of transformers, so the loss is the mean number of experts (k) times that.
            With ``probabilities="softmax"`` and the k largest logits it equals that function on the same logits; the
            library's takes all layers as one, so concatenate them along the tokens to get the same.

    Returns:
        A scalar in float32 (float64 for such logits), differentiable in ``logits``.

    Raises:
        ValueError: If an option is unknown, ``k`` is out of range, or shapes do not fit.
    """
    for name, value, allowed in (
        ("probabilities", probabilities, PROBABILITIES),
        ("normalization", normalization, NORMALIZATIONS),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
    num_experts = logits.shape[-1]
    check_k(k, num_experts)
    if indices.shape[:-1] != logits.shape[:-1]:
        raise ValueError(
            f"indices {tuple(indices.shape)} and logits {tuple(logits.shape)} must agree in all but the last dimension"
        )
    logits, indices = _wide(logits).flatten(0, -2), indices.flatten(0, -2)
    dense = subset_marginals(logits, k) if probabilities == "marginals" else torch.softmax(logits, dim=-1)
    loads, mass = loads_and_probabilities(dense, indices, mask)
    tiny = torch.finfo(mass.dtype).tiny
    # The total of a band's marginals is the mean size: were it left in, the loss would also ask for fewer experts.
    loss = num_experts * (loads * mass).sum() / mass.sum().clamp(min=tiny)
    return loss if normalization == "transformers" else loss / loads.sum().clamp(min=tiny)


def loads_and_probabilities(
    probabilities: torch.Tensor, indices: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What products of load and probability are made of: ``f_e`` and ``P_e``, for losses over any set of experts.

    Args:
        probabilities: ``[T, N]`` in float32 or float64.
        indices: ``[T, K]`` int64, the experts that were chosen; index ``N`` is a slot that is not used.
        mask: ``[T]``, bool or 0/1: the tokens that count; all by default. Without any, all is 0.

    Returns:
        ``[N]`` share of the tokens that chose each expert, a constant for the gradient; ``[N]`` mean probability.
    """
    keep = _keep(mask, probabilities)
    tokens = keep.sum().clamp(min=1)
    counts = probabilities.new_zeros(probabilities.shape[-1] + 1)
    counts = counts.scatter_add(0, indices.flatten(), keep.unsqueeze(-1).expand(indices.shape).flatten())[:-1]
    return counts / tokens, (probabilities * keep.unsqueeze(-1)).sum(0) / tokens


def z_loss(logits: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The router z-loss of ST-MoE (arXiv 2202.08906, eq. 5): the mean over tokens of ``logsumexp(logits) ** 2``.

    Args:
        logits: ``[..., E]``, the gate's output, in any floating dtype.
        mask: ``[...]``, bool or 0/1: the tokens that count; all by default. Without any the loss is 0.

    Returns:
        A scalar in float32 (float64 for such logits).

    Raises:
        ValueError: If the mask does not have a value for each token.
    """
    logits = _wide(logits).flatten(0, -2)
    keep = _keep(mask, logits)
    return (torch.logsumexp(logits, dim=-1).square() * keep).sum() / keep.sum().clamp(min=1)


def variation_loss(shares: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The squared coefficient of variation of what the experts got from a batch (Shazeer et al. 2017, eq. 7 and 11).

    Args:
        shares: ``[..., E]``, what each token gave to each expert: its weights (then this is the importance loss of
            arXiv 1701.06538) or the probabilities that it chooses them (the load loss).
        mask: ``[...]``, bool or 0/1: the tokens that count; all by default. Without any the loss is 0.

    Returns:
        ``Var(sums) / mean(sums) ** 2`` of the sums over the tokens, with the variance of the ``E`` experts as a whole
        population; a scalar in float32 (float64 for such shares).

    Raises:
        ValueError: If the mask does not have a value for each token.
    """
    shares = _wide(shares).flatten(0, -2)
    sums = (shares * _keep(mask, shares).unsqueeze(-1)).sum(0)
    return sums.var(correction=0) / sums.mean().square().clamp(min=torch.finfo(sums.dtype).tiny)


def entropy_loss(logits: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
    """The dynamic loss of Huang et al. 2024 (arXiv 2403.07652, section 2.3): the mean entropy of ``softmax(logits)``.

    Args:
        logits: ``[..., E]``, the gate's output, in any floating dtype; -inf for an expert that has no part in it.
        mask: ``[...]``, bool or 0/1: the tokens that count; all by default. Without any the loss is 0.

    Returns:
        A scalar in float32 (float64 for such logits), in nats.

    Raises:
        ValueError: If the mask does not have a value for each token.
    """
    logits = _wide(logits).flatten(0, -2)
    keep = _keep(mask, logits)
    # Before the product, whose gradient would not be a number.
    logs = torch.where(logits == -torch.inf, 0, torch.log_softmax(logits, dim=-1))
    entropy = -(logs.exp() * logs).sum(-1)
    return (entropy * keep).sum() / keep.sum().clamp(min=1)


def _wide(logits: torch.Tensor) -> torch.Tensor:
    if logits.dim() < 2:
        raise ValueError(
            f"logits must have shape [..., E] with at least one token dimension, got {tuple(logits.shape)}"
        )
    return single(logits)


def _keep(mask: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    """1 for each token that counts, else 0, ``[T]`` in the dtype of the logits ``[T, E]``."""
    if mask is None:
        return logits.new_ones(len(logits))
    if mask.numel() != len(logits):
        raise ValueError(f"mask must have one value for each of {len(logits)} tokens, got shape {tuple(mask.shape)}")
    return mask.flatten().to(device=logits.device, dtype=logits.dtype)
