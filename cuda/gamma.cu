// Gamma variates and their derivative, an element a thread.
//
// A warp goes on as long as its slowest lane. An attempt is refused once in twenty at alpha = 1 and near 0 (drawn by
// way of alpha + 1), less often elsewhere, so that a warp makes about two rounds where an element makes one. Lanes that
// are done wait; taking over other elements' attempts would need a queue in shared memory, whose bookkeeping costs what
// the idle lanes do. Every attempt has a Philox counter of its own, so that who waits for whom changes no bit.
//
// The derivative is one polynomial for the middle of the law, and branches into its tails: for alpha above 1 rarely,
// for small alpha into the lower one mostly, whose series of ten terms costs what the polynomial does.
#include "gamma.cuh"

namespace probmoe {
namespace {

constexpr int kThreads = 128;

// Where this thread's element lies: its row and column, and its place in the dense arrays and in the concentrations.
struct Element {
  int64_t row, dense, source;
  uint32_t column;
  bool exists;
};

__device__ __forceinline__ Element element_of(const pm_shape &shape) {
  const int64_t at = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x, E = shape.experts;
  const int64_t count = shape.rows * E;
  // A division of 64 bits is a hundred instructions: only where the batch needs it.
  const int64_t row = count >> 32 ? at / E : static_cast<uint32_t>(at) / static_cast<uint32_t>(E);
  const int64_t column = at - row * E;
  return {row, at, row * shape.stride + column, static_cast<uint32_t>(column), at < count};
}

template <class R>
__global__ void __launch_bounds__(kThreads) log_gamma_sample_kernel(const __grid_constant__ LawJob job) {
  const Element it = element_of(job.shape);
  if (!it.exists) return;
  const element_counter at = counter_of(job.seed, job.shape, it.row, PM_DRAW_GAMMA);
  const R alpha = read<R>(job.concentration, job.dtype, it.source);
  write(job.out, job.dtype, it.dense, draw_log_gamma(alpha, &at, it.column));
}

template <class R>
__global__ void __launch_bounds__(kThreads) log_gamma_backward_kernel(const __grid_constant__ LawJob job) {
  const Element it = element_of(job.shape);
  if (!it.exists) return;
  const R alpha = read<R>(job.concentration, job.dtype, it.source), log_g = read<R>(job.other, job.dtype, it.dense);
  write(job.out, job.dtype, it.dense, read<R>(job.grad, job.dtype, it.dense) * log_gamma_slope(alpha, log_g));
}

template <class R>
__global__ void __launch_bounds__(kThreads) standard_gamma_grad_kernel(const __grid_constant__ LawJob job) {
  const Element it = element_of(job.shape);
  if (!it.exists) return;
  const R alpha = read<R>(job.concentration, job.dtype, it.source), g = read<R>(job.other, job.dtype, it.dense);
  write(job.out, job.dtype, it.dense, standard_gamma_slope(alpha, g));
}

pm_cuda_status per_element(const LawJob &job, void (*single)(LawJob), void (*twice)(LawJob), void *stream) {
  const auto run = [&] {
    const int64_t elements = job.shape.rows * job.shape.experts;
    return launch(job.dtype == PM_F64 ? twice : single, elements, 1, kThreads, 0, stream, job);
  };
  return checked(&job.shape, job.dtype, run, PM_MAX_EXPERTS);
}

}  // namespace
}  // namespace probmoe

using namespace probmoe;

extern "C" pm_cuda_status pm_cuda_log_gamma_sample(const pm_shape *shape, pm_dtype dtype, const void *concentration,
                                                   const int64_t *seed, void *out, void *stream) {
  LawJob job = {*shape, dtype, concentration};
  job.seed = seed;
  job.out = out;
  return per_element(job, log_gamma_sample_kernel<float>, log_gamma_sample_kernel<double>, stream);
}

extern "C" pm_cuda_status pm_cuda_log_gamma_sample_backward(const pm_shape *shape, pm_dtype dtype,
                                                            const void *concentration, const void *log_value,
                                                            const void *grad, void *grad_concentration, void *stream) {
  LawJob job = {*shape, dtype, concentration, log_value};
  job.grad = grad;
  job.out = grad_concentration;
  return per_element(job, log_gamma_backward_kernel<float>, log_gamma_backward_kernel<double>, stream);
}

extern "C" pm_cuda_status pm_cuda_standard_gamma_grad(const pm_shape *shape, pm_dtype dtype, const void *concentration,
                                                      const void *value, void *out, void *stream) {
  LawJob job = {*shape, dtype, concentration, value};
  job.out = out;
  return per_element(job, standard_gamma_grad_kernel<float>, standard_gamma_grad_kernel<double>, stream);
}
