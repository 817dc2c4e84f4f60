/* Routing: selection, softmax weights and their gradient in one pass over a block. */
#ifndef PM_ROWS_ROUTE_H
#define PM_ROWS_ROUTE_H

#include "sample.h"
#include "subset.h"

/* The mode of every row of the block: the clamped count of positive logits, along the descending order, ties to the
 * lower index. Needs sort_largest. The rows' members are found together, one comparison an expert, and each is put
 * behind all that are not smaller. */
static void choose_mode(const block *k, int64_t rows, int64_t *indices) {
  const int b = k->b;
  vreal least = splat((real)INFINITY); /* smallest chosen logit */
  int size[LANES], found[LANES];
  for (int l = 0; l < LANES; ++l) {
    size[l] = found[l] = 0;
    if (l >= rows) continue;
    int64_t *choice = indices + l * b;
    if (k->poison[l]) {
      for (int j = 0; j < b; ++j) choice[j] = j;
      continue;
    }
    while (size[l] < b && k->top[size[l]][l] > 0) ++size[l];
    if (size[l] < k->a) size[l] = k->a;
    for (int j = size[l]; j < b; ++j) choice[j] = k->E;
    if (size[l] > 0) least[l] = k->top[size[l] - 1][l];
  }
  for (int64_t i = 0; i < k->E; ++i) {
    for (unsigned hit = lanes_of((vmask)(k->x[i] >= least)); hit; hit &= hit - 1) {
      const int l = __builtin_ctz(hit);
      const real x = k->x[i][l];
      int64_t *choice = indices + l * b;
      /* With all places taken only a larger logit enters, in the place of the last of the least ones. */
      if (found[l] == size[l] && !(x > least[l])) continue;
      int j = found[l] < size[l] ? found[l]++ : size[l] - 1;
      for (; j > 0 && k->x[choice[j - 1]][l] < x; --j) choice[j] = choice[j - 1];
      choice[j] = i;
    }
  }
}

static void write_weights(const block *k, const pm_job *job, int64_t row, int lane) {
  const int b = k->b;
  const int64_t *choice = job->out_indices + (row + lane) * b;
  real scale = 1;
  if (job->normalize) {
    real sum = 0;
    for (int j = 0; j < b; ++j)
      if (choice[j] < k->E) sum += k->s[choice[j]][lane];
    scale = sum > 0 ? 1 / sum : 0;
  }
  for (int j = 0; j < b; ++j) {
    const real weight = choice[j] < k->E ? k->s[choice[j]][lane] * scale : 0;
    write_(job->out, job->is_double, (row + lane) * b + j, k->poison[lane] && choice[j] < k->E ? (real)NAN : weight);
  }
}

PM_ALWAYS_INLINE void route_sample_body(const pm_job *job, block *k, int64_t row, int64_t rows, vmask wanted,
                                        int plain) {
  sample_body(job, k, row, rows, wanted, plain);
  for (int l = 0; l < LANES && l < rows; ++l)
    if (wanted[l]) write_weights(k, job, row, l);
}

PM_ROW_KERNEL(route_sample, 1)

/* The mode, with weights where job->out is given. */
static pm_status mode_rows(const pm_job *job) {
  block k;
  block_begin(&k, job, 1);
  vmask infeasible = {0};
  for (int64_t row = 0; row < job->shape.rows; row += LANES) {
    const int64_t rows = job->shape.rows - row < LANES ? job->shape.rows - row : LANES;
    block_load(&k, job, row, rows);
    infeasible |= k.infeasible;
    sort_largest(&k);
    choose_mode(&k, rows, job->out_indices + row * k.b);
    for (int l = 0; l < rows && job->out; ++l) write_weights(&k, job, row, l);
  }
  return any(infeasible) ? PM_INFEASIBLE : PM_OK;
}

static pm_status route_rows(const pm_job *job) { return job->sample ? route_sample_rows(job) : mode_rows(job); }

/* ---- backward ------------------------------------------------------------------------------------------------ */

/* h s into v (every expert) and h s z into direct, from the upstream gradient; h as in probmoe.h. */
static void upstream(block *k, const pm_job *job, int64_t row, int64_t rows) {
  const int64_t E = k->E;
  const int b = k->b;
  const source grad = {job->vector, b, job->is_double};
  for (int64_t i = 0; i < E; ++i) k->direct[i] = splat(0);
  vreal shift = splat(0); /* g.w / sum(u), what `normalize` takes from every expert */
  for (int l = 0; l < LANES && l < rows; ++l) {
    const int64_t *choice = job->indices + (row + l) * b;
    real sum = 1, mean = 0;
    if (job->normalize) {
      sum = 0;
      for (int j = 0; j < b; ++j)
        if (choice[j] >= 0 && choice[j] < E) {
          const real s = k->s[choice[j]][l];
          sum += s;
          mean += s * read_(&grad, row + l, j);
        }
      mean = sum > 0 ? mean / sum : 0; /* g.w */
      sum = sum > 0 ? sum : 1;
    }
    shift[l] = mean / sum;
    for (int j = 0; j < b; ++j)
      if (choice[j] >= 0 && choice[j] < E)
        k->direct[choice[j]][l] = k->s[choice[j]][l] * ((read_(&grad, row + l, j) - mean) / sum);
  }
  if (!job->normalize) {
    memcpy(k->v, k->direct, (size_t)E * sizeof(vreal));
    return;
  }
  for (int64_t i = 0; i < E; ++i) k->v[i] = -k->s[i] * shift;
  for (int l = 0; l < LANES && l < rows; ++l) {
    const int64_t *choice = job->indices + (row + l) * b;
    for (int j = 0; j < b; ++j)
      if (choice[j] >= 0 && choice[j] < E) k->v[choice[j]][l] = k->direct[choice[j]][l];
  }
}

PM_ALWAYS_INLINE void route_backward_body(const pm_job *job, block *k, int64_t row, int64_t rows, vmask wanted,
                                          int plain) {
  const int64_t E = k->E;
  upstream(k, job, row, rows);
  vreal total = splat(0);
  for (int64_t i = 0; i < E; ++i) total += k->direct[i];
  if (job->marginal) {
    covariance_in_place(k, plain);
    for (int64_t i = 0; i < E; ++i) k->v[i] = fma_(k->v[i], k->inverse_total, fma_(-k->s[i], total, k->direct[i]));
  } else {
    for (int64_t i = 0; i < E; ++i) k->v[i] = select_(k->poison, splat((real)NAN), fma_(-k->s[i], total, k->direct[i]));
  }
  store_rows(k->v, wanted, row, rows, E, job->out, job->is_double);
}

PM_ROW_KERNEL(route_backward, 2)

#endif
