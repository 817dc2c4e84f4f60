/* Gamma variates in log space, and the derivative of their logarithm by alpha at a fixed quantile; with them what the
 * Dirichlet law and DirMoE's gates add. One source for the C core and the CUDA kernels, written as numerics.h is, on
 *   vword, a random word a lane (two in double precision); element_counter; element_words(counter, first word, words);
 *   leading_bits(vword); not_(mask), any(mask), min_ and sqrt_.
 * A branch on any(...) concerns all rows of a vector in C, and the thread's own number on a GPU. No guard: see
 * precision.h.
 *
 * Draws: Marsaglia & Tsang, "A simple method for generating gamma variables", ACM TOMS 26 (2000). With d = alpha - 1/3,
 * c = 1 / sqrt(9 d), a normal x and a uniform U, log g = log d + 3 log(1 + c x) is accepted where
 * log U < x^2/2 + d - d v + d log v, v = (1 + c x)^3. For alpha < 1 a draw for alpha + 1 gains log(U) / alpha.
 * Attempt t of the element (row, column) reads the four words of the counter (65536 t + column, row, purpose): radius
 * and angle of x, U, and at the first attempt the boost's U. So a lane that waits for its neighbours changes nothing.
 *
 * Derivative: implicit reparameterisation (Figurnov, Mohamed & Mnih, NeurIPS 2018),
 *     D = d log g / d alpha = -(dP/dalpha) / (g p(g)),   P the regularised lower incomplete gamma function.
 * With s = 1/(1 + alpha) and delta = log g - log(1 + alpha), alpha D is computed
 *   -2 <= delta <= 1.5   as one polynomial in (s, delta): in these coordinates alpha D is smooth from alpha = 0, where
 *                        it is exp(g) E1(g), to alpha = infinity, where it is the first term of Temme's uniform
 *                        expansion (SIAM J. Math. Anal. 13, 1982); tools/fit_gamma.py.
 *   delta < -2           by the series P = g^alpha e^-g / Gamma(alpha + 1) sum_n g^n / (alpha + 1)_n (Abramowitz &
 *                        Stegun 6.5.29), differentiated by its terms (Moore, Applied Statistics 31, 1982, AS 187). All
 *                        its terms have one sign; they fall at least as fast as 0.136^n.
 *   delta > 1.5          by Legendre's continued fraction of 1 - P (Gautschi, ACM TOMS 5, 1979), as dual numbers.
 * Relative error: 2e-6 in single, 2e-12 in double precision; docs/gamma.md. */

#undef PM_LARGEST
#undef PM_LARGEST_LOG
#if PM_REAL_BITS == 32
#define PM_LARGEST 0x1.fffffep127f
#define PM_LARGEST_LOG 88.0f
#else
#define PM_LARGEST 0x1.fffffffffffffp1023
#define PM_LARGEST_LOG 709.0
#endif

/* ---- Gamma variates ------------------------------------------------------------------------------------------- */

#define PM_GAMMA_ATTEMPTS 64 /* then the last one is taken: each fails with a probability below 0.05 */

#if PM_REAL_BITS == 64
/* 1 + n / 2^52, n from the leading 52 bits. */
PM_ALWAYS_INLINE vreal one_to_two(vword word) { return real_of(leading_bits(word) | 0x3ff0000000000000u); }
#endif

/* An exponential variate -log U with neither end of (0, 1) cut short: U = (n + 1/2) / 2^31 or / 2^52. In single
 * precision the complement is converted apart, and counts where U is near 1. */
PM_ALWAYS_INLINE vreal exponential(vword word) {
#if PM_REAL_BITS == 32
  const vmask n = (vmask)(word >> 1);
  const vreal u = (whole(n) + 0.5f) * 0x1p-31f, complement = (whole(0x7fffffff - n) + 0.5f) * 0x1p-31f;
  return -log_near_one(u, -complement);
#else
  return -log_(one_to_two(word) - (1 - 0x1p-53));
#endif
}

/* sqrt(2 radius) cos(2 pi V), V from 32 or 52 bits (Box & Muller 1958). */
PM_ALWAYS_INLINE vreal normal(vreal radius, vword word) {
#if PM_REAL_BITS == 32
  const vreal centred = whole((vmask)(word ^ 0x80000000u)) * 0x1p-32f;
#else
  const vreal centred = one_to_two(word) - 1.5;
#endif
  return sqrt_(radius + radius) * sine_of_turns(abs_(centred) - (real)0.25);
}

