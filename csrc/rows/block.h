/* A block: LANES rows at once, their factors, and the two passes of the dynamic program over them.
 *
 * Expert i contributes the factor (q_i + w_i X) to a polynomial whose coefficient of X^j is the tilted e_j:
 *     A_i[j] = q_i A_{i-1}[j] + w_i A_{i-1}[j-1]        prefix, experts 1..i
 *     B_i[j] = q_i B_{i+1}[j] + w_i B_{i+1}[j+1]        adjoint, experts E..i, from the weights of the sizes
 * "Plain" blocks have q_i = 1 and w_i = tilted odds, one multiply-add a cell; general ones have both scaled down
 * (tilt.h). Every function below takes `plain` as a constant and is inlined, so that neither pays for the other.
 *
 * The prefix is kept for a segment of experts at a time, small enough for the cache; the rows before each segment are
 * its checkpoints, from which the way back recomputes it (one segment, when everything fits: then nothing is redone).
 */
#ifndef PM_ROWS_BLOCK_H
#define PM_ROWS_BLOCK_H

#include <stddef.h>

#include "../kernels.h"
#include "transfer.h"

/* Bytes of prefix table kept at once. Two tables (value and tangent) of (64, 8) fit the first-level cache. */
#define PM_TABLE_BYTES (192 * 1024)

typedef struct block {
  int64_t E;
  int a, b;           /* the band */
  vreal *x;           /* [E] logits */
  vreal *e;           /* [E] exp(x - base) 2^-exponent: the softmax, but for the factor inverse_sum */
  vreal *w;           /* [E] odds or inclusion probabilities */
  vreal *q;           /* [E] what is left of 1 in a general block's factor */
  vreal *depth;       /* [E + 1] powers of two taken out before each expert (general blocks that draw) */
  vreal *v;           /* [E] direction of the tangent, then results */
  vreal *direct;      /* [E] routing backward: the part of the gradient that needs no recursion */
  vreal *sizes;       /* [b + 1] weight of each size: 1 for exact k, exp(lambda (j - j0)) in a band, 0 below a */
  vreal *top;         /* [b + 1] the largest logits, descending */
  vint *order;        /* [b] experts, by descending logit or in the order of a draw */
  vreal *draws;       /* [b] uniforms */
  vreal *adjoint;     /* [2 (b + 2)] B and its tangent */
  vreal *checkpoints; /* [segments][width (b + 1)] */
  vreal *table;       /* [segment + 1][width (b + 1)]: the state before each expert, and after the last */
  int64_t segment;    /* experts in a segment */
  int64_t segments;
  vreal total;          /* Z of the tilted, weighted factors */
  vreal inverse_total;  /* its inverse; NaN for a poisoned row, which so answers NaN */
  vreal base, exponent; /* of e: its largest is between 0.7 and 1.42, and 0 where all are masked */
  vreal sum;            /* sum of e */
  vreal inverse_sum;    /* its inverse, 0 where all are masked */
  vmask poison;         /* rows with a NaN, a +inf, or too few unmasked experts: computed as zeros, answered with NaN */
  vmask infeasible;     /* rows with too few unmasked experts */
  vreal pivot, offset;  /* general blocks: lambda = pivot + offset */
  int normalised;       /* general blocks: p_i and 1 - p_i, not scaled by the larger of 1 and the odds */
  int by_powers;        /* general blocks, not normalised: scaled by the power of two below the odds */
  vint base_size;       /* j0 */
  double lambda[LANES]; /* the tilt (in plain blocks of double precision, and in general ones) */
  real enough[2];       /* the odds that a plain block's experts need: for j0 = a, and for j0 = b */
} block;

PM_ALWAYS_INLINE int64_t segment_length(int64_t E, int64_t b, int width) {
  const int64_t row = (b + 1) * width * (int64_t)sizeof(vreal);
  int64_t length = PM_TABLE_BYTES / row;
  const int64_t least = 32; /* checkpoints must not outgrow the table they save */
  if (length < least) length = least;
  return length < E ? length : E;
}

