"""The laws of :mod:`probmoe_ext.ops` as ``torch.distributions``: same conventions, same validation, registered KL."""

from __future__ import annotations

from .conditional_bernoulli import ConditionalBernoulli
from .constraints import KHot

__all__ = ["ConditionalBernoulli", "KHot"]