/* log g for every lane of one column. alpha = 0 gives -inf; negative, infinite and NaN alphas give NaN. */
PM_ALWAYS_INLINE vreal draw_log_gamma(vreal alpha, const element_counter *at, uint32_t column) {
  const vmask proper = (vmask)(alpha > 0) & (vmask)(alpha <= PM_LARGEST), boosted = (vmask)(alpha < 1);
  const vreal shape = select_(proper, select_(boosted, alpha + 1, alpha), splat(1));
  const vreal d = shape - (real)(1.0 / 3), c = 1 / sqrt_(9 * d);
  vreal log_root = splat(0), boost = splat(0);
  vmask pending = proper;
  for (uint32_t attempt = 0; attempt < PM_GAMMA_ATTEMPTS && any(pending); ++attempt) {
    vword words[4];
    element_words(at, attempt * PM_MAX_EXPERTS + column, words);
    if (attempt == 0 && any(boosted & proper)) boost = exponential(words[3]) / alpha;
    const vreal t = c * normal(exponential(words[0]), words[1]);
    const vmask inside = (vmask)(t > -1 + PM_REAL_HALF_ULP);
    const vreal root = log1p_(select_(inside, t, splat(0)));
    /* x^2/2 = 4.5 d t^2, so that nothing large cancels. */
    const vreal bound = d * fma_(splat(3), root - t, t * t * ((real)1.5 - t));
    const vmask accepted = inside & (vmask)(-exponential(words[2]) < bound);
    log_root = select_(pending & inside, root, log_root);
    pending = pending & not_(accepted);
  }
  const vreal drawn = fma_(splat(3), log_root, log_(d)) - select_(boosted, boost, splat(0));
  const vreal nothing = select_((vmask)(alpha == 0), splat(-(real)INFINITY), splat((real)NAN));
  return select_(proper, max_(drawn, splat(-PM_LARGEST)), nothing);
}

/* ---- the derivative of a Gamma variate's logarithm ------------------------------------------------------------- */

#if PM_REAL_BITS == 32
enum { SERIES_TERMS = 10, FRACTION_TERMS = 8 };
#else
enum { SERIES_TERMS = 17, FRACTION_TERMS = 18 };
#endif

PM_ALWAYS_INLINE vreal slope_central(vreal s, vreal delta) {
  const real half = (PM_SLOPE_HIGHEST - PM_SLOPE_LOWEST) / 2, middle = (PM_SLOPE_HIGHEST + PM_SLOPE_LOWEST) / 2;
  const vreal u = fma_(splat(2), s, splat(-1)), v = (delta - middle) * (1 / half);
  vreal y = splat(0);
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 24
#endif
  for (int i = SLOPE_ROWS - 1; i >= 0; --i) {
    vreal row = splat(slope_table[i][slope_lengths[i] - 1]);
#if defined(__CUDACC__)
#pragma unroll
#else
#pragma GCC unroll 24
#endif
    for (int j = SLOPE_COLUMNS - 2; j >= 0; --j)
      if (j < slope_lengths[i] - 1) row = fma_(row, v, splat(slope_table[i][j]));
    y = i == SLOPE_ROWS - 1 ? row : fma_(y, u, row);
  }
  return y;
}

/* With R_n = 1 + g/(alpha + n) R_{n+1}: -(R_1 (log g - psi(1 + alpha)) + dR_1/dalpha). */
PM_APART vreal slope_low(vreal alpha, vreal g, vreal gap) {
  vreal total = splat(1), slope = splat(0);
  for (int n = SERIES_TERMS; n > 0; --n) {
    const vreal inverse = 1 / (alpha + (real)n), factor = g * inverse;
    slope = factor * fma_(-inverse, total, slope);
    total = fma_(factor, total, splat(1));
  }
  return -fma_(total, gap, slope);
}

/* With h the fraction: alpha (h (log g - psi(alpha)) + dh/dalpha). */
PM_APART vreal slope_high(vreal alpha, vreal g, vreal gap) {
  vreal h = splat(0), slope = splat(0);
  for (int n = FRACTION_TERMS; n > 0; --n) {
    const vreal factor = (real)n * ((real)n - alpha);
    const vreal inverse = 1 / fma_(-factor, h, g - alpha + (real)(2 * n - 1));
    slope = inverse * inverse * fma_(splat((real)-n), h, fma_(factor, slope, splat(1)));
    h = inverse;
  }
  return fma_(alpha, fma_(h, gap, slope), h);
}

/* alpha D at log g = log(1 + alpha) + delta, s = 1/(1 + alpha); alpha > 0, all finite. */
PM_ALWAYS_INLINE vreal scaled_slope(vreal alpha, vreal s, vreal g, vreal delta) {
  const vmask low = (vmask)(delta < PM_SLOPE_LOWEST), high = (vmask)(delta > PM_SLOPE_HIGHEST);
  vreal y = slope_central(s, max_(min_(delta, splat(PM_SLOPE_HIGHEST)), splat(PM_SLOPE_LOWEST)));
  if (any(low | high)) {
    const vreal gap = delta - polynomial(digamma_excess, PM_COUNT(digamma_excess), s);
    if (any(low)) y = select_(low, slope_low(alpha, g, gap), y);
    if (any(high)) y = select_(high, slope_high(alpha, g, gap), y);
  }
  return y;
}

