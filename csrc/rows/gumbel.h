/* Row kernels of the Gumbel family but for relaxed_top_k (relaxed.h): perturbed keys and their largest, Plackett-Luce
 * log-probabilities, Gumbel-sigmoid. */
#ifndef PM_ROWS_GUMBEL_H
#define PM_ROWS_GUMBEL_H

#include "../kernels.h"
#include "noise.h"
#include "transfer.h"

/* LANES rows at once. */
typedef struct keyed {
  int64_t E;
  int k;
  vreal *x;         /* [E] logits, then keys */
  vreal *next;      /* what follows in the scratch */
  vmask poison;     /* rows with a NaN, a +inf, or too few unmasked experts: computed as zeros, answered with NaN */
  vmask infeasible; /* rows with fewer than k_min unmasked experts */
} keyed;

static void keyed_begin(keyed *d, const pm_job *job) {
  d->E = job->shape.experts;
  d->k = (int)job->shape.k_max;
  d->x = (vreal *)(((uintptr_t)job->scratch + sizeof(vreal) - 1) & ~(uintptr_t)(sizeof(vreal) - 1));
  d->next = d->x + pitch(d->E);
}

static void keyed_load(keyed *d, const pm_job *job, int64_t row, int64_t rows) {
  const source in = {job->logits, job->shape.stride, job->is_double};
  const vreal infinity = splat((real)INFINITY);
  load_rows(&in, row, rows, d->E, d->x);
  vmask bad = {0}, unmasked = {0};
  for (int64_t i = 0; i < d->E; ++i) {
    bad |= ~(vmask)(d->x[i] < infinity);
    unmasked -= (vmask)(d->x[i] > -infinity);
  }
  d->infeasible = (vmask)(unmasked < (bits)job->shape.k_min) & ~bad;
  d->poison = bad | d->infeasible;
  if (any(d->poison))
    for (int64_t i = 0; i < d->E; ++i) d->x[i] = select_(d->poison, splat(0), d->x[i]);
}

/* Adds the Gumbel variates of the block that starts at `row` to x: expert i has draw i. */
static void perturb(const keyed *d, const pm_job *job, int64_t row) {
  const element_counter at = counter_of(job->seed, (uint64_t)(job->shape.first_row + row), LANES, PM_DRAW_GUMBEL);
  vword word[4];
  for (int64_t i = 0; i < d->E; i += 4) {
    element_words(&at, (uint32_t)(i / 4), word);
    for (int t = 0; t < 4 && i + t < d->E; ++t) d->x[i + t] += gumbel_of(word[t]);
  }
}

/* ---- the k largest keys -------------------------------------------------------------------------------------- */

/* The k largest of x and where they are, descending, ties to the lower index: an insertion network, all lanes in step.
 * Where a lane has inserted its key, the ones it displaces move down whatever they compare as. */
#define PM_UNROLLED_KEYS 8
PM_ALWAYS_INLINE void largest_range(const vreal *x, int64_t E, int k, vreal *top, vmask *at) {
  vreal key[PM_UNROLLED_KEYS];
  vmask index[PM_UNROLLED_KEYS];
  vreal *t = k <= PM_UNROLLED_KEYS ? key : top;
  vmask *n = k <= PM_UNROLLED_KEYS ? index : at;
#pragma GCC unroll 8
  for (int j = 0; j < k; ++j) {
    t[j] = splat(-(real)INFINITY);
    n[j] = (vmask){0};
  }
  for (int64_t i = 0; i < E; ++i) {
    vreal moving = x[i];
    vmask number = (vmask){0} + (bits)i, inserted = {0};
#pragma GCC unroll 8
    for (int j = 0; j < k; ++j) {
      inserted |= (vmask)(moving > t[j]);
      const vreal displaced = t[j];
      const vmask displaced_number = n[j];
      t[j] = select_(inserted, moving, displaced);
      n[j] = (inserted & number) | (~inserted & displaced_number);
      moving = select_(inserted, displaced, moving);
      number = (inserted & displaced_number) | (~inserted & number);
    }
  }
  if (t == key) {
#pragma GCC unroll 8
    for (int j = 0; j < k; ++j) {
      top[j] = t[j];
      at[j] = n[j];
    }
  }
}

