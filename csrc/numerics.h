/* Elementary functions, and variates from random words: one source for the C core and the CUDA kernels.
 *
 * Written on `vreal`, which is a vector of rows in C (rows/simd.h) and a single number on a GPU (cuda/numerics.cuh).
 * Either defines, for the precision of precision.h and before it includes this file,
 *   vreal; vmask (a truth value a lane) and vpattern (its bits), whole numbers of the same width;
 *   splat(number); fma_(a, b, c); max_(a, b), b where either is NaN; select_(mask, yes, no); scale_by_shifted (below);
 *   pattern_of(vreal), real_of(vpattern), whole(vmask): bits of a number, number of bits, the number as a number;
 *   PM_ALWAYS_INLINE and PM_CONSTANT, before a function and a table.
 * Every multiply-add that is to be fused is written so, and no other product meets a sum: wherever there is a fused
 * instruction, all compilers return the same bits, and so do a CPU and a GPU.
 * Errors are the largest seen against 50 digits (csrc/tests holds them). No guard: see precision.h. */
#include "rows/gamma_tables.h"

/* Horner's rule, constant first; the count is a constant of the call, so that no table is left in memory. */
#define PM_COUNT(table) ((int)(sizeof(table) / sizeof((table)[0])))
PM_ALWAYS_INLINE vreal polynomial(const real *coefficients, int count, vreal x) {
  vreal y = splat(coefficients[count - 1]);
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 24
#endif
  for (int i = count - 2; i >= 0; --i) y = fma_(y, x, splat(coefficients[i]));
  return y;
}

#if PM_REAL_BITS == 32
PM_CONSTANT real exp_tail[5] = {0.49999993451669324f, 0.16666520689251869f, 0.041668387368100674f,
                                0.0083687098947233054f, 0.0013814613114645247f};
#else
PM_CONSTANT real exp_tail[10] = {5.0000000000000106e-01, 1.6666666666666413e-01, 4.1666666666530265e-02,
                                 8.3333333334943343e-03, 1.3888888943598014e-03, 1.9841269506776754e-04,
                                 2.4801493135824400e-05, 2.7557586267482642e-06, 2.7630234059594198e-07,
                                 2.5000072185264219e-08};
#endif

/* x = n log 2 + r with whole n and |r| <= log(2) / 2; returns exp(r), and n in the low bits of *shifted, a number so
 * large that its last bit counts ones. log 2 is split in two so that n log 2 is exact (Cody & Waite 1980). The
 * polynomials are minimax in relative error, 3.1e-9 and 3.7e-18, well below half an ulp. */
PM_ALWAYS_INLINE vreal exp_reduced(vreal x, vreal *shifted) {
#if PM_REAL_BITS == 32
  const real log2_high = 0x1.62e4p-1f, log2_low = 0x1.7f7d1cp-20f;
#else
  const real log2_high = 0x1.62e42fefa38p-1, log2_low = 0x1.ef35793c7673p-45;
#endif
  *shifted = fma_(x, splat((real)0x1.71547652b82fep0), splat(PM_EXP_ROUND));
  const vreal n = *shifted - splat(PM_EXP_ROUND);
  vreal r = fma_(n, splat(-log2_high), x);
  r = fma_(n, splat(-log2_low), r);
  vreal y = polynomial(exp_tail, PM_COUNT(exp_tail), r);
  y = fma_(y, r, splat(1));
  return fma_(y, r, splat(1));
}

/* exp(x) for -inf <= x <= 80 within 1 ulp, no NaN; 0 where the result is below the normal range. */
PM_ALWAYS_INLINE vreal exp_(vreal x) {
  vreal shifted;
  const vreal y = exp_reduced(x, &shifted);
  return scale_by_shifted(y, shifted, splat(PM_EXP_ROUND), x, splat(PM_EXP_LOWEST));
}

/* 2^y for -inf <= y <= 0 within 1 ulp, no NaN; 0 where it is below the normal range. y = n + r, |r| <= 1/2. In single
 * precision 2^r = 1 + r P(r), P the minimax polynomial of degree 5, off by 0.15 half-ulps at most; in double precision
 * exp(r log 2) by its Taylor polynomial of degree 13, whose first omitted term is below half an ulp. */
