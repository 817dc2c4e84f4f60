"""DirMoE's prior and schedules as plain functions (arXiv 2602.09001): numbers in, numbers out."""

from __future__ import annotations

import math


def _check_experts(k: int, num_experts: int) -> None:
    if not 1 <= k < num_experts:
        raise ValueError(f"k must be from 1 to num_experts - 1 = {num_experts - 1}, got {k}")


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def calibrate_ratio(mass: float, k: int, num_experts: int) -> float:
    """The ratio of the prior's concentrations that puts a given mass on the active experts.

    With ``alpha_hi`` on k experts and ``alpha_lo`` on the others, the mean of the Dirichlet law has the mass
    ``k alpha_hi / (k alpha_hi + (E - k) alpha_lo)`` on the k, so that the ratio is ``mass / (1 - mass) (E - k) / k``.

    Args:
        mass: Expected mass on the active experts, above 0 and below 1.
        k: Number of active experts, ``1 <= k < E``.
        num_experts: ``E``.

    Returns:
        ``alpha_hi / alpha_lo``.

    Raises:
        ValueError: If an argument is out of range.
    """
    _check_experts(k, num_experts)
    if not 0 < mass < 1:
        raise ValueError(f"mass must be above 0 and below 1, got {mass}")
    return mass / (1 - mass) * (num_experts - k) / k


def mean_simpson(k: int, num_experts: int, ratio: float = 1.0) -> float:
    """Simpson index ``sum m_i^2`` of the prior's mean, the least that :func:`calibrate_concentration` can reach.

    Args:
        k: Number of active experts, ``1 <= k < E``.
        num_experts: ``E``.
        ratio: ``alpha_hi / alpha_lo``.

    Raises:
        ValueError: If an argument is out of range.
    """
    _check_experts(k, num_experts)
    _check_positive("ratio", ratio)
    total = k * ratio + (num_experts - k)
    return (k * ratio**2 + (num_experts - k)) / total**2


def calibrate_concentration(simpson: float, k: int, num_experts: int, ratio: float = 1.0) -> float:
    """The concentration at which ``Dir(lambda base)`` has a given expected Simpson index.

    ``base`` is ``ratio`` for k experts and 1 for the others; with ``B = sum base`` and ``S = sum base^2`` the index is
    ``E[sum theta^2] = (lambda S / B + 1) / (lambda B + 1)``, which falls from 1 to ``S / B^2`` as lambda grows. For
    ``ratio = 1`` the result is ``(1 - h) / (h E - 1)``.

    Args:
        simpson: ``E[sum theta^2]``, above :func:`mean_simpson` and below 1.
        k: Number of active experts, ``1 <= k < E``.
        num_experts: ``E``.
        ratio: ``alpha_hi / alpha_lo``, as of :func:`calibrate_ratio`.

    Returns:
        ``lambda``.

    Raises:
        ValueError: If an argument is out of range.
    """
    least = mean_simpson(k, num_experts, ratio)
    if not least < simpson < 1:
        raise ValueError(f"simpson must be above {least:.6g} (that of the prior's mean) and below 1, got {simpson}")
    total = k * ratio + (num_experts - k)
    return (1 - simpson) / (total * (simpson - least))


def annealed_temperature(step: int, start: float, rate: float, floor: float) -> float:
    """``max(floor, start * rate**step)``.

    Args:
        step: Optimizer step, from 0.
        start: Temperature at step 0.
        rate: Factor for each step, above 0 and at most 1.
        floor: The lowest temperature.

    Raises:
        ValueError: If an argument is out of range.
    """
    _check_positive("start", start)
    return _decayed("temperature", step, start, rate, floor)


def annealed_concentration(step: int, start: float, rate: float, floor: float) -> float:
    """``max(floor, start * rate**step)``; a falling concentration lets a token's weights grow unequal.

    Args:
        step: Optimizer step, from 0.
        start: Concentration at step 0.
        rate: Factor for each step, above 0 and at most 1.
        floor: The lowest concentration.

    Raises:
        ValueError: If an argument is out of range.
    """
    _check_positive("start", start)
    return _decayed("concentration", step, start, rate, floor)


def _decayed(name: str, step: int, start: float, rate: float, floor: float) -> float:
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step}")
    if not 0 < rate <= 1:
        raise ValueError(f"rate of the {name} must be above 0 and at most 1, got {rate}")
    if not 0 < floor <= start:
        raise ValueError(f"floor of the {name} must be above 0 and at most its start {start}, got {floor}")
    return max(floor, start * rate**step)
