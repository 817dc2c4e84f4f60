// Conventional routing on the GPU: softmax, the mode's selection and its gradient, one warp a row.
//
// A lane keeps experts lane, lane + 32, ... in registers, so that loads are coalesced and nothing goes through shared
// memory. Selection is k rounds of a warp-wide arg-max: for the k of practice (1 to 8) that is fewer instructions than
// a sort, and its order is the output's.
#include <cmath>
#include <type_traits>

#include "launch.cuh"

namespace probmoe {
namespace {

// A row in registers, with its softmax. A poisoned row (NaN, +inf, too few unmasked experts) is computed as zeros.
template <class R, int N>
struct Row {
  R logit[N], softmax[N];
  bool poison;
};

template <class T, int N>
__device__ __forceinline__ Row<typename Compute<T>::type, N> load_row(const pm_shape &shape, const T *logits,
                                                                      int64_t row, int lane) {
  using R = typename Compute<T>::type;
  Row<R, N> it;
  bool bad = false;
  int unmasked = 0;
  R largest = -INFINITY;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int64_t i = lane + n * kWarp;
    const bool real = i < shape.experts;
    it.logit[n] = real ? read(logits + row * shape.stride + i) : static_cast<R>(-INFINITY);
    bad |= !(it.logit[n] < static_cast<R>(INFINITY));
    unmasked += it.logit[n] > static_cast<R>(-INFINITY);
    largest = it.logit[n] > largest ? it.logit[n] : largest;
  }
  it.poison = __any_sync(kAllLanes, bad) || warp_sum(unmasked) < shape.k_min;
  largest = warp_max(largest);
  if (it.poison || largest == static_cast<R>(-INFINITY)) largest = 0;
  R sum = 0;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    if (it.poison) it.logit[n] = lane + n * kWarp < shape.experts ? R(0) : static_cast<R>(-INFINITY);
    it.softmax[n] = exponential(it.logit[n] - largest);
    sum += it.softmax[n];
  }
  sum = warp_sum(sum);
  const R scale = sum > 0 ? R(1) / sum : R(0);
#pragma unroll
  for (int n = 0; n < N; ++n) it.softmax[n] *= scale;
  return it;
}

template <class T, int N>
__global__ void __launch_bounds__(kWarp *kWarpsPerBlock)
    route_mode_kernel(pm_shape shape, const T *__restrict__ logits, int normalize, T *weights, int64_t *indices) {
  using R = typename Compute<T>::type;
  const int lane = threadIdx.x;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.y;
  if (row >= shape.rows) return;  // a whole warp: the shuffles below stay complete
  Row<R, N> it = load_row<T, N>(shape, logits, row, lane);
  weights += row * shape.k_max;
  indices += row * shape.k_max;
  if (it.poison) {
    for (int64_t j = lane; j < shape.k_max; j += kWarp) {
      indices[j] = j;
      weights[j] = cast<T>(static_cast<R>(NAN));
    }
    return;
  }
  R total = 0;
  uint32_t taken = 0;
  int64_t count = 0;
  for (int64_t j = 0; j < shape.k_max; ++j) {
    R best = -INFINITY, weight = 0;
    int64_t at = shape.experts;
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (!(taken >> n & 1) && it.logit[n] > best) best = it.logit[n], weight = it.softmax[n], at = lane + n * kWarp;
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      const R value = __shfl_xor_sync(kAllLanes, best, step), s = __shfl_xor_sync(kAllLanes, weight, step);
      const int64_t where = __shfl_xor_sync(kAllLanes, at, step);
      if (value > best || (value == best && where < at)) best = value, weight = s, at = where;
    }
    // Beyond k_min only positive logits enter; the order is descending, so the first refusal ends the row.
    if (at == shape.experts || (j >= shape.k_min && !(best > 0))) {
      for (int64_t rest = j + lane; rest < shape.k_max; rest += kWarp) {
        indices[rest] = shape.experts;
        weights[rest] = cast<T>(R(0));
      }
      break;
    }
    if (at % kWarp == lane) taken |= 1u << (at / kWarp);
    total += weight;
    ++count;
    if (lane == 0) {
      indices[j] = at;
      weights[j] = cast<T>(weight);
    }
  }
  if (!normalize) return;
  // A second walk over the chosen, each weight from its owner's register: the rounded ones just written will not do.
  const R scale = total > 0 ? R(1) / total : R(0);
  __syncwarp();
  for (int64_t j = 0; j < count; ++j) {
    const int64_t at = indices[j];
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (at == lane + n * kWarp) weights[j] = cast<T>(it.softmax[n] * scale);
  }
}

