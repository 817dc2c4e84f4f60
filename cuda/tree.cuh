// The tree: a lane's eight experts as a polynomial, and products of polynomials over the lanes of the group.
//
// Expert i contributes the factor (q_i + w_i X), cut after X^K; the coefficient of X^j of a product is the tilted e_j
// of its experts (csrc/rows/tilt.h). Where the sequential recursion has E dependent steps, the tree has 8 in the lane
// and log2(lanes) products of depth K above them, in registers and shuffles alone: no shared memory, so that occupancy
// is bounded by registers. Its rounding is smaller, too: a coefficient passes through 8 + log2(lanes) sums, not E.
//
// Plain factors (1 + w_i X), w = j0 softmax(x), need no multiplication by q and no second exponential, and are what
// logits of ordinary spread get. Where they could lose something to the range of float, the row is scaled: the tilt is
// its j0-th largest logit, found by selection, and each factor is divided by its larger coefficient, so that Z >= 1
// whatever the logits, and at most C(256, 8) = 4e14. Both are compiled into a kernel; a row's own numbers alone decide.
#pragma once

#include "row.cuh"

namespace probmoe {

// Odds that, when j0 experts have them, bound Z from below far enough for the plain form: for j0 = k_min and k_max.
// What underflows is at most E k exp(k) times the smallest normal number, to be 1e-17 of Z: a marginal of 1e-12 keeps
// its five digits. The logarithms are those of the two sizes.
struct PlainLimits {
  float odds_low, odds_high, log_low, log_high;
};

inline PlainLimits plain_limits(const pm_shape &shape) {
  const double a = static_cast<double>(shape.k_min), b = static_cast<double>(shape.k_max), tiny = 1.17549435e-38;
  const double least = std::log(static_cast<double>(shape.experts) * (b > 0 ? b : 1) * tiny * 1e17) + b;
  return {a > 0 ? static_cast<float>(std::exp(least / a)) : 0.0f,
          b > 0 ? static_cast<float>(std::exp(least / b)) : 0.0f, a > 0 ? static_cast<float>(std::log(a)) : -INFINITY,
          b > 0 ? static_cast<float>(std::log(b)) : -INFINITY};
}

// A lane's factors, and what the sizes weigh: exp(lambda (j - j0)) within the band, lambda = high + low.
struct Factors {
  float w[kSlots], q[kSlots];
  float high, low;
  int base;
  bool tilted;
};

template <int K>
__device__ __forceinline__ void weigh_sizes(const Factors &factors, int k_min, int k_max, float (&sizes)[K + 1]) {
#pragma unroll
  for (int j = 0; j <= K; ++j)
    sizes[j] = j < k_min || j > k_max ? 0.0f
               : factors.tilted       ? tilt_power(factors.high, factors.low, static_cast<float>(j - factors.base))
                                      : 1.0f;
}

// lambda = logsumexp(x) - log j0, j0 = k; in a band 0 as long as the sizes it favours are within, else j0 is the end of
// the band on their side. Returns whether the row loses nothing.
__device__ __forceinline__ bool plain_factors(const Group &group, const Row<float, kSlots> &row, int k_min, int k_max,
                                              const PlainLimits &limits, Factors &it) {
  const bool exact = k_min == k_max;
  float scale = static_cast<float>(k_max), odds = limits.odds_high, low = 0;
  int needed = k_max;
  bool outside = true;
  if (!exact) {
    low = logarithm(row.sum);
    const float mass = row.largest + low;
    const bool below = k_min > 0 && mass <= limits.log_low, above = mass >= limits.log_high;
    outside = below || above;
    needed = outside && !below ? k_max : k_min;
    scale = outside ? static_cast<float>(needed) : exponential(mass);
    odds = needed == k_max ? limits.odds_high : limits.odds_low;
    low -= needed == k_max ? limits.log_high : limits.log_low;
  }
  it.high = row.largest, it.low = low, it.base = needed, it.tilted = !exact && outside;
  scale *= row.inverse;
  int enough = 0;
#pragma unroll
  for (int n = 0; n < kSlots; ++n) {
    it.w[n] = exponential(row.x[n] - row.largest) * scale;
    it.q[n] = 1;
    enough += it.w[n] >= odds;
  }
  return group_sum(group, enough) >= needed;
}

// lambda = the j0-th largest logit: the mode itself has the product 1.
__device__ __forceinline__ void scaled_factors(const Group &group, const Row<float, kSlots> &row, int k_min, int k_max,
                                               Factors &it) {
  float x[kSlots], last_low = 0, last_high = 0;
#pragma unroll
  for (int n = 0; n < kSlots; ++n) x[n] = row.x[n];
  for (int j = 1; j <= k_max; ++j) {
    int expert;
    const float logit = take_largest(group, x, &expert);
    if (j == k_min) last_low = logit;
    if (j == k_max) last_high = logit;
  }
  // Sizes that the untilted law favours: its mode has as many experts as there are positive logits.
  const bool below = k_min > 0 && !(last_low > 0), above = last_high > 0, exact = k_min == k_max;
  const int base = below && !above ? k_min : k_max;
  const float pivot = !(exact || below || above) ? 0.0f : base == k_min ? last_low : last_high;
  it.high = pivot, it.low = 0, it.base = base, it.tilted = !exact && pivot != 0.0f;
#pragma unroll
  for (int n = 0; n < kSlots; ++n) {
    const float above_pivot = row.x[n] - pivot, smaller = exponential(-fabsf(above_pivot));
    it.w[n] = above_pivot > 0 ? 1.0f : smaller;
    it.q[n] = above_pivot > 0 ? smaller : 1.0f;
  }
}

// ---- polynomials ---------------------------------------------------------------------------------------------------

// Coefficients, and with kTangent their derivative in a direction of the logits. Plain ones begin with 1, which is
// neither stored by products nor sent.
template <int K, bool kPlain, bool kTangent>
struct Poly {
  float c[K + 1], d[kTangent ? K + 1 : 1];
};

template <int K, bool kPlain, bool kTangent>
__device__ __forceinline__ Poly<K, kPlain, kTangent> one() {
  Poly<K, kPlain, kTangent> it;
#pragma unroll
  for (int j = 0; j <= K; ++j) {
    it.c[j] = j == 0;
    if constexpr (kTangent) it.d[j] = 0;
  }
  return it;
}

// Times (q + w X), tangent w v X, where the polynomial has degree `degree` before (unrolled by the caller).
template <int K, bool kPlain, bool kTangent>
__device__ __forceinline__ void times_factor(Poly<K, kPlain, kTangent> &it, int degree, float w, float q, float v) {
#pragma unroll
  for (int j = K; j > 0; --j) {
    if (j > degree + 1) continue;
    if constexpr (kTangent) {
      const float inner = fmaf(v, it.c[j - 1], it.d[j - 1]);
      it.d[j] = j > degree ? w * inner : fmaf(w, inner, kPlain ? it.d[j] : q * it.d[j]);
    }
    it.c[j] = j > degree ? w * it.c[j - 1] : fmaf(w, it.c[j - 1], kPlain ? it.c[j] : q * it.c[j]);
  }
  if constexpr (!kPlain) {
    if constexpr (kTangent) it.d[0] *= q;
    it.c[0] *= q;
  }
}

// a times b, cut after X^K, into a.
template <int K, bool kPlain, bool kTangent>
__device__ __forceinline__ void times(Poly<K, kPlain, kTangent> &a, const Poly<K, kPlain, kTangent> &b) {
#pragma unroll
  for (int j = K; j >= (kPlain ? 1 : 0); --j) {  // downwards: lower coefficients of a are still the old ones
    float c = kPlain ? a.c[j] + b.c[j] : a.c[0] * b.c[j], d = 0;
    if constexpr (kTangent) d = kPlain ? a.d[j] + b.d[j] : fmaf(a.d[0], b.c[j], a.c[0] * b.d[j]);
#pragma unroll
    for (int l = 1; l <= (kPlain ? j - 1 : j); ++l) {
      c = fmaf(a.c[l], b.c[j - l], c);
      if constexpr (kTangent) d = fmaf(a.c[l], b.d[j - l], fmaf(a.d[l], b.c[j - l], d));
    }
    a.c[j] = c;
    if constexpr (kTangent) a.d[j] = d;
  }
}

template <int K, bool kPlain, bool kTangent, class Move>
__device__ __forceinline__ Poly<K, kPlain, kTangent> moved(const Poly<K, kPlain, kTangent> &from, const Move &move) {
  Poly<K, kPlain, kTangent> it = one<K, kPlain, kTangent>();
#pragma unroll
  for (int j = kPlain ? 1 : 0; j <= K; ++j) {
    it.c[j] = move(from.c[j]);
    if constexpr (kTangent) it.d[j] = move(from.d[j]);
  }
  return it;
}

// The lane's own experts. From the last to the first: in the other order the compiler would find the states before each
// expert among its partial products, and keep all of them in registers up and down the tree.
template <int K, bool kPlain, bool kTangent>
__device__ __forceinline__ Poly<K, kPlain, kTangent> leaf(const Factors &factors, const float (&v)[kSlots]) {
  Poly<K, kPlain, kTangent> it = one<K, kPlain, kTangent>();
#pragma unroll
  for (int n = 0; n < kSlots; ++n) {
    const int i = kSlots - 1 - n;
    times_factor(it, n, factors.w[i], factors.q[i], v[i]);
  }
  return it;
}

// The product of all other lanes' leaves: up the tree by exchange with the lane across, the siblings' products on the
// way multiplied up (what a pass down the tree would give).
template <int K, bool kPlain, bool kTangent>
__device__ __forceinline__ Poly<K, kPlain, kTangent> product_of_others(const Group &group,
                                                                       Poly<K, kPlain, kTangent> own) {
  const auto across = [](int step) { return [step](float c) { return __shfl_xor_sync(kAllLanes, c, step); }; };
  Poly<K, kPlain, kTangent> others = moved(own, across(1));
  times(own, others);
#pragma unroll 1
  for (int step = 2; step < group.size; step *= 2) {
    const Poly<K, kPlain, kTangent> sibling = moved(own, across(step));
    times(others, sibling);
    if (2 * step < group.size) times(own, sibling);
  }
  return others;
}

// The product of the lanes up to and including this one (Kogge & Stone's scan), then of those before it, and of all.
template <int K, bool kPlain>
__device__ __forceinline__ Poly<K, kPlain, false> product_before(const Group &group, Poly<K, kPlain, false> own,
                                                                 Poly<K, kPlain, false> *all) {
#pragma unroll 1
  for (int step = 1; step < group.size; step *= 2) {
    const int size = group.size;
    const auto left = moved(own, [=](float c) { return __shfl_up_sync(kAllLanes, c, step, size); });
    if (group.lane >= step) times(own, left);
  }
  *all = moved(own, [&](float c) { return from_lane(group, c, group.size - 1); });
  const int size = group.size;
  const auto before = moved(own, [=](float c) { return __shfl_up_sync(kAllLanes, c, 1, size); });
  return group.lane > 0 ? before : one<K, kPlain, false>();
}

// Weights of the lane's own coefficients in Z: V[c] = sum over sizes s of sizes[s] others[s - c].
template <int K>
__device__ __forceinline__ void weights_outside(const float (&sizes)[K + 1], bool only_last,
                                                const float (&others)[K + 1], float (&V)[K + 1]) {
  if (only_last) {  // exact k = K: sizes is the last unit vector
#pragma unroll
    for (int c = 0; c <= K; ++c) V[c] = others[K - c];
    return;
  }
#pragma unroll
  for (int c = 0; c <= K; ++c) {
    V[c] = 0;
#pragma unroll
    for (int s = c; s <= K; ++s) V[c] = fmaf(sizes[s], others[s - c], V[c]);
  }
}

}  // namespace probmoe
