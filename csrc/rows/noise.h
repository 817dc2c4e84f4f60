/* Gumbel and logistic variates of every lane: no draw is shared, none depends on the lanes. */
#ifndef PM_ROWS_NOISE_H
#define PM_ROWS_NOISE_H

#include "gamma.h"

/* u and 1 - u. */
PM_ALWAYS_INLINE void open_uniform(vword word, vreal *u, vreal *complement) {
#if PM_REAL_BITS == 32
  const vreal high = whole((vmask)(word >> 16)), low = whole((vmask)(word & 0xffff));
#else
  typedef uint32_t words_of __attribute__((vector_size(PM_VECTOR_BYTES / 2)));
  const vpattern magic = (vpattern)splat(0x1p52);
  words_of leading, trailing;
  memcpy(&leading, &word, sizeof leading);
  memcpy(&trailing, (const char *)&word + sizeof leading, sizeof trailing);
  const vreal high = (vreal)(__builtin_convertvector(leading, vpattern) | magic) - splat(0x1p52);
  const vreal low = (vreal)(__builtin_convertvector(trailing, vpattern) | magic) - splat(0x1p52);
#endif
  open_uniform_of(high, low, u, complement);
}

PM_ALWAYS_INLINE vreal gumbel_of(vword word) {
  vreal u, complement;
  open_uniform(word, &u, &complement);
  return gumbel_from(u, complement);
}

PM_ALWAYS_INLINE vreal logistic_of(vword word) {
  vreal u, complement;
  open_uniform(word, &u, &complement);
  return logistic_from(u, complement);
}

#endif
