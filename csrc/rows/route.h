/* Routing: selection, softmax weights and their gradient in one pass over a block. */
#ifndef PM_ROWS_ROUTE_H
#define PM_ROWS_ROUTE_H

#include "sample.h"
#include "subset.h"

/* Writes the experts of `order` and, where job->out is given, their softmax weights; overwrites `top`. */
PM_ALWAYS_INLINE void write_route(const block *k, const pm_job *job, int64_t row, vmask wanted) {
  const int b = k->b;
  const unsigned lanes = lanes_of(wanted);
  store_indices(k->order, lanes, row, b, job->out_indices);
  if (!job->out) return;
  vreal *weight = k->top, sum = splat(0);
  for (int j = 0; j < b; ++j) {
    const vmask used = (vmask)(k->order[j] < (bits)k->E);
    weight[j] = select_(used, pick(k->e, k->order[j] & used), splat(0));
    sum += weight[j];
  }
  vreal scale = job->normalize ? select_((vmask)(sum > splat(0)), splat(1) / sum, splat(0)) : k->inverse_sum;
  scale = select_(k->poison, splat((real)NAN), scale);
  for (int j = 0; j < b; ++j) weight[j] = select_((vmask)(k->order[j] < (bits)k->E), weight[j] * scale, splat(0));
  store_rows(weight, lanes, row, b, job->out, job->is_double);
}

PM_ALWAYS_INLINE void route_sample_body(const pm_job *job, block *k, int64_t row, int64_t rows, vmask wanted,
                                        int plain) {
  prefetch_rows(job->out_indices, 8, row, rows, k->b);
  if (job->out) prefetch_rows(job->out, job->is_double ? 8 : 4, row, rows, k->b);
  prefix_all(k, plain, drawn_from(k, plain));
  draw(k, job, (uint64_t)(job->shape.first_row + row), wanted, plain);
  write_route(k, job, row, wanted);
}

PM_ROW_KERNEL(route_sample, SINGLES, 1)

/* The mode: the clamped count of positive logits, along the descending order. */
static pm_status mode_rows(const pm_job *job) {
  block k;
  block_begin(&k, job, SINGLES);
  vmask infeasible = {0};
  for (int64_t row = 0; row < job->shape.rows; row += LANES) {
    const int64_t rows = job->shape.rows - row < LANES ? job->shape.rows - row : LANES;
    block_load(&k, job, row, rows);
    infeasible |= k.infeasible;
    rank_largest(&k);
    vint size = splat_bits(k.a);
    for (int j = k.a; j < k.b; ++j) size -= (vmask)(k.top[j] > splat(0));
    size = int_select_(k.poison, splat_bits(k.b), size);
    for (int j = k.a; j < k.b; ++j) k.order[j] = int_select_((vmask)(size > j), k.order[j], splat_bits((bits)k.E));
    write_route(&k, job, row, first_lanes(rows));
  }
  return any(infeasible) ? PM_INFEASIBLE : PM_OK;
}

static pm_status route_rows(const pm_job *job) { return job->sample ? route_sample_rows(job) : mode_rows(job); }

/* ---- backward ------------------------------------------------------------------------------------------------ */

PM_ALWAYS_INLINE real grad_of(const pm_job *job, int64_t at) {
  return job->is_double ? (real)((const double *)job->vector)[at] : (real)((const float *)job->vector)[at];
}

/* h s z into direct, from the upstream gradient g, and what `normalize` takes from every expert, g.w / sum(u), into
 * *shift; h as in probmoe.h. Returns the sum of `direct` over the experts. */
