/* From logits to factors: which tilt lambda, and in which form.
 *
 * The recursion adds positive terms only, so any lambda gives full relative accuracy as long as nothing that matters
 * leaves the range of the type. With x_i = r_i - lambda, each row takes the first form that is safe for it:
 *
 * Plain, 1 + exp(x_i) X. lambda = logsumexp(r) - log j0 makes the odds j0 softmax(r), which routing needs anyway: no
 *   second exp, and one multiply-add a cell. Rounded to a power of two, it rounds nothing else. The odds then sum to at
 *   most 1.5 k_max, and no coefficient exceeds exp(their sum). What underflows on the way is lost: at most
 *   2 E k_max exp(sum) times the smallest normal number, to be negligible beside Z even for a marginal of 1e-12. Z says
 *   whether it was; logits so peaked that fewer than j0 experts have odds of 2^-8 are not tried.
 *
 * Scaled, each factor divided by its larger coefficient. lambda is the j0-th largest logit, so that the mode itself has
 *   the product 1: Z >= 1 whatever the logits, and Z <= sum of C(E, j). No exponent is lost at either end, and the
 *   differences to logits near lambda are exact. For drawing, divided by the power of two below it: the plain form's
 *   numbers, exactly, with exponents of their own (sample.h).
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

#include "largest.h"

/* Marks the rows that have no answer, and puts zeros in their place; returns the largest logits. */
static vreal mark_poison(block *k) {
  const vreal infinity = splat((real)INFINITY);
  vmask bad = {0};
  vint unmasked = {0};
  for (int64_t i = 0; i < k->E; ++i) {
    bad |= ~(vmask)(k->x[i] < infinity);
    unmasked -= (vmask)(k->x[i] > -infinity);
  }
  k->infeasible = (vmask)(unmasked < k->a) & ~bad;
  k->poison = bad | k->infeasible;
  vreal largest = -infinity;
  for (int64_t i = 0; i < k->E; ++i) {
    k->x[i] = select_(k->poison, splat(0), k->x[i]);
    largest = max_(k->x[i], largest);
  }
  return select_((vmask)(largest == -infinity), splat(0), largest);
}

/* Loads the rows, marks the poisoned ones and computes the softmax. All of a row's exponentials share a power of two,
 * which is no rounding; only logits so large that n log 2 would be one are first lessened by the largest. */
static void block_load(block *k, const pm_job *job, int64_t row, int64_t rows) {
  const source in = {job->logits, job->shape.stride, job->is_double};
  const int64_t E = k->E;
  load_rows(&in, row, rows, E, k->x);
  k->w[E] = k->v[E] = splat(0); /* the last one's partner, where E is odd */
  k->q[E] = splat(1);
  vreal largest = splat(-(real)INFINITY);
  vmask unusual = {0}; /* x - x, which is 0 as long as every logit is a finite number */
  for (int64_t i = 0; i < E; ++i) {
    largest = max_(k->x[i], largest);
    unusual |= (vmask)(k->x[i] - k->x[i]);
  }
  k->poison = k->infeasible = (vmask){0};
  if (any((vmask)(unusual != 0))) largest = mark_poison(k);
  k->base = select_((vmask)(max_(largest, -largest) > splat(4096)), largest, splat(0));
  vreal origin;
  exp_reduced(largest - k->base, &origin);
  k->exponent = origin - splat(PM_EXP_ROUND);
  /* Results down to 2^-125, whatever the rounding of log 2. */
  const vreal lowest = fma_(k->exponent, splat((real)0x1.62e42fefa39efp-1), splat(PM_EXP_LOWEST + (real)0.7));
  vreal sum = splat(0);
  for (int64_t i = 0; i < E; ++i) {
    prefetch_piece(&in, row + LANES, job->shape.rows, i, E);
    const vreal x = k->x[i] - k->base;
    vreal shifted;
    const vreal y = exp_reduced(x, &shifted);
    k->e[i] = scale_by_shifted(y, shifted, origin, x, lowest);
    sum += k->e[i];
  }
  k->sum = sum;
  k->inverse_sum = select_((vmask)(sum > splat(0)), splat(1) / sum, splat(0));
}

/* ---- plain ---------------------------------------------------------------------------------------------------- */

/* The plain form can be tried for this k_max: exp(1.5 k_max) stays far inside the range. */
PM_ALWAYS_INLINE int plain_is_possible(int b) { return b <= (PM_REAL_BITS == 32 ? PM_SINGLE_MAX_K : 256); }

static void prepare_plain(block *k) {
  /* 1 / (smallest promised marginal x its relative error) */
  const double negligible = PM_REAL_BITS == 32 ? 1e17 : 1e27;
  k->losable = (real)((double)k->E * k->b * 2 * (double)PM_REAL_TINY * negligible);
}

