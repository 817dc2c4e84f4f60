/* DirMoE routing on rows, in double precision: forward and backward in one pass each over a block. What is computed is
 * in probmoe.h. Products of small gates and small shares are kept as sums of logarithms, so that r = softmax(log z +
 * log g) needs no floor at any temperature. */
#ifndef PM_ROWS_DIRMOE_H
#define PM_ROWS_DIRMOE_H

#include "dirichlet.h"

#if PM_REAL_BITS == 64
typedef struct dirmoe_block {
  int64_t E;
  int k_min, k_max;
  pm_dirmoe options;
  source gate, hi, lo;
  vreal *ell, *alpha_hi, *alpha_lo, *noise, *log_g, *score, *q, *p, *top;
  vmask poison, infeasible;
} dirmoe_block;

static dirmoe_block dirmoe_begin(const pm_dirmoe_job *job) {
  const int64_t E = job->shape.experts;
  dirmoe_block k = {.E = E, .k_min = (int)job->shape.k_min, .k_max = (int)job->shape.k_max, .options = job->options};
  k.gate = (source){job->gate_logits, job->shape.stride, job->is_double};
  k.hi = (source){job->alpha_hi, E, job->is_double};
  k.lo = (source){job->alpha_lo, E, job->is_double};
  vreal **const all[LAW_VECTORS] = {&k.ell, &k.alpha_hi, &k.alpha_lo, &k.noise, &k.log_g, &k.score, &k.q, &k.p, &k.top};
  vreal *next = aligned_vectors(job->scratch);
  for (int n = 0; n < LAW_VECTORS; ++n, next += E) *all[n] = next;
  return k;
}

/* Inputs of a block; rows that have no answer are computed as zeros and ones. */
static void dirmoe_load(dirmoe_block *k, int64_t row, int64_t rows) {
  load_rows(&k->gate, row, rows, k->E, k->ell);
  load_rows(&k->hi, row, rows, k->E, k->alpha_hi);
  load_rows(&k->lo, row, rows, k->E, k->alpha_lo);
  vmask good = ~(vmask){0};
  vreal unmasked = splat(0);
  for (int64_t i = 0; i < k->E; ++i) {
    good &= (vmask)(k->ell[i] < INFINITY) & (vmask)(k->alpha_hi[i] > 0) & (vmask)(k->alpha_hi[i] <= PM_LARGEST) &
            (vmask)(k->alpha_lo[i] > 0) & (vmask)(k->alpha_lo[i] <= PM_LARGEST);
    unmasked += select_((vmask)(k->ell[i] > -INFINITY), splat(1), splat(0));
  }
  k->infeasible = k->options.training ? (vmask){0} : good & (vmask)(unmasked < (real)k->k_min);
  k->poison = ~good | k->infeasible;
  for (int64_t i = 0; i < k->E; ++i) {
    k->ell[i] = select_(k->poison, splat(0), k->ell[i]);
    k->alpha_hi[i] = select_(k->poison, splat(1), k->alpha_hi[i]);
    k->alpha_lo[i] = select_(k->poison, splat(1), k->alpha_lo[i]);
  }
}

PM_ALWAYS_INLINE gate gate_of(const dirmoe_block *k, int64_t i) {
  return relaxed_gate(k->ell[i], k->noise[i], k->options.temperature);
}

PM_ALWAYS_INLINE void mix(dirmoe_block *k, int64_t i, vreal open, vreal closed) {
  k->q[i] = k->options.concentration * fma_(open, k->alpha_hi[i], closed * k->alpha_lo[i]);
  k->p[i] = k->options.prior_concentration * fma_(open, splat(k->options.prior_hi), closed * k->options.prior_lo);
}

/* The lane's up to `k_max` largest of `x` above -inf into choice, descending, ties to the lower index; how many. */
static int largest_of_lane(const vreal *x, int64_t E, int k_max, int lane, int64_t *choice) {
  int found = 0;
  for (int64_t i = 0; i < E && k_max > 0; ++i) {
    const real here = x[i][lane];
    if (!(here > -INFINITY) || (found == k_max && !(here > x[choice[found - 1]][lane]))) continue;
    int j = found < k_max ? found++ : k_max - 1;
    for (; j > 0 && x[choice[j - 1]][lane] < here; --j) choice[j] = choice[j - 1];
    choice[j] = i;
  }
  return found;
}

