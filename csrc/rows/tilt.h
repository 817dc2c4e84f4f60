/* From logits to factors: which tilt lambda, and in which form.
 *
 * The recursion adds positive terms only, so any lambda gives full relative accuracy as long as nothing that matters
 * leaves the range of the type. With x_i = r_i - lambda, each row takes the first form that is safe for it:
 *
 * Plain, 1 + exp(x_i) X. lambda = logsumexp(r) - log j0 makes the odds j0 softmax(r), which routing needs anyway: no
 *   second exp, and one multiply-add a cell. They sum to j0 <= k_max, so no coefficient exceeds exp(k_max). What
 *   underflows on the way is lost: at most E k_max exp(k_max) times the smallest normal number, to be negligible beside
 *   Z even for a marginal of 1e-12. As e_j0 >= t^j0 when j0 odds reach t, counting them tells beforehand: logits of
 *   ordinary spread pass, peaked ones do not.
 *
 * Scaled, each factor divided by its larger coefficient. lambda is the j0-th largest logit, so that the mode itself has
 *   the product 1: Z >= 1 whatever the logits, and Z <= sum of C(E, j). No exponent is lost at either end, and the
 *   differences to logits near lambda are exact.
 *
 * Normalised, 1 - p_i + p_i X with p_i = sigmoid(x_i), where C(E, k) would leave the range: lambda solves sum p = j0 to
 *   within 1/2, then P(N = j0) is of order 1 / sqrt(j0). Measured from the pivot r_(j0), the j0-th largest logit, the
 *   root lies in [-log(2 j0), log E] (there the experts above the pivot count at least j0 - 1/2, and those from the
 *   pivot down less than one): a few safeguarded Newton steps reach it from any input.
 *
 * j0 = k for exact k. In a band lambda = 0 as long as the sizes that it favours are within; otherwise j0 is the end
 * of the band on their side. Sizes are weighed by exp(lambda (j - j0)) <= 1. */
#ifndef PM_ROWS_TILT_H
#define PM_ROWS_TILT_H

#include "block.h"

/* Loads the rows, marks the poisoned ones and computes the softmax. */
static void block_load(block *k, const pm_job *job, int64_t row, int64_t rows) {
  const source in = {job->logits, job->shape.stride, job->is_double};
  vreal *x = k->x;
  const int64_t E = k->E;
  load_rows(&in, row, rows, E, x);
  const vreal infinity = splat((real)INFINITY);
  vmask bad = {0}, masked = {0};
  vreal largest = -infinity;
  for (int64_t i = 0; i < E; ++i) {
    bad |= ~(vmask)(x[i] < infinity);
    masked |= (vmask)(x[i] == -infinity);
    largest = max_(x[i], largest);
  }
  vmask few = {0};
  if (any(masked)) {
    vmask unmasked = {0};
    for (int64_t i = 0; i < E; ++i) unmasked -= (vmask)(x[i] > -infinity);
    few = (vmask)(unmasked < k->a) & ~bad;
    largest = select_((vmask)(largest == -infinity), splat(0), largest);
  }
  k->infeasible = few;
  k->poison = bad | few;
  if (any(k->poison)) {
    for (int64_t i = 0; i < E; ++i) x[i] = select_(k->poison, splat(0), x[i]);
    largest = select_(k->poison, splat(0), largest);
  }
  vreal sum = splat(0);
  for (int64_t i = 0; i < E; ++i) {
    const vreal e = exp_(x[i] - largest);
    k->s[i] = e;
    sum += e;
  }
  const vreal inverse = select_((vmask)(sum > 0), splat(1) / sum, splat(0));
  for (int64_t i = 0; i < E; ++i) k->s[i] *= inverse;
  k->largest = largest;
  k->sum = sum;
}

/* Weights of the sizes for the tilt of each lane. */
static void weigh_sizes(block *k) {
  for (int j = 0; j < k->a; ++j) k->sizes[j] = splat(0);
  if (k->a == k->b) {
    k->sizes[k->b] = splat(1);
    return;
  }
  for (int l = 0; l < LANES; ++l)
    for (int j = k->a; j <= k->b; ++j)
      k->sizes[j][l] = k->lambda[l] == 0 ? (real)1 : (real)exp(k->lambda[l] * (j - k->base_size[l]));
}

/* The plain form is worth trying for this k_max: exp(k_max) stays far inside the range. */
PM_ALWAYS_INLINE int plain_is_possible(int b) { return b <= (PM_REAL_BITS == 32 ? PM_SINGLE_MAX_K : 256); }

