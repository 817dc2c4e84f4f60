/* DirMoE routing on rows: forward and backward in one pass each over a block. What is computed is in probmoe.h.
 * Products of small gates and small shares are kept as sums of logarithms, so that r = softmax(log z + log g) needs no
 * floor at any temperature. */
#ifndef PM_ROWS_DIRMOE_H
#define PM_ROWS_DIRMOE_H

#include "dirichlet.h"
#include "gumbel.h"

typedef struct dirmoe_block {
  int64_t E;
  int k_min, k_max, training, normalize;
  real inverse_temperature, concentration, prior_concentration, prior_hi, prior_lo;
  source gate, hi, lo;
  vreal *ell, *alpha_hi, *alpha_lo, *noise, *open, *closed, *log_g, *score, *q, *p; /* of the experts */
  vreal *top;                                                                       /* of the slots */
  vint *at;                                                                         /* their experts, E for none */
  vreal sum_q, sum_p, difference;                                                   /* of the sums, p - q */
  vmask poison, infeasible;
} dirmoe_block;

/* A positive option in this precision, away from the ends of its range. */
static real held(double option) { return (real)(option < 1e-30 ? 1e-30 : option > 1e30 ? 1e30 : option); }

static dirmoe_block dirmoe_begin(const pm_dirmoe_job *job) {
  const int64_t E = job->shape.experts, step = pitch(E);
  const pm_dirmoe *o = &job->options;
  dirmoe_block k = {.E = E, .k_min = (int)job->shape.k_min, .k_max = (int)job->shape.k_max};
  k.training = o->training, k.normalize = o->normalize;
  k.inverse_temperature = held(1 / o->temperature);
  k.concentration = held(o->concentration), k.prior_concentration = held(o->prior_concentration);
  k.prior_hi = held(o->prior_hi), k.prior_lo = held(o->prior_lo);
  k.gate = (source){job->gate_logits, job->shape.stride, job->is_double};
  k.hi = (source){job->alpha_hi, E, job->is_double};
  k.lo = (source){job->alpha_lo, E, job->is_double};
  vreal **const all[] = {&k.ell,   &k.alpha_hi, &k.alpha_lo, &k.noise, &k.open, &k.closed,
                         &k.log_g, &k.score,    &k.q,        &k.p,     &k.top};
  vreal *next = aligned_vectors(job->scratch);
  for (size_t n = 0; n < sizeof all / sizeof *all; ++n, next += step) *all[n] = next;
  k.at = (vint *)next;
  return k;
}

/* Inputs of a block; rows that have no answer are computed as zeros and ones. */
static void dirmoe_load(dirmoe_block *k, int64_t row, int64_t rows) {
  load_rows(&k->gate, row, rows, k->E, k->ell);
  load_rows(&k->hi, row, rows, k->E, k->alpha_hi);
  load_rows(&k->lo, row, rows, k->E, k->alpha_lo);
  const vreal infinity = splat((real)INFINITY), nothing = splat(0);
  vmask good = ~(vmask){0}, unmasked = {0};
  for (int64_t i = 0; i < k->E; ++i) {
    good &= (vmask)(k->ell[i] < infinity) & (vmask)(k->alpha_hi[i] > nothing) & (vmask)(k->alpha_hi[i] < infinity) &
            (vmask)(k->alpha_lo[i] > nothing) & (vmask)(k->alpha_lo[i] < infinity);
    unmasked -= (vmask)(k->ell[i] > -infinity);
  }
  k->infeasible = k->training ? (vmask){0} : good & (vmask)(unmasked < (bits)k->k_min);
  k->poison = ~good | k->infeasible;
  if (!any(k->poison)) return;
  for (int64_t i = 0; i < k->E; ++i) {
    k->ell[i] = select_(k->poison, nothing, k->ell[i]);
    k->alpha_hi[i] = select_(k->poison, splat(1), k->alpha_hi[i]);
    k->alpha_lo[i] = select_(k->poison, splat(1), k->alpha_lo[i]);
  }
}

