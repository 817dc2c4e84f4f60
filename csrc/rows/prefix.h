/* The prefix table of a block: A_i[j] for every size j before every expert, or every pair of experts, a segment of them
 * at a time.
 *
 * Columns are computed in chunks of at most eight, whose running values stay in registers while the experts pass; a
 * chunk reads the columns before its first from the table. Each number of columns is compiled, so that every k costs
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

/* none + one X + both X^2: the factors of the experts i and i + 1. Not in plain blocks: `none`, which is 1. */
typedef struct pair {
  vreal none, one, both;
} pair;

PM_ALWAYS_INLINE pair pair_at(const block *k, int64_t i, int plain) {
  const vreal w = k->w[i], w2 = k->w[i + 1];
  if (plain) return (pair){.one = w + w2, .both = w * w2};
  const vreal q = k->q[i], q2 = k->q[i + 1];
  return (pair){.none = q * q2, .one = fma_(w, q2, q * w2), .both = w * w2};
}

/* The derivative of the pair along v: that of a factor is w v X, the normaliser q being a constant of the tilt. */
PM_ALWAYS_INLINE pair pair_slope(const block *k, int64_t i, int plain) {
  const vreal wv = k->w[i] * k->v[i], wv2 = k->w[i + 1] * k->v[i + 1];
  if (plain) return (pair){.one = wv + wv2, .both = fma_(wv, k->w[i + 1], k->w[i] * wv2)};
  return (pair){.one = fma_(wv, k->q[i + 1], k->q[i] * wv2), .both = fma_(wv, k->w[i + 1], k->w[i] * wv2)};
}

/* The columns in A[2 ..], and the one before them in A[1], times the factor q + w X; the `first` columns of a plain
 * block have the constant 1 before them. */
PM_ALWAYS_INLINE void multiply_state(vreal *A, int columns, vreal w, vreal q, int plain, int first) {
#pragma GCC unroll 8
  for (int c = columns + 1; c > 1; --c) {
    if (first && c == 2)
      A[c] += w;
    else
      A[c] = fma_(w, A[c - 1], plain ? A[c] : q * A[c]);
  }
  if (!first) A[1] = fma_(w, A[0], plain ? A[1] : q * A[1]);
}

/* Columns done+1 .. done+columns of the table's states, whose first is there, and with a tangent their derivatives b +
 * 1 columns on: `experts` experts from `begin` on. */
