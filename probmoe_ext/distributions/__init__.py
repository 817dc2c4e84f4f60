"""The laws of :mod:`probmoe_ext.ops` as ``torch.distributions``: same conventions, same validation, registered KL."""

from __future__ import annotations

from .conditional_bernoulli import ConditionalBernoulli
from .constraints import KHot
from .dirichlet import Dirichlet

__all__ = ["ConditionalBernoulli", "Dirichlet", "KHot"]
