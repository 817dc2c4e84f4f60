/* Relaxed top-k (Xie & Ermon, IJCAI 2019) and its gradient, from the perturbed keys.
 *
 * A round turns x into a = softmax(x / tau), adds a to the result and log(1 - a) to x. At low temperatures one a is 1
 * to the last bit, and 1 - a is what matters; so the largest entry m is taken apart. With c the softmax of the others
 * and d = x_m / tau - logsumexp(others / tau), a_m = sigmoid(d) = A,   1 - a_m = sigmoid(-d) = B,   log(1 - a_m) =
 * -log(1 + exp(d)),   a_i = B c_i <= 1/2, all to full relative precision, at any temperature.
 *
 * Backward, with g the gradient of the result, q that of x after the round, p before, b_i = a_i / (1 - a_i), i != m:
 *     p_i = q_i (1 - b_i / tau) + c_i / tau (B (g_i - G + Q) + A q_m)    G = A g_m + B C,   C = sum of c_i g_i,
 *     p_m = q_m (1 - A / tau) + A / tau (B (g_m - C) + Q)                Q = sum of q_i b_i.
 * It needs the c of every round, last round first. The forward pass is therefore run again, keeping them for a segment
 * of rounds at a time (all of them while they fit the cache) and x before each segment: nothing is kept between
 * forward and backward but the keys. Inside, x is in units of tau log 2, so that softmax takes powers of two. */
#ifndef PM_ROWS_RELAXED_H
#define PM_ROWS_RELAXED_H

#include "gumbel.h"

#define PM_ROUNDS_BYTES (128 * 1024)

/* Rounds in a segment: what fits, but no fewer than the square root of k, which bounds the checkpoints as well. */
static int64_t rounds_in_segment(int64_t E, int64_t k) {
  int64_t length = PM_ROUNDS_BYTES / (E * (int64_t)sizeof(vreal));
  if (length < 1) length = 1;
  while (length * length < k) ++length;
  return length < k ? length : k;
}

static size_t gumbel_bytes(int64_t E, int64_t k) {
  const int64_t length = rounds_in_segment(E, k > 0 ? k : 1), segments = (k + length - 1) / length;
  return (size_t)((4 + length + segments) * pitch(E) + 4 * length + 2 * k + 1) * sizeof(vreal);
}

/* What is known of x before a round: the largest entry, where it is, and the largest of the others. */
typedef struct leaders {
  vreal first, second;
  vmask at;
} leaders;

PM_ALWAYS_INLINE leaders begin_leaders(void) {
  leaders lead = {.at = {0}};
  lead.first = lead.second = splat(-(real)INFINITY);
  return lead;
}

PM_ALWAYS_INLINE void meet(leaders *lead, vreal x, vmask i) {
  const vmask above = (vmask)(x > lead->first);
  lead->second = max_(lead->second, min_(x, lead->first));
  lead->first = max_(x, lead->first);
  lead->at = (above & i) | (~above & lead->at);
}

static leaders find_leaders(const vreal *x, int64_t E) {
  leaders lead = begin_leaders();
  for (int64_t i = 0; i < E; ++i) meet(&lead, x[i], (vmask){0} + (bits)i);
  return lead;
}

/* Keys to units of tau log 2; they stay in range, and -inf stays what it is. */
static leaders scale_keys(vreal *x, int64_t E, vreal unit) {
  const vreal most = splat(PM_REAL_BITS == 32 ? (real)0x1p125 : (real)0x1p1021);
  leaders lead = begin_leaders();
  for (int64_t i = 0; i < E; ++i) {
    const vmask masked = (vmask)(x[i] == splat(-(real)INFINITY));
    x[i] = select_(masked, x[i], max_(min_(x[i] * unit, most), -most));
    meet(&lead, x[i], (vmask){0} + (bits)i);
  }
  return lead;
}

/* One round: c_i = scale * weights[i], 0 at m. */
typedef struct round_of {
  vreal share, rest, scale; /* A, B */
  vmask at;                 /* m */
} round_of;

