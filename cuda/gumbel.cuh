// What the Gumbel family's kernels share: a row in the registers of its group, and the noise of its experts.
//
// The layout is row.cuh's: N neighbouring experts a lane, N = 8 for up to 256 experts. Here it fits once more: a Philox
// counter has the words of four neighbouring experts, so that every word drawn is used, by the lane that drew it.
// N = 32 takes more experts through the same code; its registers are no matter for shapes that nobody waits for.
#pragma once

#include <type_traits>

#include "kernels.cuh"
#include "numerics.cuh"
#include "philox.h"
#include "row.cuh"

namespace probmoe {

constexpr int kManySlots = PM_CUDA_MAX_EXPERTS / kWarp;
constexpr int64_t kSharedBytes = 48 * 1024;  // what every architecture gives without asking

inline bool temperature_serves(double temperature) {
  return temperature >= PM_MIN_TEMPERATURE && temperature <= PM_MAX_TEMPERATURE;
}

// Blocks that a multiprocessor must have room for: left to itself the compiler spills to make room for more.
template <class R, int N>
constexpr int kBlocks = sizeof(R) == 4 && N == kSlots ? 6 : 2;

// call(R(), slots) with the instantiation for a shape, `slots` an integral constant.
template <class Call>
pm_cuda_status by_shape(const pm_shape &shape, pm_dtype dtype, const Call &call) {
  const std::integral_constant<int, kSlots> few;
  const std::integral_constant<int, kManySlots> many;
  if (shape.experts <= kTreeMaxExperts) return dtype == PM_F64 ? call(double(), few) : call(float(), few);
  return dtype == PM_F64 ? call(double(), many) : call(float(), many);
}

template <int N>
int lanes_of(const pm_shape &shape) {
  return lanes_for((shape.experts + N - 1) / N);
}

// Experts first .. first + N - 1 of the row that begins at element `row`; `fill` past the end.
template <class R, int N>
__device__ __forceinline__ void load_experts(const void *data, pm_dtype type, int width, int64_t row, int first,
                                             int experts, R fill, R (&x)[N]) {
  if constexpr (sizeof(R) == 4) {
#pragma unroll
    for (int part = 0; part < N; part += kSlots) {
      float some[kSlots];
      load_slots(data, type, width, row, first + part, experts, fill, some);
#pragma unroll
      for (int n = 0; n < kSlots; ++n) x[part + n] = some[n];
    }
  } else {
#pragma unroll
    for (int n = 0; n < N; ++n) x[n] = first + n < experts ? read<R>(data, type, row + first + n) : fill;
  }
}

template <class R, int N>
__device__ __forceinline__ void store_experts(void *data, pm_dtype type, int width, int64_t row, int first, int experts,
                                              const R (&x)[N]) {
  if constexpr (sizeof(R) == 4) {
#pragma unroll
    for (int part = 0; part < N; part += kSlots) {
      float some[kSlots];
#pragma unroll
      for (int n = 0; n < kSlots; ++n) some[n] = x[part + n];
      store_slots(data, type, width, row, first + part, experts, some);
    }
  } else {
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (first + n < experts) write(data, type, row + first + n, x[n]);
  }
}

template <class R, int N>
__device__ __forceinline__ void fill_poison(bool poison, R (&x)[N]) {
  if (!poison) return;
#pragma unroll
  for (int n = 0; n < N; ++n) x[n] = static_cast<R>(NAN);
}

// body(n, word) for each of the lane's experts first + n, with the random word of draw first + n: 32 bits in single,
// 64 in double precision. `first` is a multiple of four.
template <class R, int N, class Body>
__device__ __forceinline__ void each_word(const Job &job, int64_t row, int first, uint32_t purpose, const Body &body) {
  const uint64_t seed = static_cast<uint64_t>(*job.seed), number = static_cast<uint64_t>(job.shape.first_row + row);
#pragma unroll
  for (int part = 0; part < N; part += 4) {
    const uint32_t block = static_cast<uint32_t>(first + part) / 4;
    uint32_t word[4] = {block, static_cast<uint32_t>(number), static_cast<uint32_t>(number >> 32), purpose};
    pm_philox(seed, word);
    if constexpr (sizeof(R) == 4) {
#pragma unroll
      for (int n = 0; n < 4; ++n) body(part + n, word[n]);
    } else {
      uint32_t low[4] = {block, static_cast<uint32_t>(number), static_cast<uint32_t>(number >> 32), purpose + 1};
      pm_philox(seed, low);
#pragma unroll
      for (int n = 0; n < 4; ++n) body(part + n, uint64_t{word[n]} << 32 | low[n]);
    }
  }
}

// The keys: logits plus Gumbel noise, the same bits as on the CPU.
template <class R, int N>
__device__ __forceinline__ void perturb(const Job &job, int64_t row, int first, R (&x)[N]) {
  each_word<R, N>(job, row, first, PM_DRAW_GUMBEL, [&](int n, auto word) {
    R u, complement;
    open_uniform(word, &u, &complement);
    x[n] += gumbel_from(u, complement);
  });
}

}  // namespace probmoe
