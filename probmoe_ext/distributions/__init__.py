"""The laws of :mod:`probmoe_ext.ops` as ``torch.distributions``: same conventions, same validation, registered KL."""

from __future__ import annotations

from .conditional_bernoulli import ConditionalBernoulli
from .constraints import KHot, OrderedChoice, SumsTo
from .dirichlet import Dirichlet
from .plackett_luce import PlackettLuce
from .relaxed_top_k import RelaxedTopK

__all__ = ["ConditionalBernoulli", "Dirichlet", "KHot", "OrderedChoice", "PlackettLuce", "RelaxedTopK", "SumsTo"]