/* q and p of all experts from their gates, and the sums. */
static void mix_all(dirmoe_block *k) {
  k->sum_q = k->sum_p = k->difference = splat(0);
  for (int64_t i = 0; i < k->E; ++i) {
    k->q[i] = mixed(k->open[i], k->closed[i], k->concentration, k->alpha_hi[i], k->alpha_lo[i]);
    k->p[i] = mixed(k->open[i], k->closed[i], k->prior_concentration, splat(k->prior_hi), splat(k->prior_lo));
    k->sum_q += k->q[i];
    k->sum_p += k->p[i];
    k->difference += k->p[i] - k->q[i];
  }
  k->sum_q = min_(k->sum_q, splat(PM_MOST_SUM));
  k->sum_p = min_(k->sum_p, splat(PM_MOST_SUM));
}

static vreal divergence_from_prior(const dirmoe_block *k) {
  vreal kl = splat(0);
  for (int64_t i = 0; i < k->E; ++i) kl += bregman(k->p[i], k->q[i], k->p[i] - k->q[i]);
  return kl - bregman(k->sum_p, k->sum_q, k->difference);
}

/* Lane l of the vector at[l], `otherwise` where the slot has no expert. */
PM_ALWAYS_INLINE vreal at_slot(const dirmoe_block *k, const vreal *from, int j, real otherwise) {
  const vmask used = (vmask)(k->at[j] < (bits)k->E);
  return select_(used, pick(from, k->at[j] & used), splat(otherwise));
}

/* to[at[j]] += x, lane by lane; `to` has room for the expert E. */
PM_ALWAYS_INLINE void add_at_slot(const dirmoe_block *k, vreal *to, int j, vreal x) {
  for (int l = 0; l < LANES; ++l) to[k->at[j][l]][l] += x[l];
}

static void clear(const dirmoe_block *k, vreal *x) {
  for (int64_t i = 0; i <= k->E; ++i) x[i] = splat(0);
}

/* ---- forward ------------------------------------------------------------------------------------------------- */

/* Gates, concentrations, draws and scores of a block; returns the sums of the gates. */
static vreal draw_block(dirmoe_block *k, const pm_dirmoe_job *job, int64_t row, int64_t rows) {
  const uint64_t number = (uint64_t)(job->shape.first_row + row);
  const element_counter logistic = counter_of(job->seed, number, rows, PM_DRAW_LOGISTIC);
  const element_counter gamma = counter_of(job->seed, number, rows, PM_DRAW_GAMMA);
  vreal expected = splat(0);
  vword word[4];
  for (int64_t i = 0; i < k->E; i += 4) {
    element_words(&logistic, (uint32_t)(i / 4), word);
    for (int t = 0; t < 4 && i + t < k->E; ++t) k->noise[i + t] = logistic_of(word[t]);
  }
  for (int64_t i = 0; i < k->E; ++i) {
    const gate at = relaxed_gate(k->ell[i], k->noise[i], k->inverse_temperature);
    k->open[i] = at.open, k->closed[i] = at.closed, k->score[i] = at.log_open;
    expected += at.open;
  }
  mix_all(k);
  for (int64_t i = 0; i < k->E; ++i) k->log_g[i] = k->q[i];
  draw_log_gamma(k->log_g, k->E, rows, &gamma);
  for (int64_t i = 0; i < k->E; ++i) k->score[i] += k->log_g[i];
  store_rows(k->noise, rows_mask(rows), row, k->E, job->noise, job->is_double);
  store_rows(k->log_g, rows_mask(rows), row, k->E, job->log_gamma, job->is_double);
  return expected;
}