PM_ALWAYS_INLINE void prefix_columns(const block *k, int64_t begin, int64_t experts, int done, int columns, int plain,
                                     states of) {
  const int tangent = of == TANGENTS, first = plain && done == 0;
  const int64_t cells = (int64_t)(k->b + 1) * width_of(of);
  const int64_t beside = k->b + 1;                                   /* from a value to its derivative */
  const vreal *before = k->table + done, *dbefore = before + beside; /* the column before the chunk */
  vreal *to = k->table + cells + done + 1, *dto = to + beside;
  const vreal zero = splat(0);
  /* The state, from the two columns before the chunk on. */
  vreal A[PM_CHUNK + 2], dA[PM_CHUNK + 2];
  A[0] = A[1] = dA[0] = dA[1] = zero;
#pragma GCC unroll 8
  for (int c = 0; c < columns; ++c) {
    A[c + 2] = before[1 + c];
    if (tangent) dA[c + 2] = dbefore[1 + c];
  }
  for (int64_t i = begin; i < begin + experts; i += experts_in(of)) {
    if (!first) {
      A[1] = before[0];
      if (tangent) dA[1] = dbefore[0];
    }
    if (of != SINGLES && done > 0) {
      A[0] = before[-1];
      if (tangent) dA[0] = dbefore[-1];
    }
    if (of == SINGLES || of == ALTERNATES) {
      multiply_state(A, columns, k->w[i], plain ? zero : k->q[i], plain, first);
      if (of == ALTERNATES) multiply_state(A, columns, k->w[i + 1], plain ? zero : k->q[i + 1], plain, first);
    } else {
      const pair f = pair_at(k, i, plain), df = tangent ? pair_slope(k, i, plain) : f;
#pragma GCC unroll 8
      for (int c = columns + 1; c > 1; --c) {
        const int one_is_1 = first && c == 2, both_is_1 = first && c == 3, none_below = done == 0 && c == 2;
        if (tangent) {
          vreal sum = plain ? dA[c] : f.none * dA[c];
          sum = one_is_1 ? sum + df.one : fma_(df.one, A[c - 1], fma_(f.one, dA[c - 1], sum));
          if (both_is_1)
            sum += df.both;
          else if (!none_below)
            sum = fma_(df.both, A[c - 2], fma_(f.both, dA[c - 2], sum));
          dA[c] = sum;
        }
        vreal sum = plain ? A[c] : f.none * A[c];
        sum = one_is_1 ? sum + f.one : fma_(f.one, A[c - 1], sum);
        if (both_is_1)
          sum += f.both;
        else if (!none_below)
          sum = fma_(f.both, A[c - 2], sum);
        A[c] = sum;
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) {
      to[c] = A[c + 2];
      if (tangent) dto[c] = dA[c + 2];
    }
    before += cells, dbefore += cells, to += cells, dto += cells;
  }
}

/* A[0] of a general block: the product of the q. */
PM_ALWAYS_INLINE void prefix_empty(const block *k, int64_t begin, int64_t experts, states of) {
  const int64_t cells = (int64_t)(k->b + 1) * width_of(of);
  vreal *state = k->table;
  for (int64_t i = begin; i < begin + experts; i += experts_in(of), state += cells) {
    state[cells] = k->q[i] * state[0];
    if (of != SINGLES) state[cells] *= k->q[i + 1];
    if (of == TANGENTS) state[cells + k->b + 1] = splat(0);
  }
}

PM_ALWAYS_INLINE int64_t states_of(int64_t experts, states of) {
  return (experts + experts_in(of) - 1) / experts_in(of);
}

/* The table of `experts` experts from `begin` on, from its first state. */
#define PM_PREFIX_FORM(name, plain, of)                                                        \
  static __attribute__((noinline)) void name(const block *k, int64_t begin, int64_t experts) { \
    const int64_t cells = (int64_t)(k->b + 1) * width_of(of);                                  \
    vreal *last = k->table + states_of(experts, of) * cells;                                   \
    if (plain) {                                                                               \
      last[0] = splat(1);                                                                      \
      if ((of) == TANGENTS) last[k->b + 1] = splat(0);                                         \
    } else {                                                                                   \
      prefix_empty(k, begin, experts, of);                                                     \
    }                                                                                          \
    for (int done = 0, columns; done < k->b; done += columns) {                                \
      columns = chunk_columns(k->b, done);                                                     \
      PM_FOR_COLUMNS(columns, PM_PREFIX_CALL_##plain##_##of)                                   \
    }                                                                                          \
  }
#define PM_PREFIX_CALL_0_SINGLES(n) prefix_columns(k, begin, experts, done, n, 0, SINGLES)
#define PM_PREFIX_CALL_0_ALTERNATES(n) prefix_columns(k, begin, experts, done, n, 0, ALTERNATES)
#define PM_PREFIX_CALL_0_PAIRS(n) prefix_columns(k, begin, experts, done, n, 0, PAIRS)
#define PM_PREFIX_CALL_0_TANGENTS(n) prefix_columns(k, begin, experts, done, n, 0, TANGENTS)
#define PM_PREFIX_CALL_1_ALTERNATES(n) prefix_columns(k, begin, experts, done, n, 1, ALTERNATES)
#define PM_PREFIX_CALL_1_PAIRS(n) prefix_columns(k, begin, experts, done, n, 1, PAIRS)
#define PM_PREFIX_CALL_1_TANGENTS(n) prefix_columns(k, begin, experts, done, n, 1, TANGENTS)

PM_PREFIX_FORM(prefix_general_singles, 0, SINGLES)
PM_PREFIX_FORM(prefix_general_alternates, 0, ALTERNATES)
PM_PREFIX_FORM(prefix_general_pairs, 0, PAIRS)
PM_PREFIX_FORM(prefix_general_tangents, 0, TANGENTS)
PM_PREFIX_FORM(prefix_plain_alternates, 1, ALTERNATES)
PM_PREFIX_FORM(prefix_plain_pairs, 1, PAIRS)
PM_PREFIX_FORM(prefix_plain_tangents, 1, TANGENTS)

/* One compiled copy for each form, whoever calls it. No plain block asks for every state. */
PM_ALWAYS_INLINE void prefix_states(const block *k, int64_t begin, int64_t experts, int plain, states of) {
  if (of == SINGLES)
    prefix_general_singles(k, begin, experts);
  else if (of == ALTERNATES)
    (plain ? prefix_plain_alternates : prefix_general_alternates)(k, begin, experts);
  else if (of == PAIRS)
    (plain ? prefix_plain_pairs : prefix_general_pairs)(k, begin, experts);
  else
    (plain ? prefix_plain_tangents : prefix_general_tangents)(k, begin, experts);
}

PM_ALWAYS_INLINE int64_t segment_experts(const block *k, int64_t s) {
  return s + 1 == k->segments ? k->E - s * k->segment : k->segment;
}

/* The table of segment s from its checkpoint. */
PM_ALWAYS_INLINE void compute_segment(const block *k, int64_t s, int plain, states of) {
  const int64_t cells = (int64_t)(k->b + 1) * width_of(of);
  copy_vectors(k->table, k->checkpoints + s * cells, cells);
  prefix_states(k, s * k->segment, segment_experts(k, s), plain, of);
}

/* The state after the last expert of segment s, whose table is in place. */
PM_ALWAYS_INLINE const vreal *segment_end(const block *k, int64_t s, states of) {
  return k->table + states_of(segment_experts(k, s), of) * (k->b + 1) * width_of(of);
}

/* The state after the last expert, with the last segment's table in place. */
PM_ALWAYS_INLINE const vreal *prefix_end(const block *k, states of) { return segment_end(k, k->segments - 1, of); }

/* `total` from the state after the last expert. */
PM_ALWAYS_INLINE void sum_sizes(block *k, const vreal *end) {
  vreal total = splat(0);
  for (int j = k->a; j <= k->b; ++j) total = fma_(k->sizes[j], end[j], total);
  k->total = total;
  k->inverse_total = select_(k->poison, splat((real)NAN), splat(1) / total);
}

/* All checkpoints, then the last segment's table; sets `total`. */
PM_ALWAYS_INLINE void prefix_all(block *k, int plain, states of) {
  const int64_t cells = (int64_t)(k->b + 1) * width_of(of);
  vreal *state = k->checkpoints;
  fill_vectors(state, splat(0), cells);
  state[0] = splat(1);
  for (int64_t s = 0; s < k->segments; ++s) {
    compute_segment(k, s, plain, of);
    if (s + 1 < k->segments) copy_vectors(k->checkpoints + (s + 1) * cells, segment_end(k, s, of), cells);
  }
  sum_sizes(k, prefix_end(k, of));
}

/* The table of segment s, for s = segments - 1 down to 0: the last one is there already. */
PM_ALWAYS_INLINE void prefix_segment(const block *k, int64_t s, int plain, states of) {
  if (s + 1 < k->segments) compute_segment(k, s, plain, of);
}

#endif