/* Returns the rows for which the plain form loses nothing. */
static vmask tilt_plain(block *k) {
  const int64_t E = k->E;
  const int a = k->a, b = k->b;
  /* 1 / (smallest promised marginal x its relative error) */
  const double negligible = PM_REAL_BITS == 32 ? 1e17 : 1e27;
  const double least = log((double)E * (b > 0 ? b : 1) * (double)PM_REAL_TINY * negligible) + b;
  vreal scale = splat((real)b), needed = splat((real)b), odds = splat((real)(b > 0 ? exp(least / b) : 0));
  if (a < b || PM_REAL_BITS == 64) {
    for (int l = 0; l < LANES; ++l) {
      const double lse = (double)k->largest[l] + log((double)k->sum[l]);
      const int below = b == 0 || (a > 0 && lse <= log((double)a)), above = lse >= log((double)b);
      const int outside = a == b || below || above, size = outside && !below ? b : a;
      k->lambda[l] = outside && size > 0 ? lse - log((double)size) : 0;
      k->base_size[l] = size;
      scale[l] = outside ? (real)size : (real)exp(lse);
      needed[l] = (real)size;
      odds[l] = size > 0 ? (real)exp(least / size) : 0;
    }
  }
  vreal enough = splat(0); /* experts with the odds that guarantee Z */
  for (int64_t i = 0; i < E; ++i) {
    k->w[i] = k->s[i] * scale;
    enough += select_((vmask)(k->w[i] >= odds), splat(1), splat(0));
  }
  weigh_sizes(k);
  return (vmask)(enough >= needed);
}

/* sigmoid(d - lambda), one minus it, and their sums over the experts. */
PM_ALWAYS_INLINE void logistic(vreal x, vreal *p, vreal *q) {
  const vmask negative = (vmask)(x < splat(0));
  const vreal e = exp_(select_(negative, x, -x)), small = e / (e + splat(1)), large = splat(1) / (e + splat(1));
  *p = select_(negative, small, large);
  *q = select_(negative, large, small);
}

/* The b largest logits of each row, descending, into `top`: an insertion network, every lane in step. */
PM_ALWAYS_INLINE void sort_largest_range(const block *k, int b) {
  vreal local[PM_UNROLLED_SIZE];
  vreal *top = b <= PM_UNROLLED_SIZE ? local : k->top;
#pragma GCC unroll 8
  for (int j = 0; j < b; ++j) top[j] = splat(-(real)INFINITY);
  for (int64_t i = 0; i < k->E; ++i) {
    vreal x = k->x[i];
#pragma GCC unroll 8
    for (int j = 0; j < b; ++j) {
      const vreal above = max_(x, top[j]);
      x = min_(x, top[j]);
      top[j] = above;
    }
  }
  if (top == local) {
#pragma GCC unroll 8
    for (int j = 0; j < b; ++j) k->top[j] = top[j];
  }
}

static void sort_largest(const block *k) {
  switch (k->b) {
    case 1: sort_largest_range(k, 1); break;
    case 2: sort_largest_range(k, 2); break;
    case 4: sort_largest_range(k, 4); break;
    case 6: sort_largest_range(k, 6); break;
    case 8: sort_largest_range(k, 8); break;
    default: sort_largest_range(k, k->b); break;
  }
}

/* The largest coefficient of the scaled form stays as far inside the range as the plain form's threshold asks. */
static int scaled_is_possible(const block *k) {
  const double E = (double)k->E, b = k->b, largest = lgamma(E + 1) - lgamma(b + 1) - lgamma(E - b + 1);
  return 2 * b <= E && largest + log(E * (b + 1)) < (PM_REAL_BITS == 32 ? 41.0 : 640.0);
}

static void tilt_scaled(block *k) {
  const int64_t E = k->E;
  vreal pivot = splat(0);
  for (int l = 0; l < LANES; ++l) {
    /* sizes favoured at lambda = 0: the mode's, the number of positive logits */
    const int below = k->a > 0 && !(k->top[k->a - 1][l] > 0), above = k->b > 0 && k->top[k->b - 1][l] > 0;
    k->base_size[l] = below && !above ? k->a : k->b;
    if (k->b > 0 && (below || above || k->a == k->b)) pivot[l] = k->top[k->base_size[l] - 1][l];
  }
  for (int64_t i = 0; i < E; ++i) {
    const vreal x = k->x[i] - pivot;
    const vmask positive = (vmask)(x > splat(0));
    const vreal e = exp_(select_(positive, -x, x));
    k->w[i] = select_(positive, splat(1), e);
    k->q[i] = select_(positive, e, splat(1));
  }
  k->pivot = pivot;
  k->offset = splat(0);
}

