/* Gamma variates in log space, and the derivative of their logarithm by alpha at a fixed quantile; with them what the
 * Dirichlet law and DirMoE's gates and divergence add. One source for the C core and the CUDA kernels, written as
 * numerics.h is, on vword, a random word a lane (two in double precision); element_counter; element_words(counter,
 * first word, words); leading_bits(vword); not_(mask), any(mask), min_ and sqrt_. A branch on any(...) concerns all
 * rows of a vector in C, and the thread's own number on a GPU. No guard: see precision.h.
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

/* d = shape - 1/3 and c = 1 / sqrt(9 d) of Marsaglia and Tsang, at the shape alpha or, below 1, alpha + 1. */
typedef struct gamma_shape {
  vmask proper, boosted; /* is there a law; does a boost follow */
  vreal d, c;
} gamma_shape;

PM_ALWAYS_INLINE gamma_shape gamma_shape_of(vreal alpha) {
  gamma_shape at;
  at.proper = (vmask)(alpha > 0) & (vmask)(alpha <= PM_LARGEST);
  at.boosted = (vmask)(alpha < 1);
  at.d = select_(at.proper, select_(at.boosted, alpha + 1, alpha), splat(1)) - (real)(1.0 / 3);
  at.c = 1 / sqrt_(9 * at.d);
  return at;
}

/* One attempt: log(1 + c x), whether 1 + c x is above 0, and whether it is accepted. */
typedef struct gamma_attempt {
  vreal log_root;
  vmask inside, accepted;
} gamma_attempt;

PM_ALWAYS_INLINE gamma_attempt attempt_gamma(const gamma_shape *at, const vword *words) {
  const vreal t = at->c * normal(exponential(words[0]), words[1]);
  gamma_attempt made;
  made.inside = (vmask)(t > -1 + PM_REAL_HALF_ULP);
  made.log_root = log1p_(select_(made.inside, t, splat(0)));
  /* x^2/2 = 4.5 d t^2, so that nothing large cancels. */
  const vreal bound = at->d * fma_(splat(3), made.log_root - t, t * t * ((real)1.5 - t));
  made.accepted = made.inside & (vmask)(-exponential(words[2]) < bound);
  return made;
}

/* log g from the accepted attempt. alpha = 0 gives -inf; negative, infinite and NaN alphas give NaN. */
PM_ALWAYS_INLINE vreal log_gamma_from(vreal alpha, const gamma_shape *at, vreal log_root, vreal boost) {
  const vreal drawn = fma_(splat(3), log_root, log_(at->d)) - select_(at->boosted, boost, splat(0));
  const vreal nothing = select_((vmask)(alpha == 0), splat(-(real)INFINITY), splat((real)NAN));
  return select_(at->proper, max_(drawn, splat(-PM_LARGEST)), nothing);
}

/* Further attempts for the lanes that are pending, from `attempt` on. */
PM_ALWAYS_INLINE vreal retry_gamma(const gamma_shape *at, const element_counter *counter, uint32_t column,
                                   uint32_t attempt, vmask pending, vreal log_root) {
  for (; attempt < PM_GAMMA_ATTEMPTS && any(pending); ++attempt) {
    vword words[4];
    element_words(counter, attempt * PM_MAX_EXPERTS + column, words);
    const gamma_attempt made = attempt_gamma(at, words);
    log_root = select_(pending & made.inside, made.log_root, log_root);
    pending = pending & not_(made.accepted);
  }
  return log_root;
}

