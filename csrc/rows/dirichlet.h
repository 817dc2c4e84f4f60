/* The Dirichlet law on rows: theta = g / sum(g) from Gamma variates in log space, its pathwise gradient, and in double
 * precision the closed forms. */
#ifndef PM_ROWS_DIRICHLET_H
#define PM_ROWS_DIRICHLET_H

#include "gamma.h"

/* Vectors of a block of rows, in the scratch. */
typedef struct law_block {
  int64_t E, rows;
  source concentration, other, grad, total;
  vreal *a, *b, *c, *d;
} law_block;

static law_block law_begin(const pm_law_job *job) {
  const int64_t E = job->shape.experts;
  law_block k = {.E = E};
  k.concentration = (source){job->concentration, job->shape.stride, job->is_double};
  k.other = (source){job->other, E, job->is_double};
  k.grad = (source){job->grad, E, job->is_double};
  k.total = (source){job->total, 1, job->is_double};
  k.a = aligned_vectors(job->scratch);
  k.b = k.a + E;
  k.c = k.b + E;
  k.d = k.c + E;
  return k;
}

PM_ALWAYS_INLINE int64_t rows_left(const pm_law_job *job, int64_t row) {
  return job->shape.rows - row < LANES ? job->shape.rows - row : LANES;
}

/* One number a row, in and out. */
PM_ALWAYS_INLINE vreal load_scalars(const source *in, int64_t row, int64_t rows) {
  vreal x = {0};
  for (int l = 0; l < LANES; ++l) x[l] = read_(in, l < rows ? row + l : row + rows - 1, 0);
  return x;
}

PM_ALWAYS_INLINE void store_scalars(void *to, int is_double, int64_t row, int64_t rows, vreal x) {
  for (int l = 0; l < LANES && l < rows; ++l) write_(to, is_double, row + l, x[l]);
}

static pm_status dirichlet_sample_rows(const pm_law_job *job) {
  law_block k = law_begin(job);
  vreal *log_g = k.a;
  for (int64_t row = 0; row < job->shape.rows; row += LANES) {
    const int64_t rows = rows_left(job, row), E = k.E;
    const element_counter at = counter_of(job->seed, (uint64_t)(job->shape.first_row + row), rows, PM_DRAW_GAMMA);
    load_rows(&k.concentration, row, rows, E, log_g);
    vreal largest = splat(-(real)INFINITY);
    vmask poison = {0};
    draw_log_gamma(log_g, E, rows, &at);
    for (int64_t i = 0; i < E; ++i) {
      poison |= (vmask)(log_g[i] != log_g[i]);
      largest = max_(log_g[i], largest);
    }
    poison |= (vmask)(largest == -(real)INFINITY);
    largest = select_(poison, splat(0), largest);
    vreal sum = splat(0);
    for (int64_t i = 0; i < E; ++i) {
      log_g[i] = exp_(min_(log_g[i] - largest, splat(0)));
      sum += log_g[i];
    }
    const vreal scale = select_(poison, splat((real)NAN), 1 / sum);
    for (int64_t i = 0; i < E; ++i) log_g[i] *= scale;
    store_rows(log_g, rows_mask(rows), row, E, job->out, job->is_double);
    store_scalars(job->out_other, job->is_double, row, rows,
                  select_(poison, splat((real)NAN), largest + log_(select_(poison, splat(1), sum))));
  }
  return PM_OK;
}

/* grad_alpha_j = D_j theta_j (h_j - h.theta), log g_j = log theta_j + total. A theta below the normal range counts as
 * 0: its gradient is. */
static pm_status dirichlet_sample_backward_rows(const pm_law_job *job) {
  law_block k = law_begin(job);
  for (int64_t row = 0; row < job->shape.rows; row += LANES) {
    const int64_t rows = rows_left(job, row), E = k.E;
    load_rows(&k.concentration, row, rows, E, k.a);
    load_rows(&k.other, row, rows, E, k.b);
    load_rows(&k.grad, row, rows, E, k.c);
    const vreal total = load_scalars(&k.total, row, rows);
    vreal mean = splat(0);
    for (int64_t i = 0; i < E; ++i) mean = fma_(k.c[i], k.b[i], mean);
    for (int64_t i = 0; i < E; ++i) {
      const vmask positive = (vmask)(k.b[i] >= PM_REAL_TINY), lost = (vmask)(k.b[i] != k.b[i]);
      const vreal log_g = log_(select_(positive, k.b[i], splat(1))) + total;
      const vreal grad = log_gamma_slope(k.a[i], log_g) * (k.b[i] * (k.c[i] - mean));
      k.c[i] = select_(positive | lost, grad, splat(0));
    }
    store_rows(k.c, rows_mask(rows), row, E, job->out, job->is_double);
  }
  return PM_OK;
}

