// csrc/numerics.h for kernels: its functions on single numbers, `float` and `double` side by side as overloads.
//
// They return the CPU's bits, where CUDA's own logf and expf are an ulp apart from any other library's: what decides
// (keys, gates) is computed by these. The constants are folded into the instructions; no table is left in memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define PM_ALWAYS_INLINE __device__ __forceinline__
#define PM_CONSTANT __attribute__((unused)) static __device__ const

namespace probmoe {

__device__ __forceinline__ float fma_(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ double fma_(double a, double b, double c) { return fma(a, b, c); }
__device__ __forceinline__ uint32_t pattern_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ uint64_t pattern_of(double x) { return static_cast<uint64_t>(__double_as_longlong(x)); }
__device__ __forceinline__ float real_of(uint32_t x) { return __uint_as_float(x); }
__device__ __forceinline__ double real_of(uint64_t x) { return __longlong_as_double(static_cast<long long>(x)); }

template <class R>
__device__ __forceinline__ R max_(R a, R b) {
  return a > b ? a : b;
}

template <class Mask, class R>
__device__ __forceinline__ R select_(Mask mask, R yes, R no) {
  return mask ? yes : no;
}

// Exponents fit an int, which converts in one instruction.
#define PM_NUMBERS                                                                                 \
  typedef real vreal;                                                                              \
  typedef bits vmask;                                                                              \
  typedef pattern vpattern;                                                                        \
  PM_ALWAYS_INLINE real splat(real x) { return x; }                                                \
  PM_ALWAYS_INLINE real whole(bits n) { return static_cast<real>(static_cast<int>(n)); }           \
  PM_ALWAYS_INLINE real scale_by_shifted(real y, real shifted, real origin, real x, real lowest) { \
    const pattern power = (pattern_of(shifted) - pattern_of(origin)) << PM_MANTISSA_BITS;          \
    return x >= lowest ? real_of(pattern_of(y) + power) : real(0);                                 \
  }

namespace single_precision {
#define PM_REAL_BITS 32
#include "precision.h"
PM_NUMBERS
#include "numerics.h"
#undef PM_REAL_BITS
}  // namespace single_precision

namespace double_precision {
#define PM_REAL_BITS 64
#include "precision.h"
PM_NUMBERS
#include "numerics.h"
#undef PM_REAL_BITS
}  // namespace double_precision

using single_precision::exp_, double_precision::exp_;
using single_precision::gumbel_from, double_precision::gumbel_from;
using single_precision::log1p_, double_precision::log1p_;
using single_precision::log_, double_precision::log_;
using single_precision::log_rest, double_precision::log_rest;
using single_precision::logistic_from, double_precision::logistic_from;
using single_precision::sigmoid, double_precision::sigmoid;

// The halves of a word as whole numbers, by their place in a mantissa: conversions would take the slow pipe.
__device__ __forceinline__ void open_uniform(uint32_t word, float *u, float *complement) {
  const float high = real_of((word >> 16) | 0x4b000000u) - 0x1p23f;
  const float low = real_of((word & 0xffffu) | 0x4b000000u) - 0x1p23f;
  single_precision::open_uniform_of(high, low, u, complement);
}

__device__ __forceinline__ void open_uniform(uint64_t word, double *u, double *complement) {
  const uint64_t magic = uint64_t{0x433} << 52;
  const double high = real_of((word >> 32) | magic) - 0x1p52, low = real_of((word & 0xffffffffu) | magic) - 0x1p52;
  double_precision::open_uniform_of(high, low, u, complement);
}

}  // namespace probmoe