/* D from log g; 0 for alpha = 0 (and log g = -inf), NaN where there is no law. */
PM_ALWAYS_INLINE vreal log_gamma_slope(vreal alpha, vreal log_g) {
  const vmask proper = (vmask)(alpha > 0) & (vmask)(alpha <= PM_LARGEST) & (vmask)(abs_(log_g) <= PM_LARGEST);
  const vreal a = select_(proper, alpha, splat(1)), y = select_(proper, log_g, splat(0));
  const vreal g = exp_(min_(y, splat(PM_LARGEST_LOG)));
  const vreal slope = scaled_slope(a, 1 / (1 + a), g, y - log1p_(a)) / a;
  const vmask nothing = (vmask)(alpha == 0) & (vmask)(log_g == -(real)INFINITY);
  return select_(proper, slope, select_(nothing, splat(0), splat((real)NAN)));
}

/* dg/dalpha = g D from g. delta is taken from the quotient, which keeps its digits where alpha is large. Values below
 * the normal range count as 0. */
PM_ALWAYS_INLINE vreal standard_gamma_slope(vreal alpha, vreal g) {
  const vmask proper = (vmask)(alpha > 0) & (vmask)(alpha <= PM_LARGEST) & (vmask)(g <= PM_LARGEST);
  const vmask usable = proper & (vmask)(g >= PM_REAL_TINY);
  const vreal a = select_(usable, alpha, splat(1)), x = select_(usable, g, splat(1)), s = 1 / (1 + a);
  const vreal quotient = max_(x / (1 + a), splat(PM_REAL_TINY));
  const vreal slope = x * (scaled_slope(a, s, x, log_(quotient)) / a);
  const vmask nothing = (proper | (vmask)(alpha == 0)) & (vmask)(g >= 0) & (vmask)(g < PM_REAL_TINY);
  return select_(usable, slope, select_(nothing, splat(0), splat((real)NAN)));
}

#if PM_REAL_BITS == 64
/* log(theta) for any theta: -inf at 0, NaN below, right below the normal range too. */
PM_ALWAYS_INLINE vreal log_of_value(vreal x) {
  const vmask tiny = (vmask)(x < PM_REAL_TINY), positive = (vmask)(x > 0) & (vmask)(x <= PM_LARGEST);
  const vreal scaled = select_(tiny, x * 0x1p54, x);
  const vreal y = log_(select_(positive, scaled, splat(1))) - select_(tiny, splat(0x1.2b708872320e2p5), splat(0));
  const vreal edge = select_((vmask)(x == 0), splat(-(real)INFINITY), select_((vmask)(x > 0), x, splat((real)NAN)));
  return select_(positive, y, edge);
}
#endif

/* ---- gates ------------------------------------------------------------------------------------------------------ */

#if PM_REAL_BITS == 64
#define PM_LARGEST_GATE 1e30 /* bound of (gate logit + noise) / tau: the gate is 0 or 1 long before */

/* Standard logistic noise, the difference of two Gumbel variates. */
PM_ALWAYS_INLINE vreal logistic_noise(const element_counter *at, uint32_t column) {
  vword words[4];
  element_words(at, column, words);
  return log_(exponential(words[1])) - log_(exponential(words[0]));
}

/* A relaxed gate: z, 1 - z, log z; where it may move, and its logit is not at a bound. */
typedef struct gate {
  vreal open, closed, log_open;
  vmask moves;
} gate;

PM_ALWAYS_INLINE gate relaxed_gate(vreal ell, vreal noise, real temperature) {
  const vmask masked = (vmask)(ell == -(real)INFINITY);
  const vreal logit = (select_(masked, splat(0), ell) + noise) / temperature;
  const vreal y = max_(min_(logit, splat(PM_LARGEST_GATE)), splat(-PM_LARGEST_GATE));
  const vreal e = exp_(-abs_(y)), likely = 1 / (1 + e), unlikely = e * likely;
  const vmask positive = (vmask)(y >= 0);
  gate at;
  at.open = select_(masked, splat(0), select_(positive, likely, unlikely));
  at.closed = select_(masked, splat(1), select_(positive, unlikely, likely));
  at.log_open = select_(masked, splat(-(real)INFINITY), min_(y, splat(0)) - log1p_(e));
  at.moves = not_(masked) & (vmask)(abs_(logit) <= PM_LARGEST_GATE);
  return at;
}
#endif
