// csrc/gamma_numerics.h for kernels: its functions on single numbers, `float` and `double` side by side as overloads,
// so that a draw and its derivative have the CPU's bits; and what the kernels of the Gamma and Dirichlet family share.
#pragma once

#include "kernels.cuh"
#include "numerics.cuh"
#include "philox.h"

#define PM_APART __device__ __forceinline__  // a kernel has one call of each: nothing to share, registers to pass

namespace probmoe {

// Philox's counter of an element, but for its column and attempt.
struct element_counter {
  uint64_t seed, row;
  uint32_t purpose;
};

__device__ __forceinline__ void philox_words(const element_counter &at, uint32_t first, uint32_t low,
                                             uint32_t (&words)[4]) {
  words[0] = first, words[1] = static_cast<uint32_t>(at.row), words[2] = static_cast<uint32_t>(at.row >> 32);
  words[3] = at.purpose + low;
  pm_philox(at.seed, words);
}

#define PM_GAMMA_NUMBERS                                               \
  PM_ALWAYS_INLINE bool any(vmask mask) { return mask != 0; }          \
  PM_ALWAYS_INLINE vmask not_(vmask mask) { return mask == 0; }        \
  PM_ALWAYS_INLINE real min_(real a, real b) { return a < b ? a : b; } \
  PM_ALWAYS_INLINE real sqrt_(real x) { return ::sqrt(x); }

// log g: the first attempt, and then what it takes.
#define PM_GAMMA_DRAW                                                                                        \
  PM_ALWAYS_INLINE real draw_log_gamma(real alpha, const element_counter *counter, uint32_t column) {        \
    const gamma_shape shape = gamma_shape_of(alpha);                                                         \
    real log_root, boost;                                                                                    \
    const vmask pending = begin_gamma(alpha, &shape, counter, column, &log_root, &boost);                    \
    return log_gamma_from(alpha, &shape, retry_gamma(&shape, counter, column, 1, pending, log_root), boost); \
  }

namespace single_precision {
#define PM_REAL_BITS 32
#include "precision.h"
typedef uint32_t vword;
PM_ALWAYS_INLINE void element_words(const element_counter *at, uint32_t first, vword (&words)[4]) {
  philox_words(*at, first, 0, words);
}
PM_GAMMA_NUMBERS
#include "gamma_numerics.h"
PM_GAMMA_DRAW
#undef PM_REAL_BITS
}  // namespace single_precision

namespace double_precision {
#define PM_REAL_BITS 64
#include "precision.h"
struct vword {
  uint32_t high, low;
};
PM_ALWAYS_INLINE void element_words(const element_counter *at, uint32_t first, vword (&words)[4]) {
  uint32_t high[4], low[4];
  philox_words(*at, first, 0, high);
  philox_words(*at, first, 1, low);
  for (int n = 0; n < 4; ++n) words[n] = {high[n], low[n]};
}
PM_ALWAYS_INLINE uint64_t leading_bits(vword word) { return uint64_t{word.high} << 20 | word.low >> 12; }
PM_GAMMA_NUMBERS
#include "gamma_numerics.h"
PM_GAMMA_DRAW
#undef PM_REAL_BITS
}  // namespace double_precision

using double_precision::gamma_at, double_precision::gamma_values, double_precision::log_of_value;
using single_precision::bregman, double_precision::bregman;
using single_precision::bregman_slopes_at, double_precision::bregman_slopes_at;
using single_precision::draw_log_gamma, double_precision::draw_log_gamma;
using single_precision::log_gamma_slope, double_precision::log_gamma_slope;
using single_precision::mixed, double_precision::mixed;
using single_precision::relaxed_gate, double_precision::relaxed_gate;
using single_precision::standard_gamma_slope, double_precision::standard_gamma_slope;

// ---- one call ------------------------------------------------------------------------------------------------------

// As pm_law_job of csrc/kernels.h: concentrations in rows of the shape's stride, all else dense.
struct LawJob {
  pm_shape shape;
  pm_dtype dtype;
  const void *concentration;
  const void *other;  // the variates, the value, or the second law's concentration
  const void *total;  // the logarithm of each row's sum of Gamma variates
  const void *grad;
  const int64_t *seed;  // on the device
  void *out;
  void *out_other;
};

__device__ __forceinline__ element_counter counter_of(const int64_t *seed, const pm_shape &shape, int64_t row,
                                                      uint32_t purpose) {
  return {static_cast<uint64_t>(*seed), static_cast<uint64_t>(shape.first_row + row), purpose};
}

// body(i) for the experts of this lane: lane, lane + size, ... Neighbouring lanes read neighbouring elements, 128 bytes
// a warp of float in one access already; wider ones would give a lane four experts to draw one after the other.
template <class Body>
__device__ __forceinline__ void each_expert(const Group &group, int experts, const Body &body) {
  for (int i = group.lane; i < experts; i += group.size) body(i);
}

// Blocks of as many rows as shared memory holds, `bytes` a row: no more than every architecture gives without asking.
inline int threads_for(int size, int64_t bytes) {
  int threads = 128;
  while (threads > kWarp && threads / size * bytes > 48 * 1024) threads /= 2;
  return threads;
}

}  // namespace probmoe
