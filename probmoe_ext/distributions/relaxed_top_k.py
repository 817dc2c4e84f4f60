"""The relaxation of drawing k experts without replacement."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from .. import ops
from ..ops.gumbel import check_size, check_temperature
from .conditional_bernoulli import check_parameter
from .constraints import LogOdds, SumsTo
from .plackett_luce import check_feasible


class RelaxedTopK(Distribution):
    """Relaxed k-hot vectors with a pathwise gradient (Xie & Ermon, IJCAI 2019).

    The sum of k rounds of softmax on ``logits + Gumbel`` noise, each of which takes out what those before have chosen;
    see :func:`probmoe_ext.ops.relaxed_top_k`. As the temperature goes to 0 it tends to the k-hot of a
    :class:`PlackettLuce` draw. ``event_shape`` is ``(E,)``; values sum to k.

    For k = 1 this is the concrete law of ``torch.distributions.RelaxedOneHotCategorical``, and ``log_prob`` is its
    density; for more draws no closed form is known, and ``log_prob`` raises. For the same reason no divergence is
    registered: compare the :class:`PlackettLuce` laws that are relaxed.

    Args:
        temperature: A positive number, from 1e-6 to 1e6.
        k: How many experts, ``0 <= k <= E``.
        logits: ``[..., E]``, floating; -inf masks an expert out.
        validate_args: As for every ``torch.distributions.Distribution``.

    Raises:
        TypeError: ``k`` is no int, ``temperature`` no number, or ``logits`` no floating tensor.
        ValueError: ``k``, ``temperature`` or a shape is out of range; with ``validate_args`` also NaN or +inf, or a row
            with fewer than ``k`` unmasked experts.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"logits": LogOdds()}
    has_rsample = True

    def __init__(self, temperature: float, k: int, logits: Tensor, validate_args: bool | None = None) -> None:
        """See the class."""
        check_parameter(logits, "logits")
        check_size(k, logits.shape[-1])
        self.temperature = check_temperature(temperature)
        self.k = k
        self.logits = logits
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=validate_args)
        if self._validate_args:
            check_feasible(logits, k)

    def expand(self, batch_shape: Any, _instance: Any = None) -> RelaxedTopK:
        """The same law on a larger batch shape, sharing memory."""
        new = self._get_checked_instance(RelaxedTopK, _instance)
        batch_shape = torch.Size(batch_shape)
        new.temperature, new.k = self.temperature, self.k
        new.logits = self.logits.expand(batch_shape + self.event_shape)
        super(RelaxedTopK, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> SumsTo:
        """Nonnegative vectors with the sum k."""
        return SumsTo(self.k)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  (torch.distributions' signature)
        """Draws ``sample_shape + batch_shape + (E,)``, differentiable in the logits; seeded by torch's generator."""
        logits = self.logits.expand(self._extended_shape(torch.Size(sample_shape)))
        return ops.relaxed_top_k(logits, self.k, self.temperature)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density on the simplex ``[...]`` of values ``[..., E]``, for k = 1 (Maddison et al. 2017, equation 10).

        Raises:
            NotImplementedError: k is not 1.
        """
        if self.k != 1:
            raise NotImplementedError(f"RelaxedTopK has a known density for k = 1 alone, not for k = {self.k}")
        if self._validate_args:
            self._validate_sample(value)
        logits, value = torch.broadcast_tensors(self.logits, value)
        n, log_value = logits.shape[-1], value.log()
        scores = logits - self.temperature * log_value
        constant = math.lgamma(n) + (n - 1) * math.log(self.temperature)
        return constant + (scores - log_value).sum(-1) - n * scores.logsumexp(-1)

    def __repr__(self) -> str:
        return super().__repr__().replace("(", f"(temperature: {self.temperature}, k: {self.k}, ", 1)