static void tilt_normalised(block *k) {
  const int64_t E = k->E;
  const int a = k->a, b = k->b;
  const vreal zero = splat(0);
  vreal pivot = zero, target = splat((real)b);
  vmask open = ~(vmask){0}; /* lanes whose tilt is still to be solved for */
  if (a < b) {
    vreal expected = zero, p, q;
    for (int64_t i = 0; i < E; ++i) {
      logistic(k->x[i], &p, &q);
      expected += p;
    }
    const vmask below = (vmask)(expected <= splat((real)a)), above = (vmask)(expected >= splat((real)b));
    target = select_(below, splat((real)a), splat((real)b));
    open = (below | above) & (vmask)(target > zero);
    for (int l = 0; l < LANES; ++l) k->base_size[l] = below[l] ? a : b;
  } else {
    for (int l = 0; l < LANES; ++l) k->base_size[l] = b;
    open = (vmask)(target > zero);
  }
  for (int l = 0; l < LANES; ++l)
    if (open[l]) pivot[l] = k->top[k->base_size[l] - 1][l];
  vreal lambda = zero;
  if (any(open)) {
    vreal low = splat((real)-log(2.0 * b)), high = splat((real)log((double)E));
    vmask moving = open;
    for (int step = 0; step < 64 && any(moving); ++step) {
      vreal mean = zero, variance = zero, p, q;
      for (int64_t i = 0; i < E; ++i) {
        logistic((k->x[i] - pivot) - lambda, &p, &q);
        mean += p;
        variance = fma_(p, q, variance);
      }
      const vreal excess = mean - target;
      moving &= ~((vmask)(excess <= splat((real)0.5)) & (vmask)(excess >= splat((real)-0.5)));
      low = select_((vmask)(excess > zero), max_(low, lambda), low);
      high = select_((vmask)(excess > zero), high, min_(high, lambda));
      vreal next = lambda + excess / max_(variance, splat(PM_REAL_TINY));
      const vmask outside = ~((vmask)(next > low) & (vmask)(next < high));
      next = select_(outside, (low + high) * splat((real)0.5), next);
      lambda = select_(moving, next, lambda);
    }
  }
  if (a < b) { /* the root has the sign that makes the far end of the band light; the step's tolerance may not */
    const vreal tilt = pivot + lambda;
    vmask wrong = open;
    for (int l = 0; l < LANES; ++l) wrong[l] &= -(bits)(k->base_size[l] == a ? tilt[l] > 0 : tilt[l] < 0);
    pivot = select_(wrong, zero, pivot);
    lambda = select_(wrong, zero, lambda);
  }
  for (int64_t i = 0; i < E; ++i) logistic((k->x[i] - pivot) - lambda, &k->w[i], &k->q[i]);
  k->pivot = pivot;
  k->offset = lambda;
}

/* For the rows that are not safe in the plain form. */
static void tilt_general(block *k) {
  if (k->b == 0) /* only the empty set: as if every expert were masked */
    for (int64_t i = 0; i < k->E; ++i) k->x[i] = splat(-(real)INFINITY);
  sort_largest(k);
  k->normalised = !scaled_is_possible(k);
  if (k->normalised)
    tilt_normalised(k);
  else
    tilt_scaled(k);
  for (int l = 0; l < LANES; ++l) k->lambda[l] = (double)k->pivot[l] + (double)k->offset[l];
  weigh_sizes(k);
}

/* Calls body(job, block, row, rows, wanted lanes) for every block of rows: for those that are safe in the plain form,
 * and for the others in a general one. Either way a row is answered from its own numbers alone. */
typedef void (*block_body)(const pm_job *job, block *k, int64_t row, int64_t rows, vmask wanted);

PM_ALWAYS_INLINE pm_status for_each_block(const pm_job *job, int width, block_body plain_body,
                                          block_body general_body) {
  block k;
  block_begin(&k, job, width);
  vmask infeasible = {0};
  for (int64_t row = 0; row < job->shape.rows; row += LANES) {
    const int64_t rows = job->shape.rows - row < LANES ? job->shape.rows - row : LANES;
    block_load(&k, job, row, rows);
    infeasible |= k.infeasible;
    vmask wanted = {0};
    for (int l = 0; l < LANES && l < rows; ++l) wanted[l] = -1;
    if (plain_body && plain_is_possible(k.b)) {
      const vmask safe = wanted & tilt_plain(&k);
      if (any(safe)) plain_body(job, &k, row, rows, safe);
      wanted &= ~safe;
    }
    if (any(wanted)) {
      tilt_general(&k);
      general_body(job, &k, row, rows, wanted);
    }
  }
  return any(infeasible) ? PM_INFEASIBLE : PM_OK;
}

/* name_rows(job) from name_body(job, block, row, rows, wanted, plain). */
#define PM_ROW_KERNEL(name, width)                                                                   \
  static void name##_plain(const pm_job *job, block *k, int64_t row, int64_t rows, vmask wanted) {   \
    name##_body(job, k, row, rows, wanted, 1);                                                       \
  }                                                                                                  \
  static void name##_general(const pm_job *job, block *k, int64_t row, int64_t rows, vmask wanted) { \
    name##_body(job, k, row, rows, wanted, 0);                                                       \
  }                                                                                                  \
  static pm_status name##_rows(const pm_job *job) { return for_each_block(job, width, name##_plain, name##_general); }

#endif
