/* The Gumbel family's public functions: check, run. Single-precision problems stay in single precision at any size, but
 * for log-probabilities, which are always computed in double precision. */
#include "kernels.h"

static pm_status check_exact(const pm_shape *shape, const void *logits, const void *out, const void *scratch) {
  const pm_status status = pm_check(shape, logits, out, scratch);
  return status == PM_OK && shape->k_min != shape->k_max ? PM_BAD_CARDINALITY : status;
}

static pm_status check_temperature(double temperature) {
  return temperature >= PM_MIN_TEMPERATURE && temperature <= PM_MAX_TEMPERATURE ? PM_OK : PM_BAD_OPTION;
}

/* Before the kernel, which indexes by them. */
static pm_status check_choices(const pm_shape *shape, const int64_t *indices) {
  if (shape->rows * shape->k_max > 0 && !indices) return PM_NULL_POINTER;
  for (int64_t n = 0; n < shape->rows * shape->k_max; ++n)
    if (indices[n] < 0 || indices[n] >= shape->experts) return PM_BAD_INDEX;
  return PM_OK;
}

#define PM_REQUIRE(call)                \
  do {                                  \
    const pm_status status = call;      \
    if (status != PM_OK) return status; \
  } while (0)

#define PM_GUMBEL(suffix, type, type_is_double)                                                                      \
  pm_status pm_gumbel_top_k_##suffix(const pm_shape *shape, const type *logits, uint64_t seed, int64_t *indices,     \
                                     type *keys, void *scratch) {                                                    \
    PM_REQUIRE(check_exact(shape, logits, keys, scratch));                                                           \
    if (shape->rows > 0 && !indices) return PM_NULL_POINTER;                                                         \
    const pm_job job = {.shape = *shape,                                                                             \
                        .logits = logits,                                                                            \
                        .out = keys,                                                                                 \
                        .out_indices = indices,                                                                      \
                        .scratch = scratch,                                                                          \
                        .seed = seed,                                                                                \
                        .is_double = type_is_double};                                                                \
    return pm_kernels_for(type_is_double, shape->rows)->gumbel_top_k(&job);                                          \
  }                                                                                                                  \
  pm_status pm_relaxed_top_k_##suffix(const pm_shape *shape, const type *logits, double temperature, uint64_t seed,  \
                                      type *out, type *keys, void *scratch) {                                        \
    PM_REQUIRE(check_exact(shape, logits, out, scratch));                                                            \
    PM_REQUIRE(check_temperature(temperature));                                                                      \
    const pm_job job = {.shape = *shape,                                                                             \
                        .logits = logits,                                                                            \
                        .out = out,                                                                                  \
                        .scratch = scratch,                                                                          \
                        .seed = seed,                                                                                \
                        .is_double = type_is_double,                                                                 \
                        .temperature = temperature,                                                                  \
                        .keys = keys};                                                                               \
    return pm_kernels_for(type_is_double, shape->rows)->relaxed_top_k(&job);                                         \
  }                                                                                                                  \
  pm_status pm_relaxed_top_k_backward_##suffix(const pm_shape *shape, const type *keys, const type *grad,            \
                                               double temperature, type *grad_logits, void *scratch) {               \
    PM_REQUIRE(check_exact(shape, keys, grad_logits, scratch));                                                      \
    PM_REQUIRE(check_temperature(temperature));                                                                      \
    if (shape->rows > 0 && !grad) return PM_NULL_POINTER;                                                            \
    const pm_job job = {.shape = *shape,                                                                             \
                        .logits = keys,                                                                              \
                        .vector = grad,                                                                              \
                        .out = grad_logits,                                                                          \
                        .scratch = scratch,                                                                          \
                        .is_double = type_is_double,                                                                 \
                        .temperature = temperature};                                                                 \
    return pm_kernels_for(type_is_double, shape->rows)->relaxed_top_k_backward(&job);                                \
  }                                                                                                                  \
  pm_status pm_gumbel_sigmoid_##suffix(const pm_shape *shape, const type *logits, double temperature, uint64_t seed, \
                                       type *out, void *scratch) {                                                   \
    PM_REQUIRE(pm_check(shape, logits, out, scratch));                                                               \
    PM_REQUIRE(check_temperature(temperature));                                                                      \
    const pm_job job = {.shape = *shape,                                                                             \
                        .logits = logits,                                                                            \
                        .out = out,                                                                                  \
                        .scratch = scratch,                                                                          \
                        .seed = seed,                                                                                \
                        .is_double = type_is_double,                                                                 \
                        .temperature = temperature};                                                                 \
    return pm_kernels_for(type_is_double, shape->rows)->gumbel_sigmoid(&job);                                        \
  }

PM_GUMBEL(f32, float, 0)
PM_GUMBEL(f64, double, 1)

/* No row is infeasible here: a choice that cannot be has the log-probability -inf. */
#define PM_PLACKETT_LUCE(suffix, type, type_is_double)                                                               \
  pm_status pm_plackett_luce_log_prob_##suffix(const pm_shape *shape, const type *logits, const int64_t *indices,    \
                                               type *out, void *scratch) {                                           \
    PM_REQUIRE(pm_check(shape, logits, out, scratch));                                                               \
    PM_REQUIRE(check_choices(shape, indices));                                                                       \
    pm_job job = {.shape = *shape,                                                                                   \
                  .logits = logits,                                                                                  \
                  .indices = indices,                                                                                \
                  .out = out,                                                                                        \
                  .scratch = scratch,                                                                                \
                  .is_double = type_is_double};                                                                      \
    job.shape.k_min = 0;                                                                                             \
    return pm_kernels_for(1, shape->rows)->plackett_luce_log_prob(&job);                                             \
  }                                                                                                                  \
  pm_status pm_plackett_luce_log_prob_backward_##suffix(const pm_shape *shape, const type *logits,                   \
                                                        const int64_t *indices, const type *grad, type *grad_logits, \
                                                        void *scratch) {                                             \
    PM_REQUIRE(pm_check(shape, logits, grad_logits, scratch));                                                       \
    PM_REQUIRE(check_choices(shape, indices));                                                                       \
    if (shape->rows > 0 && !grad) return PM_NULL_POINTER;                                                            \
    pm_job job = {.shape = *shape,                                                                                   \
                  .logits = logits,                                                                                  \
                  .vector = grad,                                                                                    \
                  .indices = indices,                                                                                \
                  .out = grad_logits,                                                                                \
                  .scratch = scratch,                                                                                \
                  .is_double = type_is_double};                                                                      \
    job.shape.k_min = 0;                                                                                             \
    return pm_kernels_for(1, shape->rows)->plackett_luce_log_prob_backward(&job);                                    \
  }

PM_PLACKETT_LUCE(f32, float, 0)
PM_PLACKETT_LUCE(f64, double, 1)