static void largest_keys(const vreal *x, int64_t E, int k, vreal *top, vmask *at) {
  switch (k) {
    case 1: largest_range(x, E, 1, top, at); break;
    case 2: largest_range(x, E, 2, top, at); break;
    case 4: largest_range(x, E, 4, top, at); break;
    case 6: largest_range(x, E, 6, top, at); break;
    case 8: largest_range(x, E, 8, top, at); break;
    default: largest_range(x, E, k, top, at); break;
  }
}

static pm_status gumbel_top_k_rows(const pm_job *job) {
  keyed d;
  keyed_begin(&d, job);
  const int k = d.k;
  vreal *top = d.next;
  vmask *at = (vmask *)(d.next + k);
  vmask infeasible = {0};
  for (int64_t row = 0; row < job->shape.rows; row += LANES) {
    const int64_t rows = job->shape.rows - row < LANES ? job->shape.rows - row : LANES;
    keyed_load(&d, job, row, rows);
    infeasible |= d.infeasible;
    perturb(&d, job, row);
    largest_keys(d.x, d.E, k, top, at);
    for (int l = 0; l < rows; ++l) {
      const int64_t first = (row + l) * k;
      for (int j = 0; j < k; ++j) {
        job->out_indices[first + j] = d.poison[l] ? j : at[j][l];
        write_(job->out, job->is_double, first + j, d.poison[l] ? (real)NAN : top[j][l]);
      }
    }
  }
  return any(infeasible) ? PM_INFEASIBLE : PM_OK;
}

/* ---- Gumbel-sigmoid ------------------------------------------------------------------------------------------ */

static pm_status gumbel_sigmoid_rows(const pm_job *job) {
  const source in = {job->logits, job->shape.stride, job->is_double};
  const vreal inverse = splat((real)(1 / job->temperature));
  keyed d;
  keyed_begin(&d, job);
  for (int64_t row = 0; row < job->shape.rows; row += LANES) {
    const int64_t rows = job->shape.rows - row < LANES ? job->shape.rows - row : LANES;
    const element_counter at = counter_of(job->seed, (uint64_t)(job->shape.first_row + row), LANES, PM_DRAW_CONCRETE);
    const unsigned wanted = rows_mask(rows);
    load_rows(&in, row, rows, d.E, d.x);
    vword word[4];
    for (int64_t i = 0; i < d.E; i += 4) {
      element_words(&at, (uint32_t)(i / 4), word);
      for (int t = 0; t < 4 && i + t < d.E; ++t) d.x[i + t] = sigmoid((d.x[i + t] + logistic_of(word[t])) * inverse);
    }
    store_rows(d.x, wanted, row, d.E, job->out, job->is_double);
  }
  return PM_OK;
}

/* ---- Plackett-Luce: double precision only ---------------------------------------------------------------------- */
#if PM_REAL_BITS == 64

/* The rows' choices r_{i_t} into chosen[t], taken out of x (-inf). Returns the lanes where all were there to be taken:
 * an expert that is masked, or was taken before, is not. */
static vmask take_choices(keyed *d, const pm_job *job, int64_t row, int64_t rows, vreal *chosen) {
  vmask possible = ~(vmask){0};
  for (int l = 0; l < LANES; ++l) {
    const int64_t *index = job->indices + (row + (l < rows ? l : rows - 1)) * d->k;
    for (int t = 0; t < d->k; ++t) {
      const real r = d->x[index[t]][l];
      chosen[t][l] = r;
      if (r == -INFINITY) possible[l] = 0;
      d->x[index[t]][l] = -INFINITY;
    }
  }
  return possible;
}

/* log(exp(a) + exp(b)) - max(a, b), from a - b. */
PM_ALWAYS_INLINE vreal log_excess(vreal difference) { return log1p_(exp_(-abs_(difference))); }