/* Fills w and `sizes`; returns the rows that are worth trying. Those whose `total` is then at least `least_total` have
 * lost nothing. */
static vmask tilt_plain(block *k) {
  const int64_t E = k->E;
  const int a = k->a, b = k->b;
  /* Where lambda is 0, and where the largest size is favoured: by the sum of the odds. */
  const vreal most = splat(PM_LARGEST_EXPONENT - 1);
  const vreal reach = select_((vmask)(k->base == splat(0)), k->exponent, k->base);
  const vreal clamped = max_(min_(reach, most), -most), odds = k->sum * power_of_two(clamped);
  const vmask below = (vmask)(odds <= splat((real)a)) & -(bits)(a > 0), above = (vmask)(odds >= splat((real)b));
  const vmask tilted = below | above | -(bits)(a == b), large = tilted & ~(below & -(bits)(a < b));
  k->base_size = int_select_(large, splat_bits(b), splat_bits(a));
  /* The power of two next to j0 / sum, in whole powers so that neither the odds nor the sizes' weights are rounded. */
  const vreal size = select_(large, splat((real)b), splat((real)a));
  const vreal ideal = size * k->inverse_sum * splat((real)1.4142135623730951);
  vreal power = (vreal)((vpattern)ideal & ~(vpattern)splat_bits(((bits)1 << PM_MANTISSA_BITS) - 1));
  vreal exponent = exponent_of(power);
  power = select_(tilted, power, power_of_two(clamped));
  exponent = select_(tilted, exponent, clamped);
  k->power = power;
  fill_vectors(k->sizes, splat(0), a);
  if (a == b)
    k->sizes[b] = splat(1);
  else {
    /* exp(-|lambda|), by which each step away from j0 weighs less; 1 where lambda is 0. */
    const vreal lambda = select_(tilted, reach - exponent, splat(0));
    const vreal step = power_of_two(-min_(max_(lambda, -lambda), most));
    vreal rising = splat(1), falling = splat(1); /* from a upwards, from b downwards */
    for (int j = a; j <= b; ++j, rising *= step) k->sizes[j] = rising;
    for (int j = b; j >= a; --j, falling *= step) k->sizes[j] = select_(large, falling, k->sizes[j]);
  }
#if PM_REAL_BITS == 64
  for (int l = 0; l < LANES; ++l)
    k->lambda[l] = tilted[l] ? k->base[l] + (k->exponent[l] - exponent[l]) * 0.69314718055994531 : 0;
#endif
  vint likely = {0}; /* experts that are not out of the question */
  for (int64_t i = 0; i < E; ++i) {
    k->w[i] = k->e[i] * power;
    likely = count_where_at_most(likely, 1, splat((real)0x1p-8), k->w[i]);
  }
  k->least_total = exp_(k->sum * power) * k->losable;
  return (vmask)(likely >= k->base_size);
}

/* ---- general -------------------------------------------------------------------------------------------------- */

/* Weights of the sizes for the tilt of each lane. */
static void weigh_sizes(block *k) {
  fill_vectors(k->sizes, splat(0), k->a);
  if (k->a == k->b) {
    k->sizes[k->b] = splat(1);
    return;
  }
  for (int l = 0; l < LANES; ++l)
    for (int j = k->a; j <= k->b; ++j)
      k->sizes[j][l] = k->lambda[l] == 0 ? (real)1 : (real)exp(k->lambda[l] * (j - (int)k->base_size[l]));
}

/* sigmoid(d - lambda), one minus it, and their sums over the experts. */
PM_ALWAYS_INLINE void logistic(vreal x, vreal *p, vreal *q) {
  const vmask negative = (vmask)(x < splat(0));
  const vreal e = exp_(select_(negative, x, -x)), small = e / (e + splat(1)), large = splat(1) / (e + splat(1));
  *p = select_(negative, small, large);
  *q = select_(negative, large, small);
}

/* Largest coefficient and what underflows on the way both stay inside the range, the latter as negligible as in the
 * plain form. Scaling by powers of two leaves each factor above the pivot up to twice as large. */
static int scaled_is_possible(const block *k) {
  const double E = (double)k->E, b = k->b, largest = lgamma(E + 1) - lgamma(b + 1) - lgamma(E - b + 1);
  return 2 * b <= E && largest + log(E * (b + 1)) + b * log(2.0) < (PM_REAL_BITS == 32 ? 47.0 : 645.0);
}

