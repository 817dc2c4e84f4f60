/* The two functions of a round of softmax, cheaper than exp_ and log_ on the ranges that occur there. */
#ifndef PM_ROWS_POWERS_H
#define PM_ROWS_POWERS_H

#include "elementary.h"

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
  const vpattern power = ((vpattern)shifted - (vpattern)splat(round)) << PM_MANTISSA_BITS;
  return (vreal)(~(vpattern)vanishes & ((vpattern)z + power));
}

#endif
