/* A block: LANES rows at once, and their factors.
 *
 * Expert i contributes the factor (q_i + w_i X) to a polynomial whose coefficient of X^j is the tilted e_j:
 *     A_i[j] = q_i A_{i-1}[j] + w_i A_{i-1}[j-1]        prefix, experts 1..i
 *     B_i[j] = q_i B_{i+1}[j] + w_i B_{i+1}[j+1]        adjoint, experts E..i, from the weights of the sizes
 * "Plain" blocks have q_i = 1 and w_i = tilted odds, one multiply-add a cell; general ones have both scaled down
 * (tilt.h). Every function below takes `plain` as a constant and is inlined, so that neither pays for the other.
 *
 * The passes wait for loads and stores more than for arithmetic, so tables have a state for every two experts. To draw,
 * the one between is computed again where it is needed (sample.h). The way back multiplies the two factors first,
 *     (q + w X)(q' + w' X) = none + one X + both X^2,
 * and only its last step tells the two apart (subset.h). The prefix is kept for a segment of experts at a time, small
 * enough for the cache; the rows before each segment are its checkpoints, from which the way back recomputes it (one
 * segment, when everything fits: then nothing is redone). */
#ifndef PM_ROWS_BLOCK_H
#define PM_ROWS_BLOCK_H

#include <stddef.h>

#include "../kernels.h"
#include "transfer.h"

/* What a block's table holds: the state before every expert; before every second one, the same numbers; before every
 * pair, whose factors are multiplied first; or that and its tangent. */
typedef enum states { SINGLES, ALTERNATES, PAIRS, TANGENTS } states;

PM_ALWAYS_INLINE int width_of(states of) { return of == TANGENTS ? 2 : 1; }
PM_ALWAYS_INLINE int experts_in(states of) { return of == SINGLES ? 1 : 2; }

/* Bytes of prefix table kept at once. Both tables (value and tangent) of (256, 8) fit a second-level cache. */
#define PM_TABLE_BYTES (320 * 1024)

typedef struct block {
  int64_t E;
  int a, b;           /* the band */
  vreal *x;           /* [E] logits */
  vreal *e;           /* [E] exp(x - base) 2^-exponent: the softmax, but for the factor inverse_sum */
  vreal *w;           /* [E + 1] odds or inclusion probabilities; where E is odd, the last expert's partner has 0 */
  vreal *q;           /* [E + 1] what is left of 1 in a general block's factor; the partner has 1 */
  vreal *depth;       /* [E + 2] powers of two taken out before each expert (general blocks that draw) */
  vreal *v;           /* [E + 1] direction of the tangent, then results */
  vreal *direct;      /* [E] routing backward: the part of the gradient that needs no recursion */
  vreal *sizes;       /* [b + 1] weight of each size: 1 for exact k, exp(lambda (j - j0)) in a band, 0 below a */
  vreal *top;         /* [b + 1] the largest logits, descending */
  vint *order;        /* [b] experts, by descending logit or in the order of a draw */
  vreal *draws;       /* [b + 1] uniforms */
  vreal *adjoint;     /* [2 (b + 2)] B and its tangent */
  vreal *relay;       /* [8][(E + 1) / 2] from one chunk of columns to the next (subset.h) */
  vreal *checkpoints; /* [segments][width (b + 1)] */
  vreal *table;       /* [states in a segment + 1][width (b + 1)] */
  vreal *apart;       /* [(b + 1) / 2 + 1][2 (b + 1)] a table for the experts of S alone (route.h), where chosen_fits */
  int64_t segment;    /* experts in a segment: a whole number of pairs, but for the last */
  int64_t segments;
  vreal total;          /* Z of the tilted, weighted factors */
  vreal inverse_total;  /* its inverse; NaN for a poisoned row, which so answers NaN */
  vreal power;          /* plain blocks: w = power e */
  vreal base, exponent; /* of e: its largest is between 0.7 and 1.42, and 0 where all are masked */
  vreal sum;            /* sum of e */
  vreal inverse_sum;    /* its inverse, 0 where all are masked */
  vmask poison;         /* rows with a NaN, a +inf, or too few unmasked experts: computed as zeros, answered with NaN */
  vmask infeasible;     /* rows with too few unmasked experts */
  vreal pivot, offset;  /* general blocks: lambda = pivot + offset */
  int scalable;         /* whether general blocks can be scaled: -1 as long as no block has asked */
  int normalised;       /* general blocks: p_i and 1 - p_i, not scaled by the larger of 1 and the odds */
  int by_powers;        /* general blocks, not normalised: scaled by the power of two below the odds */
  vint base_size;       /* j0 */
  double lambda[LANES]; /* the tilt (in plain blocks of double precision, and in general ones) */
  real losable;         /* plain blocks: what may underflow, as a share of exp(sum of the odds) and of the promise */
  vreal least_total;    /* ... and the Z beside which that is negligible */
} block;

/* States in a segment: an even number, but for the last, as a table of single experts is also one of every second. */
PM_ALWAYS_INLINE int64_t segment_states(int64_t E, int64_t b, int width) {
  const int64_t row = (b + 1) * width * (int64_t)sizeof(vreal);
  int64_t length = PM_TABLE_BYTES / row;
  const int64_t least = 32; /* checkpoints must not outgrow the table they save */
  if (length < least) length = least;
  return length < E ? length & ~(int64_t)1 : E;
}

/* Whether routing's backward pass takes the experts of S by themselves: few of many. */
PM_ALWAYS_INLINE int chosen_fits(int64_t E, int64_t b) { return 2 * b <= E && b <= 32; }

static size_t block_bytes(int64_t E, int64_t b) {
  const int64_t length = segment_states(E, b, 2), segments = (E + length - 1) / length;
  const int64_t vectors = 7 * (E + 1) + 2 * (b + 1) + 2 * (b + 1) + 2 * (b + 2) + 4 * (E + 1) +
                          2 * (b + 1) * (segments + length + 1) + (chosen_fits(E, b) ? (b + 4) * (b + 1) : 0);
  return (size_t)vectors * sizeof(vreal) + sizeof(vreal);
}

/* Lays a block out in the scratch. */
static void block_begin(block *k, const pm_job *job, states of) {
  vreal *next = (vreal *)(((uintptr_t)job->scratch + sizeof(vreal) - 1) & ~(uintptr_t)(sizeof(vreal) - 1));
  const int64_t E = job->shape.experts, b = job->shape.k_max;
  k->E = E;
  k->a = (int)job->shape.k_min;
  k->b = (int)b;
  k->scalable = -1;
  k->segment = segment_states(E, b, width_of(of)) * experts_in(of);
  k->segments = (E + k->segment - 1) / k->segment;
  k->x = next, next += E;
  k->e = next, next += E;
  k->w = next, next += E + 1;
  k->q = next, next += E + 1;
  k->depth = next, next += E + 2;
  k->v = next, next += E + 1;
  k->direct = next, next += E;
  k->sizes = next, next += b + 1;
  k->top = next, next += b + 1;
  k->order = (vint *)next, next += b;
  k->draws = next, next += b + 1;
  k->adjoint = next, next += 2 * (b + 2);
  k->relay = next, next += 4 * (E + 1);
  k->checkpoints = next, next += k->segments * width_of(of) * (b + 1);
  k->table = next, next += ((k->segment < E ? k->segment : E) / experts_in(of) + 2) * width_of(of) * (b + 1);
  k->apart = next;
}

#endif
