"""The Dirichlet law, a drop-in for torch's: other draws and gradients, the same conventions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Dirichlet as TorchDirichlet
from torch.distributions.kl import register_kl

from .. import ops
from ..ops.arguments import check_logits

SMALLEST_SHARE = {torch.float16: 2.0**-24}
"""What a share is raised to, so that its logarithm is finite; the smallest normal number of all other dtypes."""


class Dirichlet(TorchDirichlet):
    """Shares of E experts on the simplex, density proportional to ``prod theta_i^(alpha_i - 1)``.

    A :class:`torch.distributions.Dirichlet` in everything but how it is computed. Draws are made in log space, where
    concentrations of 1e-4 do not degenerate, on all threads, and from one seed of torch's generator; their pathwise
    gradient (Figurnov, Mohamed & Mnih, NeurIPS 2018) is accurate to about 1e-6 in float32 and 1e-12 in float64, where
    torch's is off by up to 9e-4 in both (docs/gamma.md). ``log_prob``, ``entropy`` and ``kl_divergence`` are computed
    in double precision. ``mean``, ``mode`` and ``variance`` are torch's.

    ``batch_shape`` is that of the concentration without its last dimension, ``event_shape`` is ``(E,)``. Values and
    statistics have the concentration's dtype.

    Args:
        concentration: ``[..., E]``, floating, positive.
        validate_args: As for every ``torch.distributions.Distribution``.

    Raises:
        TypeError: ``concentration`` is no floating tensor.
        ValueError: It has no last dimension of experts; with ``validate_args``, or an entry is not positive.

    Example::

        law = Dirichlet(torch.tensor([0.1, 2.0, 3.0], requires_grad=True))
        law.rsample((10,)).square().sum().backward()
    """

    def __init__(self, concentration: Tensor, validate_args: bool | None = None) -> None:
        """See the class."""
        check_logits(concentration, "concentration")
        super().__init__(concentration, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Dirichlet:
        """The same law on a larger batch shape, sharing memory."""
        new = self._get_checked_instance(Dirichlet, _instance)
        batch_shape = torch.Size(batch_shape)
        new.concentration = self.concentration.expand(batch_shape + self.event_shape)
        super(TorchDirichlet, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:  # noqa: B008  (torch.distributions' signature)
        """Draws ``sample_shape + batch_shape + (E,)`` with pathwise gradients; seeded by torch's generator.

        Shares below the smallest normal number are raised to it, without a gradient.
        """
        shape = self._extended_shape(torch.Size(sample_shape))
        draw = ops.dirichlet_sample(self.concentration.expand(shape))
        return draw.clamp(min=SMALLEST_SHARE.get(draw.dtype, torch.finfo(draw.dtype).tiny))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of points of the simplex ``[..., E]``, broadcast against ``batch_shape``."""
        if self._validate_args:
            self._validate_sample(value)
        return ops.dirichlet_log_prob(*torch.broadcast_tensors(self.concentration, value))

    def entropy(self) -> Tensor:
        """Differential entropy in nats, of ``batch_shape``."""
        return ops.dirichlet_entropy(self.concentration)


def _kl_dirichlet(p: TorchDirichlet, q: TorchDirichlet) -> Tensor:
    if p.event_shape != q.event_shape:
        raise ValueError(f"p and q must have the same number of experts, not {p.event_shape[0]} and {q.event_shape[0]}")
    return ops.dirichlet_kl(*torch.broadcast_tensors(p.concentration, q.concentration))


# Against torch's own law as well: otherwise torch's formula would serve the mixed pairs.
for _p, _q in ((Dirichlet, Dirichlet), (Dirichlet, TorchDirichlet), (TorchDirichlet, Dirichlet)):
    register_kl(_p, _q)(_kl_dirichlet)