static size_t block_bytes(int64_t E, int64_t b) {
  const int64_t segment = segment_length(E, b, 2), segments = (E + segment - 1) / segment;
  const int64_t vectors = 7 * E + 1 + 2 * (b + 1) + 2 * b + 2 * (b + 2) + 2 * (b + 1) * (segments + segment + 1);
  return (size_t)vectors * sizeof(vreal) + sizeof(vreal);
}

/* Lays a block out in the scratch; `width` is 1, or 2 to carry tangents. */
static void block_begin(block *k, const pm_job *job, int width) {
  vreal *next = (vreal *)(((uintptr_t)job->scratch + sizeof(vreal) - 1) & ~(uintptr_t)(sizeof(vreal) - 1));
  const int64_t E = job->shape.experts, b = job->shape.k_max;
  k->E = E;
  k->a = (int)job->shape.k_min;
  k->b = (int)b;
  k->segment = segment_length(E, b, width);
  k->segments = (E + k->segment - 1) / k->segment;
  k->x = next, next += E;
  k->e = next, next += E;
  k->w = next, next += E;
  k->q = next, next += E;
  k->depth = next, next += E + 1;
  k->v = next, next += E;
  k->direct = next, next += E;
  k->sizes = next, next += b + 1;
  k->top = next, next += b + 1;
  k->order = (vint *)next, next += b;
  k->draws = next, next += b;
  k->adjoint = next, next += 2 * (b + 2);
  k->checkpoints = next, next += k->segments * width * (b + 1);
  k->table = next;
}

/* ---- prefix ------------------------------------------------------------------------------------------------- */

/* One expert: to = from times (q + w X), cut after X^b. With a tangent (v the logit's), the tangent's factor is
 * w v X, the normaliser q being a constant of the tilt. to == from is allowed. */
PM_ALWAYS_INLINE void prefix_step(const vreal *from, vreal *to, vreal w, vreal q, vreal v, int b, int plain,
                                  int tangent) {
  const vreal *dfrom = from + b + 1;
  vreal *dto = to + b + 1;
  for (int j = b; j > 0; --j) {
    if (tangent) {
      const vreal inner = fma_(v, from[j - 1], dfrom[j - 1]);
      dto[j] = fma_(w, inner, plain ? dfrom[j] : q * dfrom[j]);
    }
    to[j] = fma_(w, from[j - 1], plain ? from[j] : q * from[j]);
  }
  if (tangent) dto[0] = plain ? dfrom[0] : q * dfrom[0];
  to[0] = plain ? from[0] : q * from[0];
}

/* `size` constant: the running state stays in registers and the table is only written. */
#define PM_UNROLLED_SIZE 8
PM_ALWAYS_INLINE void prefix_range(const block *k, vreal *state, vreal *table, int64_t begin, int64_t end, int size,
                                   int plain, int tangent) {
  const int cells = (size + 1) * (tangent ? 2 : 1);
  if (size <= PM_UNROLLED_SIZE) {
    vreal A[2 * (PM_UNROLLED_SIZE + 1)];
#pragma GCC unroll 18
    for (int c = 0; c < cells; ++c) A[c] = state[c];
    for (int64_t i = begin; i < end; ++i) {
      if (table) {
#pragma GCC unroll 18
        for (int c = 0; c < cells; ++c) table[c] = A[c];
        table += cells;
      }
      const vreal w = k->w[i], q = plain ? w : k->q[i], v = tangent ? k->v[i] : w;
#pragma GCC unroll 8
      for (int j = size; j > 0; --j) {
        if (tangent) {
          const vreal inner = fma_(v, A[j - 1], A[size + j]);
          A[size + 1 + j] = fma_(w, inner, plain ? A[size + 1 + j] : q * A[size + 1 + j]);
        }
        A[j] = fma_(w, A[j - 1], plain ? A[j] : q * A[j]);
      }
      if (!plain) {
        A[0] = q * A[0];
        if (tangent) A[size + 1] = q * A[size + 1];
      }
    }
#pragma GCC unroll 18
    for (int c = 0; c < cells; ++c) (table ? table : state)[c] = A[c];
    return;
  }
  if (!table) {
    for (int64_t i = begin; i < end; ++i)
      prefix_step(state, state, k->w[i], plain ? k->w[i] : k->q[i], tangent ? k->v[i] : k->w[i], size, plain, tangent);
    return;
  }
  memcpy(table, state, (size_t)cells * sizeof(vreal));
  for (int64_t i = begin; i < end; ++i, table += cells)
    prefix_step(table, table + cells, k->w[i], plain ? k->w[i] : k->q[i], tangent ? k->v[i] : k->w[i], size, plain,
                tangent);
}