PM_ALWAYS_INLINE vreal exp2_(vreal y) {
  const real round = PM_REAL_BITS == 32 ? (real)0x1.8p23 : (real)0x1.8p52;
  const vmask vanishes = (vmask)(y < splat(PM_REAL_BITS == 32 ? -126 : -1022));
  const vreal shifted = y + splat(round), r = y - (shifted - splat(round));
#if PM_REAL_BITS == 32
  vreal z = splat(0x1.44138ap-13f);
  z = fma_(z, r, splat(0x1.5f089p-10f));
  z = fma_(z, r, splat(0x1.3b2a54p-7f));
  z = fma_(z, r, splat(0x1.c6af6cp-5f));
  z = fma_(z, r, splat(0x1.ebfbep-3f));
  z = fma_(z, r, splat(0x1.62e43p-1f));
  z = fma_(z, r, splat(1));
#else
  const vreal s = r * splat(0x1.62e42fefa39efp-1);
  vreal z = splat(1.0 / 6227020800.0);
  z = fma_(z, s, splat(1.0 / 479001600.0));
  z = fma_(z, s, splat(1.0 / 39916800.0));
  z = fma_(z, s, splat(1.0 / 3628800.0));
  z = fma_(z, s, splat(1.0 / 362880.0));
  z = fma_(z, s, splat(1.0 / 40320.0));
  z = fma_(z, s, splat(1.0 / 5040.0));
  z = fma_(z, s, splat(1.0 / 720.0));
  z = fma_(z, s, splat(1.0 / 120.0));
  z = fma_(z, s, splat(1.0 / 24.0));
  z = fma_(z, s, splat(1.0 / 6.0));
  z = fma_(z, s, splat(0.5));
  z = fma_(z, s, splat(1));
  z = fma_(z, s, splat(1));
#endif
  /* Unsigned: where the result vanishes the exponent wraps, and is masked out. */
  const vpattern power = (pattern_of(shifted) - pattern_of(splat(round))) << PM_MANTISSA_BITS;
  return select_(vanishes, splat(0), real_of(pattern_of(z) + power));
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
  const vmask n = (vmask)(pattern_of(u) - pattern_of(splat(root_half))) >> PM_MANTISSA_BITS;
  const vreal mantissa = real_of(pattern_of(u) - ((vpattern)n << PM_MANTISSA_BITS));
  const vreal f = select_((vmask)(n == 0), minus_one, mantissa - 1);
  const vreal times = whole(n), square = f * f;
  const vreal tail = polynomial(log_tail, PM_COUNT(log_tail), f);
  vreal small = fma_(times, splat(log2_low), square * fma_(f, tail, splat((real)-0.5)));
  return fma_(times, splat(log2_high), f + small);
}

/* log(x), x normal and positive. */
PM_ALWAYS_INLINE vreal log_(vreal x) { return log_near_one(x, x - 1); }

/* log(1 + t), t > -1 + 2^-24 (single) or 2^-53 (double precision). */
PM_ALWAYS_INLINE vreal log1p_(vreal t) { return log_near_one(1 + t, t); }

/* log(1 - a) within 2 ulp, for 0 <= a <= 1/2. In single precision -(a + a^2 P(a)), P the minimax polynomial of degree
 * 8, off by 0.32 half-ulps at most. */
PM_ALWAYS_INLINE vreal log_rest(vreal a) {
#if PM_REAL_BITS == 32
  vreal y = splat(0x1.4c8696p+0f);
  y = fma_(y, a, splat(-0x1.83befap+0f));
  y = fma_(y, a, splat(0x1.1c1658p+0f));
  y = fma_(y, a, splat(-0x1.70fde2p-3f));
  y = fma_(y, a, splat(0x1.d0007ap-3f));
  y = fma_(y, a, splat(0x1.8d2012p-3f));
  y = fma_(y, a, splat(0x1.004ffap-2f));
  y = fma_(y, a, splat(0x1.5553dp-2f));
  y = fma_(y, a, splat(0.5f));
  return fma_(-(a * a), y, -a);
#else
  return log_near_one(splat(1) - a, -a);
#endif
}

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
  at.trigamma = fma_(s * s, polynomial(stirling_trigamma, PM_COUNT(stirling_trigamma), s), s) +
                fma_(next, next, inverse * inverse);
  return at;
}
#endif

/* ---- variates of random words -------------------------------------------------------------------------------- */

/* u = (w + 1/2) / 2^b and 1 - u = (~w + 1/2) / 2^b, each rounded once, of a word w of b = 32 bits in single, 64 in
 * double precision, from its upper and lower half as whole numbers. So both tails of the variates end where the words
 * do, beyond a probability of 2^-33 or 2^-65, and up to there they have all their digits; neither u nor 1 - u is ever
 * 0. The fused operations are exact but for the last one. */
PM_ALWAYS_INLINE void open_uniform_of(vreal high, vreal low, vreal *u, vreal *complement) {
#if PM_REAL_BITS == 32
  const real most = 0x1p16f - 1, step = 0x1p-16f, fine = 0x1p-32f, half = 0x1p-33f;
#else
  const real most = 0x1p32 - 1, step = 0x1p-32, fine = 0x1p-64, half = 0x1p-65;
#endif
  *u = fma_(high, splat(step), fma_(low, splat(fine), splat(half)));
  *complement = fma_(splat(most) - high, splat(step), fma_(splat(most) - low, splat(fine), splat(half)));
}

/* -log(-log(1 - u)): small u, where the uniform has its digits, make the upper tail. */
PM_ALWAYS_INLINE vreal gumbel_from(vreal u, vreal complement) { return -log_(-log_near_one(complement, -u)); }

/* log(u / (1 - u)). */
PM_ALWAYS_INLINE vreal logistic_from(vreal u, vreal complement) { return log_(u / complement); }

/* 1 / (1 + exp(-y)); NaN where y is. */
PM_ALWAYS_INLINE vreal sigmoid(vreal y) {
  const vmask negative = (vmask)(y < splat(0)), defined = (vmask)(y == y);
  const vreal e = exp_(select_(defined, select_(negative, y, -y), splat(0)));
  return select_(defined, select_(negative, e, splat(1)) / (e + splat(1)), y);
}