#if PM_REAL_BITS == 64
/* A law needs positive, finite concentrations: lanes without them are computed as ones and answered with NaN. */
PM_ALWAYS_INLINE vmask make_proper(vreal *alpha, int64_t E) {
  vmask proper = ~(vmask){0};
  for (int64_t i = 0; i < E; ++i) {
    const vmask good = (vmask)(alpha[i] > 0) & (vmask)(alpha[i] <= PM_LARGEST);
    alpha[i] = select_(good, alpha[i], splat(1));
    proper &= good;
  }
  return proper;
}

PM_ALWAYS_INLINE vreal row_sum(const vreal *x, int64_t E) {
  vreal sum = splat(0);
  for (int64_t i = 0; i < E; ++i) sum += x[i];
  return sum;
}

static pm_status dirichlet_log_prob_rows(const pm_law_job *job) {
  law_block k = law_begin(job);
  for (int64_t row = 0; row < job->shape.rows; row += LANES) {
    const int64_t rows = rows_left(job, row), E = k.E;
    load_rows(&k.concentration, row, rows, E, k.a);
    load_rows(&k.other, row, rows, E, k.b);
    const vmask proper = make_proper(k.a, E);
    vreal value = gamma_at(row_sum(k.a, E)).log_gamma;
    for (int64_t i = 0; i < E; ++i) {
      const vmask one = (vmask)(k.a[i] == 1) & (vmask)(k.b[i] == k.b[i]); /* 0 log 0 = 0 */
      value += select_(one, splat(0), (k.a[i] - 1) * log_of_value(k.b[i])) - gamma_at(k.a[i]).log_gamma;
    }
    store_scalars(job->out, job->is_double, row, rows, select_(proper, value, splat(NAN)));
  }
  return PM_OK;
}

static pm_status dirichlet_log_prob_backward_rows(const pm_law_job *job) {
  law_block k = law_begin(job);
  k.grad.stride = 1;
  for (int64_t row = 0; row < job->shape.rows; row += LANES) {
    const int64_t rows = rows_left(job, row), E = k.E;
    load_rows(&k.concentration, row, rows, E, k.a);
    load_rows(&k.other, row, rows, E, k.b);
    const vmask proper = make_proper(k.a, E);
    const vreal grad = select_(proper, load_scalars(&k.grad, row, rows), splat(NAN));
    const vreal whole = gamma_at(row_sum(k.a, E)).digamma;
    for (int64_t i = 0; i < E; ++i) {
      k.c[i] = grad * (whole - gamma_at(k.a[i]).digamma + log_of_value(k.b[i]));
      k.d[i] = select_((vmask)(k.a[i] == 1) & proper, splat(0), grad * ((k.a[i] - 1) / k.b[i]));
    }
    store_rows(k.c, rows_mask(rows), row, E, job->out, job->is_double);
    store_rows(k.d, rows_mask(rows), row, E, job->out_other, job->is_double);
  }
  return PM_OK;
}

static pm_status dirichlet_entropy_rows(const pm_law_job *job) {
  law_block k = law_begin(job);
  for (int64_t row = 0; row < job->shape.rows; row += LANES) {
    const int64_t rows = rows_left(job, row), E = k.E;
    load_rows(&k.concentration, row, rows, E, k.a);
    const vmask proper = make_proper(k.a, E);
    const vreal sum = row_sum(k.a, E);
    const gamma_values whole = gamma_at(sum);
    vreal value = fma_(sum - (real)E, whole.digamma, -whole.log_gamma);
    for (int64_t i = 0; i < E; ++i) {
      const gamma_values at = gamma_at(k.a[i]);
      value += fma_(1 - k.a[i], at.digamma, at.log_gamma);
    }
    store_scalars(job->out, job->is_double, row, rows, select_(proper, value, splat(NAN)));
  }
  return PM_OK;
}

