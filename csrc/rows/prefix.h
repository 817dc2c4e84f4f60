/* The prefix table of a block: A_i[j] for every expert i and size j, a segment of experts at a time.
 *
 * Columns are computed in chunks of at most eight, whose running values stay in registers while the experts pass; a
 * chunk reads the column before its first from the table. Each number of columns is compiled, so that every k costs
 * its share. In plain blocks A[0] is 1 throughout (and dA[0] is 0): neither is written or read, but at the end. */
#ifndef PM_ROWS_PREFIX_H
#define PM_ROWS_PREFIX_H

#include "block.h"

#define PM_CHUNK 8

/* How many of the columns 1..b the chunk takes that starts behind column `done`: all chunks alike but for one. */
PM_ALWAYS_INLINE int chunk_columns(int b, int done) {
  const int chunks = (b - done + PM_CHUNK - 1) / PM_CHUNK;
  return (b - done + chunks - 1) / chunks;
}

/* call(n) with n a constant, 1..8. */
#define PM_FOR_COLUMNS(n, call) \
  switch (n) {                  \
    case 1: call(1); break;     \
    case 2: call(2); break;     \
    case 3: call(3); break;     \
    case 4: call(4); break;     \
    case 5: call(5); break;     \
    case 6: call(6); break;     \
    case 7: call(7); break;     \
    default: call(8); break;    \
  }

/* Columns done+1 .. done+columns of the table's rows 1..experts, whose row 0 is there, and with a tangent their
 * derivatives b + 1 columns on. The tangent's factor is w v X, the normaliser q being a constant of the tilt. */
PM_ALWAYS_INLINE void prefix_columns(const block *k, int64_t begin, int64_t experts, int done, int columns, int plain,
                                     int tangent) {
  const int64_t cells = (int64_t)(k->b + 1) * (tangent ? 2 : 1);
  const int64_t beside = k->b + 1;                                   /* from a value to its derivative */
  const vreal *before = k->table + done, *dbefore = before + beside; /* the column before the chunk */
  vreal *to = k->table + cells + done + 1, *dto = to + beside;
  vreal A[PM_CHUNK], dA[PM_CHUNK];
#pragma GCC unroll 8
  for (int c = 0; c < columns; ++c) {
    A[c] = before[1 + c];
    if (tangent) dA[c] = dbefore[1 + c];
  }
  const int first = plain && done == 0;
  for (int64_t i = begin; i < begin + experts; ++i) {
    const vreal w = k->w[i], q = plain ? w : k->q[i], v = tangent ? k->v[i] : w;
#pragma GCC unroll 8
    for (int c = columns - 1; c > 0; --c) {
      if (tangent) dA[c] = fma_(w, fma_(v, A[c - 1], dA[c - 1]), plain ? dA[c] : q * dA[c]);
      A[c] = fma_(w, A[c - 1], plain ? A[c] : q * A[c]);
    }
    if (first) {
      if (tangent) dA[0] = fma_(w, v, dA[0]);
      A[0] += w;
    } else {
      if (tangent) dA[0] = fma_(w, fma_(v, *before, *dbefore), plain ? dA[0] : q * dA[0]);
      A[0] = fma_(w, *before, plain ? A[0] : q * A[0]);
    }
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) {
      to[c] = A[c];
      if (tangent) dto[c] = dA[c];
    }
    before += cells, dbefore += cells, to += cells, dto += cells;
  }
}

/* A[0] of a general block: the product of the q. */
PM_ALWAYS_INLINE void prefix_empty(const block *k, int64_t begin, int64_t experts, int tangent) {
  const int64_t cells = (int64_t)(k->b + 1) * (tangent ? 2 : 1);
  vreal *row = k->table;
  for (int64_t i = begin; i < begin + experts; ++i, row += cells) {
    row[cells] = k->q[i] * row[0];
    if (tangent) row[cells + k->b + 1] = splat(0);
  }
}

