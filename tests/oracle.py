"""What is true, by the definitions alone: all subsets enumerated (small E), or 50-digit arithmetic (any E).

Nothing here knows how the ops work. Enumeration is float64 torch and differentiable to any order; the 50-digit dynamic
program runs on the untilted odds, since the exponents of decimals have room for any of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal, localcontext
from functools import cache
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

Band = tuple[int, int]
MAX_ENUMERATED = 8
_DIGITS = 50


@cache
def subsets(num_experts: int, k_min: int, k_max: int) -> Tensor:
    """Return the 0/1 indicators ``[N, E]`` of all subsets with k_min..k_max members."""
    rows = [
        [1.0 if i in members else 0.0 for i in range(num_experts)]
        for size in range(k_min, k_max + 1)
        for members in combinations(range(num_experts), size)
    ]
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, num_experts)


def _scores(logits: Tensor, band: Band) -> tuple[Tensor, Tensor]:
    """Return the indicators ``[N, E]`` and the sum of logits of each subset ``[..., N]``."""
    if logits.shape[-1] > MAX_ENUMERATED:
        raise ValueError(f"enumeration is for at most {MAX_ENUMERATED} experts, got {logits.shape[-1]}")
    z = subsets(logits.shape[-1], *band).to(logits.device)
    members = torch.where(z > 0, logits.double().unsqueeze(-2), 0.0)
    return z, members.sum(-1)


def log_partition(logits: Tensor, band: Band) -> Tensor:
    """``log Z`` ``[...]``."""
    return torch.logsumexp(_scores(logits, band)[1], dim=-1)


def probabilities(logits: Tensor, band: Band) -> tuple[Tensor, Tensor]:
    """Return the indicators ``[N, E]`` of all allowed subsets and their probabilities ``[..., N]``."""
    z, scores = _scores(logits, band)
    return z, torch.softmax(scores, dim=-1)


def cardinality(logits: Tensor, band: Band) -> Tensor:
    """``P(|S| = j)``, ``[..., k_max - k_min + 1]``."""
    z, p = probabilities(logits, band)
    sizes = torch.arange(band[0], band[1] + 1, dtype=z.dtype)
    return p @ (z.sum(-1, keepdim=True) == sizes).to(z.dtype)


def marginals(logits: Tensor, band: Band) -> Tensor:
    """``P(i in S)``, ``[..., E]``."""
    z, p = probabilities(logits, band)
    return p @ z


def covariance(logits: Tensor, band: Band) -> Tensor:
    """``P(i, j in S) - m_i m_j``, ``[..., E, E]``."""
    z, p = probabilities(logits, band)
    centred = z - (p @ z).unsqueeze(-2)
    return centred.transpose(-1, -2) @ (p.unsqueeze(-1) * centred)


def covariance_vp(logits: Tensor, v: Tensor, band: Band) -> Tensor:
    """``C v``, ``[..., E]``."""
    return (covariance(logits, band) @ v.double().unsqueeze(-1)).squeeze(-1)


def pairwise(logits: Tensor, band: Band) -> Tensor:
    """``P(i, j in S)``, ``[..., E, E]``."""
    z, p = probabilities(logits, band)
    return z.t() @ (p.unsqueeze(-1) * z)


def kl(p_logits: Tensor, q_logits: Tensor, band: Band) -> Tensor:
    """``sum P (log P - log Q)`` over subsets that P allows, ``[...]``; ``+inf`` if Q forbids one of them."""
    log_p, log_q = (torch.log_softmax(_scores(logits, band)[1], dim=-1) for logits in (p_logits, q_logits))
    charged, forbidden = log_p > -torch.inf, log_q == -torch.inf
    ratio = torch.where(charged & ~forbidden, log_p - log_q, 0.0)
    value = (torch.where(charged, log_p, 0.0).exp() * ratio).sum(-1)
    return torch.where((charged & forbidden).any(-1), torch.inf, value)


def entropy(logits: Tensor, band: Band) -> Tensor:
    """``-sum P log P`` over subsets of positive probability, ``[...]``."""
    log_p = torch.log_softmax(_scores(logits, band)[1], dim=-1)
    finite = torch.where(log_p == -torch.inf, 0.0, log_p)
    return -torch.where(log_p == -torch.inf, 0.0, finite.exp() * finite).sum(-1)


def straight_through(logits: Tensor, indices: Tensor, band: Band) -> Tensor:
    """The 0/1 vectors ``[..., E]`` of `indices` ``[..., k_max]``, with the gradient of the marginals."""
    z = torch.nn.functional.one_hot(indices, logits.shape[-1] + 1).sum(-2)[..., :-1].double()
    m = marginals(logits, band)
    return z + (m - m.detach())


def log_prob(logits: Tensor, indices: Tensor, band: Band) -> Tensor:
    """Log-probability of the subsets named by `indices` ``[..., k_max]`` (unused slots E); ``-inf`` if not allowed."""
    num_experts = logits.shape[-1]
    named = (indices.unsqueeze(-1) == torch.arange(num_experts)).any(-2).double()
    z, scores = _scores(logits, band)
    log_p = torch.log_softmax(scores, dim=-1)
    same = (named.unsqueeze(-2) == z).all(-1)
    return torch.where(same.any(-1), torch.where(same, log_p, 0.0).sum(-1), -torch.inf)


def mode(logits: Tensor, band: Band) -> Tensor:
    """The most probable subset, int64 ``[..., k_max]`` by descending logit, unused slots E.

    Among equally probable subsets: the one without experts of logit 0, then the one with the lower indices.
    """
    num_experts = logits.shape[-1]
    z, scores = _scores(logits, band)
    flat_scores = scores.reshape(-1, len(z))
    answer = []
    for row, r in zip(flat_scores, logits.reshape(-1, num_experts), strict=True):
        best = [z[n].nonzero().flatten().tolist() for n in (row == row.max()).nonzero().flatten().tolist()]
        members = min(best, key=lambda s: (len(s), s))
        members.sort(key=lambda i: (-float(r[i]), i))
        answer.append(members + [num_experts] * (band[1] - len(members)))
    return torch.tensor(answer, dtype=torch.int64).reshape(*logits.shape[:-1], band[1])


def indicator_codes(indices: Tensor, num_experts: int) -> Tensor:
    """Number the subsets in ``[..., K]`` index form: bit i stands for expert i; unused slots (E) count for nothing."""
    bits = torch.where(indices < num_experts, 2 ** indices.clamp(max=62), 0)
    return bits.sum(-1)


@dataclass(frozen=True)
class Exact:
    """50-digit results for one row, rounded to float64."""

    log_z: float
    marginals: np.ndarray
    covariance_vp: np.ndarray


def exact(logits: Tensor, v: Tensor, band: Band) -> Exact:
    """Compute log Z, marginals and C v of one row ``[E]`` with 50 digits.

    Prefix and suffix tables of the untilted recursion, each carried as a dual number in the direction `v`.
    """
    k_min, k_max = band
    num_experts = logits.shape[-1]
    with localcontext() as context:
        context.prec = _DIGITS
        zero, one = Decimal(0), Decimal(1)
        w = [Decimal(r).exp() for r in logits.double().tolist()]  # of -inf: 0
        u = [Decimal(x) for x in v.double().tolist()]
        start = np.full(k_max + 1, zero, dtype=object)
        start[0] = one
        before, before_dot = _tables(w, u, start)
        end = np.full(k_max + 1, zero, dtype=object)
        end[: k_max - k_min + 1] = one
        # Counting what is still allowed to come, the suffix recursion has the shape of the prefix one.
        after, after_dot = _tables(w[::-1], u[::-1], end)
        z, z_dot = before[-1][k_min:].sum(), before_dot[-1][k_min:].sum()
        m, c = [], []
        for i in range(num_experts):
            a, a_dot = before[i][:k_max], before_dot[i][:k_max]
            b = after[num_experts - 1 - i][:k_max][::-1]
            b_dot = after_dot[num_experts - 1 - i][:k_max][::-1]
            n = w[i] * (a * b).sum() if k_max else zero
            n_dot = u[i] * n + (w[i] * (a_dot * b + a * b_dot).sum() if k_max else zero)
            m.append(n / z)
            c.append(n_dot / z - n * z_dot / z**2)
        return Exact(
            float(z.ln()),
            np.array([float(x) for x in m], dtype=np.float64),
            np.array([float(x) for x in c], dtype=np.float64),
        )


def _tables(w: list[Decimal], u: list[Decimal], row: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """All steps of ``row[j] += w_i row[j - 1]`` and of its tangent, with ``dw_i = u_i w_i``."""
    dot = row * 0
    table, table_dot = [row], [dot]
    for w_i, u_i in zip(w, u, strict=True):
        grown, grown_dot = row.copy(), dot.copy()
        grown[1:] = row[1:] + w_i * row[:-1]
        grown_dot[1:] = dot[1:] + w_i * (dot[:-1] + u_i * row[:-1])
        row, dot = grown, grown_dot
        table.append(row)
        table_dot.append(dot)
    return table, table_dot


def routed(logits: Tensor, indices: Tensor, band: Band, normalize: bool, through_marginals: bool) -> Tensor:
    """ProbMoE's weights at `indices`, by the sentence: ``u = z s``, with a gradient through the marginals if asked.

    A row that masks all experts has no weights to give: its ``s`` counts as 0.
    """
    padded = torch.nn.functional.one_hot(indices, logits.shape[-1] + 1).sum(-2)[..., :-1].double()
    nothing = (logits == -torch.inf).all(-1, keepdim=True)
    r = torch.where(nothing, 0.0, logits.double())
    s = torch.where(nothing, 0.0, torch.exp(r - torch.logsumexp(r, dim=-1, keepdim=True)))
    u = padded * s
    if through_marginals:
        m = marginals(logits, band)
        u = u + s * (m - m.detach())
    if normalize and indices.shape[-1]:
        total = u.sum(-1, keepdim=True)
        u = torch.where(padded.any(-1, keepdim=True), u / torch.where(total == 0, 1.0, total), 0.0)
    return torch.cat([u, torch.zeros_like(u[..., :1])], dim=-1).gather(-1, indices)


def ranked(logits: Tensor, k: int) -> Tensor:
    """The k most probable experts, int64 ``[..., k]``, ties to the lower index, by sorting Python tuples."""
    probabilities = torch.softmax(logits.double(), dim=-1).reshape(-1, logits.shape[-1])
    rows = [sorted(range(len(p)), key=lambda i: (-p[i], i))[:k] for p in probabilities.tolist()]
    return torch.tensor(rows, dtype=torch.int64).reshape(*logits.shape[:-1], k)
