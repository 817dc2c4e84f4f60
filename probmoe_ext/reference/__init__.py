"""The ops in plain torch: oracle of the tests, baseline of the benchmarks, documentation of the semantics.

Every function here has the name, arguments and results of its compiled counterpart in `probmoe_ext.ops`, less what is
done before an operator is called (`mask`, `num_samples`), but is written for clarity. Gradients come from autograd
through the formulas, to any order. Nothing here imports the extension.

`float32` and `float64` are computed as they are; `bfloat16` and `float16` in `float32`, floating-point results being
rounded back to the input's dtype at the end.
"""

from __future__ import annotations

from probmoe_ext.reference.dirichlet import dirichlet_entropy, dirichlet_kl, dirichlet_log_prob, dirichlet_sample
from probmoe_ext.reference.dirmoe import route_dirmoe
from probmoe_ext.reference.gamma import log_gamma_grad, log_gamma_sample, standard_gamma_grad
from probmoe_ext.reference.gumbel import gumbel_sigmoid, gumbel_top_k, plackett_luce_log_prob, relaxed_top_k
from probmoe_ext.reference.log_space import subset_marginals_log_space
from probmoe_ext.reference.philox import philox4x32, philox_open_uniform, philox_uniform
from probmoe_ext.reference.route import route_probmoe, route_top_k
from probmoe_ext.reference.sample import subset_sample
from probmoe_ext.reference.subset import (
    subset_cardinality,
    subset_covariance_vp,
    subset_entropy,
    subset_log_partition,
    subset_log_prob,
    subset_marginals,
    subset_mode,
)
from probmoe_ext.reference.subset_derived import subset_indicator, subset_kl, subset_pairwise

__all__ = [
    "dirichlet_entropy",
    "dirichlet_kl",
    "dirichlet_log_prob",
    "dirichlet_sample",
    "gumbel_sigmoid",
    "gumbel_top_k",
    "log_gamma_grad",
    "log_gamma_sample",
    "philox4x32",
    "philox_open_uniform",
    "philox_uniform",
    "plackett_luce_log_prob",
    "relaxed_top_k",
    "route_dirmoe",
    "route_probmoe",
    "route_top_k",
    "standard_gamma_grad",
    "subset_cardinality",
    "subset_covariance_vp",
    "subset_entropy",
    "subset_indicator",
    "subset_kl",
    "subset_log_partition",
    "subset_log_prob",
    "subset_marginals",
    "subset_marginals_log_space",
    "subset_mode",
    "subset_pairwise",
    "subset_sample",
]
