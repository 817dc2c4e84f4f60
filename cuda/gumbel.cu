// The k largest keys, and relaxed Bernoulli gates. An expert's noise and its logarithms (numerics.cuh) are some eighty
// instructions behind one load of two or four bytes, so that both run at the issue rate and not at memory's.
#include "gumbel.cuh"

namespace probmoe {
namespace {

constexpr int kThreads = 128;

// k rounds of arg-max, in the order of the output. A slot a lane, so that the stores are neighbours; more slots than
// lanes go out in turns.
template <class R, int N>
__global__ void __launch_bounds__(kThreads, kBlocks<R, N>)
    gumbel_top_k_kernel(const __grid_constant__ Job job, int size, int width) {
  const Group group = group_of(size, job.shape.rows);
  const int k = static_cast<int>(job.shape.k_max), experts = static_cast<int>(job.shape.experts);
  const int first = group.lane * N;
  R x[N];
  load_experts(job.logits, job.dtype, width, group.row * job.shape.stride, first, experts, static_cast<R>(-INFINITY),
               x);
  const bool poison = settle(group, first, experts, k, x);
  perturb(job, group.row, first, x);
  for (int base = 0; base < k; base += size) {
    int mine = 0;
    R key = 0;
    for (int lane = 0; lane < size && base + lane < k; ++lane) {
      int expert;
      const R largest = take_largest(group, x, &expert);
      if (group.lane == lane) mine = expert, key = largest;
    }
    const int slot = base + group.lane;
    if (!group.active || slot >= k) continue;
    job.out_indices[group.row * k + slot] = poison ? slot : mine;
    write(job.out, job.dtype, group.row * k + slot, poison ? static_cast<R>(NAN) : key);
  }
}

// Elementwise: no lane needs another, and a row that is longer than its group is taken in turns.
template <class R>
__global__ void __launch_bounds__(kThreads)
    gumbel_sigmoid_kernel(const __grid_constant__ Job job, int size, int in_width, int out_width, R inverse) {
  const Group group = group_of(size, job.shape.rows);
  const int experts = static_cast<int>(job.shape.experts);
  if (!group.active) return;
  for (int first = group.lane * kSlots; first < experts; first += size * kSlots) {
    R x[kSlots];
    load_experts(job.logits, job.dtype, in_width, group.row * job.shape.stride, first, experts, R(0), x);
    each_word<R, kSlots>(job, group.row, first, PM_DRAW_CONCRETE, [&](int n, auto word) {
      R u, complement;
      open_uniform(word, &u, &complement);
      x[n] = sigmoid((x[n] + logistic_from(u, complement)) * inverse);
    });
    store_experts(job.out, job.dtype, out_width, group.row * experts, first, experts, x);
  }
}

}  // namespace

extern "C" pm_cuda_status pm_cuda_gumbel_top_k(const pm_shape *shape, pm_dtype dtype, const void *logits,
                                               const int64_t *seed, void *keys, int64_t *indices, void *stream) {
  Job job = job_of(shape, dtype, logits);
  job.seed = seed;
  job.out = keys;
  job.out_indices = indices;
  return checked(shape, dtype, [&]() -> pm_cuda_status {
    if (shape->k_min != shape->k_max) return cudaErrorInvalidValue;
    if (shape->k_max == 0) return cudaSuccess;
    return by_shape(*shape, dtype, [&](auto real, auto slots) {
      constexpr int N = decltype(slots)::value;
      const int size = lanes_of<N>(*shape);
      return launch(gumbel_top_k_kernel<decltype(real), N>, shape->rows, size, kThreads, 0, stream, job, size,
                    access_width(dtype, logits, shape->experts, shape->stride));
    });
  });
}

extern "C" pm_cuda_status pm_cuda_gumbel_sigmoid(const pm_shape *shape, pm_dtype dtype, const void *logits,
                                                 double temperature, const int64_t *seed, void *out, void *stream) {
  Job job = job_of(shape, dtype, logits);
  job.seed = seed;
  job.out = out;
  return checked(shape, dtype, [&]() -> pm_cuda_status {
    if (!temperature_serves(temperature)) return cudaErrorInvalidValue;
    const int size = lanes_of<kSlots>(*shape);
    const int in = access_width(dtype, logits, shape->experts, shape->stride);
    const int to = access_width(dtype, out, shape->experts, shape->experts);
    if (dtype == PM_F64)
      return launch(gumbel_sigmoid_kernel<double>, shape->rows, size, kThreads, 0, stream, job, size, in, to,
                    1 / temperature);
    return launch(gumbel_sigmoid_kernel<float>, shape->rows, size, kThreads, 0, stream, job, size, in, to,
                  static_cast<float>(1 / temperature));
  });
}

}  // namespace probmoe
