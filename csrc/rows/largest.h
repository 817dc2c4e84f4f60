/* The b largest logits of every row, and whose they are, ties to the lower index.
 *
 * A logit's bits, read as a whole number, order as the logit does (those of a negative one reversed). Their low bits
 * are given to the expert, so that an insertion network of integer minima and maxima, every lane in step, carries the
 * indices along. What the low bits said is lost: where two neighbours in the result, or the last of it and the best
 * left out, agree in all others, and the low bits were not all zero (they are for logits that come from bfloat16 or
 * float16), the lane is ranked again, in full precision. */
#ifndef PM_ROWS_LARGEST_H
#define PM_ROWS_LARGEST_H

#include "prefix.h"

/* One lane, by insertion. */
static void rank_lane(const block *k, int l) {
  int found = 0;
  for (int64_t i = 0; i < k->E; ++i) {
    const real x = k->x[i][l];
    if (found == k->b && !(x > k->top[found - 1][l])) continue;
    int j = found < k->b ? found++ : found - 1;
    for (; j > 0 && k->top[j - 1][l] < x; --j) {
      k->top[j][l] = k->top[j - 1][l];
      k->order[j][l] = k->order[j - 1][l];
    }
    k->top[j][l] = x;
    k->order[j][l] = (bits)i;
  }
}

/* Returns the lanes in doubt. */
PM_ALWAYS_INLINE vmask rank_range(const block *k, int b) {
  int index_bits = 0;
  while ((int64_t)1 << index_bits < k->E) ++index_bits;
  const bits low = ((bits)1 << index_bits) - 1;
  vint local[PM_CHUNK];
  vint *key = b <= PM_CHUNK ? local : k->order;
#pragma GCC unroll 8
  for (int j = 0; j < b; ++j) key[j] = splat_bits(-PM_LARGEST_BITS - 1);
  vint left_out = splat_bits(-PM_LARGEST_BITS - 1), lost = splat_bits(0);
  for (int64_t i = 0; i < k->E; ++i) {
    const vint pattern = (vint)(k->x[i] + splat(0)); /* -0 becomes +0 */
    lost |= pattern & low;
    const vint ordered = pattern ^ ((pattern >> (PM_REAL_BITS - 1)) & PM_LARGEST_BITS);
    vint candidate = (ordered & ~low) | (bits)(low - i);
#pragma GCC unroll 8
    for (int j = 0; j < b; ++j) {
      const vint larger = int_max_(candidate, key[j]);
      candidate = int_min_(candidate, key[j]);
      key[j] = larger;
    }
    left_out = int_max_(left_out, candidate);
  }
  vmask doubt = {0};
#pragma GCC unroll 8
  for (int j = 0; j < b; ++j) {
    const vint next = j + 1 < b ? key[j + 1] : left_out;
    doubt |= (vmask)((vpattern)(key[j] ^ next) <= (pattern)low);
  }
#pragma GCC unroll 8
  for (int j = 0; j < b; ++j) {
    k->order[j] = low - (key[j] & low);
    k->top[j] = pick(k->x, k->order[j]);
  }
  return doubt & (vmask)(lost != 0);
}

/* Fills `order` and `top`. Poisoned rows, whose logits count as 0, are ranked 0, 1, 2, ... */
static void rank_largest(const block *k) {
  vmask doubt;
  if (k->b == 0) return;
  if (k->b > PM_CHUNK)
    doubt = rank_range(k, k->b);
  else
#define PM_RANK_CALL(n) doubt = rank_range(k, n)
    PM_FOR_COLUMNS(k->b, PM_RANK_CALL)
  for (unsigned left = lanes_of(doubt); left; left &= left - 1) rank_lane(k, __builtin_ctz(left));
}

#endif