static vreal upstream(block *k, const pm_job *job, int64_t row, int64_t rows, vreal *shift) {
  const uint64_t E = (uint64_t)k->E;
  const int b = k->b;
  fill_vectors(k->direct, splat(0), k->E);
  real total[LANES] = {0}, taken[LANES] = {0};
  for (int l = 0; l < rows; ++l) {
    const int64_t *choice = job->indices + (row + l) * b;
    const int64_t first = (row + l) * b;
    const real *e = (const real *)k->e + l;
    real *direct = (real *)k->direct + l, inverse = k->inverse_sum[l], mean = 0, sum = 0;
    if (job->normalize) {
      for (int j = 0; j < b; ++j) {
        if ((uint64_t)choice[j] >= E) continue;
        sum += e[choice[j] * LANES];
        mean += e[choice[j] * LANES] * grad_of(job, first + j);
      }
      inverse = sum > 0 ? 1 / sum : 0;
      mean *= inverse; /* g.w */
      taken[l] = mean * inverse;
      sum = 0;
    }
    for (int j = 0; j < b; ++j) {
      if ((uint64_t)choice[j] >= E) continue;
      const real value = e[choice[j] * LANES] * (grad_of(job, first + j) - mean) * inverse;
      direct[choice[j] * LANES] = value;
      sum += value;
    }
    total[l] = sum;
  }
  memcpy(shift, taken, sizeof *shift);
  vreal result;
  memcpy(&result, total, sizeof result);
  return result;
}

/* ---- backward where the direction lives on S ------------------------------------------------------------------ */

/* The experts of S as a block of their own, b of them; a slot that is not used has odds of 0.
 *
 * The gradient without `normalize` is C (h s) + J^T (h z), and h s is 0 outside of S. The recursion takes the experts
 * in any order: those outside of S first, which then carry no tangent, and those of S with it. So the many cost what
 * they cost in the marginals: half the multiply-adds of a covariance product, and half its table. */
typedef struct chosen {
  block part;
  vreal *e;    /* [b] their e */
  vreal *grad; /* [b] h, then h s */
} chosen;

/* Moves the experts of S from the block, where a factor of 1 is left, to their own: `e`, w and q. */
PM_ALWAYS_INLINE void choose_experts(const chosen *c, const block *k, const pm_job *job, int64_t row, int64_t rows,
                                     int plain) {
  const uint64_t E = (uint64_t)k->E;
  const int b = k->b;
  fill_vectors(c->e, splat(0), b);
  if (!plain) {
    fill_vectors(c->part.w, splat(0), b);
    fill_vectors(c->part.q, splat(1), b);
  }
  const int64_t *choice = job->indices + row * b;
  for (int l = 0; l < rows; ++l, choice += b) {
    const real *from = (const real *)k->e + l;
    real *e = (real *)c->e + l, *odds = (real *)k->w + l, *rest = (real *)k->q + l;
    real *w = (real *)c->part.w + l, *q = (real *)c->part.q + l;
    for (int j = 0; j < b; ++j) {
      const uint64_t i = (uint64_t)choice[j];
      if (i >= E) continue;
      e[j * LANES] = from[i * LANES];
      if (!plain) w[j * LANES] = odds[i * LANES], q[j * LANES] = rest[i * LANES], rest[i * LANES] = 1;
      odds[i * LANES] = 0;
    }
  }
  if (plain)
    for (int j = 0; j < b; ++j) c->part.w[j] = c->e[j] * k->power;
}

/* h s for the experts of S, into c->grad; returns the sum. */
PM_ALWAYS_INLINE vreal upstream_of(const chosen *c, const block *k, const pm_job *job, int64_t row, int64_t rows) {
  const int b = k->b;
  const source grad = {job->vector, b, job->is_double};
  load_rows(&grad, row, rows, b, c->grad);
  vreal sum = splat(0);
  for (int j = 0; j < b; ++j) {
    const vreal s = c->e[j] * k->inverse_sum;
    c->grad[j] = select_((vmask)(s > splat(0)), c->grad[j] * s, splat(0)); /* not what belongs to an unused slot */
    sum += c->grad[j];
  }
  return sum;
}

/* The results of the experts of S to their places. */
PM_ALWAYS_INLINE void write_chosen(const vreal *v, const pm_job *job, unsigned wanted, int64_t row, int64_t E, int b) {
  const int is_double = job->is_double;
  void *const out = job->out;
  for (unsigned left = wanted; left; left &= left - 1) {
    const int l = __builtin_ctz(left);
    const int64_t at = row + l, *choice = job->indices + at * b;
    const real *value = (const real *)v + l;
    for (int j = 0; j < b; ++j)
      if ((uint64_t)choice[j] < (uint64_t)E) write_(out, is_double, at * E + choice[j], value[j * LANES]);
  }
}

