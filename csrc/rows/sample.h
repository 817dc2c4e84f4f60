/* Drawing a subset from the prefix table.
 *
 * A_i[j] is the (tilted) mass of the j-subsets of experts 1..i, that is, of those whose last member is at most i. So
 * with j members still to choose among experts 1..n, the last one is the smallest i with A_i[j] > u A_n[j]: inversion,
 * one uniform a member, by bisection, since A_i[j] does not decrease in i. In the general forms A_i[j] carries the
 * product q_1 .. q_i, and the same inversion is done by steps: expert i is passed over while
 * U < q_i A_{i-1}[j], with U divided by q_i each time. */
#ifndef PM_ROWS_SAMPLE_H
#define PM_ROWS_SAMPLE_H

#include "../philox.h"
#include "tilt.h"

/* Uniform for one draw of one row, in this precision. */
PM_ALWAYS_INLINE real uniform(uint64_t seed, uint64_t row, uint32_t draw, uint32_t purpose) {
  const uint32_t high = pm_random_word(seed, row, draw, purpose);
#if PM_REAL_BITS == 32
  return pm_uniform_f32(high);
#else
  return pm_uniform_f64(high, pm_random_word(seed, row, draw, purpose + 1));
#endif
}

/* Uniforms for draws 0..count-1 of every lane, four draws to a counter. Word l serves lane l % LANES; in double
 * precision the upper half of the words are the low parts. */
static void uniforms(uint64_t seed, uint64_t row, int count, uint32_t purpose, vreal *out) {
  vword row_low, row_high, use;
  for (int l = 0; l < WORDS; ++l) {
    const uint64_t number = row + (uint64_t)(l % LANES);
    row_low[l] = (uint32_t)number;
    row_high[l] = (uint32_t)(number >> 32);
    use[l] = purpose + (uint32_t)(l / LANES);
  }
  for (int first = 0; first < count; first += 4) {
    vword c[4] = {(vword){0} + (uint32_t)first / 4, row_low, row_high, use};
    uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < PM_PHILOX_ROUNDS; ++round) {
      vword high0, low0, high1, low1;
      multiply_words(c[0], PM_PHILOX_M0, &high0, &low0);
      multiply_words(c[2], PM_PHILOX_M1, &high1, &low1);
      c[0] = high1 ^ c[1] ^ key0;
      c[1] = low1;
      c[2] = high0 ^ c[3] ^ key1;
      c[3] = low0;
      key0 += PM_PHILOX_W0;
      key1 += PM_PHILOX_W1;
    }
    for (int t = 0; t < 4 && first + t < count; ++t)
      for (int l = 0; l < LANES; ++l)
#if PM_REAL_BITS == 32
        out[first + t][l] = pm_uniform_f32(c[t][l]);
#else
        out[first + t][l] = pm_uniform_f64(c[t][l], c[t][l + LANES]);
#endif
  }
}

/* Where the lanes stand on their way down the experts. */
typedef struct walk {
  int64_t experts[LANES]; /* n: the choice is among experts 1..n */
  int left[LANES];        /* j: how many are still to be chosen */
  int size[LANES];        /* |S| */
  real level[LANES];      /* U = u A_n[j] */
} walk;

/* The size of S: the smallest j whose cumulative mass exceeds u Z. */
PM_ALWAYS_INLINE int draw_size(const block *k, const vreal *end, int lane, uint64_t seed, uint64_t row) {
  if (k->a == k->b) return k->b;
  const real level = uniform(seed, row, 0, PM_DRAW_SIZE) * k->total[lane];
  real mass = 0;
  int last = k->a;
  for (int j = k->a; j <= k->b; ++j) {
    const real step = k->sizes[j][lane] * end[j][lane];
    if (step > 0) last = j;
    mass += step;
    if (mass > level) return last;
  }
  return last;
}

/* U = u A, below A even where a subnormal product rounds up to it. */
PM_ALWAYS_INLINE real level_of(real u, real mass) {
  const real level = u * mass;
  return level < mass ? level : 0;
}

#define PM_MASS(i, j) table[((i) - begin) * cells + (j)][l] /* A_i[j] of lane l, i experts passed */

/* The lanes' members among the experts of one segment, last first, into choice[left - 1]: bisection. `table` holds the
 * states before expert `begin` and after each one; `u` the uniforms, one a member.
 *
 * The bisection runs over the whole segment, not up to n: A_i[j] for i >= n exceeds U as well. So every lane takes the
 * same number of steps, and their chains of dependent loads overlap. */
