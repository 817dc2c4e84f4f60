"""The Plackett-Luce law of ordered draws without replacement."""

from __future__ import annotations

from itertools import combinations, permutations
from math import perm
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints
from torch.distributions.kl import register_kl

from .. import ops
from ..ops.arguments import single
from ..ops.gumbel import check_size
from .conditional_bernoulli import check_parameter
from .constraints import LogOdds, OrderedChoice

MAX_EXPERTS = 16
"""Entropy, divergence and inclusion probabilities go over all sets of experts that may be gone: at most 2**16."""
MAX_DRAWS = 2**16


class PlackettLuce(Distribution):
    """Ordered draws of k of E experts without replacement: each with ``softmax(logits)`` over what is left.

    ``P(i_1, ..., i_k) = prod_t w_{i_t} / (sum of w - w_{i_1} - ... - w_{i_{t-1}})``, ``w = exp(logits)``; drawn by the
    k largest ``logits + Gumbel`` (Kool et al. 2019). ``batch_shape`` is that of the logits without their
    last dimension, ``event_shape`` is ``(k,)``: a value is the int64 indices in the order in which they were drawn.

    Forgetting the order gives a law on subsets of size k. It is *not* the conditional Bernoulli law of the same logits
    (:class:`ConditionalBernoulli`), whose subsets have probabilities proportional to ``prod of w``: the two agree for
    k = 1 and k = E, and where all logits are equal.

    ``log_prob``, ``inclusion``, ``entropy`` and ``kl_divergence`` are differentiable; draws carry no gradient.

    Args:
        k: How many experts are drawn, ``0 <= k <= E``.
        logits: ``[..., E]``, floating; -inf masks an expert out.
        validate_args: As for every ``torch.distributions.Distribution``.

    Raises:
        TypeError: ``k`` is no int, or ``logits`` no floating tensor.
        ValueError: ``k`` or a shape is out of range; with ``validate_args`` also NaN or +inf, or a row with fewer than
            ``k`` unmasked experts.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"logits": LogOdds()}
    has_enumerate_support = True

    def __init__(self, k: int, logits: Tensor, validate_args: bool | None = None) -> None:
        """See the class."""
        check_parameter(logits, "logits")
        check_size(k, logits.shape[-1])
        self.k = k
        self.logits = logits
        super().__init__(logits.shape[:-1], torch.Size((k,)), validate_args=validate_args)
        if self._validate_args:
            check_feasible(logits, k)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PlackettLuce:
        """The same law on a larger batch shape, sharing memory."""
        new = self._get_checked_instance(PlackettLuce, _instance)
        batch_shape = torch.Size(batch_shape)
        new.k = self.k
        new.logits = self.logits.expand(batch_shape + self.logits.shape[-1:])
        super(PlackettLuce, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> OrderedChoice:
        """Distinct indices in ``0..E-1`` (those with masked experts are in it, with probability 0)."""
        return OrderedChoice(self.logits.shape[-1])

    @property
    def mode(self) -> Tensor:
        """The most probable ordered draw ``[..., k]``: the k largest logits, descending, ties to the lower index."""
        return torch.sort(self.logits, dim=-1, descending=True, stable=True).indices[..., : self.k]

    @property
    def inclusion(self) -> Tensor:
        """Probability that each expert is among the k, ``[..., E]``; for E <= 16 experts, in O(2^E)."""
        chains = self._chains()
        return self._narrow(chains.gone(self.k) @ chains.members(self.k))

    def entropy(self) -> Tensor:
        """Entropy of the ordered draw in nats, of ``batch_shape``; for E <= 16 experts, in O(2^E)."""
        chains = self._chains()
        total = self._wide().new_zeros(self.batch_shape)
        for t in range(self.k):
            conditional = chains.conditional(t)
            spread = -(torch.where(conditional > -torch.inf, conditional, 0) * conditional.exp()).sum(-1)
            total = total + (chains.gone(t) * spread).sum(-1)
        return self._narrow(total)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  (torch.distributions' signature)
        """Exact draws, int64 ``sample_shape + batch_shape + (k,)``; seeded by torch's generator."""
        shape = torch.Size(sample_shape) + self.batch_shape + self.logits.shape[-1:]
        with torch.no_grad():
            return ops.gumbel_top_k(self.logits.expand(shape), self.k)[0]

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability of ordered draws ``[..., k]``, broadcast against ``batch_shape``; -inf if impossible."""
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        logits = self.logits.expand(shape + self.logits.shape[-1:])
        return ops.plackett_luce_log_prob(logits, value.long().expand((*shape, self.k)))

    def enumerate_support(self, expand: bool = True) -> Tensor:
        """All ordered draws in lexicographic order, ``[N, *batch_shape, k]`` (or ``[N, 1, ..., 1, k]``).

        Raises:
            ValueError: There are more than 65536.
        """
        num_experts = self.logits.shape[-1]
        if perm(num_experts, self.k) > MAX_DRAWS:
            raise ValueError(f"enumerate_support is for at most {MAX_DRAWS} draws, not {perm(num_experts, self.k)}")
        draws = list(permutations(range(num_experts), self.k))
        values = torch.tensor(draws, dtype=torch.int64, device=self.logits.device)
        values = values.reshape(len(draws), *(1 for _ in self.batch_shape), self.k)
        return values.expand(-1, *self.batch_shape, -1) if expand else values

    def __repr__(self) -> str:
        return super().__repr__().replace("(", f"(k: {self.k}, ", 1)

    def _wide(self) -> Tensor:
        return single(self.logits)

    def _narrow(self, value: Tensor) -> Tensor:
        return value.to(self.logits.dtype)

    def _chains(self) -> _Chains:
        return _Chains(self._wide(), self.k)


def check_feasible(logits: Tensor, k: int) -> None:
    """Raises unless every row leaves k experts unmasked."""
    unmasked = (logits > -torch.inf).sum(-1).flatten()
    short = (unmasked < k).nonzero()
    if len(short):
        row = int(short[0])
        raise ValueError(
            f"every row must leave at least k = {k} experts unmasked, row {row} leaves {int(unmasked[row])}"
        )


class _Chains:
    """The law by the sets that are gone after t draws, whatever their order: a chain on the subsets."""

    def __init__(self, logits: Tensor, k: int) -> None:
        if logits.shape[-1] > MAX_EXPERTS:
            raise NotImplementedError(
                f"this statistic of PlackettLuce is for E <= {MAX_EXPERTS} experts, not {logits.shape[-1]}; "
                "estimate it by log_prob of draws"
            )
        self.logits, self.k = logits, k
        self._gone = [logits.new_ones((*logits.shape[:-1], 1))]

    def _sets(self, t: int) -> list[tuple[int, ...]]:
        return list(combinations(range(self.logits.shape[-1]), t))

    def members(self, t: int) -> Tensor:
        """0/1 members ``[N, E]`` of the sets of size t."""
        num_experts = self.logits.shape[-1]
        sets = self._sets(t)
        rows = torch.tensor(sets, dtype=torch.int64, device=self.logits.device).reshape(len(sets), t)
        zeros = torch.zeros((len(sets), num_experts), dtype=self.logits.dtype, device=self.logits.device)
        return zeros.scatter(-1, rows, 1.0)

    def conditional(self, t: int) -> Tensor:
        """Log-probabilities ``[..., N, E]`` of the next expert, given each set of size t."""
        left = torch.where(self.members(t) > 0, -torch.inf, self.logits.unsqueeze(-2))
        some = (left > -torch.inf).any(-1, keepdim=True)  # no expert left: such a set cannot be gone before the k-th
        return torch.where(some & (left > -torch.inf), torch.log_softmax(torch.where(some, left, 0), -1), -torch.inf)

    def gone(self, t: int) -> Tensor:
        """Probabilities ``[..., N]`` that each set of size t is what the first t draws took."""
        while len(self._gone) <= t:
            size = len(self._gone) - 1
            place = {members: n for n, members in enumerate(self._sets(size + 1))}
            moves = [
                (n, i, place[tuple(sorted((*members, i)))])
                for n, members in enumerate(self._sets(size))
                for i in range(self.logits.shape[-1])
                if i not in members
            ]
            before, expert, after = torch.tensor(moves, device=self.logits.device).reshape(-1, 3).unbind(-1)
            flow = (self._gone[size].unsqueeze(-1) * self.conditional(size).exp())[..., before, expert]
            zeros = flow.new_zeros((*flow.shape[:-1], len(place)))
            self._gone.append(zeros.index_add(-1, after, flow))
        return self._gone[t]


@register_kl(PlackettLuce, PlackettLuce)
def _kl_plackett_luce(p: PlackettLuce, q: PlackettLuce) -> Tensor:
    if p.logits.shape[-1] != q.logits.shape[-1]:
        raise ValueError(
            f"p and q must have the same number of experts, not {p.logits.shape[-1]} and {q.logits.shape[-1]}"
        )
    if p.k != q.k:
        raise NotImplementedError(f"KL divergence is for laws of as many draws, not {p.k} and {q.k}")
    p_logits, q_logits = torch.broadcast_tensors(p._wide(), q._wide())
    ours, theirs = _Chains(p_logits, p.k), _Chains(q_logits, p.k)
    total = p_logits.new_zeros(p_logits.shape[:-1])
    for t in range(p.k):
        mine, other = ours.conditional(t), theirs.conditional(t)
        possible = mine > -torch.inf
        difference = torch.where(possible, mine, 0) - torch.where(possible, other, 0)
        # A set that cannot be gone counts for nothing, even where q makes the next step impossible.
        step = torch.where(possible, mine.exp() * difference, 0).sum(-1)
        mass = ours.gone(t)
        total = total + torch.where(mass > 0, mass * step, 0).sum(-1)
    return p._narrow(total)
