/* CUDA launchers: raw device pointers, int64 sizes, a stream. No torch, no allocation, no synchronisation.
 *
 * Each queues its work on `stream` of the current device and returns the launch's status; outputs are written when the
 * stream gets there. Layout and meaning are those of csrc/probmoe.h, with these differences: E <= PM_CUDA_MAX_EXPERTS,
 * and a row with fewer than k_min unmasked experts is answered as a NaN row (weights NaN, indices 0, 1, 2, ...), since
 * no row can be named without waiting for the device. */
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

/* The mode with softmax weights: pm_route with PM_FORWARD_MODE. weights [T, k_max] in the type of logits. */
pm_cuda_status pm_cuda_route_mode(const pm_shape *shape, pm_dtype dtype, const void *logits, int normalize,
                                  void *weights, int64_t *indices, void *stream);

/* pm_route_backward with PM_BACKWARD_STRAIGHT_THROUGH: grad_logits = J_softmax^T (h z). All of `dtype`. */
pm_cuda_status pm_cuda_route_straight_through(const pm_shape *shape, pm_dtype dtype, const void *logits,
                                              const int64_t *indices, const void *grad_weights, int normalize,
                                              void *grad_logits, void *stream);

#ifdef __cplusplus
}
#endif

#endif
