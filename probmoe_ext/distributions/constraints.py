"""What values and parameters may be, beyond ``torch.distributions.constraints``."""

from __future__ import annotations

import math

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
