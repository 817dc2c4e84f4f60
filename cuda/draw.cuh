// Drawing a subset from a row's tree: the same uniforms, and by inversion the same decisions, as csrc/rows/sample.h.
//
// With j members still to choose among experts 1..n, the last one is the smallest i with A_i[j] > u A_n[j]. In the
// plain form A_i[j] does not decrease in i, so every lane compares its eight states at once and a vote finds the lane:
// j counts down the same way in all rows, hence static indices into the registers. What rounding could still break is
// the order between a lane's own states and the next lane's first (one came by the recursion, the other by the tree); a
// row that finds no possible expert, or none before the last one, says so and walks, as do rows in the scaled form.
#pragma once

#include "philox.h"
#include "tree.cuh"

namespace probmoe {

// Draws 0..7 of the row, spread over the lanes of the group: draw t is in lane t % size (two of them for four lanes).
struct Uniforms {
  float first, second;
};

__device__ __forceinline__ float uniform_at(uint64_t seed, uint64_t row, int draw, uint32_t purpose) {
  return pm_uniform_f32(pm_random_word(seed, row, static_cast<uint32_t>(draw), purpose));
}

template <int K>
__device__ __forceinline__ Uniforms draw_uniforms(const Group &group, uint64_t seed, uint64_t row) {
  Uniforms it;
  it.first = uniform_at(seed, row, group.lane, PM_DRAW_ITEM);
  it.second = K > 4 && group.size == 4 ? uniform_at(seed, row, group.lane + 4, PM_DRAW_ITEM) : it.first;
  return it;
}

__device__ __forceinline__ float uniform_of(const Group &group, const Uniforms &all, int draw) {
  return from_lane(group, draw < group.size ? all.first : all.second, draw % group.size);
}

template <int K>
__device__ __forceinline__ float pick(const float (&c)[K + 1], int j) {
  float value = c[0];
#pragma unroll
  for (int n = 1; n <= K; ++n) value = j == n ? c[n] : value;
  return value;
}

// The size of S: the smallest j whose cumulative mass exceeds u Z.
template <int K>
__device__ __forceinline__ int draw_size(const Factors &factors, const float (&all)[K + 1], int k_min, int k_max,
                                         uint64_t seed, uint64_t row) {
  if (k_min == k_max) return k_max;
  float sizes[K + 1];
  weigh_sizes<K>(factors, k_min, k_max, sizes);
  float total = 0;
#pragma unroll
  for (int j = 0; j <= K; ++j) total = fmaf(sizes[j], all[j], total);
  const float level = uniform_at(seed, row, 0, PM_DRAW_SIZE) * total;
  float mass = 0;
  int last = k_min, found = -1;
#pragma unroll
  for (int j = 0; j <= K; ++j) {
    const float step = sizes[j] * all[j];
    if (found < 0 && step > 0) last = j;
    mass += step;
    if (found < 0 && j >= k_min && mass > level) found = last;
  }
  return found < 0 ? last : found;
}

// The members, ascending, in slots 0, 1, ...: `mine` are those in slots `lane` and `lane + size` of the group, left as
// they are beyond the size of the subset. Returns whether the row is answered; otherwise it has to walk.
template <int K>
__device__ __forceinline__ bool draw_by_vote(const Group &group, const Factors &factors, int k_min, int k_max,
                                             uint64_t seed, uint64_t row, int (&mine)[2]) {
  Poly<K, true, false> all, state[kSlots];
  const float still[kSlots] = {};
  state[0] = product_before(group, leaf<K, true, false>(factors, still), &all);
#pragma unroll
  for (int n = 1; n < kSlots; ++n) {
    state[n] = state[n - 1];
    times_factor(state[n], K, factors.w[n - 1], 1.0f, 0.0f);
  }
  // A masked expert is never the answer. The states before and after it are equal, so that the search goes on to the
  // next one; those at the end of the lane have none, and are put out of reach.
  int last = -1;
#pragma unroll
  for (int n = 0; n < kSlots; ++n)
    if (factors.w[n] > 0) last = n;
  if (__any_sync(kAllLanes, last < kSlots - 1)) {
#pragma unroll
    for (int n = 0; n < kSlots; ++n)
#pragma unroll
      for (int j = 1; j <= K; ++j) state[n].c[j] = n > last ? INFINITY : state[n].c[j];
  }
  const Uniforms uniforms = draw_uniforms<K>(group, seed, row);
  const int size = draw_size<K>(factors, all.c, k_min, k_max, seed, row);
  float mass = pick<K>(all.c, size);
  bool sound = mass > 0 || size == 0;
  int limit = kTreeMaxExperts;  // the member after
#pragma unroll
  for (int j = K; j > 0; --j) {
    if (j > k_max) continue;  // uniform
    const bool now = j <= size;
    const float level = level_of(uniform_of(group, uniforms, now ? size - j : 0), mass);
    float below = state[0].c[j - 1];
    int at = 0;
#pragma unroll
    for (int n = 1; n < kSlots; ++n)
      if (state[n].c[j] <= level) at = n, below = state[n].c[j - 1];
    const unsigned votes = group_vote(group, state[0].c[j] <= level && below > 0);
    const int lane = 31 - __clz(static_cast<int>(votes | 1u));
    const int expert = from_lane(group, group.lane * kSlots + at, lane);
    sound &= !now || (votes != 0 && expert < limit);
    below = from_lane(group, below, lane);
    if (!now) continue;
    mass = below, limit = expert;
    if (group.lane == j - 1) mine[0] = expert;
    if (group.lane + group.size == j - 1) mine[1] = expert;
  }
  return sound;
}

// The same expert by expert, from the last, for any factors: U is divided by the q of each one that is passed over, as
// csrc/rows/sample.h does for such factors. One lane at a time, in all groups of the warp together, and half of its
// experts at a time, for the sake of registers; a member is written by the lane that owns it. Slots that nothing was
// found for (there are none but by underflow) keep 0, 1, 2, ...
template <int K>
__device__ __forceinline__ int draw_by_walk(const Group &group, const Factors &factors, int k_min, int k_max,
                                            uint64_t seed, uint64_t row, bool wanted, int64_t *members) {
  constexpr int kHalf = kSlots / 2;
  using P = Poly<K, false, false>;
  P all;
  const float still[kSlots] = {};
  const P before = product_before(group, leaf<K, false, false>(factors, still), &all);
  const int size = draw_size<K>(factors, all.c, k_min, k_max, seed, row);
  if (wanted)
    for (int j = group.lane; j < k_max; j += group.size) members[j] = j;
  __syncwarp();
  int left = wanted ? size : 0;
  float level = left > 0 ? level_of(uniform_at(seed, row, 0, PM_DRAW_ITEM), pick<K>(all.c, size)) : 0.0f;
  for (int lane = group.size - 1; lane >= 0; --lane) {
#pragma unroll 1
    for (int half = group.lane == lane ? 1 : -1; half >= 0; --half) {
      P state[kHalf];
      float w[kHalf], q[kHalf];
      state[0] = before;
#pragma unroll
      for (int n = 0; n < kHalf; ++n) {
        if (half) times_factor(state[0], K, factors.w[n], factors.q[n], 0.0f);
        w[n] = half ? factors.w[kHalf + n] : factors.w[n];
        q[n] = half ? factors.q[kHalf + n] : factors.q[n];
      }
#pragma unroll
      for (int n = 1; n < kHalf; ++n) {
        state[n] = state[n - 1];
        times_factor(state[n], K, w[n - 1], q[n - 1], 0.0f);
      }
#pragma unroll
      for (int n = kHalf - 1; n >= 0; --n) {
        if (left == 0) continue;
        const float mass = pick<K>(state[n].c, left), rest = q[n] * mass, reach = pick<K>(state[n].c, left - 1);
        if (!(level < rest)) {
          if (w[n] * reach > 0) {
            members[--left] = group.lane * kSlots + half * kHalf + n;
            level = left > 0 ? level_of(uniform_at(seed, row, size - left, PM_DRAW_ITEM), reach) : 0.0f;
            continue;
          }
          level = rest;  // an expert that cannot enter is passed over, whatever rounding said
        }
        if (q[n] != 1) level = q[n] > 0 ? level / q[n] : 0.0f;
        if (!(level < mass)) level = mass * (1 - 0x1p-24f);
      }
    }
    left = from_lane(group, left, lane);
    level = from_lane(group, level, lane);
  }
  __syncwarp();
  return size;
}

}  // namespace probmoe