/* Scores (and what the backward pass needs) of a drawn block; returns the sums of the gates. */
static vreal draw_block(dirmoe_block *k, const pm_dirmoe_job *job, int64_t row, int64_t rows) {
  const uint64_t number = (uint64_t)(job->shape.first_row + row);
  const element_counter logistic = counter_of(job->seed, number, rows, PM_DRAW_LOGISTIC);
  const element_counter gamma = counter_of(job->seed, number, rows, PM_DRAW_GAMMA);
  vreal expected = splat(0);
  for (int64_t i = 0; i < k->E; ++i) {
    k->noise[i] = logistic_noise(&logistic, (uint32_t)i);
    const gate at = gate_of(k, i);
    mix(k, i, at.open, at.closed);
    k->log_g[i] = draw_log_gamma(k->q[i], &gamma, (uint32_t)i);
    k->score[i] = at.log_open + k->log_g[i];
    expected += at.open;
  }
  store_rows(k->noise, rows_mask(rows), row, k->E, job->noise, job->is_double);
  store_rows(k->log_g, rows_mask(rows), row, k->E, job->log_gamma, job->is_double);
  return expected;
}

/* Slots of the lanes from their order of `x`: at most `size` of them (those above 0 where the band leaves the choice).
 */
static vreal choose_slots(const dirmoe_block *k, const vreal *x, int decided, int64_t rows, int64_t *indices) {
  vreal chosen = splat(0);
  for (int l = 0; l < LANES && l < rows; ++l) {
    int64_t *choice = indices + l * k->k_max;
    int size = largest_of_lane(x, k->E, k->k_max, l, choice);
    if (decided) {
      int positive = 0;
      while (positive < size && x[choice[positive]][l] > 0) ++positive;
      size = positive < k->k_min ? k->k_min : positive;
    }
    for (int j = 0; j < k->k_max; ++j)
      if (k->poison[l])
        choice[j] = j;
      else if (j >= size)
        choice[j] = k->E;
    chosen[l] = size;
  }
  return chosen;
}

/* top[j] = x at slot j, -inf where it is unused. */
static void gather_slots(const dirmoe_block *k, const vreal *x, const int64_t *indices, int64_t rows) {
  for (int j = 0; j < k->k_max; ++j) {
    vreal at = splat(-INFINITY);
    for (int l = 0; l < LANES && l < rows; ++l) {
      const int64_t i = indices[l * k->k_max + j];
      if (i >= 0 && i < k->E) at[l] = x[i][l];
    }
    k->top[j] = at;
  }
}

PM_ALWAYS_INLINE vreal largest_score(const dirmoe_block *k) {
  vreal largest = splat(-INFINITY);
  for (int64_t i = 0; i < k->E; ++i) largest = max_(k->score[i], largest);
  return select_((vmask)(largest > -INFINITY), largest, splat(0));
}

/* top becomes the weights: exp(top - largest) / sum, the sum over the slots or over all scores. */
static void weigh_slots(dirmoe_block *k) {
  const vreal largest = largest_score(k);
  vreal sum = splat(0);
  if (!k->options.normalize)
    for (int64_t i = 0; i < k->E; ++i) sum += exp_(k->score[i] - largest);
  for (int j = 0; j < k->k_max; ++j) {
    k->top[j] = exp_(k->top[j] - largest);
    if (k->options.normalize) sum += k->top[j];
  }
  const vreal inverse = 1 / select_((vmask)(sum > 0), sum, splat(1));
  for (int j = 0; j < k->k_max; ++j) k->top[j] *= inverse;
}

/* Inference: z is the indicator of the slots; top becomes their shares of the posterior mean, whose sum is returned. */
static vreal decide_block(dirmoe_block *k, const int64_t *indices, int64_t rows) {
  for (int64_t i = 0; i < k->E; ++i) k->score[i] = splat(0);
  for (int l = 0; l < LANES && l < rows; ++l)
    for (int j = 0; j < k->k_max; ++j) {
      const int64_t i = indices[l * k->k_max + j];
      if (i >= 0 && i < k->E) k->score[i][l] = 1;
    }
  for (int64_t i = 0; i < k->E; ++i) mix(k, i, k->score[i], 1 - k->score[i]);
  gather_slots(k, k->q, indices, rows);
  vreal sum = splat(0);
  for (int j = 0; j < k->k_max; ++j) sum += k->top[j] = max_(k->top[j], splat(0));
  sum = select_((vmask)(sum > 0), sum, splat(1));
  for (int j = 0; j < k->k_max; ++j) k->top[j] /= sum;
  return sum;
}