static void choose_plain(const block *k, const vreal *table, int64_t begin, int64_t end, walk *at, const vreal *u,
                         int64_t *const *choice) {
  const int64_t cells = k->b + 1;
  for (;;) {
    unsigned open = 0;
    for (int l = 0; l < LANES; ++l)
      open |= (unsigned)(at->left[l] > 0 && !(PM_MASS(begin, at->left[l]) > at->level[l])) << l;
    if (!open) return; /* what is left has its members before this segment */
    int64_t low[LANES];
    for (int l = 0; l < LANES; ++l) low[l] = begin;
    for (int64_t span = end - begin; span > 1;) { /* A_low[j] <= U < A_{low + span}[j] */
      const int64_t half = span / 2;
      for (int l = 0; l < LANES; ++l) low[l] += PM_MASS(low[l] + half, at->left[l]) > at->level[l] ? 0 : half;
      span -= half;
    }
    for (int l = 0; l < LANES; ++l) {
      if (!(open >> l & 1)) continue;
      const int j = --at->left[l];
      choice[l][j] = low[l];
      if (j > 0) at->level[l] = level_of(u[at->size[l] - j][l], PM_MASS(low[l], j));
    }
  }
}

/* The same for one lane of a general block, expert by expert. */
static void choose_general(const block *k, const vreal *table, int64_t begin, int l, walk *at, const vreal *u,
                           int64_t *choice) {
  const int64_t cells = k->b + 1;
  while (at->left[l] > 0) {
    const int j = at->left[l];
    int64_t i;
    for (i = at->experts[l] - 1; i >= begin; --i) {
      const real q = k->q[i][l], mass = PM_MASS(i, j);
      if (!(at->level[l] < q * mass)) {
        if (k->w[i][l] * PM_MASS(i, j - 1) > 0) break;
        at->level[l] = q * mass; /* an expert that cannot enter is passed over, whatever rounding said */
      }
      if (q == 1 && at->level[l] < mass) continue;
      at->level[l] = q > 0 ? at->level[l] / q : 0;
      if (!(at->level[l] < mass)) at->level[l] = mass * (1 - PM_REAL_HALF_ULP);
    }
    at->experts[l] = i < begin ? begin : i;
    if (i < begin) return;
    choice[j - 1] = i;
    at->left[l] = j - 1;
    if (j > 1) at->level[l] = level_of(u[at->size[l] - (j - 1)][l], PM_MASS(i, j - 1));
  }
}
#undef PM_MASS

/* Draws S for the wanted lanes: indices [.., b] ascending, slots past |S| at E. Poisoned rows get 0, 1, 2, ... Needs
 * prefix_all; overwrites `top`. */
PM_ALWAYS_INLINE void sample_block(block *k, const pm_job *job, int64_t row, int64_t rows, vmask wanted, int plain) {
  const int b = k->b;
  const uint64_t first = (uint64_t)(job->shape.first_row + row);
  const vreal *end = prefix_end(k, 0);
  vreal *u = k->top;
  walk at;
  int64_t *choice[LANES];
  uniforms(job->seed, first, b, PM_DRAW_ITEM, u);
  for (int l = 0; l < LANES; ++l) {
    at.left[l] = at.size[l] = 0;
    at.level[l] = 0;
    choice[l] = job->out_indices + (row + (l < rows ? l : 0)) * b;
    if (l >= rows || !wanted[l]) continue;
    const int drawable = !k->poison[l] && k->total[l] > 0;
    const int size = drawable ? draw_size(k, end, l, job->seed, first + (uint64_t)l) : b;
    for (int j = 0; j < b; ++j) choice[l][j] = j < size ? j : k->E;
    if (!drawable) continue;
    at.experts[l] = k->E;
    at.left[l] = at.size[l] = size;
    at.level[l] = size > 0 ? level_of(u[0][l], end[size][l]) : 0;
  }
  for (int64_t s = k->segments - 1; s >= 0; --s) {
    const int64_t begin = s * k->segment, stop = s + 1 == k->segments ? k->E : begin + k->segment;
    prefix_segment(k, s, plain, 0);
    if (plain)
      choose_plain(k, k->table, begin, stop, &at, u, choice);
    else
      for (int l = 0; l < LANES; ++l) choose_general(k, k->table, begin, l, &at, u, choice[l]);
  }
}

PM_ALWAYS_INLINE void sample_body(const pm_job *job, block *k, int64_t row, int64_t rows, vmask wanted, int plain) {
  prefix_all(k, plain, 0);
  sample_block(k, job, row, rows, wanted, plain);
}

PM_ROW_KERNEL(sample, 1)

#endif
