/* DirMoE routing's public functions: check, run in the precision of the type. */
#include <math.h>

#include "kernels.h"

static pm_status check_options(const pm_dirmoe *options) {
  if (!options) return PM_NULL_POINTER;
  const double positive[] = {options->temperature, options->concentration, options->prior_concentration,
                             options->prior_hi, options->prior_lo};
  for (size_t n = 0; n < sizeof positive / sizeof *positive; ++n)
    if (!(positive[n] > 0) || isinf(positive[n])) return PM_BAD_OPTION;
  return PM_OK;
}

static pm_status forward(const pm_shape *shape, pm_dirmoe_job *job, const pm_dirmoe *options) {
  pm_status status = pm_check(shape, job->gate_logits, job->kl, job->scratch);
  if (status == PM_OK) status = check_options(options);
  if (status != PM_OK) return status;
  if (shape->rows > 0) {
    if (!job->alpha_hi || !job->alpha_lo || !job->expected_k) return PM_NULL_POINTER;
    if (shape->k_max > 0 && (!job->weights || !job->out_indices)) return PM_NULL_POINTER;
    if (options->training && (!job->noise || !job->log_gamma)) return PM_NULL_POINTER;
  }
  job->shape = *shape;
  job->options = *options;
  return pm_kernels_for(job->is_double, shape->rows)->dirmoe(job);
}

static pm_status backward(const pm_shape *shape, pm_dirmoe_job *job, const pm_dirmoe *options) {
  pm_status status = pm_check(shape, job->gate_logits, job->grad_gate_logits, job->scratch);
  if (status == PM_OK) status = check_options(options);
  if (status != PM_OK) return status;
  if (shape->rows > 0) {
    if (!job->alpha_hi || !job->alpha_lo || !job->grad_kl || !job->grad_expected) return PM_NULL_POINTER;
    if (!job->grad_alpha_hi || !job->grad_alpha_lo) return PM_NULL_POINTER;
    if (shape->k_max > 0 && (!job->indices || !job->grad_weights)) return PM_NULL_POINTER;
    if (options->training && (!job->saved_noise || !job->saved_log_gamma)) return PM_NULL_POINTER;
  }
  job->shape = *shape;
  job->options = *options;
  return pm_kernels_for(job->is_double, shape->rows)->dirmoe_backward(job);
}

#define PM_DIRMOE(suffix, type, type_is_double)                                                                  \
  pm_status pm_route_dirmoe_##suffix(const pm_shape *shape, const pm_dirmoe *options, const type *gate_logits,   \
                                     const type *alpha_hi, const type *alpha_lo, uint64_t seed, type *weights,   \
                                     int64_t *indices, type *kl, type *expected_k, type *noise, type *log_gamma, \
                                     void *scratch) {                                                            \
    pm_dirmoe_job job = {.gate_logits = gate_logits,                                                             \
                         .alpha_hi = alpha_hi,                                                                   \
                         .alpha_lo = alpha_lo,                                                                   \
                         .weights = weights,                                                                     \
                         .kl = kl,                                                                               \
                         .expected_k = expected_k,                                                               \
                         .noise = noise,                                                                         \
                         .log_gamma = log_gamma,                                                                 \
                         .out_indices = indices,                                                                 \
                         .scratch = scratch,                                                                     \
                         .seed = seed,                                                                           \
                         .is_double = type_is_double};                                                           \
    return forward(shape, &job, options);                                                                        \
  }                                                                                                              \
  pm_status pm_route_dirmoe_backward_##suffix(                                                                   \
      const pm_shape *shape, const pm_dirmoe *options, const type *gate_logits, const type *alpha_hi,            \
      const type *alpha_lo, const int64_t *indices, const type *noise, const type *log_gamma,                    \
      const type *grad_weights, const type *grad_kl, const type *grad_expected_k, type *grad_gate_logits,        \
      type *grad_alpha_hi, type *grad_alpha_lo, void *scratch) {                                                 \
    pm_dirmoe_job job = {.gate_logits = gate_logits,                                                             \
                         .alpha_hi = alpha_hi,                                                                   \
                         .alpha_lo = alpha_lo,                                                                   \
                         .grad_weights = grad_weights,                                                           \
                         .grad_kl = grad_kl,                                                                     \
                         .grad_expected = grad_expected_k,                                                       \
                         .saved_noise = noise,                                                                   \
                         .saved_log_gamma = log_gamma,                                                           \
                         .indices = indices,                                                                     \
                         .grad_gate_logits = grad_gate_logits,                                                   \
                         .grad_alpha_hi = grad_alpha_hi,                                                         \
                         .grad_alpha_lo = grad_alpha_lo,                                                         \
                         .scratch = scratch,                                                                     \
                         .is_double = type_is_double};                                                           \
    return backward(shape, &job, options);                                                                       \
  }

PM_DIRMOE(f32, float, 0)
PM_DIRMOE(f64, double, 1)
