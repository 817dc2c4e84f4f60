// What every kernel file shares: types in and out, warp reductions, the checked launch.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "probmoe_cuda.h"

namespace probmoe {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The type of computation: half types go through float, with one rounding on the way out.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};

template <class T>
__device__ __forceinline__ typename Compute<T>::type read(const T *from) {
  return static_cast<typename Compute<T>::type>(*from);
}

template <class T>
__device__ __forceinline__ T cast(typename Compute<T>::type value) {
  return static_cast<T>(value);
}

__device__ __forceinline__ float exponential(float x) { return expf(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }

template <class R>
__device__ __forceinline__ R warp_sum(R value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAllLanes, value, step);
  return value;
}

template <class R>
__device__ __forceinline__ R warp_max(R value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const R other = __shfl_xor_sync(kAllLanes, value, step);
    value = other > value ? other : value;
  }
  return value;
}

// Rows over warps: four warps a block, one row a warp.
constexpr int kWarpsPerBlock = 4;

inline dim3 warp_grid(int64_t rows) {
  return dim3(static_cast<unsigned>((rows + kWarpsPerBlock - 1) / kWarpsPerBlock));
}

// fn(tag) for the element type; `tag` is a null pointer of that type.
template <class F>
pm_cuda_status for_type(pm_dtype dtype, const F &fn) {
  switch (dtype) {
    case PM_F32: fn(static_cast<float *>(nullptr)); break;
    case PM_F64: fn(static_cast<double *>(nullptr)); break;
    case PM_BF16: fn(static_cast<__nv_bfloat16 *>(nullptr)); break;
    case PM_F16: fn(static_cast<__half *>(nullptr)); break;
    default: return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

// fn(std::integral_constant-like tag) with the number of experts a lane holds, rounded up to a compiled one.
template <int N>
struct PerLane {
  static constexpr int value = N;
};

// Three sizes, not six: each is compiled for four types and every architecture, and the padding lanes cost little.
template <class F>
void for_experts(int64_t experts, const F &fn) {
  if (experts <= 2 * kWarp)
    fn(PerLane<2>{});
  else if (experts <= 8 * kWarp)
    fn(PerLane<8>{});
  else
    fn(PerLane<32>{});
}

}  // namespace probmoe