/* The largest of x into the slots, descending; no expert where they are -inf. */
static void fill_slots(dirmoe_block *k, const vreal *x) {
  largest_keys(x, k->E, k->k_max, k->top, k->at);
  for (int j = 0; j < k->k_max; ++j) {
    const vmask used = (vmask)(k->top[j] > splat(-(real)INFINITY));
    k->at[j] = int_select_(used, k->at[j], splat_bits((bits)k->E));
  }
}

/* Training: top becomes the weights, exp(top - largest) / sum, the sum over the slots or over all scores. */
static void weigh_slots(dirmoe_block *k) {
  if (k->k_max == 0) return;
  const vreal largest = select_((vmask)(k->top[0] > splat(-(real)INFINITY)), k->top[0], splat(0));
  vreal sum = splat(0);
  for (int j = 0; j < k->k_max; ++j) sum += k->top[j] = exp_(k->top[j] - largest);
  if (!k->normalize) {
    sum = splat(0);
    for (int64_t i = 0; i < k->E; ++i) sum += exp_(k->score[i] - largest);
  }
  const vreal inverse = 1 / select_((vmask)(sum > 0), sum, splat(1));
  for (int j = 0; j < k->k_max; ++j) k->top[j] *= inverse;
}

/* Inference: keeps the slots of positive logits beyond the first k_min; returns how many there are. */
static vreal decide_slots(dirmoe_block *k) {
  vreal chosen = splat(0);
  for (int j = 0; j < k->k_max; ++j) {
    const vmask wanted = (vmask)(k->top[j] > splat(0)) | (j < k->k_min ? ~(vmask){0} : (vmask){0});
    k->at[j] = int_select_(wanted, k->at[j], splat_bits((bits)k->E));
    chosen += select_((vmask)(k->at[j] < (bits)k->E), splat(1), splat(0));
  }
  return chosen;
}

/* Inference: z is the indicator of the slots; returns the inverse of the sum of their q. */
static vreal decide_gates(dirmoe_block *k) {
  clear(k, k->open);
  for (int j = 0; j < k->k_max; ++j) add_at_slot(k, k->open, j, splat(1));
  for (int64_t i = 0; i < k->E; ++i) {
    k->open[i] = min_(k->open[i], splat(1));
    k->closed[i] = 1 - k->open[i];
  }
  mix_all(k);
  vreal sum = splat(0);
  for (int j = 0; j < k->k_max; ++j) sum += at_slot(k, k->q, j, 0);
  return 1 / select_((vmask)(sum > 0), sum, splat(1));
}

static pm_status dirmoe_rows(const pm_dirmoe_job *job) {
  dirmoe_block k = dirmoe_begin(job);
  vmask infeasible = {0};
  for (int64_t row = 0; row < job->shape.rows; row += LANES) {
    const int64_t rows = job->shape.rows - row < LANES ? job->shape.rows - row : LANES;
    dirmoe_load(&k, row, rows);
    infeasible |= k.infeasible;
    vreal expected;
    if (k.training) {
      expected = draw_block(&k, job, row, rows);
      fill_slots(&k, k.score);
      weigh_slots(&k);
    } else {
      fill_slots(&k, k.ell);
      expected = decide_slots(&k);
      const vreal inverse = decide_gates(&k);
      for (int j = 0; j < k.k_max; ++j) k.top[j] = at_slot(&k, k.q, j, 0) * inverse;
    }
    const vreal kl = divergence_from_prior(&k), nothing = splat((real)NAN);
    store_scalars(job->kl, job->is_double, row, rows, select_(k.poison, nothing, kl));
    store_scalars(job->expected_k, job->is_double, row, rows, select_(k.poison, nothing, expected));
    for (int j = 0; j < k.k_max; ++j) {
      k.top[j] = select_(k.poison, nothing, k.top[j]);
      k.at[j] = int_select_(k.poison, splat_bits(j), k.at[j]);
    }
    store_rows(k.top, rows_mask(rows), row, k.k_max, job->weights, job->is_double);
    store_indices(k.at, rows_mask(rows), row, k.k_max, job->out_indices);
  }
  return any(infeasible) ? PM_INFEASIBLE : PM_OK;
}

