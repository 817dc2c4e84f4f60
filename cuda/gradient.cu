// Marginals and their covariance, the gradient of routing included: up the tree, down again, and back over each lane's
// experts. Nothing but the logits is kept from the forward pass: recomputing its 8 + log2(lanes) products is cheaper
// than the E (k + 1) numbers a row that a table would read and write.
#include "kernels.cuh"
#include "tree.cuh"

namespace probmoe {
namespace {

constexpr int kThreads = 128;

// How wide the accesses to each of the [T, E] arrays are.
struct Widths {
  int in, vector, out;
};

// w_i sum_j A_{i-1}[j] B_{i+1}[j+1], or its derivative in the direction v less `slope` times it, over Z: the prefix A
// is the lane's own, the adjoint B starts from what all other lanes and the sizes leave to each power of the lane's.
template <int K, bool kPlain, bool kTangent>
__device__ __forceinline__ void adjoint(const Group &group, const Factors &factors, const float (&v)[kSlots], int k_min,
                                        int k_max, float (&result)[kSlots]) {
  using P = Poly<K, kPlain, kTangent>;
  const bool only_last = k_min == K;
  const P own = leaf<K, kPlain, kTangent>(factors, v), others = product_of_others(group, own);
  float sizes[K + 1], B[K + 1], dB[K + 1], total = 0, slope = 0;
  if (!only_last) weigh_sizes<K>(factors, k_min, k_max, sizes);
  weights_outside<K>(sizes, only_last, others.c, B);
#pragma unroll
  for (int c = 0; c <= K; ++c) total = fmaf(own.c[c], B[c], total);
  const float inverse = 1 / total;
  if constexpr (kTangent) {
    weights_outside<K>(sizes, only_last, others.d, dB);
#pragma unroll
    for (int c = 0; c <= K; ++c) slope = fmaf(own.d[c], B[c], fmaf(own.c[c], dB[c], slope));
    slope *= inverse;
#pragma unroll
    for (int c = 0; c <= K; ++c) dB[c] = fmaf(-slope, B[c], dB[c]);
  }
  P before[kSlots];
  before[0] = one<K, kPlain, kTangent>();
#pragma unroll
  for (int n = 1; n < kSlots; ++n) {
    before[n] = before[n - 1];
    times_factor(before[n], n - 1, factors.w[n - 1], factors.q[n - 1], v[n - 1]);
  }
#pragma unroll
  for (int n = kSlots - 1; n >= 0; --n) {
    const float w = factors.w[n], q = factors.q[n];
    const P &A = before[n];
    float sum = 0;
#pragma unroll
    for (int j = 0; j < K; ++j) {  // A has degree n, so that powers of B above n + 1 have no part in what is left
      if (j > n) continue;
      if constexpr (kTangent) {
        const float inner = fmaf(v[n], B[j + 1], dB[j + 1]);
        sum = fmaf(A.c[j], inner, fmaf(A.d[j], B[j + 1], sum));
        dB[j] = fmaf(w, inner, kPlain ? dB[j] : q * dB[j]);
      } else {
        sum = fmaf(A.c[j], B[j + 1], sum);
      }
      B[j] = fmaf(w, B[j + 1], kPlain ? B[j] : q * B[j]);
    }
    if constexpr (!kPlain) {  // the power K has none above it
      if (K <= n) {
        if constexpr (kTangent) dB[K] *= q;
        B[K] *= q;
      }
    }
    result[n] = w * (sum * inverse);
  }
}

// C v. For exact k, C 1 = 0: v is centred first, which keeps the tangents small and with them the
// rounding.
template <int K, bool kPlain>
__device__ __forceinline__ void covariance(const Group &group, const Factors &factors, float (&v)[kSlots], int k_min,
                                           int k_max, float (&result)[kSlots]) {
  if (k_min == k_max) {
    float mass = 0, moment = 0;
#pragma unroll
    for (int n = 0; n < kSlots; ++n) mass += factors.w[n], moment = fmaf(factors.w[n], v[n], moment);
    mass = group_sum(group, mass);
    moment = group_sum(group, moment);
    const float centre = mass > 0 ? moment / mass : 0.0f;
#pragma unroll
    for (int n = 0; n < kSlots; ++n) v[n] -= centre;
  }
  adjoint<K, kPlain, true>(group, factors, v, k_min, k_max, result);
}

// What the weights' gradient sends to each softmax probability s: h s into v (every expert) and h s z into direct, h
// as in probmoe.h.
__device__ __forceinline__ void upstream(const Group &group, const Job &job, const float (&s)[kSlots],
                                         float (&v)[kSlots], float (&direct)[kSlots]) {
  const int k_max = static_cast<int>(job.shape.k_max), experts = static_cast<int>(job.shape.experts);
  const int64_t from = group.row * k_max;
  bool chosen[kSlots] = {};
#pragma unroll
  for (int n = 0; n < kSlots; ++n) v[n] = 0;
  for (int base = 0; base < k_max; base += group.size) {  // a slot a lane, then each lane looks for its own experts
    const int slot = base + group.lane;
    int at = experts;
    float g = 0;
    if (slot < k_max) {
      const int64_t index = job.indices[from + slot];
      if (index >= 0 && index < experts)
        at = static_cast<int>(index), g = read<float>(job.vector, job.dtype, from + slot);
    }
    for (int lane = 0; lane < group.size && base + lane < k_max; ++lane) {
      const int offset = from_lane(group, at, lane) - group.lane * kSlots;
      const float value = from_lane(group, g, lane);
#pragma unroll
      for (int n = 0; n < kSlots; ++n)
        if (offset == n && group.lane * kSlots + n < experts) v[n] = value, chosen[n] = true;
    }
  }
  float mean = 0, divisor = 1;
  if (job.normalize) {
    float sum = 0;
#pragma unroll
    for (int n = 0; n < kSlots; ++n)
      if (chosen[n]) sum += s[n], mean = fmaf(s[n], v[n], mean);
    sum = group_sum(group, sum);
    mean = group_sum(group, mean);
    divisor = sum > 0 ? sum : 1.0f;
    mean = sum > 0 ? mean / sum : 0.0f;  // g.w
  }
#pragma unroll
  for (int n = 0; n < kSlots; ++n) {
    direct[n] = chosen[n] ? s[n] * ((v[n] - mean) / divisor) : 0.0f;
    v[n] = chosen[n] ? direct[n] : -s[n] * (mean / divisor);
  }
}

// One form of the kernels below, from loads to stores: the plain one for all rows that it is safe for, the scaled one
// for those that are not (`wanted`). The second starts afresh, so that it costs the first no registers. Returns whether
// the row has been answered.
template <int K, bool kPlain, bool kTangent>
__device__ __forceinline__ bool pass(const Job &job, const PlainLimits &limits, const Group &group, Widths widths,
                                     bool routing, bool wanted) {
  const int k_min = static_cast<int>(job.shape.k_min), k_max = static_cast<int>(job.shape.k_max);
  const int experts = static_cast<int>(job.shape.experts), first = group.lane * kSlots;
  Row<float, kSlots> row;
  load_slots(job.logits, job.dtype, widths.in, group.row * job.shape.stride, first, experts, -INFINITY, row.x);
  finish_row(group, first, experts, k_min, row);
  float v[kSlots] = {}, result[kSlots] = {};
  // The part of the gradient that needs no recursion waits in shared memory, a column a thread: eight registers fewer.
  float *direct = reinterpret_cast<float *>(shared_memory()) + threadIdx.x;
  if (kTangent && routing) {
    float softmax[kSlots], through = 0;
#pragma unroll
    for (int n = 0; n < kSlots; ++n) softmax[n] = exponential(row.x[n] - row.largest) * row.inverse;
    upstream(group, job, softmax, v, result);
#pragma unroll
    for (int n = 0; n < kSlots; ++n) through += result[n];
    through = group_sum(group, through);
#pragma unroll
    for (int n = 0; n < kSlots; ++n) direct[n * kThreads] = fmaf(-softmax[n], through, result[n]);
  } else if (kTangent) {
    load_slots(job.vector, job.dtype, widths.vector, group.row * experts, first, experts, 0.0f, v);
  }
  if (!routing || job.marginal) {
    Factors factors;
    if constexpr (kPlain)
      wanted = plain_factors(group, row, k_min, k_max, limits, factors);
    else
      scaled_factors(group, row, k_min, k_max, factors);
    if (!__any_sync(kAllLanes, wanted)) return false;
    if constexpr (kTangent)
      covariance<K, kPlain>(group, factors, v, k_min, k_max, result);
    else
      adjoint<K, kPlain, false>(group, factors, v, k_min, k_max, result);
  }
  if (kTangent && routing) {
#pragma unroll
    for (int n = 0; n < kSlots; ++n) result[n] = (job.marginal ? result[n] : 0.0f) + direct[n * kThreads];
  }
  if (row.poison) {
#pragma unroll
    for (int n = 0; n < kSlots; ++n) result[n] = NAN;
  }
  if (group.active && wanted) store_slots(job.out, job.dtype, widths.out, group.row * experts, first, experts, result);
  return wanted;
}

// Not inlined: the compiler would otherwise mingle the two forms, at twice the registers.
template <int K, bool kTangent>
__device__ __noinline__ void scaled_pass(const Job &job, const PlainLimits &limits, int size, Widths widths,
                                         bool routing, bool wanted) {
  pass<K, false, kTangent>(job, limits, group_of(size, job.shape.rows), widths, routing, wanted);
}

template <int K>
__global__ void __launch_bounds__(kThreads)
    marginals_kernel(const __grid_constant__ Job job, const __grid_constant__ PlainLimits limits, int size,
                     Widths widths) {
  const bool done = pass<K, true, false>(job, limits, group_of(size, job.shape.rows), widths, false, true);
  if (!__all_sync(kAllLanes, done)) scaled_pass<K, false>(job, limits, size, widths, false, !done);
}

template <int K>
__global__ void __launch_bounds__(kThreads, 4)
    gradient_kernel(const __grid_constant__ Job job, const __grid_constant__ PlainLimits limits, int size,
                    Widths widths, bool routing) {
  const bool done = pass<K, true, true>(job, limits, group_of(size, job.shape.rows), widths, routing, true);
  if (!__all_sync(kAllLanes, done)) scaled_pass<K, true>(job, limits, size, widths, routing, !done);
}

Widths widths_of(const Job &job) {
  const pm_shape &shape = job.shape;
  return {access_width(job.dtype, job.logits, shape.experts, shape.stride),
          access_width(job.dtype, job.vector, shape.experts, shape.experts),
          access_width(job.dtype, job.out, shape.experts, shape.experts)};
}

}  // namespace

pm_cuda_status marginals(const Job &job, void *stream) {
  const pm_shape &shape = job.shape;
  const int size = lanes_for((shape.experts + kSlots - 1) / kSlots);
  const auto kernel = shape.k_max <= 4 ? marginals_kernel<4> : marginals_kernel<8>;
  return launch(kernel, shape.rows, size, kThreads, 0, stream, job, plain_limits(shape), size, widths_of(job));
}

pm_cuda_status gradient(const Job &job, bool routing, void *stream) {
  const pm_shape &shape = job.shape;
  const int size = lanes_for((shape.experts + kSlots - 1) / kSlots);
  // Straight through, k_max plays no part in the instantiation.
  const auto kernel = shape.k_max <= 4 || (routing && !job.marginal) ? gradient_kernel<4> : gradient_kernel<8>;
  return launch(kernel, shape.rows, size, kThreads, kThreads * kSlots * sizeof(float), stream, job, plain_limits(shape),
                size, widths_of(job), routing);
}

}  // namespace probmoe