/* One compiled copy of `range` for each form, with and without tangents, whoever calls it. */
#define PM_FOUR_FORMS(name, range, parameters, ...)                                                  \
  static __attribute__((noinline)) void name##_plain parameters { range(__VA_ARGS__, 1, 0) }         \
  static __attribute__((noinline)) void name##_plain_tangent parameters { range(__VA_ARGS__, 1, 1) } \
  static __attribute__((noinline)) void name##_general parameters { range(__VA_ARGS__, 0, 0) }       \
  static __attribute__((noinline)) void name##_general_tangent parameters { range(__VA_ARGS__, 0, 1) }

#define PM_FORM(name, plain, tangent) \
  ((plain) ? ((tangent) ? name##_plain_tangent : name##_plain) : ((tangent) ? name##_general_tangent : name##_general))

#define PM_PREFIX(k, state, table, begin, end, plain, tangent)                         \
  switch ((k)->b) {                                                                    \
    case 1: prefix_range(k, state, table, begin, end, 1, plain, tangent); break;       \
    case 2: prefix_range(k, state, table, begin, end, 2, plain, tangent); break;       \
    case 4: prefix_range(k, state, table, begin, end, 4, plain, tangent); break;       \
    case 6: prefix_range(k, state, table, begin, end, 6, plain, tangent); break;       \
    case 8: prefix_range(k, state, table, begin, end, 8, plain, tangent); break;       \
    default: prefix_range(k, state, table, begin, end, (k)->b, plain, tangent); break; \
  }

PM_FOUR_FORMS(prefix, PM_PREFIX, (const block *k, vreal *state, vreal *table, int64_t begin, int64_t end), k, state,
              table, begin, end)

/* All checkpoints, then the last segment's table; sets `total`. */
PM_ALWAYS_INLINE void prefix_all(block *k, int plain, int tangent) {
  const int64_t cells = (int64_t)(k->b + 1) * (tangent ? 2 : 1);
  vreal *state = k->checkpoints;
  for (int64_t c = 0; c < cells; ++c) state[c] = splat(0);
  state[0] = splat(1);
  for (int64_t s = 0; s + 1 < k->segments; ++s, state += cells) {
    memcpy(state + cells, state, (size_t)cells * sizeof(vreal));
    PM_FORM(prefix, plain, tangent)(k, state + cells, NULL, s * k->segment, (s + 1) * k->segment);
  }
  PM_FORM(prefix, plain, tangent)(k, state, k->table, (k->segments - 1) * k->segment, k->E);
  const vreal *last = k->table + (k->E - (k->segments - 1) * k->segment) * cells;
  vreal total = splat(0);
  for (int j = k->a; j <= k->b; ++j) total = fma_(k->sizes[j], last[j], total);
  k->total = total;
  k->inverse_total = select_(k->poison, splat((real)NAN), splat(1) / total);
}

/* The table of segment s, for s = segments - 1 down to 0: the last one is there already. */
PM_ALWAYS_INLINE void prefix_segment(const block *k, int64_t s, int plain, int tangent) {
  if (s + 1 == k->segments) return;
  const int64_t cells = (int64_t)(k->b + 1) * (tangent ? 2 : 1);
  PM_FORM(prefix, plain, tangent)(k, k->checkpoints + s * cells, k->table, s * k->segment, (s + 1) * k->segment);
}

/* The state after the last expert, with the last segment's table in place. */
PM_ALWAYS_INLINE const vreal *prefix_end(const block *k, int tangent) {
  return k->table + (k->E - (k->segments - 1) * k->segment) * (int64_t)(k->b + 1) * (tangent ? 2 : 1);
}

#endif
