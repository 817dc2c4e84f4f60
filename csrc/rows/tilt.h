/* From logits to factors: which tilt lambda, and in which form.
 *
 * The recursion adds positive terms only, so any lambda gives full relative accuracy as long as nothing that matters
 * leaves the range of the type. Two forms share the work, and each row takes the first that is safe for it:
 *
 * Plain. lambda = logsumexp(r) - log kappa makes the odds kappa softmax(r), which routing needs anyway: no second exp.
 *   They sum to kappa <= k_max, so no coefficient exceeds exp(k_max). What underflows on the way is lost; it is at most
 *   E k_max exp(k_max) times the smallest normal number, and `plain_is_safe` asks that this be negligible beside Z
 *   even for a marginal of 1e-12. Logits of ordinary spread pass; peaked ones do not.
 *
 * Normalised. Factors (1 - p_i) + p_i X with p_i = sigmoid(r_i - lambda) and lambda solving sum p = kappa to within
 * 1/2: then P(N = kappa) is of order 1 / sqrt(kappa) and nothing can leave the range, whatever the logits. The unknown
 *   is measured from the pivot r_(kappa), the kappa-th largest logit: differences to nearby logits are then exact, and
 *   the root lies in [-log(2 kappa), log E] (there the experts above the pivot count at least kappa - 1/2, and the ones
 *   from the pivot down less than one): a few safeguarded Newton steps reach it from any input.
 *
 * kappa = k for exact k; in a band, the expected size at lambda = 0 clamped to it (MATH: E_lambda[N] = clamp(E_0[N])),
 * and sizes are weighed by exp(lambda (j - j0)) <= 1, j0 the end of the band at which the clamp holds. */
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

static void tilt_plain(block *k) {
  const int64_t E = k->E;
  const int a = k->a, b = k->b;
  vreal scale = splat((real)b);
  if (a < b || PM_REAL_BITS == 64) {
    for (int l = 0; l < LANES; ++l) {
      const double lse = (double)k->largest[l] + log((double)k->sum[l]);
      const int below = b == 0 || (a > 0 && lse <= log((double)a)), above = lse >= log((double)b);
      if (a == b || below || above) {
        const int size = below ? a : b;
        k->lambda[l] = size > 0 ? lse - log((double)size) : 0;
        k->base_size[l] = size;
        scale[l] = (real)size;
      } else {
        k->lambda[l] = 0;
        k->base_size[l] = a;
        scale[l] = (real)exp(lse);
      }
    }
  }
  for (int64_t i = 0; i < E; ++i) k->w[i] = k->s[i] * scale;
  weigh_sizes(k);
}

/* The rows for which the plain form has lost nothing, once `total` is known. */
static vmask plain_is_safe(const block *k) {
  const double negligible =
      PM_REAL_BITS == 32 ? 1e17 : 1e27; /* 1 / (smallest promised marginal x its rounding error) */
  const double least = (double)k->E * (k->b > 0 ? k->b : 1) * exp((double)k->b) * (double)PM_REAL_TINY * negligible;
  return (vmask)(k->total >= splat((real)least));
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

static void tilt_normalised(block *k) {
  const int64_t E = k->E;
  const int a = k->a, b = k->b;
  const vreal zero = splat(0);
  const vreal *top = k->top;
  sort_largest(k);
  if (b == 0) /* only the empty set: as if every expert were masked */
    for (int64_t i = 0; i < E; ++i) k->x[i] = splat(-(real)INFINITY);
  vreal pivot = zero, kappa = splat((real)b);
  vmask open = ~(vmask){0}; /* lanes whose tilt is still to be solved for */
  if (a < b) {
    vreal expected = zero, p, q;
    for (int64_t i = 0; i < E; ++i) {
      logistic(k->x[i], &p, &q);
      expected += p;
    }
    const vmask below = (vmask)(expected <= splat((real)a)), above = (vmask)(expected >= splat((real)b));
    kappa = select_(below, splat((real)a), splat((real)b));
    open = (below | above) & (vmask)(kappa > zero);
    for (int l = 0; l < LANES; ++l) k->base_size[l] = below[l] ? a : b;
  } else {
    for (int l = 0; l < LANES; ++l) k->base_size[l] = b;
    open = (vmask)(kappa > zero);
  }
  for (int l = 0; l < LANES; ++l)
    if (open[l]) pivot[l] = top[k->base_size[l] - 1][l];
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
      const vreal excess = mean - kappa;
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
  for (int l = 0; l < LANES; ++l) k->lambda[l] = (double)pivot[l] + (double)lambda[l];
  k->pivot = pivot;
  k->offset = lambda;
  weigh_sizes(k);
}

/* Calls body(job, block, row, rows, wanted lanes) for every block of rows: first in the plain form, then, for the rows
 * that this was not safe for, in the normalised one. The body returns the rows that it has answered, and a row is
 * answered from its own numbers alone. */
typedef vmask (*block_body)(const pm_job *job, block *k, int64_t row, int64_t rows, vmask wanted);

PM_ALWAYS_INLINE pm_status for_each_block(const pm_job *job, int width, block_body plain_body,
                                          block_body normalised_body) {
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
      tilt_plain(&k);
      wanted &= ~plain_body(job, &k, row, rows, wanted);
    }
    if (any(wanted)) {
      tilt_normalised(&k);
      normalised_body(job, &k, row, rows, wanted);
    }
  }
  return any(infeasible) ? PM_INFEASIBLE : PM_OK;
}

/* name_rows(job) from name_body(job, block, row, rows, wanted, plain). */
#define PM_ROW_KERNEL(name, width)                                                                       \
  static vmask name##_plain(const pm_job *job, block *k, int64_t row, int64_t rows, vmask wanted) {      \
    return name##_body(job, k, row, rows, wanted, 1);                                                    \
  }                                                                                                      \
  static vmask name##_normalised(const pm_job *job, block *k, int64_t row, int64_t rows, vmask wanted) { \
    return name##_body(job, k, row, rows, wanted, 0);                                                    \
  }                                                                                                      \
  static pm_status name##_rows(const pm_job *job) {                                                      \
    return for_each_block(job, width, name##_plain, name##_normalised);                                  \
  }

#endif