/* (A - E) psi'(A) - (alpha_i - 1) psi'(alpha_i). */
static pm_status dirichlet_entropy_backward_rows(const pm_law_job *job) {
  law_block k = law_begin(job);
  k.grad.stride = 1;
  for (int64_t row = 0; row < job->shape.rows; row += LANES) {
    const int64_t rows = rows_left(job, row), E = k.E;
    load_rows(&k.concentration, row, rows, E, k.a);
    const vmask proper = make_proper(k.a, E);
    const vreal grad = select_(proper, load_scalars(&k.grad, row, rows), splat(NAN)), sum = row_sum(k.a, E);
    const vreal shared = (sum - (real)E) * gamma_at(sum).trigamma;
    for (int64_t i = 0; i < E; ++i) k.c[i] = grad * fma_(1 - k.a[i], gamma_at(k.a[i]).trigamma, shared);
    store_rows(k.c, rows_mask(rows), row, E, job->out, job->is_double);
  }
  return PM_OK;
}

/* The divergence and, where wanted, its gradients in place of p (k.a) and q (k.b), both proper:
 *   dKL/dp_i = (p_i - q_i) psi'(p_i) - (P - Q) psi'(P),   dKL/dq_i = psi(q_i) - psi(Q) - (psi(p_i) - psi(P)). */
PM_ALWAYS_INLINE vreal divergence(vreal *p, vreal *q, int64_t E, int gradients) {
  const vreal sum_p = row_sum(p, E), sum_q = row_sum(q, E);
  const gamma_values whole_p = gamma_at(sum_p), whole_q = gamma_at(sum_q);
  const vreal shared = (sum_p - sum_q) * whole_p.trigamma;
  vreal value = whole_p.log_gamma - whole_q.log_gamma;
  for (int64_t i = 0; i < E; ++i) {
    const gamma_values at_p = gamma_at(p[i]), at_q = gamma_at(q[i]);
    const vreal difference = p[i] - q[i];
    value += fma_(difference, at_p.digamma - whole_p.digamma, at_q.log_gamma - at_p.log_gamma);
    if (gradients) {
      p[i] = fma_(difference, at_p.trigamma, -shared);
      q[i] = (at_q.digamma - whole_q.digamma) - (at_p.digamma - whole_p.digamma);
    }
  }
  return value;
}

static pm_status dirichlet_kl_rows(const pm_law_job *job) {
  law_block k = law_begin(job);
  for (int64_t row = 0; row < job->shape.rows; row += LANES) {
    const int64_t rows = rows_left(job, row), E = k.E;
    load_rows(&k.concentration, row, rows, E, k.a);
    load_rows(&k.other, row, rows, E, k.b);
    const vmask proper = make_proper(k.a, E) & make_proper(k.b, E);
    const vreal value = divergence(k.a, k.b, E, 0);
    store_scalars(job->out, job->is_double, row, rows, select_(proper, value, splat(NAN)));
  }
  return PM_OK;
}

static pm_status dirichlet_kl_backward_rows(const pm_law_job *job) {
  law_block k = law_begin(job);
  k.grad.stride = 1;
  for (int64_t row = 0; row < job->shape.rows; row += LANES) {
    const int64_t rows = rows_left(job, row), E = k.E;
    load_rows(&k.concentration, row, rows, E, k.a);
    load_rows(&k.other, row, rows, E, k.b);
    const vmask proper = make_proper(k.a, E) & make_proper(k.b, E);
    const vreal grad = select_(proper, load_scalars(&k.grad, row, rows), splat(NAN));
    divergence(k.a, k.b, E, 1);
    for (int64_t i = 0; i < E; ++i) k.a[i] *= grad, k.b[i] *= grad;
    store_rows(k.a, rows_mask(rows), row, E, job->out, job->is_double);
    store_rows(k.b, rows_mask(rows), row, E, job->out_other, job->is_double);
  }
  return PM_OK;
}
#endif

#endif