/* ---- backward ------------------------------------------------------------------------------------------------ */

static void load_slots(dirmoe_block *k, const pm_dirmoe_job *job, int64_t row, int64_t rows) {
  for (int j = 0; j < k->k_max; ++j)
    for (int l = 0; l < LANES; ++l) {
      const int64_t i = job->indices[(row + (l < rows ? l : rows - 1)) * k->k_max + j];
      k->at[j][l] = (bits)(i >= 0 && i < k->E ? i : k->E);
    }
}

/* Loads the gradient of the weights into top, and makes it that of the slots' scores by `share`s of a sum: h - h.w
 * where the sum is over the slots, else h. Returns h.w. */
static vreal slot_gradient(dirmoe_block *k, const vreal *share, vreal inverse, int over_slots) {
  vreal mean = splat(0);
  for (int j = 0; j < k->k_max; ++j) {
    const vreal weight = at_slot(k, share, j, 0) * inverse;
    k->top[j] = select_((vmask)(weight > 0), k->top[j], splat(0));
    mean = fma_(k->top[j], weight, mean);
  }
  if (over_slots)
    for (int j = 0; j < k->k_max; ++j) k->top[j] -= mean;
  return mean;
}

/* The gradient by the scores into score, and by q through the draws in place of log_g. */
static void score_gradient(dirmoe_block *k) {
  vreal largest = splat(-(real)INFINITY), sum = splat(0);
  for (int64_t i = 0; i < k->E; ++i) largest = max_(k->score[i], largest);
  largest = select_((vmask)(largest > splat(-(real)INFINITY)), largest, splat(0));
  for (int64_t i = 0; i < k->E; ++i) sum += k->score[i] = exp_(k->score[i] - largest);
  if (k->normalize) {
    sum = splat(0);
    for (int j = 0; j < k->k_max; ++j) sum += at_slot(k, k->score, j, 0);
  }
  const vreal inverse = 1 / select_((vmask)(sum > 0), sum, splat(1));
  const vreal mean = slot_gradient(k, k->score, inverse, k->normalize);
  for (int j = 0; j < k->k_max; ++j) k->top[j] *= at_slot(k, k->score, j, 0) * inverse;
  if (k->normalize) { /* only the slots' experts have one */
    clear(k, k->score);
    for (int j = 0; j < k->k_max; ++j) add_at_slot(k, k->score, j, k->top[j]);
    for (int j = 0; j < k->k_max; ++j) k->top[j] *= log_gamma_slope(at_slot(k, k->q, j, 1), at_slot(k, k->log_g, j, 0));
    clear(k, k->log_g);
    for (int j = 0; j < k->k_max; ++j) add_at_slot(k, k->log_g, j, k->top[j]);
    return;
  }
  for (int64_t i = 0; i < k->E; ++i) k->score[i] *= -mean * inverse;
  for (int j = 0; j < k->k_max; ++j) add_at_slot(k, k->score, j, k->top[j]);
  for (int64_t i = 0; i < k->E; ++i) {
    const vmask moved = (vmask)(k->score[i] != 0);
    k->log_g[i] = any(moved) ? select_(moved, k->score[i] * log_gamma_slope(k->q[i], k->log_g[i]), splat(0)) : splat(0);
  }
}

