// What every kernel file shares: element types in and out, lanes in groups, the checked launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#include "probmoe_cuda.h"

namespace probmoe {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// One call: what a kernel gets to know, by value. Unused pointers are NULL.
struct Job {
  pm_shape shape;
  pm_dtype dtype;
  const void *logits;
  const void *vector;      // grad, v or grad_weights, dense
  const int64_t *indices;  // routing backward, log-probability
  const int64_t *seed;     // on the device
  void *out;
  int64_t *out_indices;
  void *scratch;
  int normalize;
  int marginal;  // routing backward: through the marginals, or straight through
};

// ---- elements ------------------------------------------------------------------------------------------------------

// The element type is told at run time: one uniform branch at each load, in place of a copy of every kernel for each
// of four types. Half types are rounded once, on the way out.
template <class R>
__device__ __forceinline__ R read(const void *from, pm_dtype type, int64_t at) {
  switch (type) {
    case PM_BF16: return static_cast<R>(__bfloat162float(static_cast<const __nv_bfloat16 *>(from)[at]));
    case PM_F16: return static_cast<R>(__half2float(static_cast<const __half *>(from)[at]));
    case PM_F64:
      if constexpr (sizeof(R) == 8) return static_cast<const double *>(from)[at];  // a float kernel never sees one
      [[fallthrough]];
    default: return static_cast<R>(static_cast<const float *>(from)[at]);
  }
}

// Double to half goes through float, as on the CPU.
template <class R>
__device__ __forceinline__ void write(void *to, pm_dtype type, int64_t at, R value) {
  switch (type) {
    case PM_BF16: static_cast<__nv_bfloat16 *>(to)[at] = __float2bfloat16(static_cast<float>(value)); break;
    case PM_F16: static_cast<__half *>(to)[at] = __float2half(static_cast<float>(value)); break;
    case PM_F64:
      if constexpr (sizeof(R) == 8) static_cast<double *>(to)[at] = value;
      break;
    default: static_cast<float *>(to)[at] = static_cast<float>(value);
  }
}

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return logf(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }
__device__ __forceinline__ float fused(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fused(double a, double b, double c) { return fma(a, b, c); }

// U = u A, below A even where a subnormal product rounds up to it.
template <class R>
__device__ __forceinline__ R level_of(R u, R mass) {
  const R level = u * mass;
  return level < mass ? level : R(0);
}

// exp(lambda d), at most 1, for lambda = high + low: the products and their sum keep their rounding errors (fused
// multiply-add, Knuth's two-sum), so that a size's weight is as good at a tilt of 100 as at 1.
template <class R>
__device__ __forceinline__ R tilt_power(R high, R low, R d) {
  const R large = high * d, small = low * d, sum = large + small, back = sum - large;
  if (!(sum > R(-1000))) return R(0);
  const R error = fused(high, d, -large) + fused(low, d, -small) + ((large - (sum - back)) + (small - back));
  return exponential(sum) * (R(1) + error);
}

// ---- groups: 2^n neighbouring lanes that share a row ---------------------------------------------------------------

struct Group {
  int size, lane, first;  // lanes, which of them this is, and the warp's lane number of the first
  int64_t row;            // of the batch; the last one where the group has none of its own, so that no lane is missing
  bool active;            // whether the row is the group's own
};

// Groups of `size` lanes take the rows in order; blocks have one dimension.
__device__ __forceinline__ Group group_of(int size, int64_t rows) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t row = thread / size;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  return {size, lane % size, lane - lane % size, row < rows ? row : rows - 1, row < rows};
}

// Reductions end with the same bits in every lane: operand order does not matter to +, max and min of two numbers.
template <class R>
__device__ __forceinline__ R group_sum(const Group &group, R value) {
  for (int step = 1; step < group.size; step *= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

template <class R>
__device__ __forceinline__ R group_max(const Group &group, R value) {
  for (int step = 1; step < group.size; step *= 2) {
    const R other = __shfl_xor_sync(kAllLanes, value, step);
    value = other > value ? other : value;
  }
  return value;
}

// Which lanes of the group say yes: bit 0 is its first lane.
__device__ __forceinline__ unsigned group_vote(const Group &group, bool yes) {
  const unsigned votes = __ballot_sync(kAllLanes, yes) >> group.first;
  return group.size == kWarp ? votes : votes & ((1u << group.size) - 1);
}

template <class R>
__device__ __forceinline__ R from_lane(const Group &group, R value, int lane) {
  return __shfl_sync(kAllLanes, value, lane, group.size);
}

// The block's dynamic shared memory. (tests/emulation gives the address on a CPU.)
__device__ __forceinline__ double *shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) double shared_doubles[];
#endif
  return shared_doubles;
}

// ---- launch --------------------------------------------------------------------------------------------------------

// Groups of `size` lanes for all rows, in blocks of `threads`.
template <class... Parameters, class... Arguments>
pm_cuda_status launch(void (*kernel)(Parameters...), int64_t rows, int size, int threads, size_t shared, void *stream,
                      Arguments... arguments) {
  const int64_t per_block = threads / size;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>((rows + per_block - 1) / per_block));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

inline int lanes_for(int64_t items) {
  int lanes = 4;
  while (lanes < items && lanes < kWarp) lanes *= 2;
  return lanes;
}

}  // namespace probmoe
