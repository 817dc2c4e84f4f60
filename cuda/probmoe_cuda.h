/* CUDA launchers: raw device pointers, int64 sizes, a stream. No torch, no allocation, no synchronisation.
 *
 * Each queues its work on `stream` of the current device and returns the launch's status; outputs are written when the
 * stream gets there. Layout and meaning are those of csrc/probmoe.h, with these differences:
 *   - E <= PM_CUDA_MAX_EXPERTS; all of logits, vectors and outputs of a call have the type `dtype`.
 *   - A row with fewer than k_min unmasked experts is answered as a NaN row (NaN, indices 0, 1, 2, ...), since no row
 *     can be named without waiting for the device. So is, by pm_cuda_subset_log_prob, one with an index outside 0..E,
 *     and by pm_cuda_plackett_luce_log_prob and its gradient one with an index outside 0..E-1.
 *   - `seed` points to the device: the kernel reads it, so that a captured graph draws anew when it is replayed.
 *   - `scratch` is device memory of pm_cuda_scratch_size(shape, dtype) bytes, aligned to 16, and may be NULL where
 *     that is 0, as it is for all shapes of practice. Calls on one stream may share it.
 *
 * PRECISION. float32, bfloat16 and float16 rows of up to 256 experts and subsets of up to 8 are computed in single
 * precision (within the promises of csrc/probmoe.h), larger ones and float64 in double. log Z, the sizes'
 * probabilities, the entropy and log-probabilities are computed in double always, as on the CPU: they are sums in which
 * large terms of both signs meet. The mode needs comparisons alone and is in the type of its logits. The Gumbel family
 * is in single precision at any size but for float64. */
#ifndef PROBMOE_CUDA_H
#define PROBMOE_CUDA_H

#include <stdint.h>

#include "probmoe.h"

