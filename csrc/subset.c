/* The subset family's public functions: check, pick the precision, run. */
#include <math.h>

#include "kernels.h"

const char *pm_status_text(pm_status status) {
  switch (status) {
    case PM_OK: return "done";
    case PM_NULL_POINTER: return "a required pointer is NULL";
    case PM_BAD_SHAPE:
      return "need rows >= 0, 1 <= experts <= 65536, stride >= experts, and samples >= 0 at least rows apart";
    case PM_BAD_CARDINALITY: return "need 0 <= k_min <= k_max <= experts";
    case PM_BAD_INDEX: return "an index is outside 0 .. experts";
    case PM_BAD_OPTION: return "a temperature or concentration is not positive and finite, or out of its bounds";
    case PM_INFEASIBLE: return "a row has fewer than k_min unmasked experts";
  }
  return "unknown status";
}

size_t pm_scratch_size(int64_t experts, int64_t k_max) {
  if (experts < 1 || experts > PM_MAX_EXPERTS || k_max < 0 || k_max > experts) return 0;
  return pm_largest_scratch(experts, k_max);
}

pm_status pm_check(const pm_shape *shape, const void *logits, const void *out, const void *scratch) {
  if (!shape) return PM_NULL_POINTER;
  if (shape->rows < 0 || shape->experts < 1 || shape->experts > PM_MAX_EXPERTS || shape->stride < shape->experts)
    return PM_BAD_SHAPE;
  if (shape->k_min < 0 || shape->k_min > shape->k_max || shape->k_max > shape->experts) return PM_BAD_CARDINALITY;
  if (shape->rows > 0 && (!logits || !scratch || !out)) return PM_NULL_POINTER;
  return PM_OK;
}

int pm_double_needed(const pm_shape *shape, int is_double) {
  return is_double || shape->experts > PM_SINGLE_MAX_EXPERTS || shape->k_max > PM_SINGLE_MAX_K;
}

#define PM_INFEASIBLE_ROW(suffix, type)                                           \
  int64_t pm_infeasible_row_##suffix(const pm_shape *shape, const type *logits) { \
    for (int64_t row = 0; row < shape->rows; ++row) {                             \
      int64_t unmasked = 0, poisoned = 0;                                         \
      for (int64_t i = 0; i < shape->experts; ++i) {                              \
        const type x = logits[row * shape->stride + i];                           \
        unmasked += x > (type) - INFINITY;                                        \
        poisoned += !(x < (type)INFINITY);                                        \
      }                                                                           \
      if (unmasked < shape->k_min && !poisoned) return row;                       \
    }                                                                             \
    return -1;                                                                    \
  }

PM_INFEASIBLE_ROW(f32, float)
PM_INFEASIBLE_ROW(f64, double)

/* f(shape, logits[, vector], out, scratch) in both precisions. `precise` kernels always compute in double. */
#define PM_RUN(kernel, type_is_double, precise, ...)                                                    \
  const pm_status status = pm_check(shape, logits, out, scratch);                                       \
  if (status != PM_OK) return status;                                                                   \
  const pm_job job = {                                                                                  \
      .shape = *shape, .logits = logits, .scratch = scratch, .is_double = type_is_double, __VA_ARGS__}; \
  return pm_kernels_for((precise) || pm_double_needed(shape, type_is_double), shape->rows)->kernel(&job)

#define PM_UNARY(name, precise)                                                                               \
  pm_status pm_subset_##name##_f32(const pm_shape *shape, const float *logits, float *out, void *scratch) {   \
    PM_RUN(name, 0, precise, .out = out);                                                                     \
  }                                                                                                           \
  pm_status pm_subset_##name##_f64(const pm_shape *shape, const double *logits, double *out, void *scratch) { \
    PM_RUN(name, 1, precise, .out = out);                                                                     \
  }

#define PM_BINARY(name, precise)                                                                                   \
  pm_status pm_subset_##name##_f32(const pm_shape *shape, const float *logits, const float *vector, float *out,    \
                                   void *scratch) {                                                                \
    if (shape && shape->rows > 0 && !vector) return PM_NULL_POINTER;                                               \
    PM_RUN(name, 0, precise, .vector = vector, .out = out);                                                        \
  }                                                                                                                \
  pm_status pm_subset_##name##_f64(const pm_shape *shape, const double *logits, const double *vector, double *out, \
                                   void *scratch) {                                                                \
    if (shape && shape->rows > 0 && !vector) return PM_NULL_POINTER;                                               \
    PM_RUN(name, 1, precise, .vector = vector, .out = out);                                                        \
  }

PM_UNARY(log_partition, 1)
PM_UNARY(cardinality, 1)
PM_UNARY(entropy, 1)
PM_UNARY(marginals, 0)
PM_BINARY(cardinality_backward, 1)
PM_BINARY(covariance_vp, 0)

#define PM_SAMPLE(suffix, type, type_is_double)                                                                  \
  pm_status pm_subset_sample_##suffix(const pm_shape *shape, const type *logits, uint64_t seed, int64_t samples, \
                                      int64_t sample_stride, int64_t *out, void *scratch) {                      \
    if (shape && (samples < 0 || (samples > 1 && sample_stride < shape->rows))) return PM_BAD_SHAPE;             \
    PM_RUN(sample, type_is_double, 0, .out_indices = out, .seed = seed, .samples = samples,                      \
           .sample_stride = sample_stride);                                                                      \
  }                                                                                                              \
  pm_status pm_subset_mode_##suffix(const pm_shape *shape, const type *logits, int64_t *out, void *scratch) {    \
    PM_RUN(route, type_is_double, 0, .out_indices = out);                                                        \
  }

PM_SAMPLE(f32, float, 0)
PM_SAMPLE(f64, double, 1)

/* Before the kernel, which indexes by them: a bad index must not be read through. */
static pm_status check_indices(const pm_shape *shape, const int64_t *indices) {
  if (shape->rows * shape->k_max > 0 && !indices) return PM_NULL_POINTER;
  for (int64_t n = 0; n < shape->rows * shape->k_max; ++n)
    if (indices[n] < 0 || indices[n] > shape->experts) return PM_BAD_INDEX;
  return PM_OK;
}

#define PM_LOG_PROB(suffix, type, type_is_double)                                                                     \
  pm_status pm_subset_log_prob_##suffix(const pm_shape *shape, const type *logits, const int64_t *indices, type *out, \
                                        void *scratch) {                                                              \
    pm_status legal = pm_check(shape, logits, out, scratch);                                                          \
    if (legal == PM_OK) legal = check_indices(shape, indices);                                                        \
    if (legal != PM_OK) return legal;                                                                                 \
    PM_RUN(log_prob, type_is_double, 1, .indices = indices, .out = out);                                              \
  }

PM_LOG_PROB(f32, float, 0)
PM_LOG_PROB(f64, double, 1)