/* The round of x, its weights, and, but for the last, x and its leaders after it; with a result, the a are added. */
PM_ALWAYS_INLINE round_of play_round(vreal *x, int64_t E, vreal unit, leaders *lead, vreal *weights, vreal *result,
                                     int last) {
  const vreal infinity = splat((real)INFINITY), one = splat(1);
  const vmask alone = (vmask)(lead->second == -infinity);
  const vreal first = lead->first, second = select_(alone, splat(0), lead->second);
  round_of r;
  r.at = lead->at;
  for (int l = 0; l < LANES; ++l) x[r.at[l]][l] = -(real)INFINITY;
  vreal sum = splat(0);
  for (int64_t i = 0; i < E; ++i) {
    weights[i] = exp2_(x[i] - second);
    sum += weights[i];
  }
  const vreal gap = (first - second) * splat((real)0.693147180559945309) - log_(select_(alone, one, sum));
  const vreal odds = select_(alone, infinity, gap); /* d */
  const vreal e = exp_(-abs_(odds)), large = one / (one + e), small = e * large;
  const vmask likely = (vmask)(odds >= splat(0));
  r.share = select_(likely, large, small);
  r.rest = select_(likely, small, large);
  r.scale = select_(alone, splat(0), one / sum);
  if (last && !result) return r;
  const vreal scale = r.rest * r.scale;
  *lead = begin_leaders();
  for (int64_t i = 0; i < E; ++i) {
    const vreal a = weights[i] * scale;
    if (result) result[i] += a;
    if (last) continue;
    x[i] = fma_(log_rest(a), unit, x[i]);
    meet(lead, x[i], (vmask){0} + (bits)i);
  }
  if (result)
    for (int l = 0; l < LANES; ++l) result[r.at[l]][l] += r.share[l];
  if (last) return r;
  const vreal own = first - (max_(odds, splat(0)) + log1p_(e)) * unit;
  for (int l = 0; l < LANES; ++l) x[r.at[l]][l] = own[l];
  meet(lead, own, r.at);
  return r;
}

static void answer_poison(const keyed *d, vreal *out) {
  if (any(d->poison))
    for (int64_t i = 0; i < d->E; ++i) out[i] = select_(d->poison, splat((real)NAN), out[i]);
}

/* The keys of the block, for the backward pass; a poisoned row's are NaN. */
static void store_keys(const keyed *d, const pm_job *job, int64_t row, int64_t rows, unsigned wanted) {
  if (lanes_of(d->poison) & wanted) {
    for (int l = 0; l < rows; ++l)
      for (int64_t i = 0; i < d->E; ++i)
        write_(job->keys, job->is_double, (row + l) * d->E + i, d->poison[l] ? (real)NAN : d->x[i][l]);
  } else {
    store_rows(d->x, wanted, row, d->E, job->keys, job->is_double);
  }
}

static pm_status relaxed_top_k_rows(const pm_job *job) {
  const vreal unit = splat((real)(1.44269504088896341 / job->temperature));
  keyed d;
  keyed_begin(&d, job);
  const int64_t E = d.E;
  vreal *result = d.next, *weights = result + pitch(E);
  vmask infeasible = {0};
  for (int64_t row = 0; row < job->shape.rows; row += LANES) {
    const int64_t rows = job->shape.rows - row < LANES ? job->shape.rows - row : LANES;
    const unsigned wanted = rows_mask(rows);
    keyed_load(&d, job, row, rows);
    infeasible |= d.infeasible;
    perturb(&d, job, row);
    for (int64_t i = 0; i < E; ++i) result[i] = splat(0);
    if (job->keys) store_keys(&d, job, row, rows, wanted);
    leaders lead = scale_keys(d.x, E, unit);
    for (int t = 0; t + 1 < d.k; ++t) play_round(d.x, E, unit, &lead, weights, result, 0);
    if (d.k > 0) play_round(d.x, E, unit, &lead, weights, result, 1);
    answer_poison(&d, result);
    store_rows(result, wanted, row, E, job->out, job->is_double);
  }
  return any(infeasible) ? PM_INFEASIBLE : PM_OK;
}