#ifdef __cplusplus
extern "C" {
#endif

#define PM_CUDA_MAX_EXPERTS 1024

typedef enum pm_dtype { PM_F32 = 0, PM_F64 = 1, PM_BF16 = 2, PM_F16 = 3 } pm_dtype;

/* 0, or the cudaError_t of the launch; pm_cuda_error_text names it. */
typedef int pm_cuda_status;
const char *pm_cuda_error_text(pm_cuda_status status);

/* Bytes of scratch that suffice for every launcher at this shape, but for one with a size of its own. */
int64_t pm_cuda_scratch_size(const pm_shape *shape, pm_dtype dtype);

/* ---- the subset family -------------------------------------------------------------------------------------- */

/* out [T] */
pm_cuda_status pm_cuda_subset_log_partition(const pm_shape *shape, pm_dtype dtype, const void *logits, void *out,
                                            void *scratch, void *stream);
pm_cuda_status pm_cuda_subset_entropy(const pm_shape *shape, pm_dtype dtype, const void *logits, void *out,
                                      void *scratch, void *stream);
/* out [T, k_max-k_min+1] */
pm_cuda_status pm_cuda_subset_cardinality(const pm_shape *shape, pm_dtype dtype, const void *logits, void *out,
                                          void *scratch, void *stream);
/* grad [T, k_max-k_min+1], grad_logits [T, E] */
pm_cuda_status pm_cuda_subset_cardinality_backward(const pm_shape *shape, pm_dtype dtype, const void *logits,
                                                   const void *grad, void *grad_logits, void *scratch, void *stream);
/* out [T, E] */
pm_cuda_status pm_cuda_subset_marginals(const pm_shape *shape, pm_dtype dtype, const void *logits, void *out,
                                        void *scratch, void *stream);
/* v, out [T, E] */
pm_cuda_status pm_cuda_subset_covariance_vp(const pm_shape *shape, pm_dtype dtype, const void *logits, const void *v,
                                            void *out, void *scratch, void *stream);
/* indices [T, k_max], out [T] */
pm_cuda_status pm_cuda_subset_log_prob(const pm_shape *shape, pm_dtype dtype, const void *logits,
                                       const int64_t *indices, void *out, void *scratch, void *stream);
/* seed [1] on the device, out [T, k_max] */
pm_cuda_status pm_cuda_subset_sample(const pm_shape *shape, pm_dtype dtype, const void *logits, const int64_t *seed,
                                     int64_t *out, void *scratch, void *stream);
/* out [T, k_max] */
pm_cuda_status pm_cuda_subset_mode(const pm_shape *shape, pm_dtype dtype, const void *logits, int64_t *out,
                                   void *stream);

/* ---- the Gumbel family ---------------------------------------------------------------------------------------- */

/* No scratch but where one is named. Keys and gates have the bits of a CPU with fused multiply-add, float32 and float64
 * (csrc/numerics.h): the same seed draws the same experts on both. Sums over a row are added in another order, and
 * log-probabilities keep them relative to one of their logits, so that single precision is enough for them, too. */

/* seed [1] on the device, keys and indices [T, k], k = k_min = k_max */
pm_cuda_status pm_cuda_gumbel_top_k(const pm_shape *shape, pm_dtype dtype, const void *logits, const int64_t *seed,
                                    void *keys, int64_t *indices, void *stream);
/* indices [T, k_max], out [T] */
pm_cuda_status pm_cuda_plackett_luce_log_prob(const pm_shape *shape, pm_dtype dtype, const void *logits,
                                              const int64_t *indices, void *out, void *stream);
/* grad [T], grad_logits [T, E] */
pm_cuda_status pm_cuda_plackett_luce_log_prob_backward(const pm_shape *shape, pm_dtype dtype, const void *logits,
                                                       const int64_t *indices, const void *grad, void *grad_logits,
                                                       void *stream);
/* out [T, E] of type `dtype`; keys [T, E], float for the half types */
pm_cuda_status pm_cuda_relaxed_top_k(const pm_shape *shape, pm_dtype dtype, const void *logits, double temperature,
                                     const int64_t *seed, void *out, void *keys, void *stream);
/* keys and grad_logits [T, E] of type `dtype`, float or double; grad [T, E] of type `grad_dtype`, double if that is.
 * Scratch of its own size, 0 for all shapes of practice. */
int64_t pm_cuda_relaxed_top_k_backward_scratch_size(const pm_shape *shape, pm_dtype dtype);
pm_cuda_status pm_cuda_relaxed_top_k_backward(const pm_shape *shape, pm_dtype dtype, const void *keys,
                                              pm_dtype grad_dtype, const void *grad, double temperature,
                                              void *grad_logits, void *scratch, void *stream);
/* out [T, E]; k is not read */
pm_cuda_status pm_cuda_gumbel_sigmoid(const pm_shape *shape, pm_dtype dtype, const void *logits, double temperature,
                                      const int64_t *seed, void *out, void *stream);

/* ---- routing ------------------------------------------------------------------------------------------------ */

/* pm_route: a draw where `seed` (on the device) is given, the mode where it is NULL. weights, indices [T, k_max]. */
pm_cuda_status pm_cuda_route(const pm_shape *shape, pm_dtype dtype, const void *logits, const int64_t *seed,
                             int normalize, void *weights, int64_t *indices, void *scratch, void *stream);

/* pm_route_backward. indices, grad_weights [T, k_max], grad_logits [T, E]. */
pm_cuda_status pm_cuda_route_backward(const pm_shape *shape, pm_dtype dtype, const void *logits, const int64_t *indices,
                                      const void *grad_weights, pm_backward backward, int normalize, void *grad_logits,
                                      void *scratch, void *stream);

/* ---- the Gamma and Dirichlet family --------------------------------------------------------------------------- */

/* As the functions of csrc/probmoe.h: concentrations (the first law's) in rows of the shape's stride, all else dense,
 * no scratch. The first three are elementwise and take up to PM_MAX_EXPERTS columns. Draws and their derivative are
 * computed in single precision but for PM_F64, the closed forms in double precision.
 *
 * A draw of log g and the derivative D have the bits of a CPU with fused multiply-add, float32 and float64: the same
 * words of Philox, the same attempts accepted, operation for operation the same arithmetic (csrc/gamma_numerics.h).
 * Sums over a row are added in another order. */

/* seed [1] on the device, out [T, E] */
pm_cuda_status pm_cuda_log_gamma_sample(const pm_shape *shape, pm_dtype dtype, const void *concentration,
                                        const int64_t *seed, void *out, void *stream);
/* log_value, grad, grad_concentration [T, E] */
pm_cuda_status pm_cuda_log_gamma_sample_backward(const pm_shape *shape, pm_dtype dtype, const void *concentration,
                                                 const void *log_value, const void *grad, void *grad_concentration,
                                                 void *stream);
/* value, out [T, E] */
pm_cuda_status pm_cuda_standard_gamma_grad(const pm_shape *shape, pm_dtype dtype, const void *concentration,
                                           const void *value, void *out, void *stream);
/* seed [1] on the device, out [T, E], log_total [T] */
pm_cuda_status pm_cuda_dirichlet_sample(const pm_shape *shape, pm_dtype dtype, const void *concentration,
                                        const int64_t *seed, void *out, void *log_total, void *stream);
/* sample, grad, grad_concentration [T, E], log_total [T] */
pm_cuda_status pm_cuda_dirichlet_sample_backward(const pm_shape *shape, pm_dtype dtype, const void *concentration,
                                                 const void *sample, const void *log_total, const void *grad,
                                                 void *grad_concentration, void *stream);
/* out, grad [T], all else [T, E] */
pm_cuda_status pm_cuda_dirichlet_log_prob(const pm_shape *shape, pm_dtype dtype, const void *concentration,
                                          const void *value, void *out, void *stream);
pm_cuda_status pm_cuda_dirichlet_log_prob_backward(const pm_shape *shape, pm_dtype dtype, const void *concentration,
                                                   const void *value, const void *grad, void *grad_concentration,
                                                   void *grad_value, void *stream);
pm_cuda_status pm_cuda_dirichlet_entropy(const pm_shape *shape, pm_dtype dtype, const void *concentration, void *out,
                                         void *stream);
pm_cuda_status pm_cuda_dirichlet_entropy_backward(const pm_shape *shape, pm_dtype dtype, const void *concentration,
                                                  const void *grad, void *grad_concentration, void *stream);
pm_cuda_status pm_cuda_dirichlet_kl(const pm_shape *shape, pm_dtype dtype, const void *p_concentration,
                                    const void *q_concentration, void *out, void *stream);
pm_cuda_status pm_cuda_dirichlet_kl_backward(const pm_shape *shape, pm_dtype dtype, const void *p_concentration,
                                             const void *q_concentration, const void *grad, void *grad_p, void *grad_q,
                                             void *stream);

/* ---- DirMoE routing --------------------------------------------------------------------------------------------- */

/* pm_route_dirmoe. gate_logits in rows of the shape's stride, all else dense. `seed` [1] is on the
 * device and read when training; noise and log_gamma [T, E] are float32, float64 for PM_F64, and then written, too. */
pm_cuda_status pm_cuda_route_dirmoe(const pm_shape *shape, const pm_dirmoe *options, pm_dtype dtype,
                                    const void *gate_logits, const void *alpha_hi, const void *alpha_lo,
                                    const int64_t *seed, void *weights, int64_t *indices, void *kl, void *expected_k,
                                    void *noise, void *log_gamma, void *stream);

/* pm_route_dirmoe_backward */
pm_cuda_status pm_cuda_route_dirmoe_backward(const pm_shape *shape, const pm_dirmoe *options, pm_dtype dtype,
                                             const void *gate_logits, const void *alpha_hi, const void *alpha_lo,
                                             const int64_t *indices, const void *noise, const void *log_gamma,
                                             const void *grad_weights, const void *grad_kl, const void *grad_expected_k,
                                             void *grad_gate_logits, void *grad_alpha_hi, void *grad_alpha_lo,
                                             void *stream);

#ifdef __cplusplus
}
#endif

#endif
