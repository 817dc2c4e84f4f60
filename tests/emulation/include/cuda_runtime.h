// CUDA's execution model on a CPU, as far as cuda/ uses it: enough to compile the kernels as C++ and run them.
//
// A block's threads are fibres. Each runs until it meets the others: at a shuffle, a vote or a barrier, where it waits
// until all that the mask names are there. What would be undefined on a GPU ends the launch with an error that says so:
// lanes that meet at different places, or that left before; a read or write past the block's shared memory. Shared
// memory begins as NaN. Emulation finds mistakes of logic; it knows nothing of speed, caches or memory order.
#pragma once

#include <math.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct uint2 {
  uint32_t x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline uint32_t __float_as_uint(float x) { return bits_as<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return bits_as<float>(x); }
inline long long __double_as_longlong(double x) { return bits_as<long long>(x); }
inline double __longlong_as_double(long long x) { return bits_as<double>(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __ffs(int x) { return __builtin_ffs(x); }

// ---- where a thread is, and how it meets the others ----------------------------------------------------------------

extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs

namespace emulation {

constexpr int kLanes = 32;

// A meeting: what kind, where in the source, of whom, and what the lane brings.
struct Meeting {
  const char *kind, *file;
  int line;
  unsigned mask;
  uint64_t value;
};

double *dynamic_shared_memory();

// Waits for the lanes of the mask, then returns what each of them brought.
const uint64_t *meet(const Meeting &meeting);
void meet_block(const char *file, int line);

int run(dim3 grid, dim3 block, size_t shared, const std::function<void()> &thread);

template <class T>
uint64_t packed(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T unpacked(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline int own_lane() { return static_cast<int>(threadIdx.x % kLanes); }

template <class T>
T exchange(const char *kind, unsigned mask, T value, int source, const char *file, int line) {
  const uint64_t *all = meet({kind, file, line, mask, packed(value)});
  return unpacked<T>(all[source]);
}

}  // namespace emulation

#define shared_doubles emulation::dynamic_shared_memory()

#define EMULATION_SITE const char *file = __builtin_FILE(), int line = __builtin_LINE()

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, EMULATION_SITE) {
  const int own = emulation::own_lane(), first = own / width * width;
  return emulation::exchange("__shfl_sync", mask, value, first + (lane & (width - 1)), file, line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32, EMULATION_SITE) {
  const int own = emulation::own_lane(), source = own - delta;
  return emulation::exchange("__shfl_up_sync", mask, value, source < own / width * width ? own : source, file, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, EMULATION_SITE) {
  const int own = emulation::own_lane(), source = own ^ lanes;
  return emulation::exchange("__shfl_xor_sync", mask, value, source / width > own / width ? own : source, file, line);
}
inline unsigned __ballot_sync(unsigned mask, bool yes, EMULATION_SITE) {
  const uint64_t *all = emulation::meet({"__ballot_sync", file, line, mask, yes});
  unsigned votes = 0;
  for (int lane = 0; lane < emulation::kLanes; ++lane) votes |= (mask >> lane & 1 && all[lane] ? 1u : 0u) << lane;
  return votes;
}
inline bool __any_sync(unsigned mask, bool yes, EMULATION_SITE) { return __ballot_sync(mask, yes, file, line) != 0; }
inline bool __all_sync(unsigned mask, bool yes, EMULATION_SITE) { return __ballot_sync(mask, yes, file, line) == mask; }
inline void __syncwarp(unsigned mask = 0xffffffffu, EMULATION_SITE) {
  emulation::meet({"__syncwarp", file, line, mask, 0});
}
inline void __syncthreads(EMULATION_SITE) { emulation::meet_block(file, line); }

// ---- the runtime ---------------------------------------------------------------------------------------------------

using cudaStream_t = void *;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
const char *cudaGetErrorString(cudaError_t error);

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Parameters...), Arguments &&...given) {
  if (config->dynamicSmemBytes > 48 * 1024 || config->blockDim.x > 1024 || config->gridDim.x == 0)
    return cudaErrorInvalidValue;
  return emulation::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, [&] { kernel(given...); });
}
