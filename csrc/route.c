/* Routing's public functions: check, pick the precision, run. */
#include "kernels.h"

#define PM_ROUTE(suffix, type, type_is_double)                                                              \
  pm_status pm_route_##suffix(const pm_shape *shape, const type *logits, pm_forward forward, int normalize, \
                              uint64_t seed, type *weights, int64_t *indices, void *scratch) {              \
    const pm_status status = pm_check(shape, logits, weights, scratch);                                     \
    if (status != PM_OK) return status;                                                                     \
    if (shape->rows > 0 && !indices) return PM_NULL_POINTER;                                                \
    const pm_job job = {.shape = *shape,                                                                    \
                        .logits = logits,                                                                   \
                        .out = weights,                                                                     \
                        .out_indices = indices,                                                             \
                        .scratch = scratch,                                                                 \
                        .seed = seed,                                                                       \
                        .is_double = type_is_double,                                                        \
                        .sample = forward == PM_FORWARD_SAMPLE,                                             \
                        .normalize = normalize};                                                            \
    return pm_kernels_for(pm_double_needed(shape, type_is_double), shape->rows)->route(&job);               \
  }                                                                                                         \
  pm_status pm_route_backward_##suffix(const pm_shape *shape, const type *logits, const int64_t *indices,   \
                                       const type *grad_weights, pm_backward backward, int normalize,       \
                                       type *grad_logits, void *scratch) {                                  \
    const pm_status status = pm_check(shape, logits, grad_logits, scratch);                                 \
    if (status != PM_OK) return status;                                                                     \
    if (shape->rows > 0 && shape->k_max > 0 && (!indices || !grad_weights)) return PM_NULL_POINTER;         \
    const pm_job job = {.shape = *shape,                                                                    \
                        .logits = logits,                                                                   \
                        .vector = grad_weights,                                                             \
                        .indices = indices,                                                                 \
                        .out = grad_logits,                                                                 \
                        .scratch = scratch,                                                                 \
                        .is_double = type_is_double,                                                        \
                        .normalize = normalize,                                                             \
                        .marginal = backward == PM_BACKWARD_MARGINAL};                                      \
    return pm_kernels_for(pm_double_needed(shape, type_is_double), shape->rows)->route_backward(&job);      \
  }

PM_ROUTE(f32, float, 0)
PM_ROUTE(f64, double, 1)