/* The first attempt, log(1 + c x) and the boost, for every lane of one column; returns the lanes that are pending. */
PM_ALWAYS_INLINE vmask begin_gamma(vreal alpha, const gamma_shape *at, const element_counter *counter, uint32_t column,
                                   vreal *log_root, vreal *boost) {
  vword words[4];
  element_words(counter, column, words);
  *boost = splat(0);
  if (any(at->boosted & at->proper)) *boost = exponential(words[3]) / alpha;
  const gamma_attempt made = attempt_gamma(at, words);
  *log_root = select_(made.inside, made.log_root, splat(0));
  return at->proper & not_(made.accepted);
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

/* ---- DirMoE's gates and divergence ------------------------------------------------------------------------------ */

#undef PM_LEAST_CONCENTRATION
#undef PM_MOST_CONCENTRATION
#undef PM_MOST_SUM
#if PM_REAL_BITS == 32
#define PM_LEAST_CONCENTRATION 0x1p-40f
#define PM_MOST_CONCENTRATION 0x1p40f
#define PM_MOST_SUM 0x1p42f
#else
#define PM_LEAST_CONCENTRATION 0x1p-300
#define PM_MOST_CONCENTRATION 0x1p300
#define PM_MOST_SUM 0x1p316
#endif
#define PM_LARGEST_GATE ((real)1e30) /* bound of a gate's logit: it is 0 or 1 long before */

/* A relaxed gate: z, 1 - z, log z; where it may move, and its logit is not at a bound. */
typedef struct gate {
  vreal open, closed, log_open;
  vmask moves;
} gate;

PM_ALWAYS_INLINE gate relaxed_gate(vreal ell, vreal noise, real inverse_temperature) {
  const vmask masked = (vmask)(ell == -(real)INFINITY);
  const vreal logit = (select_(masked, splat(0), ell) + noise) * inverse_temperature;
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

/* A concentration between those of open and closed gates, held where the divergence's products stay in range. */
PM_ALWAYS_INLINE vreal mixed(vreal open, vreal closed, real scale, vreal hi, vreal lo) {
  const vreal x = scale * fma_(open, hi, closed * lo);
  return max_(min_(x, splat(PM_MOST_CONCENTRATION)), splat(PM_LEAST_CONCENTRATION));
}

/* KL(Dir(q) || Dir(p)) = sum of B(p_i, q_i, d_i) - B(P, Q, D), with d = p - q and P, Q, D the sums, and
 *
 *     B = log Gamma(p) - log Gamma(q) - psi(q) d >= 0,
 *
 * the Bregman divergence of log Gamma. By Stirling's series at x + 2, with S and R its remainders for log Gamma and
 * psi,
 *
 *     B = (p + 3/2) log((p+2) / (q+2)) - d (1 + R(q+2)) + S(p+2) - S(q+2)
 *         + d/q + d/(q+1) - log(p (p+1) / (q (q+1))),
 *
 * logarithms of 1 and something small where d is. The error is some ulps of |d| (1 + 1/q), and of S <= 1/24: nothing of
 * the size of log Gamma is rounded. */
typedef struct shifted {
  vreal reciprocal, next, third; /* 1/x, 1/(x+1), 1/(x+2): of one division */
} shifted;

PM_ALWAYS_INLINE shifted shifted_of(vreal x) {
  const vreal second = x + 1, third = x + 2, pair = x * second, inverse = 1 / (pair * third);
  return (shifted){second * third * inverse, x * third * inverse, pair * inverse};
}

PM_ALWAYS_INLINE vreal bregman(vreal p, vreal q, vreal d) {
  const vreal s = shifted_of(p).third; /* as q's, to the bit where they agree */
  const shifted at = shifted_of(q);
  const vreal t = d * at.reciprocal, next = d * at.next, linear = t + next;
  const vreal ratio = (p * (p + 1)) * (at.reciprocal * at.next);
  const vreal low = linear - log_near_one(ratio, fma_(t, next, linear));
  const vreal high = log_near_one((p + 2) * at.third, d * at.third);
  const vreal slope = 1 + polynomial(stirling_digamma, PM_COUNT(stirling_digamma), at.third);
  const vreal rest = polynomial(stirling_log_gamma, PM_COUNT(stirling_log_gamma), s) -
                     polynomial(stirling_log_gamma, PM_COUNT(stirling_log_gamma), at.third);
  return fma_(p + (real)1.5, high, -(d * slope)) + rest + low;
}

/* B's derivatives: by p, psi(p) - psi(q), and by q, -psi'(q) d. */
typedef struct bregman_slopes {
  vreal by_p, by_q;
} bregman_slopes;

PM_ALWAYS_INLINE bregman_slopes bregman_slopes_at(vreal p, vreal q, vreal d) {
  const shifted low = shifted_of(q), high = shifted_of(p);
  const vreal squares = fma_(low.next, low.next, low.reciprocal * low.reciprocal);
  const vreal poles = fma_(low.next, high.next, low.reciprocal * high.reciprocal);
  const vreal rest = polynomial(stirling_digamma, PM_COUNT(stirling_digamma), high.third) -
                     polynomial(stirling_digamma, PM_COUNT(stirling_digamma), low.third);
  const vreal tail = polynomial(stirling_trigamma, PM_COUNT(stirling_trigamma), low.third);
  const vreal trigamma = fma_(low.third * low.third, tail, low.third) + squares;
  bregman_slopes at;
  at.by_p = fma_(d, poles, log_near_one((p + 2) * low.third, d * low.third)) + rest;
  at.by_q = -(d * trigamma);
  return at;
}
