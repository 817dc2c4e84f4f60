// A row of any shape in double precision: the sequential recursion, its coefficients spread over the lanes of a group.
//
// Expert by expert, A[j] <- q A[j] + w A[j-1] for all j at once: E steps of (k_max + 1) / lanes cells. That is slower
// than the tree, whose products cost K^2 and whose polynomials must fit registers, but has no bound on k. The factors
// are scaled as in tree.cuh; E <= 1024 keeps even C(1024, 512) = 4.5e306 in the range of double, and starting the
// recursion from 2^-256 makes room for the tangents as well.
//
// States are kept for a segment of sqrt(E) experts, and one before each segment, from which the way back recomputes it:
// 5 KB a row at (64, 8), so that they lie in shared memory for all shapes of practice; in the scratch for others.
#pragma once

#include "row.cuh"

namespace probmoe {

struct Layout {
  int cells;  // of a state with its tangent
  int segment, segments;
  int64_t doubles;  // of one row
};

inline __host__ __device__ Layout layout_of(int64_t experts, int64_t k_max) {
  int segment = 1;
  while (segment * segment < experts) ++segment;
  const int cells = 2 * static_cast<int>(k_max + 1), segments = static_cast<int>((experts + segment - 1) / segment);
  // x, w, q, v, direct; sizes; two adjoints; a checkpoint a segment; a segment's states
  return {cells, segment, segments, 5 * experts + k_max + 1 + cells * static_cast<int64_t>(2 + segments + segment + 1)};
}

struct General {
  Group group;
  int E, a, b, base;
  Layout layout;
  double *x, *w, *q, *v, *direct, *sizes, *adjoint, *checkpoints, *table;
  double pivot, largest, inverse, start, total;
  bool poison;

  __device__ __forceinline__ General(const Group &its_group, const pm_shape &shape, double *space) : group(its_group) {
    E = static_cast<int>(shape.experts), a = static_cast<int>(shape.k_min), b = static_cast<int>(shape.k_max);
    layout = layout_of(E, b);
    x = space, w = x + E, q = w + E, v = q + E, direct = v + E, sizes = direct + E;
    adjoint = sizes + b + 1, checkpoints = adjoint + 2 * layout.cells;
    table = checkpoints + static_cast<int64_t>(layout.segments) * layout.cells;
    start = E > 512 ? 0x1p-256 : 1.0;
  }

  // body(i) for the experts (or whatever there are `count` of) of this lane.
  template <class Body>
  __device__ __forceinline__ void each(int count, const Body &body) const {
    for (int i = group.lane; i < count; i += group.size) body(i);
  }

  __device__ __forceinline__ double softmax(int i) const { return exp(x[i] - largest) * inverse; }

  __device__ void load(const Job &job) {
    bool bad = false;
    int unmasked = 0;
    double most = -INFINITY;
    each(E, [&](int i) {
      const double value = read<double>(job.logits, job.dtype, group.row * job.shape.stride + i);
      bad |= !(value < static_cast<double>(INFINITY));
      unmasked += value > static_cast<double>(-INFINITY);
      most = value > most ? value : most;
      x[i] = value;
    });
    poison = group_vote(group, bad) != 0;
    poison |= group_sum(group, unmasked) < a;
    most = group_max(group, most);
    largest = poison || most == static_cast<double>(-INFINITY) ? 0 : most;
    double sum = 0;
    each(E, [&](int i) {
      if (poison) x[i] = 0;
      sum += exp(x[i] - largest);
    });
    sum = group_sum(group, sum);
    inverse = sum > 0 ? 1 / sum : 0;
    __syncwarp();
  }

  // The j-th largest logit, bit by bit from the top of its order-preserving code.
  __device__ double nth_largest(int j, bool wide) const {
    const auto code = [wide](double value) -> uint64_t {
      if (wide) {
        const uint64_t bits = static_cast<uint64_t>(__double_as_longlong(value));
        return bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
      }
      const uint32_t bits = __float_as_uint(static_cast<float>(value));
      return bits >> 31 ? ~bits : bits | 1u << 31;
    };
    uint64_t found = 0;
    for (uint64_t bit = uint64_t{1} << (wide ? 63 : 31); bit; bit >>= 1) {
      int count = 0;
      each(E, [&](int i) { count += code(x[i]) >= (found | bit); });
      if (group_sum(group, count) >= j) found |= bit;
    }
    if (wide) return __longlong_as_double(static_cast<long long>(found >> 63 ? found & ~(uint64_t{1} << 63) : ~found));
    const uint32_t bits = static_cast<uint32_t>(found);
    return static_cast<double>(__uint_as_float(bits >> 31 ? bits & 0x7fffffffu : ~bits));
  }

