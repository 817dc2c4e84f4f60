/* The Dirichlet family's public functions: check, pick the precision, run. */
#include "kernels.h"

/* For a shape that is not checked yet. */
static const pm_kernels *kernels_of(const pm_shape *shape, int is_double) {
  return pm_kernels_for(is_double, shape ? shape->rows : 0);
}

/* The job of a checked call; a NULL among `needed` ends it. */
static pm_status begin(const pm_shape *shape, const pm_law_job *job, const void *needed, const void *also) {
  const pm_status status = pm_check(shape, job->concentration, job->out, job->scratch);
  if (status != PM_OK) return status;
  return shape->rows > 0 && (!needed || !also) ? PM_NULL_POINTER : PM_OK;
}

/* A number a row, in double precision for both types. */
static pm_status closed_form(const pm_shape *shape, const void *concentration, const void *other, const void *needed,
                             void *out, void *scratch, int is_double, pm_law_kernel kernel) {
  pm_law_job job = {
      .concentration = concentration, .other = other, .out = out, .scratch = scratch, .is_double = is_double};
  const pm_status status = begin(shape, &job, needed, needed);
  if (status != PM_OK) return status;
  job.shape = *shape;
  return kernel(&job);
}

static pm_status gradient(const pm_shape *shape, const void *concentration, const void *other, const void *grad,
                          void *out, void *out_other, void *scratch, int is_double, pm_law_kernel kernel) {
  pm_law_job job = {.concentration = concentration,
                    .other = other,
                    .grad = grad,
                    .out = out,
                    .out_other = out_other,
                    .scratch = scratch,
                    .is_double = is_double};
  pm_status status = begin(shape, &job, other, grad);
  if (status == PM_OK && shape->rows > 0 && !out_other) status = PM_NULL_POINTER;
  if (status != PM_OK) return status;
  job.shape = *shape;
  return kernel(&job);
}

#define PM_DIRICHLET(suffix, type, type_is_double)                                                                     \
  pm_status pm_dirichlet_sample_##suffix(const pm_shape *shape, const type *concentration, uint64_t seed, type *out,   \
                                         type *log_total, void *scratch) {                                             \
    pm_law_job job = {.concentration = concentration,                                                                  \
                      .out = out,                                                                                      \
                      .out_other = log_total,                                                                          \
                      .scratch = scratch,                                                                              \
                      .seed = seed,                                                                                    \
                      .is_double = type_is_double};                                                                    \
    const pm_status status = begin(shape, &job, log_total, log_total);                                                 \
    if (status != PM_OK) return status;                                                                                \
    job.shape = *shape;                                                                                                \
    return kernels_of(shape, type_is_double)->dirichlet_sample(&job);                                                  \
  }                                                                                                                    \
  pm_status pm_dirichlet_sample_backward_##suffix(const pm_shape *shape, const type *concentration,                    \
                                                  const type *sample, const type *log_total, const type *grad,         \
                                                  type *grad_concentration, void *scratch) {                           \
    pm_law_job job = {.concentration = concentration,                                                                  \
                      .other = sample,                                                                                 \
                      .total = log_total,                                                                              \
                      .grad = grad,                                                                                    \
                      .out = grad_concentration,                                                                       \
                      .scratch = scratch,                                                                              \
                      .is_double = type_is_double};                                                                    \
    pm_status status = begin(shape, &job, sample, log_total);                                                          \
    if (status == PM_OK && shape->rows > 0 && !grad) status = PM_NULL_POINTER;                                         \
    if (status != PM_OK) return status;                                                                                \
    job.shape = *shape;                                                                                                \
    return kernels_of(shape, type_is_double)->dirichlet_sample_backward(&job);                                         \
  }                                                                                                                    \
  pm_status pm_dirichlet_log_prob_##suffix(const pm_shape *shape, const type *concentration, const type *value,        \
                                           type *out, void *scratch) {                                                 \
    return closed_form(shape, concentration, value, value, out, scratch, type_is_double,                               \
                       kernels_of(shape, 1)->dirichlet_log_prob);                                                      \
  }                                                                                                                    \
  pm_status pm_dirichlet_log_prob_backward_##suffix(const pm_shape *shape, const type *concentration,                  \
                                                    const type *value, const type *grad, type *grad_concentration,     \
                                                    type *grad_value, void *scratch) {                                 \
    return gradient(shape, concentration, value, grad, grad_concentration, grad_value, scratch, type_is_double,        \
                    kernels_of(shape, 1)->dirichlet_log_prob_backward);                                                \
  }                                                                                                                    \
  pm_status pm_dirichlet_entropy_##suffix(const pm_shape *shape, const type *concentration, type *out,                 \
                                          void *scratch) {                                                             \
    return closed_form(shape, concentration, NULL, concentration, out, scratch, type_is_double,                        \
                       kernels_of(shape, 1)->dirichlet_entropy);                                                       \
  }                                                                                                                    \
  pm_status pm_dirichlet_entropy_backward_##suffix(const pm_shape *shape, const type *concentration, const type *grad, \
                                                   type *grad_concentration, void *scratch) {                          \
    return gradient(shape, concentration, concentration, grad, grad_concentration, grad_concentration, scratch,        \
                    type_is_double, kernels_of(shape, 1)->dirichlet_entropy_backward);                                 \
  }                                                                                                                    \
  pm_status pm_dirichlet_kl_##suffix(const pm_shape *shape, const type *p_concentration, const type *q_concentration,  \
                                     type *out, void *scratch) {                                                       \
    return closed_form(shape, p_concentration, q_concentration, q_concentration, out, scratch, type_is_double,         \
                       kernels_of(shape, 1)->dirichlet_kl);                                                            \
  }                                                                                                                    \
  pm_status pm_dirichlet_kl_backward_##suffix(const pm_shape *shape, const type *p_concentration,                      \
                                              const type *q_concentration, const type *grad, type *grad_p,             \
                                              type *grad_q, void *scratch) {                                           \
    return gradient(shape, p_concentration, q_concentration, grad, grad_p, grad_q, scratch, type_is_double,            \
                    kernels_of(shape, 1)->dirichlet_kl_backward);                                                      \
  }

PM_DIRICHLET(f32, float, 0)
PM_DIRICHLET(f64, double, 1)
