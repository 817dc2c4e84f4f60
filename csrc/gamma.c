/* The Gamma family's public functions: check, pick the precision, run. */
#include "kernels.h"

#define PM_GAMMA(suffix, type, type_is_double)                                                                         \
  pm_status pm_log_gamma_sample_##suffix(const pm_shape *shape, const type *concentration, uint64_t seed, type *out,   \
                                         void *scratch) {                                                              \
    const pm_status status = pm_check(shape, concentration, out, scratch);                                             \
    if (status != PM_OK) return status;                                                                                \
    const pm_law_job job = {.shape = *shape,                                                                           \
                            .concentration = concentration,                                                            \
                            .out = out,                                                                                \
                            .scratch = scratch,                                                                        \
                            .seed = seed,                                                                              \
                            .is_double = type_is_double};                                                              \
    return pm_kernels_for(type_is_double, shape->rows)->log_gamma_sample(&job);                                        \
  }                                                                                                                    \
  pm_status pm_log_gamma_sample_backward_##suffix(const pm_shape *shape, const type *concentration,                    \
                                                  const type *log_value, const type *grad, type *grad_concentration) { \
    const pm_status status = pm_check(shape, concentration, grad_concentration, grad_concentration);                   \
    if (status != PM_OK) return status;                                                                                \
    if (shape->rows > 0 && (!log_value || !grad)) return PM_NULL_POINTER;                                              \
    const pm_law_job job = {.shape = *shape,                                                                           \
                            .concentration = concentration,                                                            \
                            .other = log_value,                                                                        \
                            .grad = grad,                                                                              \
                            .out = grad_concentration,                                                                 \
                            .is_double = type_is_double};                                                              \
    return pm_kernels_for(type_is_double, shape->rows)->log_gamma_backward(&job);                                      \
  }                                                                                                                    \
  pm_status pm_standard_gamma_grad_##suffix(const pm_shape *shape, const type *concentration, const type *value,       \
                                            type *out) {                                                               \
    const pm_status status = pm_check(shape, concentration, out, out);                                                 \
    if (status != PM_OK) return status;                                                                                \
    if (shape->rows > 0 && !value) return PM_NULL_POINTER;                                                             \
    const pm_law_job job = {                                                                                           \
        .shape = *shape, .concentration = concentration, .other = value, .out = out, .is_double = type_is_double};     \
    return pm_kernels_for(type_is_double, shape->rows)->standard_gamma_grad(&job);                                     \
  }

PM_GAMMA(f32, float, 0)
PM_GAMMA(f64, double, 1)