  // Tilt, factors and sizes: as scaled_factors in tree.cuh.
  __device__ void tilt(bool wide) {
    const double last_low = a > 0 ? nth_largest(a, wide) : 0, last_high = b > a ? nth_largest(b, wide) : last_low;
    const bool below = a > 0 && !(last_low > 0), above = b > 0 && last_high > 0;
    base = below && !above ? a : b;
    pivot = b == 0 || !(a == b || below || above) ? 0 : base == a ? last_low : last_high;
    each(E, [&](int i) {
      if (b == 0) x[i] = -INFINITY;  // only the empty set: as if every expert were masked
      const double over = x[i] - pivot, smaller = exp(-fabs(over));
      w[i] = over > 0 ? 1 : smaller;
      q[i] = over > 0 ? smaller : 1;
    });
    each(b + 1, [&](int j) {
      sizes[j] = j < a ? 0 : a == b || pivot == 0 ? 1 : tilt_power(pivot, 0.0, static_cast<double>(j - base));
    });
    __syncwarp();
  }

  __device__ __forceinline__ void advance(const double *from, double *to, int i, bool tangent) const {
    const double wi = w[i], qi = q[i], vi = tangent ? v[i] : 0;
    each(b + 1, [&](int j) {
      const double below = j > 0 ? from[j - 1] : 0;
      to[j] = fma(wi, below, qi * from[j]);
      if (!tangent) return;
      const double inner = fma(vi, below, j > 0 ? from[b + j] : 0);
      to[b + 1 + j] = fma(wi, inner, qi * from[b + 1 + j]);
    });
    __syncwarp();
  }

  __device__ __forceinline__ int begin_of(int s) const { return s * layout.segment; }
  __device__ __forceinline__ int end_of(int s) const {
    return s + 1 == layout.segments ? E : begin_of(s) + layout.segment;
  }

  // The states before each expert of segment s, and after its last, from its checkpoint.
  __device__ void fill(int s, bool tangent) const {
    each(layout.cells, [&](int c) { table[c] = checkpoints[static_cast<int64_t>(s) * layout.cells + c]; });
    __syncwarp();
    double *state = table;
    for (int i = begin_of(s); i < end_of(s); ++i, state += layout.cells)
      advance(state, state + layout.cells, i, tangent);
  }

  __device__ __forceinline__ const double *last_state() const {
    return table + static_cast<int64_t>(E - begin_of(layout.segments - 1)) * layout.cells;
  }

  // All checkpoints and the last segment; sets total.
  __device__ void prefix(bool tangent) {
    each(layout.cells, [&](int c) { checkpoints[c] = c == 0 ? start : 0; });
    __syncwarp();
    for (int s = 0; s < layout.segments; ++s) {
      fill(s, tangent);
      if (s + 1 == layout.segments) break;
      const double *state = table + static_cast<int64_t>(layout.segment) * layout.cells;
      double *next = checkpoints + static_cast<int64_t>(s + 1) * layout.cells;
      each(layout.cells, [&](int c) { next[c] = state[c]; });
      __syncwarp();
    }
    double sum = 0;
    each(b + 1, [&](int j) { sum = fma(sizes[j], last_state()[j], sum); });
    total = group_sum(group, sum);
  }

  // Back over the experts. `adjoint` holds B_{E+1}, with a tangent dB_{E+1} behind it, on entry (synchronised). Calls
  // body(i, in, out) in every lane, with in = sum_j A_{i-1}[j] B_{i+1}[j+1] or its tangent (w_i not yet multiplied),
  // and without a tangent out = sum_j A_{i-1}[j] B_{i+1}[j].
  template <class Body>
  __device__ void back(bool tangent, const Body &body) const {
    double *B = adjoint, *next = adjoint + layout.cells;
    for (int s = layout.segments - 1; s >= 0; --s) {
      if (s + 1 < layout.segments) fill(s, tangent);
      for (int i = end_of(s) - 1; i >= begin_of(s); --i) {
        const double *A = table + static_cast<int64_t>(i - begin_of(s)) * layout.cells;
        const double wi = w[i], qi = q[i], vi = tangent ? v[i] : 0;
        double in = 0, out = 0;
        each(b + 1, [&](int j) {
          const double above = j < b ? B[j + 1] : 0;
          next[j] = fma(wi, above, qi * B[j]);
          if (tangent) {
            const double inner = fma(vi, above, j < b ? B[b + 2 + j] : 0);
            in = fma(A[j], inner, fma(A[b + 1 + j], above, in));
            next[b + 1 + j] = fma(wi, inner, qi * B[b + 1 + j]);
          } else {
            in = fma(A[j], above, in);
            out = fma(A[j], B[j], out);
          }
        });
        in = group_sum(group, in);
        if (!tangent) out = group_sum(group, out);
        __syncwarp();
        body(i, in, out);
        double *old = B;
        B = next, next = old;
      }
    }
  }
};

}  // namespace probmoe
