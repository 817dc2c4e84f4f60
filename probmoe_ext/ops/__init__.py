"""Functional, differentiable, ``torch.compile``-able operators.

``logits`` is ``[..., E]`` in float32, float64, bfloat16 or float16 (the last two are computed in float32), any
strides, any batch dimensions; -inf masks an expert out, and so does a False in ``mask``. ``k`` is the subset's size, or
a pair ``(k_min, k_max)`` for a size within a band. Definitions follow ProbMoE (arXiv 2606.01509) and the conditional
Bernoulli law; results have the dtype of ``logits``. The raw operators are ``torch.ops.probmoe_ext.*``.
"""

from __future__ import annotations

from .dirichlet import dirichlet_entropy, dirichlet_kl, dirichlet_log_prob, dirichlet_sample
from .dirmoe import route_dirmoe
from .fallback import register_fallbacks as _register_fallbacks
from .gamma import log_gamma_sample, standard_gamma_grad
from .gumbel import gumbel_sigmoid, gumbel_top_k, plackett_luce_log_prob, relaxed_top_k
from .route import route_probmoe, route_top_k
from .streams import sample_stream, set_sample_stream
from .subset import subset_cardinality, subset_covariance_vp, subset_log_partition, subset_marginals
from .subset_derived import subset_indicator, subset_kl, subset_pairwise
from .subset_draws import subset_mode, subset_sample
from .subset_probability import subset_entropy, subset_log_prob

__all__ = [
    "dirichlet_entropy",
    "dirichlet_kl",
    "dirichlet_log_prob",
    "dirichlet_sample",
    "gumbel_sigmoid",
    "gumbel_top_k",
    "log_gamma_sample",
    "plackett_luce_log_prob",
    "relaxed_top_k",
    "route_dirmoe",
    "route_probmoe",
    "route_top_k",
    "sample_stream",
    "set_sample_stream",
    "standard_gamma_grad",
    "subset_cardinality",
    "subset_covariance_vp",
    "subset_entropy",
    "subset_indicator",
    "subset_kl",
    "subset_log_partition",
    "subset_log_prob",
    "subset_marginals",
    "subset_mode",
    "subset_pairwise",
    "subset_sample",
]

_register_fallbacks()
