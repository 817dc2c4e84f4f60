/* Drawing a subset from the prefix table.
 *
 * A_i[j] is the (tilted) mass of the j-subsets of experts 1..i, that is, of those whose last member is at most i. So
 * with j members still to choose among experts 1..n, the last one is the smallest i with A_i[j] > u A_n[j]: inversion,
 * one uniform a member, by bisection, since A_i[j] does not decrease in i. In the normalised form A_i[j] carries the
 * product of (1 - p_1) .. (1 - p_i), and the same inversion is done by steps: expert i is passed over while
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

/* Uniforms for draws 0..count-1 of every lane. Four draws share a counter; lanes are innermost so that the compiler
 * spreads the rounds over a register. */
static void uniforms(uint64_t seed, uint64_t row, int count, uint32_t purpose, vreal *out) {
  for (int first = 0; first < count; first += 4) {
    uint32_t words[PM_REAL_BITS / 32][4][LANES];
    for (int part = 0; part < PM_REAL_BITS / 32; ++part) {
      uint32_t (*c)[LANES] = words[part];
      for (int l = 0; l < LANES; ++l) {
        c[0][l] = (uint32_t)first / 4;
        c[1][l] = (uint32_t)(row + (uint64_t)l);
        c[2][l] = (uint32_t)((row + (uint64_t)l) >> 32);
        c[3][l] = purpose + (uint32_t)part;
      }
      uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
      for (int round = 0; round < PM_PHILOX_ROUNDS; ++round) {
        for (int l = 0; l < LANES; ++l) {
          const uint64_t product0 = (uint64_t)PM_PHILOX_M0 * c[0][l], product1 = (uint64_t)PM_PHILOX_M1 * c[2][l];
          c[0][l] = (uint32_t)(product1 >> 32) ^ c[1][l] ^ key0;
          c[1][l] = (uint32_t)product1;
          c[2][l] = (uint32_t)(product0 >> 32) ^ c[3][l] ^ key1;
          c[3][l] = (uint32_t)product0;
        }
        key0 += PM_PHILOX_W0;
        key1 += PM_PHILOX_W1;
      }
    }
    for (int t = 0; t < 4 && first + t < count; ++t)
      for (int l = 0; l < LANES; ++l)
#if PM_REAL_BITS == 32
        out[first + t][l] = pm_uniform_f32(words[0][t][l]);
#else
        out[first + t][l] = pm_uniform_f64(words[0][t][l], words[1][t][l]);
#endif
  }
}

/* Where a lane stands on its way down the experts. */
typedef struct walk {
  int64_t experts; /* n: the choice is among experts 1..n */
  int left;        /* j: how many are still to be chosen */
  int size;        /* |S| */
  real level;      /* U = u A_n[j] */
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

/* The lane's members among the experts of one segment, last first, into choice[left - 1]. `table` holds the states
 * before expert `begin` and after each one; `u` the uniforms, one a member. */
PM_ALWAYS_INLINE void choose(const block *k, const vreal *table, int64_t begin, int lane, walk *at, const vreal *u,
                             int64_t *choice, int plain) {
  const int64_t cells = k->b + 1;
#define PM_MASS(i, j) table[((i) - begin) * cells + (j)][lane] /* A_i[j], i experts passed */
  while (at->left > 0) {
    const int j = at->left;
    int64_t i;
    if (plain) {
      if (PM_MASS(begin, j) > at->level) break; /* no member is left in this segment */
      int64_t span = at->experts - begin;
      for (i = begin; span > 1;) { /* A_i[j] <= U < A_{i+span}[j] */
        const int64_t half = span / 2;
        i += PM_MASS(i + half, j) > at->level ? 0 : half;
        span -= half;
      }
    } else {
      for (i = at->experts - 1; i >= begin; --i) {
        const real q = k->q[i][lane], mass = PM_MASS(i, j);
        const int possible = k->w[i][lane] * PM_MASS(i, j - 1) > 0;
        if (possible && !(at->level < q * mass)) break;
        at->level = q > 0 ? at->level / q : 0;
        if (!(at->level < mass)) at->level = mass * (1 - PM_REAL_HALF_ULP);
      }
      if (i < begin) break;
    }
    choice[j - 1] = i;
    at->experts = i;
    at->left = j - 1;
    if (at->left > 0) at->level = u[at->size - at->left][lane] * PM_MASS(i, at->left);
  }
  if (at->left > 0) at->experts = begin;
#undef PM_MASS
}

/* Draws S for the wanted lanes: indices [.., b] ascending, slots past |S| at E. Poisoned rows get 0, 1, 2, ... Needs
 * prefix_all; overwrites `top`. */
PM_ALWAYS_INLINE void sample_block(block *k, const pm_job *job, int64_t row, int64_t rows, vmask wanted, int plain) {
  const int b = k->b;
  const uint64_t first = (uint64_t)(job->shape.first_row + row);
  const vreal *end = prefix_end(k, 0);
  vreal *u = k->top;
  walk at[LANES];
  uniforms(job->seed, first, b, PM_DRAW_ITEM, u);
  for (int l = 0; l < LANES; ++l) {
    at[l].left = 0;
    if (l >= rows || !wanted[l]) continue;
    int64_t *choice = job->out_indices + (row + l) * b;
    const int drawable = !k->poison[l] && k->total[l] > 0;
    const int size = drawable ? draw_size(k, end, l, job->seed, first + (uint64_t)l) : b;
    for (int j = 0; j < b; ++j) choice[j] = j < size ? j : k->E;
    if (!drawable) continue;
    at[l].experts = k->E;
    at[l].left = at[l].size = size;
    at[l].level = size > 0 ? u[0][l] * end[size][l] : 0;
  }
  for (int64_t s = k->segments - 1; s >= 0; --s) {
    prefix_segment(k, s, plain, 0);
    for (int l = 0; l < LANES; ++l)
      if (at[l].left > 0) choose(k, k->table, s * k->segment, l, &at[l], u, job->out_indices + (row + l) * b, plain);
  }
}

PM_ALWAYS_INLINE vmask sample_body(const pm_job *job, block *k, int64_t row, int64_t rows, vmask wanted, int plain) {
  prefix_all(k, plain, 0);
  const vmask safe = plain ? wanted & plain_is_safe(k) : wanted;
  if (any(safe)) sample_block(k, job, row, rows, safe, plain);
  return safe;
}

PM_ROW_KERNEL(sample, 1)

#endif