template <class T, int N>
__global__ void __launch_bounds__(kWarp *kWarpsPerBlock)
    route_straight_through_kernel(pm_shape shape, const T *__restrict__ logits, const int64_t *__restrict__ indices,
                                  const T *__restrict__ grad_weights, int normalize, T *__restrict__ grad_logits) {
  using R = typename Compute<T>::type;
  const int lane = threadIdx.x;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.y;
  if (row >= shape.rows) return;
  const Row<R, N> it = load_row<T, N>(shape, logits, row, lane);
  R upstream[N];
  uint32_t chosen = 0;
#pragma unroll
  for (int n = 0; n < N; ++n) upstream[n] = 0;
  for (int64_t j = 0; j < shape.k_max; ++j) {
    const int64_t at = indices[row * shape.k_max + j];
    const R g = read(grad_weights + row * shape.k_max + j);
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (at == lane + n * kWarp && at < shape.experts) upstream[n] = g, chosen |= 1u << n;
  }
  R mass = 0, moment = 0;
#pragma unroll
  for (int n = 0; n < N; ++n)
    if (chosen >> n & 1) mass += it.softmax[n], moment += it.softmax[n] * upstream[n];
  mass = warp_sum(mass);
  moment = warp_sum(moment);
  const R divisor = normalize && mass > 0 ? mass : R(1), mean = normalize ? moment / divisor : R(0);
  R direct[N], total = 0;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    direct[n] = chosen >> n & 1 ? it.softmax[n] * ((upstream[n] - mean) / divisor) : R(0);
    total += direct[n];
  }
  total = warp_sum(total);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const int64_t i = lane + n * kWarp;
    const R value = it.poison ? static_cast<R>(NAN) : direct[n] - it.softmax[n] * total;
    if (i < shape.experts) grad_logits[row * shape.experts + i] = cast<T>(value);
  }
}

}  // namespace
}  // namespace probmoe

using namespace probmoe;

extern "C" const char *pm_cuda_error_text(pm_cuda_status status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

extern "C" pm_cuda_status pm_cuda_route_mode(const pm_shape *shape, pm_dtype dtype, const void *logits, int normalize,
                                             void *weights, int64_t *indices, void *stream) {
  if (shape->rows == 0 || shape->k_max == 0) return cudaSuccess;
  if (shape->experts > PM_CUDA_MAX_EXPERTS) return cudaErrorInvalidValue;
  return for_type(dtype, [&](auto *tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for_experts(shape->experts, [&](auto n) {
      route_mode_kernel<T, decltype(n)::value>
          <<<warp_grid(shape->rows), dim3(kWarp, kWarpsPerBlock), 0, static_cast<cudaStream_t>(stream)>>>(
              *shape, static_cast<const T *>(logits), normalize, static_cast<T *>(weights), indices);
    });
  });
}

extern "C" pm_cuda_status pm_cuda_route_straight_through(const pm_shape *shape, pm_dtype dtype, const void *logits,
                                                         const int64_t *indices, const void *grad_weights,
                                                         int normalize, void *grad_logits, void *stream) {
  if (shape->rows == 0) return cudaSuccess;
  if (shape->experts > PM_CUDA_MAX_EXPERTS) return cudaErrorInvalidValue;
  return for_type(dtype, [&](auto *tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    for_experts(shape->experts, [&](auto n) {
      route_straight_through_kernel<T, decltype(n)::value>
          <<<warp_grid(shape->rows), dim3(kWarp, kWarpsPerBlock), 0, static_cast<cudaStream_t>(stream)>>>(
              *shape, static_cast<const T *>(logits), indices, static_cast<const T *>(grad_weights), normalize,
              static_cast<T *>(grad_logits));
    });
  });
}
