/* Gumbel and logistic variates of every lane: no draw is shared, none depends on the lanes.
 *
 * u = (w + 1/2) / 2^b and 1 - u = (~w + 1/2) / 2^b from a word w of b = 32 bits in single, 64 in double precision, each
 * rounded once. So both tails of the variates end where the words do, beyond a probability of 2^-33 or 2^-65, and up to
 * there they have all their digits; neither u nor 1 - u is ever 0. */
#ifndef PM_ROWS_NOISE_H
#define PM_ROWS_NOISE_H

#include "gamma.h"

/* u and 1 - u. The fused operations are exact but for the last one. */
PM_ALWAYS_INLINE void open_uniform(vword word, vreal *u, vreal *complement) {
#if PM_REAL_BITS == 32
  const real most = 0x1p16f - 1, step = 0x1p-16f, fine = 0x1p-32f, half = 0x1p-33f;
  const vreal high = __builtin_convertvector((vmask)(word >> 16), vreal);
  const vreal low = __builtin_convertvector((vmask)(word & 0xffff), vreal);
#else
  typedef uint32_t words_of __attribute__((vector_size(PM_VECTOR_BYTES / 2)));
  const real most = 0x1p32 - 1, step = 0x1p-32, fine = 0x1p-64, half = 0x1p-65;
  const vpattern magic = (vpattern)splat(0x1p52);
  words_of leading, trailing;
  memcpy(&leading, &word, sizeof leading);
  memcpy(&trailing, (const char *)&word + sizeof leading, sizeof trailing);
  const vreal high = (vreal)(__builtin_convertvector(leading, vpattern) | magic) - splat(0x1p52);
  const vreal low = (vreal)(__builtin_convertvector(trailing, vpattern) | magic) - splat(0x1p52);
#endif
  *u = fma_(high, splat(step), fma_(low, splat(fine), splat(half)));
  *complement = fma_(splat(most) - high, splat(step), fma_(splat(most) - low, splat(fine), splat(half)));
}

/* -log(-log(1 - u)): small u, where the uniform has its digits, make the upper tail. */
PM_ALWAYS_INLINE vreal gumbel_of(vword word) {
  vreal u, complement;
  open_uniform(word, &u, &complement);
  return -log_(-log_near_one(complement, -u));
}

/* log(u / (1 - u)). */
PM_ALWAYS_INLINE vreal logistic_of(vword word) {
  vreal u, complement;
  open_uniform(word, &u, &complement);
  return log_(u / complement);
}

#endif
