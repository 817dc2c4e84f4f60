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
 * forward and backward but the keys. Inside, x is in units of tau log 2, so that softmax takes powers of two.
 *
 * Where 1 / tau is a small whole number n, and a row's keys lie close enough together, a round needs neither power nor
 * logarithm: with w = exp(x / tau), a = w / sum(w), and w (1 - a)^n is what the next round begins with; for m, 1 - a is
 * the share of the others. No w of an expert that has not led a round falls by more than 2^n a round, so that what the
 * keys span, and n a round, decide by the row whether all stay in range. What has led may underflow: its a is then less
 * than that of any other by as much. */
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
  return (size_t)((6 + length + segments) * pitch(E) + 4 * length + 2 * k + 1) * sizeof(vreal);
}

/* What is known of x before a round: the largest entry, where it is, and the largest of the others; of weights in place
 * of x, the sum of the others. */
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

/* ---- rounds on weights --------------------------------------------------------------------------------------- */

#define PM_MOST_POWER 4
#if PM_REAL_BITS == 32
#define PM_WEIGHTS_SPAN 110 /* bits, of the 126 below 1 */
#else
#define PM_WEIGHTS_SPAN 1000
#endif

/* n = 1 / tau if that is a whole number up to PM_MOST_POWER, else 0. */
static int power_of(double temperature) {
  const double n = 1 / temperature, whole = (double)(int64_t)(n + 0.5);
  return whole >= 1 && whole <= PM_MOST_POWER && fabs(n - whole) <= 1e-12 * n ? (int)whole : 0;
}

PM_ALWAYS_INLINE void meet_weight(leaders *lead, vreal w, vmask i) {
  const vmask above = (vmask)(w > lead->first);
  lead->second += min_(w, lead->first);
  lead->first = max_(w, lead->first);
  lead->at = (above & i) | (~above & lead->at);
}

static leaders find_weights(const vreal *w, int64_t E) {
  leaders lead = {.at = {0}};
  lead.first = lead.second = splat(0);
  for (int64_t i = 0; i < E; ++i) meet_weight(&lead, w[i], (vmask){0} + (bits)i);
  return lead;
}

/* The weights of keys x, the largest of them 1, and the lanes in which k rounds keep them in range. */
static vmask weigh_keys(const vreal *x, int64_t E, int k, vreal unit, int power, vreal *w) {
  const vreal infinity = splat((real)INFINITY);
  vreal most = -infinity, least = infinity;
  for (int64_t i = 0; i < E; ++i) {
    most = max_(x[i], most);
    least = min_(select_((vmask)(x[i] == -infinity), infinity, x[i]), least);
  }
  const vmask near = (vmask)((most - least) * unit <= splat((real)(PM_WEIGHTS_SPAN - power * k)));
  if (any(near))
    for (int64_t i = 0; i < E; ++i) w[i] = exp2_(select_(near, (x[i] - most) * unit, splat(0)));
  return near;
}

PM_ALWAYS_INLINE vreal raise(vreal x, int power) {
  vreal y = x;
  if (power == 2) return x * x;
  for (int n = 1; n < power; ++n) y *= x;
  return y;
}

/* play_round on weights: those of the round to `weights`, unless it is NULL. */
PM_ALWAYS_INLINE round_of play_weights(vreal *w, int64_t E, int power, leaders *lead, vreal *weights, vreal *result,
                                       int last) {
  const vreal first = lead->first, others = lead->second, one = splat(1), inverse = one / (first + others);
  round_of r;
  r.at = lead->at;
  r.share = first * inverse, r.rest = others * inverse;
  r.scale = select_((vmask)(others > splat(0)), one / others, splat(0));
  for (int l = 0; l < LANES; ++l) w[r.at[l]][l] = 0;
  *lead = (leaders){.at = {0}};
  for (int64_t i = 0; i < E; ++i) {
    const vreal before = w[i], a = before * inverse;
    if (weights) weights[i] = before;
    if (result) result[i] += a;
    if (last) continue;
    w[i] = before * raise(one - a, power);
    meet_weight(lead, w[i], (vmask){0} + (bits)i);
  }
  if (result)
    for (int l = 0; l < LANES; ++l) result[r.at[l]][l] += r.share[l];
  if (last) return r;
  const vreal own = first * raise(r.rest, power);
  for (int l = 0; l < LANES; ++l) w[r.at[l]][l] = own[l];
  meet_weight(lead, own, r.at);
  return r;
}

/* ---- forward ------------------------------------------------------------------------------------------------- */

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

/* The sum of all rounds from keys x (or, with a power, their weights), which are used up. */
static void play_keys(vreal *x, int64_t E, int k, vreal unit, vreal *weights, vreal *result) {
  leaders lead = scale_keys(x, E, unit);
  for (int64_t i = 0; i < E; ++i) result[i] = splat(0);
  for (int t = 0; t + 1 < k; ++t) play_round(x, E, unit, &lead, weights, result, 0);
  if (k > 0) play_round(x, E, unit, &lead, weights, result, 1);
}

static void play_powers(vreal *w, int64_t E, int k, int power, vreal *result) {
  leaders lead = find_weights(w, E);
  for (int64_t i = 0; i < E; ++i) result[i] = splat(0);
  for (int t = 0; t + 1 < k; ++t) play_weights(w, E, power, &lead, NULL, result, 0);
  if (k > 0) play_weights(w, E, power, &lead, NULL, result, 1);
}

