"""What values and parameters may be, beyond ``torch.distributions.constraints``."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import constraints


class KHot(constraints.Constraint):
    """Vectors of zeros and ones (of any dtype) with a number of ones from ``k_min`` to ``k_max``."""

    is_discrete = True
    event_dim = 1

    def __init__(self, k_min: int, k_max: int) -> None:
        """Stores the band, ``0 <= k_min <= k_max``."""
        self.k_min = k_min
        self.k_max = k_max
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Whether each vector ``[..., E]`` satisfies the constraint, bool ``[...]``."""
        ones = value == 1
        size = ones.sum(-1)
        return (ones | (value == 0)).all(-1) & (size >= self.k_min) & (size <= self.k_max)

    def __repr__(self) -> str:
        return f"KHot(k_min={self.k_min}, k_max={self.k_max})"


# torch's `independent` would make vectors of scalar constraints, but refuses an empty batch.
class LogOdds(constraints.Constraint):
    """Vectors of logits: below +inf and not NaN; -inf masks an entry out."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        """Whether each vector ``[..., E]`` satisfies the constraint, bool ``[...]``."""
        return (value < math.inf).all(-1)

    def __repr__(self) -> str:
        return "LogOdds()"


class OddsProbability(constraints.Constraint):
    """Vectors of probabilities below 1, whose odds ``p / (1 - p)`` are finite."""

    event_dim = 1

    def check(self, value: Tensor) -> Tensor:
        """Whether each vector ``[..., E]`` satisfies the constraint, bool ``[...]``."""
        return ((value >= 0) & (value < 1)).all(-1)

    def __repr__(self) -> str:
        return "OddsProbability()"


class OrderedChoice(constraints.Constraint):
    """Vectors of distinct whole numbers (of any dtype) from 0 to ``num_experts - 1``."""

    is_discrete = True
    event_dim = 1

    def __init__(self, num_experts: int) -> None:
        """Stores the number of experts, at least 1."""
        self.num_experts = num_experts
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Whether each vector ``[..., k]`` satisfies the constraint, bool ``[...]``."""
        whole = (value >= 0) & (value < self.num_experts) & (value == value.long())
        ordered = value.sort(-1).values
        return whole.all(-1) & (ordered[..., 1:] != ordered[..., :-1]).all(-1)

    def __repr__(self) -> str:
        return f"OrderedChoice(num_experts={self.num_experts})"


class SumsTo(constraints.Constraint):
    """Vectors of nonnegative numbers with a given sum, up to rounding."""

    event_dim = 1

    def __init__(self, total: float) -> None:
        """Stores the sum."""
        self.total = total
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Whether each vector ``[..., E]`` satisfies the constraint, bool ``[...]``."""
        slack = 8 * torch.finfo(value.dtype).eps * max(1.0, abs(self.total))
        return (value >= 0).all(-1) & ((value.sum(-1) - self.total).abs() <= slack)

    def __repr__(self) -> str:
        return f"SumsTo(total={self.total})"