static pm_status dirmoe_rows(const pm_dirmoe_job *job) {
  dirmoe_block k = dirmoe_begin(job);
  vmask infeasible = {0};
  for (int64_t row = 0; row < job->shape.rows; row += LANES) {
    const int64_t rows = job->shape.rows - row < LANES ? job->shape.rows - row : LANES;
    int64_t *indices = job->out_indices + row * k.k_max;
    dirmoe_load(&k, row, rows);
    infeasible |= k.infeasible;
    vreal expected;
    if (k.options.training) {
      expected = draw_block(&k, job, row, rows);
      choose_slots(&k, k.score, 0, rows, indices);
      gather_slots(&k, k.score, indices, rows);
      weigh_slots(&k);
    } else {
      expected = choose_slots(&k, k.ell, 1, rows, indices);
      decide_block(&k, indices, rows);
    }
    const vreal kl = divergence(k.q, k.p, k.E, 0), nothing = splat(NAN);
    store_scalars(job->kl, job->is_double, row, rows, select_(k.poison, nothing, kl));
    store_scalars(job->expected_k, job->is_double, row, rows, select_(k.poison, nothing, expected));
    for (int l = 0; l < LANES && l < rows; ++l)
      for (int j = 0; j < k.k_max; ++j)
        write_(job->weights, job->is_double, (row + l) * k.k_max + j, k.poison[l] ? NAN : k.top[j][l]);
  }
  return any(infeasible) ? PM_INFEASIBLE : PM_OK;
}

/* ---- backward ------------------------------------------------------------------------------------------------ */

/* Gradient by the scores, in score: of a softmax over the slots (`normalize`) or over all experts. top holds the
 * weights. */
static void score_gradient(dirmoe_block *k, const pm_dirmoe_job *job, int64_t row, int64_t rows) {
  const source grad = {job->grad_weights, k->k_max, job->is_double};
  const int64_t *indices = job->indices + row * k->k_max;
  vreal mean = splat(0);
  for (int l = 0; l < LANES && l < rows; ++l)
    for (int j = 0; j < k->k_max; ++j) mean[l] += k->top[j][l] > 0 ? read_(&grad, row + l, j) * k->top[j][l] : 0;
  if (k->options.normalize) {
    for (int64_t i = 0; i < k->E; ++i) k->score[i] = splat(0);
  } else {
    const vreal largest = largest_score(k);
    vreal sum = splat(0);
    for (int64_t i = 0; i < k->E; ++i) sum += k->score[i] = exp_(k->score[i] - largest);
    const vreal inverse = 1 / select_((vmask)(sum > 0), sum, splat(1));
    for (int64_t i = 0; i < k->E; ++i) k->score[i] *= -mean * inverse;
  }
  for (int l = 0; l < LANES && l < rows; ++l)
    for (int j = 0; j < k->k_max; ++j) {
      const int64_t i = indices[l * k->k_max + j];
      if (i < 0 || i >= k->E) continue;
      const real shift = k->options.normalize ? mean[l] : 0;
      k->score[i][l] += k->top[j][l] * (read_(&grad, row + l, j) - shift);
    }
}