static pm_status relaxed_top_k_rows(const pm_job *job) {
  const vreal unit = splat((real)(1.44269504088896341 / job->temperature));
  const int power = power_of(job->temperature);
  keyed d;
  keyed_begin(&d, job);
  const int64_t E = d.E, step = pitch(E);
  vreal *result = d.next, *general = result + step, *weights = general + step;
  vmask infeasible = {0};
  for (int64_t row = 0; row < job->shape.rows; row += LANES) {
    const int64_t rows = job->shape.rows - row < LANES ? job->shape.rows - row : LANES;
    const unsigned wanted = rows_mask(rows);
    keyed_load(&d, job, row, rows);
    infeasible |= d.infeasible;
    perturb(&d, job, row);
    if (job->keys) store_keys(&d, job, row, rows, wanted);
    const vmask near = power ? weigh_keys(d.x, E, d.k, unit, power, weights) : (vmask){0};
    if (any(near)) play_powers(weights, E, d.k, power, result);
    if (any(~near)) {
      play_keys(d.x, E, d.k, unit, weights, general);
      for (int64_t i = 0; i < E; ++i) result[i] = select_(near, result[i], general[i]);
    }
    answer_poison(&d, result);
    store_rows(result, wanted, row, E, job->out, job->is_double);
  }
  return any(infeasible) ? PM_INFEASIBLE : PM_OK;
}

/* ---- backward ------------------------------------------------------------------------------------------------ */

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

/* What the rounds of a block need, in the scratch. */
typedef struct replay {
  int64_t E, length, segments;
  int k, power; /* 0 for rounds on keys */
  vreal unit, inverse;
  vreal *x, *g, *q, *products, *starts, *weights;
  round_of *rounds;
} replay;

PM_ALWAYS_INLINE round_of replay_round(const replay *b, leaders *lead, vreal *weights, int last) {
  return b->power ? play_weights(b->x, b->E, b->power, lead, weights, NULL, last)
                  : play_round(b->x, b->E, b->unit, lead, weights, NULL, last);
}

/* q from x, the keys in units or their weights. */
static void play_backward(const replay *b, leaders lead) {
  const int64_t E = b->E, step = pitch(E);
  for (int64_t i = 0; i < E; ++i) b->q[i] = splat(0);
  for (int64_t s = 0; s + 1 < b->segments; ++s) {
    memcpy(b->starts + s * step, b->x, (size_t)E * sizeof(vreal));
    for (int64_t t = 0; t < b->length; ++t) replay_round(b, &lead, b->weights, 0);
  }
  for (int64_t s = b->segments - 1; s >= 0; --s) {
    int64_t count = b->length;
    if (s + 1 < b->segments) {
      memcpy(b->x, b->starts + s * step, (size_t)E * sizeof(vreal));
      lead = b->power ? find_weights(b->x, E) : find_leaders(b->x, E);
    } else {
      count = b->k - 1 - s * b->length;
    }
    for (int64_t t = 0; t < count; ++t) b->rounds[t] = replay_round(b, &lead, b->weights + t * step, 0);
    if (s + 1 == b->segments) {
      b->rounds[count] = replay_round(b, &lead, b->weights + count * step, 1);
      round_backward(b->q, E, &b->rounds[count], b->weights + count * step, b->g, b->inverse, b->products, 1);
    }
    for (int64_t t = count - 1; t >= 0; --t)
      round_backward(b->q, E, &b->rounds[t], b->weights + t * step, b->g, b->inverse, b->products, 0);
  }
}

static pm_status relaxed_top_k_backward_rows(const pm_job *job) {
  const source upstream = {job->vector, job->shape.experts, job->is_double};
  const int power = power_of(job->temperature);
  keyed d;
  keyed_begin(&d, job);
  const int64_t E = d.E, step = pitch(E);
  replay b = {.E = E, .length = rounds_in_segment(E, d.k > 0 ? d.k : 1), .k = d.k};
  b.segments = (d.k + b.length - 1) / b.length;
  b.inverse = splat((real)(1 / job->temperature));
  b.unit = splat((real)(1.44269504088896341 / job->temperature));
  vreal *powers = d.next, *result = powers + step;
  b.g = result + step, b.q = b.g + step, b.products = b.q + step, b.starts = b.products + step;
  b.weights = b.starts + b.segments * step;
  b.rounds = (round_of *)(b.weights + b.length * step);
  vmask infeasible = {0};
  for (int64_t row = 0; row < job->shape.rows; row += LANES) {
    const int64_t rows = job->shape.rows - row < LANES ? job->shape.rows - row : LANES;
    const unsigned wanted = rows_mask(rows);
    keyed_load(&d, job, row, rows);
    infeasible |= d.infeasible;
    load_rows(&upstream, row, rows, E, b.g);
    const vmask near = power ? weigh_keys(d.x, E, d.k, b.unit, power, powers) : (vmask){0};
    if (any(near)) {
      b.power = power, b.x = powers;
      play_backward(&b, find_weights(powers, E));
      memcpy(result, b.q, (size_t)E * sizeof(vreal));
    }
    if (any(~near)) {
      b.power = 0, b.x = d.x;
      play_backward(&b, scale_keys(d.x, E, b.unit));
      for (int64_t i = 0; i < E; ++i) result[i] = select_(near, result[i], b.q[i]);
    }
    answer_poison(&d, result);
    store_rows(result, wanted, row, E, job->out, job->is_double);
  }
  return any(infeasible) ? PM_INFEASIBLE : PM_OK;
}

#endif