/* The table of `experts` experts from `begin` on, from its row 0. */
#define PM_PREFIX_FORM(name, plain, tangent)                                                   \
  static __attribute__((noinline)) void name(const block *k, int64_t begin, int64_t experts) { \
    const int64_t cells = (int64_t)(k->b + 1) * ((tangent) ? 2 : 1);                           \
    if (plain) {                                                                               \
      k->table[experts * cells] = splat(1);                                                    \
      if (tangent) k->table[experts * cells + k->b + 1] = splat(0);                            \
    } else {                                                                                   \
      prefix_empty(k, begin, experts, tangent);                                                \
    }                                                                                          \
    for (int done = 0, columns; done < k->b; done += columns) {                                \
      columns = chunk_columns(k->b, done);                                                     \
      PM_FOR_COLUMNS(columns, PM_PREFIX_CALL_##plain##tangent)                                 \
    }                                                                                          \
  }
#define PM_PREFIX_CALL_00(n) prefix_columns(k, begin, experts, done, n, 0, 0)
#define PM_PREFIX_CALL_01(n) prefix_columns(k, begin, experts, done, n, 0, 1)
#define PM_PREFIX_CALL_10(n) prefix_columns(k, begin, experts, done, n, 1, 0)
#define PM_PREFIX_CALL_11(n) prefix_columns(k, begin, experts, done, n, 1, 1)

PM_PREFIX_FORM(prefix_general, 0, 0)
PM_PREFIX_FORM(prefix_general_tangent, 0, 1)
PM_PREFIX_FORM(prefix_plain, 1, 0)
PM_PREFIX_FORM(prefix_plain_tangent, 1, 1)

/* One compiled copy for each form, with and without tangents, whoever calls it. */
#define PM_FORM(name, plain, tangent) \
  ((plain) ? ((tangent) ? name##_plain_tangent : name##_plain) : ((tangent) ? name##_general_tangent : name##_general))

PM_ALWAYS_INLINE int64_t segment_experts(const block *k, int64_t s) {
  return s + 1 == k->segments ? k->E - s * k->segment : k->segment;
}

/* The table of segment s from its checkpoint. */
PM_ALWAYS_INLINE void compute_segment(const block *k, int64_t s, int plain, int tangent) {
  const int64_t cells = (int64_t)(k->b + 1) * (tangent ? 2 : 1);
  memcpy(k->table, k->checkpoints + s * cells, (size_t)cells * sizeof(vreal));
  PM_FORM(prefix, plain, tangent)(k, s * k->segment, segment_experts(k, s));
}

/* The state after the last expert, with the last segment's table in place. */
PM_ALWAYS_INLINE const vreal *prefix_end(const block *k, int tangent) {
  return k->table + segment_experts(k, k->segments - 1) * (k->b + 1) * (tangent ? 2 : 1);
}

/* `total` from the state after the last expert. */
PM_ALWAYS_INLINE void sum_sizes(block *k, const vreal *end) {
  vreal total = splat(0);
  for (int j = k->a; j <= k->b; ++j) total = fma_(k->sizes[j], end[j], total);
  k->total = total;
  k->inverse_total = select_(k->poison, splat((real)NAN), splat(1) / total);
}

/* All checkpoints, then the last segment's table; sets `total`. */
PM_ALWAYS_INLINE void prefix_all(block *k, int plain, int tangent) {
  const int64_t cells = (int64_t)(k->b + 1) * (tangent ? 2 : 1);
  vreal *state = k->checkpoints;
  for (int64_t c = 0; c < cells; ++c) state[c] = splat(0);
  state[0] = splat(1);
  for (int64_t s = 0; s < k->segments; ++s) {
    compute_segment(k, s, plain, tangent);
    if (s + 1 < k->segments)
      memcpy(k->checkpoints + (s + 1) * cells, k->table + k->segment * cells, (size_t)cells * sizeof(vreal));
  }
  sum_sizes(k, prefix_end(k, tangent));
}

/* The table of segment s, for s = segments - 1 down to 0: the last one is there already. */
PM_ALWAYS_INLINE void prefix_segment(const block *k, int64_t s, int plain, int tangent) {
  if (s + 1 < k->segments) compute_segment(k, s, plain, tangent);
}

#endif
