// A row in the registers of its group: eight neighbouring experts a lane, its softmax, and the tilt.
//
// Eight experts a lane make one 128-bit load of half types (two of float), a polynomial of degree 8 as a lane's leaf of
// the tree, and a table of eight states to choose from, which registers still hold. E = 64 is then 8 lanes, four rows
// a warp: 16384 rows fill 31 warps on each of an H200's 132 multiprocessors. One lane a row would need fewer
// instructions still, but only four warps a multiprocessor, each a chain of thousands of dependent steps, and its table
// would not fit.
#pragma once

#include "launch.cuh"

namespace probmoe {

constexpr int kSlots = 8;  // experts a lane
constexpr int kTreeMaxExperts = kSlots * kWarp;

// Elements in one access: 8 or 4 neighbours where the layout allows it for all rows, else single ones.
inline int access_width(pm_dtype type, const void *data, int64_t experts, int64_t stride) {
  const int64_t bytes = type == PM_F64 ? 8 : type == PM_F32 ? 4 : 2;
  for (int width = kSlots; width >= 4; width /= 2) {
    const int64_t access = width * bytes > 16 ? 16 : width * bytes;
    if (experts % width == 0 && stride * bytes % access == 0 && reinterpret_cast<uintptr_t>(data) % access == 0)
      return width;
  }
  return 1;
}

__device__ __forceinline__ float2 unpack(uint32_t bits, pm_dtype type) {
  if (type == PM_BF16) return make_float2(__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u));
  const __half2 pair = *reinterpret_cast<const __half2 *>(&bits);
  return __half22float2(pair);
}

__device__ __forceinline__ uint32_t pack(float low, float high, pm_dtype type) {
  uint32_t bits;
  if (type == PM_BF16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    bits = *reinterpret_cast<const uint32_t *>(&pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    bits = *reinterpret_cast<const uint32_t *>(&pair);
  }
  return bits;
}

// Experts first .. first + 7 of the row that begins at element `row`; `fill` past the end.
__device__ __forceinline__ void load_slots(const void *data, pm_dtype type, int width, int64_t row, int first,
                                           int experts, float fill, float (&x)[kSlots]) {
  const bool half = type == PM_BF16 || type == PM_F16;
  if (width == 1) {
#pragma unroll
    for (int n = 0; n < kSlots; ++n) x[n] = first + n < experts ? read<float>(data, type, row + first + n) : fill;
  } else if (half && width == kSlots) {
    uint4 bits = {};
    const bool real = first < experts;
    if (real) bits = *reinterpret_cast<const uint4 *>(static_cast<const uint16_t *>(data) + row + first);
    const uint32_t word[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float2 pair = unpack(word[n], type);
      x[2 * n] = real ? pair.x : fill;
      x[2 * n + 1] = real ? pair.y : fill;
    }
  } else {
#pragma unroll
    for (int part = 0; part < kSlots; part += 4) {
      float4 four = make_float4(fill, fill, fill, fill);
      if (first + part < experts) {
        if (half) {
          const uint2 bits = *reinterpret_cast<const uint2 *>(static_cast<const uint16_t *>(data) + row + first + part);
          const float2 low = unpack(bits.x, type), high = unpack(bits.y, type);
          four = make_float4(low.x, low.y, high.x, high.y);
        } else {
          four = *reinterpret_cast<const float4 *>(static_cast<const float *>(data) + row + first + part);
        }
      }
      x[part] = four.x, x[part + 1] = four.y, x[part + 2] = four.z, x[part + 3] = four.w;
    }
  }
}

__device__ __forceinline__ void store_slots(void *data, pm_dtype type, int width, int64_t row, int first, int experts,
                                            const float (&x)[kSlots]) {
  const bool half = type == PM_BF16 || type == PM_F16;
  if (width == 1) {
#pragma unroll
    for (int n = 0; n < kSlots; ++n)
      if (first + n < experts) write(data, type, row + first + n, x[n]);
  } else if (half && width == kSlots) {
    if (first < experts)
      *reinterpret_cast<uint4 *>(static_cast<uint16_t *>(data) + row + first) =
          make_uint4(pack(x[0], x[1], type), pack(x[2], x[3], type), pack(x[4], x[5], type), pack(x[6], x[7], type));
  } else {
#pragma unroll
    for (int part = 0; part < kSlots; part += 4) {
      if (first + part >= experts) continue;
      if (half)
        *reinterpret_cast<uint2 *>(static_cast<uint16_t *>(data) + row + first + part) =
            make_uint2(pack(x[part], x[part + 1], type), pack(x[part + 2], x[part + 3], type));
      else
        *reinterpret_cast<float4 *>(static_cast<float *>(data) + row + first + part) =
            make_float4(x[part], x[part + 1], x[part + 2], x[part + 3]);
    }
  }
}

// A lane's experts and the row's softmax exp(x - largest) / sum. Experts past the end are masked ones. A poisoned row
// (NaN, +inf, too few unmasked experts) is computed as zeros, so that it cannot trap, and answered with NaN.
template <class R, int N>
struct Row {
  R x[N];
  R largest, sum, inverse;  // largest is 0 and inverse is 0 where all experts are masked
  bool poison;
};

// Whether the row is poisoned; its experts are then zeros.
template <class R, int N>
__device__ __forceinline__ bool settle(const Group &group, int first, int experts, int k_min, R (&x)[N]) {
  bool bad = false, masked = false;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    bad |= !(x[n] < static_cast<R>(INFINITY));
    masked |= x[n] == static_cast<R>(-INFINITY);
  }
  bool poison = group_vote(group, bad) != 0;
  if (__any_sync(kAllLanes, masked)) {
    int unmasked = 0;
#pragma unroll
    for (int n = 0; n < N; ++n) unmasked += x[n] > static_cast<R>(-INFINITY);
    poison |= group_sum(group, unmasked) < k_min;
  }
  if (poison) {
#pragma unroll
    for (int n = 0; n < N; ++n) x[n] = first + n < experts ? R(0) : static_cast<R>(-INFINITY);
  }
  return poison;
}

template <class R, int N>
__device__ __forceinline__ void finish_row(const Group &group, int first, int experts, int k_min, Row<R, N> &row) {
  row.poison = settle(group, first, experts, k_min, row.x);
  R largest = -INFINITY;
#pragma unroll
  for (int n = 0; n < N; ++n) largest = row.x[n] > largest ? row.x[n] : largest;
  largest = group_max(group, largest);
  row.largest = largest == static_cast<R>(-INFINITY) ? R(0) : largest;
  row.sum = 0;
#pragma unroll
  for (int n = 0; n < N; ++n) row.sum += exponential(row.x[n] - row.largest);
  row.sum = group_sum(group, row.sum);
  row.inverse = row.sum > 0 ? R(1) / row.sum : R(0);
}

// One draw of the mode: the largest logit that is left (ties: the lowest expert), which it takes out by setting it to
// -inf. Returns -inf when none is left.
template <class R, int N>
__device__ __forceinline__ R take_largest(const Group &group, R (&x)[N], int *expert) {
  R best = x[0];
  int at = 0;
#pragma unroll
  for (int n = 1; n < N; ++n)
    if (x[n] > best) best = x[n], at = n;
  const R largest = group_max(group, best);
  const int lane = __ffs(static_cast<int>(group_vote(group, best == largest))) - 1;
#pragma unroll
  for (int n = 0; n < N; ++n)
    if (group.lane == lane && n == at) x[n] = static_cast<R>(-INFINITY);
  *expert = from_lane(group, group.lane * N + at, lane);
  return largest;
}

}  // namespace probmoe
