/* The kernels of one instruction set and precision, as the table PM_TABLE. */
#include "dirichlet.h"
#include "dirmoe.h"
#include "relaxed.h"
#include "route.h"

static size_t scratch_bytes(int64_t E, int64_t k_max) {
  const size_t subset = block_bytes(E, k_max), gumbel = gumbel_bytes(E, k_max);
  return subset > gumbel ? subset : gumbel;
}

const pm_kernels PM_TABLE = {
    .scratch_size = scratch_bytes,
#if PM_REAL_BITS == 64
    .log_partition = log_partition_rows,
    .cardinality = cardinality_rows,
    .cardinality_backward = cardinality_backward_rows,
    .entropy = entropy_rows,
    .log_prob = log_prob_rows,
    .plackett_luce_log_prob = plackett_luce_log_prob_rows,
    .plackett_luce_log_prob_backward = plackett_luce_log_prob_backward_rows,
#endif
    .marginals = marginals_rows,
    .covariance_vp = covariance_rows,
    .sample = sample_rows,
    .route = route_rows,
    .route_backward = route_backward_rows,
    .law_scratch_size = law_bytes,
    .log_gamma_sample = log_gamma_sample_rows,
    .log_gamma_backward = log_gamma_backward_elements,
    .standard_gamma_grad = standard_gamma_grad_elements,
    .dirichlet_sample = dirichlet_sample_rows,
    .dirichlet_sample_backward = dirichlet_sample_backward_rows,
#if PM_REAL_BITS == 64
    .dirichlet_log_prob = dirichlet_log_prob_rows,
    .dirichlet_log_prob_backward = dirichlet_log_prob_backward_rows,
    .dirichlet_entropy = dirichlet_entropy_rows,
    .dirichlet_entropy_backward = dirichlet_entropy_backward_rows,
    .dirichlet_kl = dirichlet_kl_rows,
    .dirichlet_kl_backward = dirichlet_kl_backward_rows,
#endif
    .dirmoe = dirmoe_rows,
    .dirmoe_backward = dirmoe_backward_rows,
    .gumbel_top_k = gumbel_top_k_rows,
    .gumbel_sigmoid = gumbel_sigmoid_rows,
    .relaxed_top_k = relaxed_top_k_rows,
    .relaxed_top_k_backward = relaxed_top_k_backward_rows,
};
