/* The kernels of one instruction set and precision, as the table PM_TABLE. */
#include "route.h"

const pm_kernels PM_TABLE = {
    .scratch_size = block_bytes,
#if PM_REAL_BITS == 64
    .log_partition = log_partition_rows,
    .cardinality = cardinality_rows,
    .cardinality_backward = cardinality_backward_rows,
    .entropy = entropy_rows,
    .log_prob = log_prob_rows,
#endif
    .marginals = marginals_rows,
    .covariance_vp = covariance_rows,
    .sample = sample_rows,
    .route = route_rows,
    .route_backward = route_backward_rows,
};
