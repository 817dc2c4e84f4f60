"""DirMoE routing (arXiv 2602.09001): which experts, and how much of each, apart; one fused operator each way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C  # noqa: F401  (registers the operators)
from .arguments import FLOAT_TYPES, Cardinality, check_band, check_logits, launch, make_seed, single
from .registration import refuse_derivative, register


def _fake(logits: Tensor, hi: Tensor, lo: Tensor, seed: Tensor | None, k_min: int, k_max: int, *rest: Any) -> Any:
    rows = logits.shape[:-1]
    saved = (*rows, logits.shape[-1] if rest[5] else 0)
    state = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return (
        logits.new_empty((*rows, k_max)),
        logits.new_empty((*rows, k_max), dtype=torch.int64),
        logits.new_empty(rows),
        logits.new_empty(rows),
        logits.new_empty(saved, dtype=state),
        logits.new_empty(saved, dtype=state),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    gate_logits, alpha_hi, alpha_lo, _, *ctx.options = inputs
    _, indices, _, _, noise, log_gamma = output
    ctx.mark_non_differentiable(indices, noise, log_gamma)
    ctx.save_for_backward(gate_logits, alpha_hi, alpha_lo, indices, noise, log_gamma)


def _backward(ctx: Any, weights: Tensor, _: Any, kl: Tensor, expected_k: Tensor, *__: Any) -> tuple[Tensor | None, ...]:
    by_gate, by_hi, by_lo = _vjp(weights, kl, expected_k, *ctx.saved_tensors, *ctx.options)
    return by_gate, by_hi, by_lo, *(None for _ in range(1 + len(ctx.options)))


_vjp = register(
    "route_dirmoe_backward",
    lambda weights, kl, expected_k, logits, *rest: tuple(logits.new_empty(logits.shape) for _ in range(3)),
    refuse_derivative("routing is once differentiable"),
)
_route = register("route_dirmoe", _fake, _backward, _save, unbatched=(3,))


def _positive(value: Any, name: str) -> Any:
    """The value as a float (under a compiler, perhaps a symbolic one), or an error that says what ``name`` may be."""
    symbolic = isinstance(value, torch.SymFloat | torch.SymInt)
    if isinstance(value, bool) or not (symbolic or isinstance(value, int | float)):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, not {value!r}")
    return value * 1.0


def _expand(alpha: Tensor, gate_logits: Tensor, name: str) -> Tensor:
    """The concentrations over all experts, beside the gate logits."""
    if not isinstance(alpha, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(alpha).__name__}")
    if alpha.dtype not in FLOAT_TYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, not {alpha.dtype}")
    if alpha.device != gate_logits.device:
        raise ValueError(f"{name} is on {alpha.device} and gate_logits on {gate_logits.device}, but must be together")
    try:
        return single(alpha).expand(gate_logits.shape)
    except RuntimeError:
        raise ValueError(
            f"{name} must broadcast to the shape of gate_logits {tuple(gate_logits.shape)}, not {tuple(alpha.shape)}"
        ) from None


def route_dirmoe(
    gate_logits: Tensor,
    alpha_hi: Tensor,
    alpha_lo: Tensor,
    k: Cardinality,
    *,
    temperature: float,
    concentration: float,
    prior: Sequence[float],
    training: bool,
    normalize: bool = True,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """DirMoE routing: relaxed Bernoulli gates say which experts, a Dirichlet draw how much of each.

    Training, computed in the precision of the dtype (half types in float32)::

        z = sigmoid((gate_logits + Logistic) / temperature)
        q = concentration * (z * alpha_hi + (1 - z) * alpha_lo)         posterior
        p = prior[0] * (z * prior[1] + (1 - z) * prior[2])              prior
        theta ~ Dir(q);  r = z * theta / sum(z * theta)

    and the k_max largest r are kept. Gradients flow through the kept r, the normaliser, theta (implicitly, by q), z and
    both concentrations; which experts are kept is a constant. Inference (the paper states no rule): z is 1 for the
    experts with a positive gate logit, their number clamped to the band along the descending order
    (:func:`subset_mode`), and a constant; theta is its posterior mean ``q / sum(q)``.

    Args:
        gate_logits: ``[..., E]``, floating; -inf closes a gate.
        alpha_hi: That of open gates, positive, broadcastable to ``gate_logits`` (``[..., 1]`` or ``[..., E]``).
        alpha_lo: That of closed gates, likewise. The paper has ``alpha_hi > alpha_lo``, which is not required.
        k: The number of slots k_max, or ``(k_min, k_max)``; k_min counts at inference alone.
        temperature: tau > 0.
        concentration: lambda_q > 0, the posterior's overall concentration.
        prior: ``(lambda_p, alpha_hi, alpha_lo)`` of the prior, positive numbers.
        training: Draw, or decide.
        normalize: Training: divide the kept weights by their sum (inference always does).
        seed: Training: None draws one from torch's generator; an int or an int64 scalar tensor makes the call pure.

    Returns:
        ``(weights, indices, kl, expected_k)``: weights ``[..., k_max]`` and int64 indices ``[..., k_max]`` by
        descending r (inference: by descending gate logit), ties to the lower index, slots without an expert at index E
        and weight 0; ``KL(Dir(q) || Dir(p))`` and ``sum(z)`` of each token, ``[...]``. All but the indices in the dtype
        of ``gate_logits``, and once differentiable.

    Raises:
        TypeError: A tensor is not floating, ``k`` no int or pair of ints, a parameter no number, ``seed`` no int64.
        ValueError: Shapes or devices do not fit, ``k`` is out of range, a parameter is not positive and finite,
            ``prior`` has not three entries, or at inference a row has fewer than ``k_min`` gates above -inf.
    """
    check_logits(gate_logits, "gate_logits")
    k_min, k_max = check_band(k, gate_logits.shape[-1])
    if len(prior) != 3:
        raise ValueError(f"prior must be (lambda_p, alpha_hi, alpha_lo), not {prior!r}")
    numbers = [_positive(temperature, "temperature"), _positive(concentration, "concentration")]
    numbers += [_positive(value, f"prior[{n}]") for n, value in enumerate(prior)]
    alphas = _expand(alpha_hi, gate_logits, "alpha_hi"), _expand(alpha_lo, gate_logits, "alpha_lo")
    key = make_seed(seed, gate_logits) if training else None
    weights, indices, kl, expected_k, *_ = launch(
        _route, single(gate_logits), *alphas, key, k_min, k_max, *numbers, bool(training), bool(normalize)
    )
    dtype = gate_logits.dtype
    return weights.to(dtype), indices, kl.to(dtype), expected_k.to(dtype)