/* logsumexp of x; -inf where nothing is left. */
static vreal log_sum_exp(const vreal *x, int64_t E) {
  vreal largest = splat(-(real)INFINITY), sum = splat(0);
  for (int64_t i = 0; i < E; ++i) largest = max_(x[i], largest);
  const vmask nothing = (vmask)(largest == splat(-(real)INFINITY));
  const vreal shift = select_(nothing, splat(0), largest);
  for (int64_t i = 0; i < E; ++i) sum += exp_(x[i] - shift);
  return select_(nothing, largest, shift + log_(select_(nothing, splat(1), sum)));
}

/* With L what is left after t, the term of t is -log(1 + exp(L - r_t)), and before t there is log(exp(L) + exp(r_t)):
 * from the last choice to the first nothing is subtracted but differences of logits. */
static pm_status plackett_luce_log_prob_rows(const pm_job *job) {
  keyed d;
  keyed_begin(&d, job);
  vreal *chosen = d.next;
  for (int64_t row = 0; row < job->shape.rows; row += LANES) {
    const int64_t rows = job->shape.rows - row < LANES ? job->shape.rows - row : LANES;
    keyed_load(&d, job, row, rows);
    const vmask possible = take_choices(&d, job, row, rows, chosen);
    vreal left = log_sum_exp(d.x, d.E), total = splat(0);
    for (int t = d.k - 1; t >= 0; --t) {
      const vreal difference = left - chosen[t], excess = log_excess(difference);
      total -= max_(difference, splat(0)) + excess;
      left = max_(left, chosen[t]) + excess;
    }
    for (int l = 0; l < rows; ++l)
      write_(job->out, job->is_double, row + l, d.poison[l] ? NAN : possible[l] ? total[l] : -INFINITY);
  }
  return PM_OK;
}

/* d/dr_i = [i chosen] - sum over t of exp(r_i - L_t), L_t before t, t running up to i's own choice (or to the last):
 * one running log of the sum of exp(-L_t) serves all experts. */
static pm_status plackett_luce_log_prob_backward_rows(const pm_job *job) {
  const source in = {job->vector, 1, job->is_double};
  keyed d;
  keyed_begin(&d, job);
  vreal *chosen = d.next, *before = chosen + d.k;
  for (int64_t row = 0; row < job->shape.rows; row += LANES) {
    const int64_t rows = job->shape.rows - row < LANES ? job->shape.rows - row : LANES;
    vreal grad;
    load_rows(&in, row, rows, 1, &grad);
    keyed_load(&d, job, row, rows);
    const vmask possible = take_choices(&d, job, row, rows, chosen);
    const unsigned wanted = rows_mask(rows);
    vreal left = log_sum_exp(d.x, d.E), sum = splat(-(real)INFINITY);
    for (int t = d.k - 1; t >= 0; --t) {
      left = max_(left, chosen[t]) + log_excess(left - chosen[t]);
      before[t] = left;
    }
    for (int t = 0; t < d.k; ++t) {
      sum = max_(sum, -before[t]) + log_excess(sum + before[t]);
      chosen[t] = grad * (splat(1) - exp_(select_(possible, chosen[t] + sum, splat(0))));
    }
    grad = select_(possible, grad, splat(0));
    for (int64_t i = 0; i < d.E; ++i) d.x[i] = -grad * exp_(select_(possible, d.x[i] + sum, splat(0)));
    for (int l = 0; l < rows; ++l) {
      const int64_t *index = job->indices + (row + l) * d.k;
      for (int t = 0; t < d.k && possible[l]; ++t) d.x[index[t]][l] = chosen[t][l];
    }
    for (int64_t i = 0; i < d.E; ++i) d.x[i] = select_(d.poison, splat(NAN), d.x[i]);
    store_rows(d.x, wanted, row, d.E, job->out, job->is_double);
  }
  return PM_OK;
}

#endif
#endif