PM_ALWAYS_INLINE void route_backward_chosen(const pm_job *job, block *k, int64_t row, int64_t rows, vmask wanted,
                                            int plain) {
  const int64_t E = k->E, cells = k->b + 1;
  const int b = k->b;
  chosen c; /* what is not set here nobody asks for */
  c.part.E = b;
  c.part.b = b;
  c.part.w = k->draws; /* of use to those who draw, as are depth and top */
  c.part.q = k->depth;
  c.part.v = k->top;
  c.part.adjoint = k->adjoint;
  c.part.relay = k->relay;
  c.part.table = k->apart;
  c.e = k->direct;
  c.grad = k->direct + b;
  const block *part = &c.part;
  prefetch_rows(job->out, job->is_double ? 8 : 4, row, rows, E);
  choose_experts(&c, k, job, row, rows, plain);
  prefix_all(k, plain, PAIRS);
  const vreal share = upstream_of(&c, k, job, row, rows) * k->inverse_sum;
  const vreal *others = prefix_end(k, PAIRS);
  copy_vectors(part->v, c.grad, b);
  part->w[b] = part->v[b] = splat(0); /* the last one's partner, where b is odd */
  if (!plain) part->q[b] = splat(1);
  copy_vectors(part->table, others, cells);
  fill_vectors(part->table + cells, splat(0), cells);
  prefix_states(part, 0, b, plain, TANGENTS);
  const vreal *end = part->table + states_of(b, TANGENTS) * 2 * cells;
  sum_sizes(k, end);
  begin_adjoint(k, end);
  adjoint_states(part, 0, b, plain, TANGENTS);
  /* From here on no expert has a tangent: that of B goes the way of B itself. */
  copy_vectors(k->adjoint, k->adjoint + cells, cells);
  adjoint_all(k, plain, PAIRS);
  for (int j = 0; j < b; ++j) part->v[j] = fma_(part->v[j], k->inverse_total, fma_(-c.e[j], share, c.grad[j]));
  store_difference(k->v, k->inverse_total, k->e, share, lanes_of(wanted), row, E, job->out, job->is_double);
  write_chosen(part->v, job, lanes_of(wanted), row, E, b);
}

PM_ALWAYS_INLINE void route_backward_body(const pm_job *job, block *k, int64_t row, int64_t rows, vmask wanted,
                                          int plain) {
  const int64_t E = k->E;
  if (job->marginal && !job->normalize && chosen_fits(k->E, k->b)) {
    route_backward_chosen(job, k, row, rows, wanted, plain);
    return;
  }
  vreal shift;
  const vreal share = upstream(k, job, row, rows, &shift) * k->inverse_sum;
  if (job->marginal) {
    const vreal *direction = k->direct; /* h s: on every expert with `normalize`, else on S alone */
    if (job->normalize) {
      direction = k->v;
      for (int64_t i = 0; i < E; ++i) k->v[i] = -k->e[i] * shift;
      for (int l = 0; l < rows; ++l)
        for (int j = 0; j < k->b; ++j) {
          const int64_t i = job->indices[(row + l) * k->b + j];
          if ((uint64_t)i < (uint64_t)E) k->v[i][l] = k->direct[i][l];
        }
    }
    multiply_covariance(k, direction, plain);
    for (int64_t i = 0; i < E; ++i) k->v[i] = fma_(k->v[i], k->inverse_total, fma_(-k->e[i], share, k->direct[i]));
  } else {
    for (int64_t i = 0; i < E; ++i) k->v[i] = select_(k->poison, splat((real)NAN), fma_(-k->e[i], share, k->direct[i]));
  }
  store_rows(k->v, lanes_of(wanted), row, E, job->out, job->is_double);
}

PM_ROW_KERNEL(route_backward, TANGENTS, 0)

#endif