static void draw_backward(dirmoe_block *k, const pm_dirmoe_job *job, int64_t row, int64_t rows, vreal by_kl,
                          vreal by_expected) {
  const source noise = {job->saved_noise, k->E, job->is_double}, log_g = {job->saved_log_gamma, k->E, job->is_double};
  load_rows(&noise, row, rows, k->E, k->noise);
  load_rows(&log_g, row, rows, k->E, k->log_g);
  vreal *slope = k->noise; /* of the gate by its logit, over the gate */
  for (int64_t i = 0; i < k->E; ++i) {
    const gate at = relaxed_gate(k->ell[i], select_(k->poison, splat(0), k->noise[i]), k->inverse_temperature);
    k->open[i] = at.open, k->closed[i] = at.closed;
    slope[i] = select_(at.moves, at.closed * k->inverse_temperature, splat(0));
    k->score[i] = select_(k->poison, splat(0), at.log_open + k->log_g[i]);
  }
  mix_all(k);
  score_gradient(k);
  const bregman_slopes whole = bregman_slopes_at(k->sum_p, k->sum_q, k->difference);
  const vreal prior_gap = by_kl * (k->prior_concentration * (k->prior_hi - k->prior_lo));
  for (int64_t i = 0; i < k->E; ++i) {
    const bregman_slopes at = bregman_slopes_at(k->p[i], k->q[i], k->p[i] - k->q[i]);
    const vreal by_q = k->concentration * fma_(by_kl, at.by_q - whole.by_q, k->log_g[i]);
    const vreal by_gate =
        fma_(by_q, k->alpha_hi[i] - k->alpha_lo[i], fma_(prior_gap, at.by_p - whole.by_p, by_expected));
    k->ell[i] = fma_(by_gate, k->open[i], k->score[i]) * slope[i];
    k->alpha_hi[i] = by_q * k->open[i];
    k->alpha_lo[i] = by_q * k->closed[i];
  }
}

static void decision_backward(dirmoe_block *k, vreal by_kl) {
  const vreal inverse = decide_gates(k);
  slot_gradient(k, k->q, inverse, 1);
  clear(k, k->log_g);
  for (int j = 0; j < k->k_max; ++j) add_at_slot(k, k->log_g, j, k->top[j] * inverse);
  const vreal whole = bregman_slopes_at(k->sum_p, k->sum_q, k->difference).by_q;
  for (int64_t i = 0; i < k->E; ++i) {
    const vreal by_kl_of_q = by_kl * (bregman_slopes_at(k->p[i], k->q[i], k->p[i] - k->q[i]).by_q - whole);
    const vreal by_q = k->concentration * (by_kl_of_q + k->log_g[i]);
    k->ell[i] = splat(0);
    k->alpha_hi[i] = by_q * k->open[i];
    k->alpha_lo[i] = by_q * k->closed[i];
  }
}

static pm_status dirmoe_backward_rows(const pm_dirmoe_job *job) {
  dirmoe_block k = dirmoe_begin(job);
  const source grad_kl = {job->grad_kl, 1, job->is_double}, grad_expected = {job->grad_expected, 1, job->is_double};
  const source grad_weights = {job->grad_weights, k.k_max, job->is_double};
  vmask infeasible = {0};
  for (int64_t row = 0; row < job->shape.rows; row += LANES) {
    const int64_t rows = job->shape.rows - row < LANES ? job->shape.rows - row : LANES;
    dirmoe_load(&k, row, rows);
    infeasible |= k.infeasible;
    load_slots(&k, job, row, rows);
    load_rows(&grad_weights, row, rows, k.k_max, k.top);
    const vreal by_kl = load_scalars(&grad_kl, row, rows);
    if (k.training)
      draw_backward(&k, job, row, rows, by_kl, load_scalars(&grad_expected, row, rows));
    else
      decision_backward(&k, by_kl);
    vreal *const gradients[] = {k.ell, k.alpha_hi, k.alpha_lo};
    void *const out[] = {job->grad_gate_logits, job->grad_alpha_hi, job->grad_alpha_lo};
    for (int n = 0; n < 3; ++n) {
      if (any(k.poison))
        for (int64_t i = 0; i < k.E; ++i) gradients[n][i] = select_(k.poison, splat((real)NAN), gradients[n][i]);
      store_rows(gradients[n], rows_mask(rows), row, k.E, out[n], job->is_double);
    }
  }
  return any(infeasible) ? PM_INFEASIBLE : PM_OK;
}

#endif