static void tilt_scaled(block *k) {
  const int64_t E = k->E;
  const int a = k->a, b = k->b;
  /* Sizes favoured at lambda = 0: the mode's, the number of positive logits. */
  const vreal smallest = a > 0 ? k->top[a - 1] : splat(1), largest = b > 0 ? k->top[b - 1] : splat(0);
  const vmask above = (vmask)(largest > splat(0)), below = ~(vmask)(smallest > splat(0)) & ~above;
  k->base_size = int_select_(below, splat_bits(a), splat_bits(b));
  const vreal pivot = a == b ? largest : select_(below, smallest, select_(above, largest, splat(0)));
  k->pivot = pivot;
  k->offset = splat(0);
  if (!k->by_powers) {
    for (int64_t i = 0; i < E; ++i) {
      const vreal x = k->x[i] - pivot;
      const vmask positive = (vmask)(x > splat(0));
      const vreal e = exp_(select_(positive, -x, x));
      k->w[i] = select_(positive, splat(1), e);
      k->q[i] = select_(positive, e, splat(1));
    }
    return;
  }
  /* exp(x) = y 2^n with y in [1, 2) where x > 0; beyond the clamp 2^-n is 0 all the same. */
  vreal depth = splat(0);
  for (int64_t i = 0; i < E; ++i) {
    const vreal x = min_(k->x[i] - pivot, splat(100000));
    vreal shifted;
    const vreal y = exp_reduced(x, &shifted);
    const vmask positive = (vmask)(x > splat(0)), low = (vmask)(y < splat(1));
    const vreal n = (shifted - splat(PM_EXP_ROUND)) - select_(low, splat(1), splat(0));
    const vreal small = scale_by_shifted(y, shifted, splat(PM_EXP_ROUND), x, splat(PM_EXP_LOWEST));
    const vreal taken = select_(positive, n, splat(0));
    k->w[i] = select_(positive, select_(low, y + y, y), small);
    k->q[i] = select_((vmask)(taken < splat(PM_LARGEST_EXPONENT)), power_of_two(-taken), splat(0));
    k->depth[i] = depth;
    depth += taken;
  }
  k->depth[E] = k->depth[E + 1] = depth;
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
    k->base_size = int_select_(below, splat_bits(a), splat_bits(b));
  } else {
    k->base_size = splat_bits(b);
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
static void tilt_general(block *k, int by_powers) {
  if (k->b == 0) /* only the empty set: as if every expert were masked */
    for (int64_t i = 0; i < k->E; ++i) k->x[i] = splat(-(real)INFINITY);
  rank_largest(k);
  if (k->scalable < 0) k->scalable = scaled_is_possible(k);
  k->normalised = !k->scalable;
  k->by_powers = by_powers && !k->normalised;
  if (k->normalised)
    tilt_normalised(k);
  else
    tilt_scaled(k);
  for (int l = 0; l < LANES; ++l) k->lambda[l] = (double)k->pivot[l] + (double)k->offset[l];
  weigh_sizes(k);
}

/* Calls body(job, block, row, wanted lanes) for every block of rows: in the plain form for those that are worth it, and
 * for the others, and those that lost something, in a general one, scaled by powers of two if `by_powers`, whose answer
 * replaces the first. Either way a row is answered from its own numbers alone. */
typedef void (*block_body)(const pm_job *job, block *k, int64_t row, int64_t rows, vmask wanted);

PM_ALWAYS_INLINE pm_status for_each_block(const pm_job *job, states of, int by_powers, block_body plain_body,
                                          block_body general_body) {
  block k;
  block_begin(&k, job, of);
  const int plain = plain_body && plain_is_possible(k.b);
  if (plain) prepare_plain(&k);
  vmask infeasible = {0};
  for (int64_t row = 0; row < job->shape.rows; row += LANES) {
    const int64_t rows = job->shape.rows - row < LANES ? job->shape.rows - row : LANES;
    block_load(&k, job, row, rows);
    infeasible |= k.infeasible;
    vmask wanted = first_lanes(rows);
    if (plain) {
      const vmask tried = wanted & tilt_plain(&k);
      if (any(tried)) {
        plain_body(job, &k, row, rows, tried);
        wanted &= ~(tried & (vmask)(k.total >= k.least_total));
      }
    }
    if (any(wanted)) {
      tilt_general(&k, by_powers);
      general_body(job, &k, row, rows, wanted);
    }
  }
  return any(infeasible) ? PM_INFEASIBLE : PM_OK;
}

/* name_rows(job) from name_body(job, block, row, rows, wanted, plain). */
#define PM_ROW_KERNEL(name, of, by_powers)                                                           \
  static void name##_plain(const pm_job *job, block *k, int64_t row, int64_t rows, vmask wanted) {   \
    name##_body(job, k, row, rows, wanted, 1);                                                       \
  }                                                                                                  \
  static void name##_general(const pm_job *job, block *k, int64_t row, int64_t rows, vmask wanted) { \
    name##_body(job, k, row, rows, wanted, 0);                                                       \
  }                                                                                                  \
  static pm_status name##_rows(const pm_job *job) {                                                  \
    return for_each_block(job, of, by_powers, name##_plain, name##_general);                         \
  }

#endif
