/* The b largest logits of every row, and whose they are, ties to the lower index.
 *
 * A logit's bits, read as a whole number, order as the logit does (those of a negative one reversed). Their low bits
 * are given to the expert, so that networks of integer minima and maxima, every lane in step, carry the indices along.
 * What the low bits said is lost: where two neighbours in the result, or the last of it and the best left out, agree in
 * all others, and the low bits were not all zero (they are for logits that come from bfloat16 or float16), the lane is
 * ranked again, in full precision. */
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

/* The key of expert i; what its low bits said is gathered in `lost`. */
PM_ALWAYS_INLINE vint rank_key(const block *k, int64_t i, bits low, vint *lost) {
  const vint pattern = (vint)(k->x[i] + splat(0)); /* -0 becomes +0 */
  *lost |= pattern & low;
  const vint ordered = pattern ^ ((pattern >> (PM_REAL_BITS - 1)) & PM_LARGEST_BITS);
  return (ordered & ~low) | (bits)(low - i);
}

PM_ALWAYS_INLINE void put_in_order(vint *larger, vint *smaller) {
  const vint a = *larger;
  *larger = int_max_(a, *smaller);
  *smaller = int_min_(a, *smaller);
}

/* Sorts 4 or 8 keys, descending, by Batcher's network of 5 or 19 exchanges (odd-even merge sort, 1968). */
PM_ALWAYS_INLINE void sort_keys(vint *key, int n) {
#define PM_EXCHANGE_KEYS(i, j) put_in_order(&key[i], &key[j])
  for (int half = 0; half < n; half += 4) {
    PM_EXCHANGE_KEYS(half, half + 1), PM_EXCHANGE_KEYS(half + 2, half + 3);
    PM_EXCHANGE_KEYS(half, half + 2), PM_EXCHANGE_KEYS(half + 1, half + 3);
    PM_EXCHANGE_KEYS(half + 1, half + 2);
  }
  if (n == 4) return;
  PM_EXCHANGE_KEYS(0, 4), PM_EXCHANGE_KEYS(1, 5), PM_EXCHANGE_KEYS(2, 6), PM_EXCHANGE_KEYS(3, 7);
  PM_EXCHANGE_KEYS(2, 4), PM_EXCHANGE_KEYS(3, 5);
  PM_EXCHANGE_KEYS(1, 2), PM_EXCHANGE_KEYS(3, 4), PM_EXCHANGE_KEYS(5, 6);
#undef PM_EXCHANGE_KEYS
}

/* The n largest keys, n 4 or 8, descending: a group of n at a time is sorted and merged with the best so far. Of two
 * descending lists max(best[i], group[n-1-i]) are the n largest, and a bitonic sequence. */
PM_ALWAYS_INLINE void largest_by_groups(const block *k, int n, bits low, vint *best, vint *left_out, vint *lost) {
  for (int64_t first = 0; first < k->E; first += n) {
    vint group[PM_CHUNK];
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j)
      group[j] = first + j < k->E ? rank_key(k, first + j, low, lost) : splat_bits(-PM_LARGEST_BITS - 1);
    sort_keys(group, n);
#pragma GCC unroll 8
    for (int j = 0; j < n; ++j) {
      *left_out = int_max_(int_min_(best[j], group[n - 1 - j]), *left_out);
      best[j] = int_max_(best[j], group[n - 1 - j]);
    }
    for (int distance = n / 2; distance > 0; distance /= 2)
#pragma GCC unroll 8
      for (int j = 0; j < n; ++j)
        if (!(j & distance)) put_in_order(&best[j], &best[j + distance]);
  }
}

/* The b largest by insertion, for a few, or more than a network has. */
PM_ALWAYS_INLINE void largest_by_insertion(const block *k, int b, bits low, vint *best, vint *left_out, vint *lost) {
  for (int64_t i = 0; i < k->E; ++i) {
    vint candidate = rank_key(k, i, low, lost);
#pragma GCC unroll 8
    for (int j = 0; j < b; ++j) put_in_order(&best[j], &candidate);
    *left_out = int_max_(*left_out, candidate);
  }
}

/* Returns the lanes in doubt. */
PM_ALWAYS_INLINE vmask rank_range(const block *k, int b) {
  int index_bits = 0;
  while ((int64_t)1 << index_bits < k->E) ++index_bits;
  const bits low = ((bits)1 << index_bits) - 1;
  const int width = b > PM_CHUNK || b < 3 ? b : b > 4 ? 8 : 4;
  vint local[PM_CHUNK];
  vint *key = b <= PM_CHUNK ? local : k->order;
#pragma GCC unroll 8
  for (int j = 0; j < width; ++j) key[j] = splat_bits(-PM_LARGEST_BITS - 1);
  vint left_out = splat_bits(-PM_LARGEST_BITS - 1), lost = splat_bits(0);
  if (width == 4 || width == 8)
    largest_by_groups(k, width, low, key, &left_out, &lost);
  else
    largest_by_insertion(k, b, low, key, &left_out, &lost);
  if (b < width) left_out = key[b];
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