static void draw_backward(dirmoe_block *k, const pm_dirmoe_job *job, int64_t row, int64_t rows, vreal by_kl,
                          vreal by_expected) {
  const source noise = {job->saved_noise, k->E, job->is_double}, log_g = {job->saved_log_gamma, k->E, job->is_double};
  const pm_dirmoe *o = &k->options;
  load_rows(&noise, row, rows, k->E, k->noise);
  load_rows(&log_g, row, rows, k->E, k->log_g);
  for (int64_t i = 0; i < k->E; ++i) {
    k->noise[i] = select_(k->poison, splat(0), k->noise[i]);
    const gate at = gate_of(k, i);
    mix(k, i, at.open, at.closed);
    k->score[i] = select_(k->poison, splat(0), at.log_open + k->log_g[i]);
  }
  gather_slots(k, k->score, job->indices + row * k->k_max, rows);
  weigh_slots(k);
  score_gradient(k, job, row, rows);
  for (int64_t i = 0; i < k->E; ++i) { /* the draw's share, before q makes way for its divergence's gradient */
    const vmask moved = (vmask)(k->score[i] != 0);
    k->log_g[i] = any(moved) ? select_(moved, k->score[i] * log_gamma_slope(k->q[i], k->log_g[i]), splat(0)) : splat(0);
  }
  divergence(k->q, k->p, k->E, 1);
  for (int64_t i = 0; i < k->E; ++i) {
    const gate at = gate_of(k, i);
    const vreal by_q = o->concentration * fma_(by_kl, k->q[i], k->log_g[i]);
    const vreal by_p = o->prior_concentration * (by_kl * k->p[i]);
    const vreal by_gate = by_q * (k->alpha_hi[i] - k->alpha_lo[i]) + by_p * (o->prior_hi - o->prior_lo) + by_expected;
    const vreal slope = at.closed / o->temperature;
    k->ell[i] = select_(at.moves, fma_(by_gate, at.open, k->score[i]) * slope, splat(0));
    k->alpha_hi[i] = by_q * at.open;
    k->alpha_lo[i] = by_q * at.closed;
  }
}

static void decision_backward(dirmoe_block *k, const pm_dirmoe_job *job, int64_t row, int64_t rows, vreal by_kl) {
  const source grad = {job->grad_weights, k->k_max, job->is_double};
  const int64_t *indices = job->indices + row * k->k_max;
  const vreal sum = decide_block(k, indices, rows);
  divergence(k->q, k->p, k->E, 1);
  for (int64_t i = 0; i < k->E; ++i) k->q[i] *= by_kl;
  for (int l = 0; l < LANES && l < rows; ++l) {
    real mean = 0;
    for (int j = 0; j < k->k_max; ++j) mean += k->top[j][l] > 0 ? read_(&grad, row + l, j) * k->top[j][l] : 0;
    for (int j = 0; j < k->k_max; ++j) {
      const int64_t i = indices[l * k->k_max + j];
      if (i >= 0 && i < k->E) k->q[i][l] += (read_(&grad, row + l, j) - mean) / sum[l];
    }
  }
  for (int64_t i = 0; i < k->E; ++i) {
    const vreal by_q = k->options.concentration * k->q[i];
    k->ell[i] = splat(0);
    k->alpha_hi[i] = by_q * k->score[i];
    k->alpha_lo[i] = by_q * (1 - k->score[i]);
  }
}

static pm_status dirmoe_backward_rows(const pm_dirmoe_job *job) {
  dirmoe_block k = dirmoe_begin(job);
  const source grad_kl = {job->grad_kl, 1, job->is_double}, grad_expected = {job->grad_expected, 1, job->is_double};
  vmask infeasible = {0};
  for (int64_t row = 0; row < job->shape.rows; row += LANES) {
    const int64_t rows = job->shape.rows - row < LANES ? job->shape.rows - row : LANES;
    dirmoe_load(&k, row, rows);
    infeasible |= k.infeasible;
    const vreal by_kl = load_scalars(&grad_kl, row, rows);
    if (k.options.training)
      draw_backward(&k, job, row, rows, by_kl, load_scalars(&grad_expected, row, rows));
    else
      decision_backward(&k, job, row, rows, by_kl);
    vreal *const gradients[] = {k.ell, k.alpha_hi, k.alpha_lo};
    void *const out[] = {job->grad_gate_logits, job->grad_alpha_hi, job->grad_alpha_lo};
    for (int n = 0; n < 3; ++n) {
      for (int64_t i = 0; i < k.E; ++i) gradients[n][i] = select_(k.poison, splat(NAN), gradients[n][i]);
      store_rows(gradients[n], rows_mask(rows), row, k.E, out[n], job->is_double);
    }
  }
  return any(infeasible) ? PM_INFEASIBLE : PM_OK;
}
#endif

#endif
