"""The conditional Bernoulli law: independent inclusions, given how many there are."""

from __future__ import annotations

from itertools import combinations
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.kl import register_kl
from torch.distributions.utils import lazy_property

from .. import ops
from ..ops.arguments import FLOAT_TYPES, Cardinality, apply_mask, check_band, single
from ..ops.subset import k_hot
from .constraints import KHot, LogOdds, OddsProbability

MAX_ENUMERATED = 16


def check_parameter(value: Tensor, name: str) -> None:
    """Raises unless ``value`` is a floating tensor ``[..., E]`` with E >= 1."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
    if value.dtype not in FLOAT_TYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, not {value.dtype}")
    if value.dim() == 0 or value.shape[-1] == 0:
        raise ValueError(f"{name} must have shape [..., E] with E >= 1 experts, not {tuple(value.shape)}")


class ConditionalBernoulli(Distribution):
    """Subsets S of E experts, ``P(S) = prod_{i in S} w_i / Z`` where ``k_min <= |S| <= k_max``, as 0/1 vectors.

    The law of E independent Bernoulli variables with odds ``w_i = exp(logits_i)``, conditioned on their sum (Chen,
    Dempster & Liu, Biometrika 81, 1994). ``batch_shape`` is that of the parameter without its last dimension,
    ``event_shape`` is ``(E,)``. Values, and all statistics but indices, have the parameter's dtype; float16 and
    bfloat16 are computed in float32.

    Draws are exact and carry no gradient, so that ``has_rsample`` is False: the gradient estimators on offer
    (:func:`probmoe_ext.ops.subset_indicator`, SIMPLE) are biased. ``log_prob``, ``mean``, ``variance``,
    ``covariance_matrix``, ``cardinality``, ``entropy`` and ``kl_divergence`` are differentiable.

    Args:
        k: The size of S, or a pair ``(k_min, k_max)``, ``0 <= k_min <= k_max <= E``.
        logits: ``[..., E]`` log-odds before conditioning; -inf masks an expert out.
        probs: Instead of ``logits``: ``[..., E]`` inclusion probabilities *before conditioning*, in [0, 1), so that
            ``logits = log(probs / (1 - probs))``; 0 masks an expert out. They are not the marginals (those are
            ``mean``), and for an exact size only the ratios of their odds matter.
        mask: bool, broadcastable with the parameter, True keeps the expert; the others get logit -inf, probability 0.
        validate_args: As for every ``torch.distributions.Distribution``.

    Raises:
        TypeError: ``k`` is no int or pair of ints, the parameter no floating tensor, or ``mask`` not bool.
        ValueError: Both or neither of ``logits`` and ``probs`` are given, ``k`` or a shape is out of range; with
            ``validate_args`` also a parameter outside its constraint, or a row with fewer than ``k_min`` unmasked
            experts.

    Example::

        law = ConditionalBernoulli(2, logits=torch.tensor([0.5, -1.0, 2.0, 0.0]))
        law.log_prob(law.sample((10,)))
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {
        "probs": OddsProbability(),
        "logits": LogOdds(),
    }
    has_enumerate_support = True

    def __init__(
        self,
        k: Cardinality,
        logits: Tensor | None = None,
        probs: Tensor | None = None,
        mask: Tensor | None = None,
        validate_args: bool | None = None,
    ) -> None:
        """See the class."""
        if (logits is None) == (probs is None):
            raise ValueError("exactly one of logits and probs must be given")
        if logits is not None:
            check_parameter(logits, "logits")
            parameter = self.logits = apply_mask(logits, mask)
        else:
            assert probs is not None
            check_parameter(probs, "probs")
            parameter = self.probs = apply_mask(probs, mask, "probs", 0.0)
        self.k_min, self.k_max = check_band(k, parameter.shape[-1])
        super().__init__(parameter.shape[:-1], parameter.shape[-1:], validate_args=validate_args)
        if self._validate_args:
            unmasked = (parameter > (-torch.inf if logits is not None else 0.0)).sum(-1).flatten()
            short = (unmasked < self.k_min).nonzero()
            if len(short):
                row = int(short[0])
                raise ValueError(
                    f"every row must leave at least k_min = {self.k_min} experts unmasked, "
                    f"row {row} leaves {int(unmasked[row])}"
                )

    def expand(self, batch_shape: Any, _instance: Any = None) -> ConditionalBernoulli:
        """The same law on a larger batch shape, sharing memory."""
        new = self._get_checked_instance(ConditionalBernoulli, _instance)
        batch_shape = torch.Size(batch_shape)
        for name in ("logits", "probs"):
            if name in self.__dict__:
                setattr(new, name, self.__dict__[name].expand(batch_shape + self.event_shape))
        new.k_min, new.k_max = self.k_min, self.k_max
        super(ConditionalBernoulli, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @lazy_property
    def logits(self) -> Tensor:
        """Log-odds ``[..., E]`` before conditioning; -inf for masked experts."""
        probs = single(self.probs)
        possible = probs > 0
        # Where nothing is possible, a stand-in keeps 0 * inf out of the gradient.
        inside = torch.where(possible, probs, 0.5)
        return torch.where(possible, inside.log() - (-inside).log1p(), -torch.inf).to(self.probs.dtype)

    @lazy_property
    def probs(self) -> Tensor:
        """Inclusion probabilities ``[..., E]`` before conditioning, ``sigmoid(logits)``."""
        return torch.sigmoid(self.logits)

    @property
    def k(self) -> Cardinality:
        """The size, or the pair ``(k_min, k_max)`` if they differ."""
        return self.k_min if self.k_min == self.k_max else (self.k_min, self.k_max)

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> KHot:
        """0/1 vectors with a size within the band (those with masked experts are in it, with probability 0)."""
        return KHot(self.k_min, self.k_max)

    @property
    def mean(self) -> Tensor:
        """Marginals ``P(i in S)``, ``[..., E]``."""
        return ops.subset_marginals(self.logits, self.k)

    @property
    def variance(self) -> Tensor:
        """``m (1 - m)`` for each expert, ``[..., E]``."""
        return self._variance().to(self.logits.dtype)

    @property
    def covariance_matrix(self) -> Tensor:
        """``P(i, j in S) - m_i m_j``, ``[..., E, E]``; to absolute precision. O(E^2 k_max)."""
        wide = single(self.logits)
        m = ops.subset_marginals(wide, self.k)
        own = torch.eye(m.shape[-1], dtype=torch.bool, device=m.device)
        apart = ops.subset_pairwise(wide, self.k) - m.unsqueeze(-1) * m.unsqueeze(-2)
        return torch.where(own, self._variance().unsqueeze(-1), apart).to(self.logits.dtype)

    @property
    def mode(self) -> Tensor:
        """The most probable vector ``[..., E]``; ties go to the fewer experts, then to the lower indices."""
        return self._vectors(ops.subset_mode(self.logits.detach(), self.k))

    @property
    def cardinality(self) -> Tensor:
        """Probabilities of the sizes ``k_min, ..., k_max``, ``[..., k_max - k_min + 1]``."""
        return ops.subset_cardinality(self.logits, self.k)

    def entropy(self) -> Tensor:
        """Entropy in nats, of ``batch_shape``."""
        return ops.subset_entropy(self.logits, self.k)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  (torch.distributions' signature)
        """Exact draws, 0/1 vectors ``sample_shape + batch_shape + (E,)``; seeded by torch's generator."""
        return self._vectors(self.sample_indices(sample_shape))

    def sample_indices(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008
        """Exact draws as int64 ``sample_shape + batch_shape + (k_max,)``, ascending, unused slots (last) at E.

        After the same ``torch.manual_seed`` these are the members of what :meth:`sample` returns.
        """
        shape = torch.Size(sample_shape)
        drawn = ops.subset_sample(self.logits.detach(), self.k, num_samples=shape.numel())
        return drawn.reshape(*shape, *self.batch_shape, self.k_max)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of 0/1 vectors ``[..., E]`` of any dtype, broadcast against ``batch_shape``.

        Without validation, what is no 0/1 vector with a size in the band has -inf.
        """
        if self._validate_args:
            self._validate_sample(value)
        logits, value = torch.broadcast_tensors(self.logits, value)
        chosen = value == 1
        num_experts = logits.shape[-1]
        slots = torch.where(chosen, torch.arange(num_experts, device=value.device), num_experts)
        indices = slots.sort(-1).values[..., : self.k_max]
        log_prob = ops.subset_log_prob(logits, indices, self.k)
        allowed = (chosen | (value == 0)).all(-1) & (chosen.sum(-1) <= self.k_max)
        return torch.where(allowed | log_prob.isnan(), log_prob, -torch.inf)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All 0/1 vectors of the support: sizes ascending, and within a size the members in lexicographic order.

        Args:
            expand: Repeat them over the batch; otherwise its dimensions are 1.

        Returns:
            ``[N, *batch_shape, E]`` (or ``[N, 1, ..., 1, E]``), masked experts included.

        Raises:
            ValueError: There are more than 16 experts.
        """
        (num_experts,) = self.event_shape
        if num_experts > MAX_ENUMERATED:
            raise ValueError(f"enumerate_support is for E <= {MAX_ENUMERATED} experts, not {num_experts}")
        blocks = []
        for size in range(self.k_min, self.k_max + 1):
            members = torch.tensor(list(combinations(range(num_experts), size)), dtype=torch.int64)
            blocks.append(k_hot(members, num_experts, self.logits.dtype))
        values = torch.cat(blocks).to(self.logits.device)
        values = values.reshape(len(values), *(1 for _ in self.batch_shape), num_experts)
        return values.expand(-1, *self.batch_shape, -1) if expand else values

    def __repr__(self) -> str:
        return super().__repr__().replace("(", f"(k: {self.k}, ", 1)

    def _variance(self) -> Tensor:
        m = ops.subset_marginals(single(self.logits), self.k)
        return m * (1 - m)

    def _vectors(self, indices: Tensor) -> Tensor:
        return k_hot(indices, self.event_shape[0], self.logits.dtype)


@register_kl(ConditionalBernoulli, ConditionalBernoulli)
def _kl_conditional_bernoulli(p: ConditionalBernoulli, q: ConditionalBernoulli) -> Tensor:
    if p.event_shape != q.event_shape:
        raise ValueError(f"p and q must have the same number of experts, not {p.event_shape[0]} and {q.event_shape[0]}")
    if p.k != q.k:
        raise NotImplementedError(f"KL divergence is for laws of the same band, not {p.k} and {q.k}")
    p_logits, q_logits = torch.broadcast_tensors(p.logits, q.logits)
    return ops.subset_kl(p_logits, q_logits, p.k)
