/* Elementary functions on vectors, beside exp_ of simd.h: those that drawing Gamma variates needs, and in double
 * precision log Gamma and its derivatives. Errors are the largest seen against 50 digits (csrc/tests/test_gamma.c holds
 * them); polynomials are those of gamma_tables.h. */
#ifndef PM_ROWS_ELEMENTARY_H
#define PM_ROWS_ELEMENTARY_H

#include "gamma_tables.h"
#include "simd.h"

#if PM_VECTOR_BYTES == 64 && defined(__AVX512F__) && PM_REAL_BITS == 32
PM_ALWAYS_INLINE vreal sqrt_(vreal x) { return _mm512_sqrt_ps(x); }
#elif PM_VECTOR_BYTES == 64 && defined(__AVX512F__)
PM_ALWAYS_INLINE vreal sqrt_(vreal x) { return _mm512_sqrt_pd(x); }
#elif PM_VECTOR_BYTES == 32 && defined(__AVX2__) && PM_REAL_BITS == 32
PM_ALWAYS_INLINE vreal sqrt_(vreal x) { return _mm256_sqrt_ps(x); }
#elif PM_VECTOR_BYTES == 32 && defined(__AVX2__)
PM_ALWAYS_INLINE vreal sqrt_(vreal x) { return _mm256_sqrt_pd(x); }
#else
PM_ALWAYS_INLINE vreal sqrt_(vreal x) {
  for (int l = 0; l < LANES; ++l) x[l] = PM_REAL_BITS == 32 ? (real)sqrtf((float)x[l]) : (real)sqrt((double)x[l]);
  return x;
}
#endif

/* Horner's rule, constant first; the count is a constant of the call. */
#define PM_COUNT(table) ((int)(sizeof(table) / sizeof((table)[0])))
PM_ALWAYS_INLINE vreal polynomial(const real *coefficients, int count, vreal x) {
  vreal y = splat(coefficients[count - 1]);
#pragma GCC unroll 24
  for (int i = count - 2; i >= 0; --i) y = fma_(y, x, splat(coefficients[i]));
  return y;
}

/* log(u), u normal and positive, given u - 1 as well, which counts where u is near 1: with u the rounding of 1 + t, t
 * itself loses no digit.
 * u = 2^n (1 + f), 1 + f in [sqrt(1/2), sqrt(2)); log(1 + f) = f - f^2/2 + f^3 P(f); n log 2 in two parts. Within 1 ulp
 * of the larger of |log u| and 2^-1 ulp n, relative 2 ulp near 1. */
PM_ALWAYS_INLINE vreal log_near_one(vreal u, vreal minus_one) {
#if PM_REAL_BITS == 32
  const real root_half = 0x1.6a09e6p-1f, log2_high = 0x1.62e4p-1f, log2_low = 0x1.7f7d1cp-20f;
#else
  const real root_half = 0x1.6a09e667f3bcdp-1, log2_high = 0x1.62e42fefa38p-1, log2_low = 0x1.ef35793c7673p-45;
#endif
  const vmask n = (vmask)((vpattern)u - (vpattern)splat(root_half)) >> PM_MANTISSA_BITS;
  const vreal mantissa = (vreal)((vpattern)u - ((vpattern)n << PM_MANTISSA_BITS));
  const vreal f = select_((vmask)(n == 0), minus_one, mantissa - 1);
  const vreal times = __builtin_convertvector(n, vreal), square = f * f;
  const vreal tail = polynomial(log_tail, PM_COUNT(log_tail), f);
  vreal small = fma_(times, splat(log2_low), square * fma_(f, tail, splat((real)-0.5)));
  return fma_(times, splat(log2_high), f + small);
}

/* log(x), x normal and positive. */
PM_ALWAYS_INLINE vreal log_(vreal x) { return log_near_one(x, x - 1); }

/* log(1 + t), t > -1 + 2^-24 (single) or 2^-53 (double precision). */
PM_ALWAYS_INLINE vreal log1p_(vreal t) { return log_near_one(1 + t, t); }

/* sin(2 pi t), |t| <= 1/4, within 2 ulp. */
PM_ALWAYS_INLINE vreal sine_of_turns(vreal t) { return t * polynomial(sine, PM_COUNT(sine), t * t); }

PM_ALWAYS_INLINE vreal abs_(vreal x) { return max_(x, -x); }

#if PM_REAL_BITS == 64
/* log Gamma, psi and psi' at x > 0: those of x + 2 by Stirling's series, whose remainder is a polynomial in 1 / (x +
 * 2), less the recurrence's terms. Absolute errors 3e-16 max(1, |x log x|), 5e-16 max(1, 1/x) and 5e-16 max(1, 1/x^2).
 */
typedef struct gamma_values {
  vreal log_gamma, digamma, trigamma;
} gamma_values;

PM_ALWAYS_INLINE gamma_values gamma_at(vreal x) {
  const vreal y = x + 2, s = 1 / y, log_y = log_(y), next = 1 / (x + 1), inverse = 1 / x;
  gamma_values at;
  /* log(x (x + 1)) is split where the product would leave the range. */
  const vreal lower = log_(x) + log1p_(x);
  at.log_gamma = fma_(y - (real)0.5, log_y, -y) + (real)0.91893853320467274178 +
                 polynomial(stirling_log_gamma, PM_COUNT(stirling_log_gamma), s) - lower;
  at.digamma = log_y + polynomial(stirling_digamma, PM_COUNT(stirling_digamma), s) - next - inverse;
  at.trigamma = s + polynomial(stirling_trigamma, PM_COUNT(stirling_trigamma), s) + fma_(next, next, inverse * inverse);
  return at;
}
#endif

#endif