/* q -> p for one round, in place; after the last one q is 0. `products` (q_i b_i) are overwritten. */
PM_ALWAYS_INLINE void round_backward(vreal *q, int64_t E, const round_of *r, const vreal *weights, const vreal *g,
                                     vreal inverse, vreal *products, int last) {
  const vreal scale = r->rest * r->scale;
  vreal q_sum = splat(0), g_sum = splat(0), q_at = splat(0), g_at = splat(0);
  for (int l = 0; l < LANES; ++l) {
    q_at[l] = q[r->at[l]][l];
    g_at[l] = g[r->at[l]][l];
  }
  for (int64_t i = 0; i < E; ++i) {
    g_sum = fma_(weights[i], g[i], g_sum);
    if (last) continue;
    const vreal a = weights[i] * scale;
    products[i] = q[i] * (a / (splat(1) - a));
    q_sum += products[i];
  }
  const vreal mean = g_sum * r->scale, excess = g_at - mean; /* C, g_m - C */
  /* p_i = q_i + (c_i (B g_i + common) - q_i b_i) / tau */
  const vreal common = fma_(r->share, q_at, r->rest * (q_sum - fma_(r->share, excess, mean)));
  const vreal own = fma_(r->share * inverse, fma_(r->rest, excess, q_sum - q_at), q_at);
  const vreal slope = scale * inverse, offset = common * r->scale * inverse;
  for (int64_t i = 0; i < E; ++i) {
    const vreal through = weights[i] * fma_(slope, g[i], offset);
    q[i] = last ? through : fma_(products[i], -inverse, q[i] + through);
  }
  for (int l = 0; l < LANES; ++l) q[r->at[l]][l] = own[l];
}

static pm_status relaxed_top_k_backward_rows(const pm_job *job) {
  const vreal inverse = splat((real)(1 / job->temperature));
  const vreal unit = splat((real)(1.44269504088896341 / job->temperature));
  const source upstream = {job->vector, job->shape.experts, job->is_double};
  keyed d;
  keyed_begin(&d, job);
  const int64_t E = d.E, length = rounds_in_segment(E, d.k > 0 ? d.k : 1), segments = (d.k + length - 1) / length;
  const int64_t step = pitch(E);
  vreal *g = d.next, *q = g + step, *products = q + step, *starts = products + step,
        *weights = starts + segments * step;
  round_of *r = (round_of *)(weights + length * step);
  vmask infeasible = {0};
  for (int64_t row = 0; row < job->shape.rows; row += LANES) {
    const int64_t rows = job->shape.rows - row < LANES ? job->shape.rows - row : LANES;
    const unsigned wanted = rows_mask(rows);
    keyed_load(&d, job, row, rows);
    infeasible |= d.infeasible;
    load_rows(&upstream, row, rows, E, g);
    for (int64_t i = 0; i < E; ++i) q[i] = splat(0);
    leaders lead = scale_keys(d.x, E, unit);
    for (int64_t s = 0; s + 1 < segments; ++s) {
      memcpy(starts + s * step, d.x, (size_t)E * sizeof(vreal));
      for (int64_t t = 0; t < length; ++t) play_round(d.x, E, unit, &lead, weights, NULL, 0);
    }
    for (int64_t s = segments - 1; s >= 0; --s) {
      int64_t count = length;
      if (s + 1 < segments) {
        memcpy(d.x, starts + s * step, (size_t)E * sizeof(vreal));
        lead = find_leaders(d.x, E);
      } else {
        count = d.k - 1 - s * length;
      }
      for (int64_t t = 0; t < count; ++t) r[t] = play_round(d.x, E, unit, &lead, weights + t * step, NULL, 0);
      if (s + 1 == segments) {
        r[count] = play_round(d.x, E, unit, &lead, weights + count * step, NULL, 1);
        round_backward(q, E, &r[count], weights + count * step, g, inverse, products, 1);
      }
      for (int64_t t = count - 1; t >= 0; --t) round_backward(q, E, &r[t], weights + t * step, g, inverse, products, 0);
    }
    answer_poison(&d, q);
    store_rows(q, wanted, row, E, job->out, job->is_double);
  }
  return any(infeasible) ? PM_INFEASIBLE : PM_OK;
}

#endif
