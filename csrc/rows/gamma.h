/* Gamma variates in log space, and the derivative of their logarithm by alpha at a fixed quantile.
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
#ifndef PM_ROWS_GAMMA_H
#define PM_ROWS_GAMMA_H

#include "../kernels.h"
#include "../philox.h"
#include "simd.h"
#include "transfer.h"

#if PM_REAL_BITS == 32
enum { SERIES_TERMS = 10, FRACTION_TERMS = 8 };
#define PM_LARGEST ((real)0x1.fffffep127f)
#define PM_LARGEST_LOG ((real)88)
#else
enum { SERIES_TERMS = 17, FRACTION_TERMS = 18 };
#define PM_LARGEST ((real)0x1.fffffffffffffp1023)
#define PM_LARGEST_LOG ((real)709)
#endif
enum { ATTEMPTS = 64 }; /* then the last one is taken: each fails with a probability below 0.05 */

/* ---- random words and variates ------------------------------------------------------------------------------- */

/* The counters of a block of rows, and a key. In double precision the upper half of the words are the low parts. */
typedef struct element_counter {
  vword row_low, row_high, purpose;
  uint64_t seed;
} element_counter;

PM_ALWAYS_INLINE element_counter counter_of(uint64_t seed, uint64_t row, int64_t rows, uint32_t purpose) {
  vword low = {0}, high = {0}, use = {0};
  for (int l = 0; l < WORDS; ++l) {
    const int64_t lane = l % LANES;
    const uint64_t number = row + (uint64_t)(lane < rows ? lane : rows - 1);
    low[l] = (uint32_t)number;
    high[l] = (uint32_t)(number >> 32);
    use[l] = purpose + (uint32_t)(l / LANES);
  }
  return (element_counter){low, high, use, seed};
}

PM_ALWAYS_INLINE void element_words(const element_counter *at, uint32_t element, vword words[4]) {
  vword c0 = (vword){0} + element, c1 = at->row_low, c2 = at->row_high, c3 = at->purpose;
  uint32_t key0 = (uint32_t)at->seed, key1 = (uint32_t)(at->seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < PM_PHILOX_ROUNDS; ++round) {
    vword high0, low0, high1, low1;
    multiply_words(c0, PM_PHILOX_M0, &high0, &low0);
    multiply_words(c2, PM_PHILOX_M1, &high1, &low1);
    c0 = high1 ^ c1 ^ key0;
    c1 = low1;
    c2 = high0 ^ c3 ^ key1;
    c3 = low0;
    key0 += PM_PHILOX_W0;
    key1 += PM_PHILOX_W1;
  }
  words[0] = c0, words[1] = c1, words[2] = c2, words[3] = c3;
}

#if PM_REAL_BITS == 64
/* 1 + n / 2^52, n from the leading 52 bits. */
PM_ALWAYS_INLINE vreal one_to_two(vword word) {
  typedef uint32_t half __attribute__((vector_size(PM_VECTOR_BYTES / 2)));
  half high, low;
  memcpy(&high, &word, sizeof high);
  memcpy(&low, (const char *)&word + sizeof high, sizeof low);
  const vpattern n = (__builtin_convertvector(high, vpattern) << 20) | (__builtin_convertvector(low, vpattern) >> 12);
  return (vreal)(n | 0x3ff0000000000000u);
}
#endif

/* An exponential variate -log U with neither end of (0, 1) cut short: U = (n + 1/2) / 2^31 or / 2^52. In single
 * precision the complement is converted apart, and counts where U is near 1. */
PM_ALWAYS_INLINE vreal exponential(vword word) {
#if PM_REAL_BITS == 32
  const vmask n = (vmask)(word >> 1);
  const vreal u = (__builtin_convertvector(n, vreal) + 0.5f) * 0x1p-31f;
  const vreal complement = (__builtin_convertvector(0x7fffffff - n, vreal) + 0.5f) * 0x1p-31f;
  return -log_near_one(u, -complement);
#else
  return -log_(one_to_two(word) - (1 - 0x1p-53));
#endif
}

/* sqrt(2 radius) cos(2 pi V), V from 32 or 52 bits (Box & Muller 1958). */
PM_ALWAYS_INLINE vreal normal(vreal radius, vword word) {
#if PM_REAL_BITS == 32
  const vreal centred = __builtin_convertvector((vmask)(word ^ 0x80000000u), vreal) * 0x1p-32f;
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
  for (uint32_t attempt = 0; attempt < ATTEMPTS && any(pending); ++attempt) {
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
    pending &= ~accepted;
  }
  const vreal drawn = fma_(splat(3), log_root, log_(d)) - select_(boosted, boost, splat(0));
  const vreal nothing = select_((vmask)(alpha == 0), splat(-(real)INFINITY), splat((real)NAN));
  return select_(proper, max_(drawn, splat(-PM_LARGEST)), nothing);
}

/* ---- derivative ---------------------------------------------------------------------------------------------- */

/* s = 1/(1 + alpha) and log(1 + alpha). */
typedef struct shape_terms {
  vreal s, log_shift;
} shape_terms;

PM_ALWAYS_INLINE shape_terms terms_of(vreal alpha) { return (shape_terms){1 / (1 + alpha), log1p_(alpha)}; }

PM_ALWAYS_INLINE vreal slope_central(vreal s, vreal delta) {
  const real half = (PM_SLOPE_HIGHEST - PM_SLOPE_LOWEST) / 2, middle = (PM_SLOPE_HIGHEST + PM_SLOPE_LOWEST) / 2;
  const vreal u = fma_(splat(2), s, splat(-1)), v = (delta - middle) * (1 / half);
  vreal y = splat(0);
#pragma GCC unroll 24
  for (int i = SLOPE_ROWS - 1; i >= 0; --i) {
    vreal row = splat(slope_table[i][slope_lengths[i] - 1]);
#pragma GCC unroll 24
    for (int j = slope_lengths[i] - 2; j >= 0; --j) row = fma_(row, v, splat(slope_table[i][j]));
    y = i == SLOPE_ROWS - 1 ? row : fma_(y, u, row);
  }
  return y;
}

/* With R_n = 1 + g/(alpha + n) R_{n+1}: -(R_1 (log g - psi(1 + alpha)) + dR_1/dalpha). */
static __attribute__((noinline)) vreal slope_low(vreal alpha, vreal g, vreal gap) {
  vreal total = splat(1), slope = splat(0);
  for (int n = SERIES_TERMS; n > 0; --n) {
    const vreal inverse = 1 / (alpha + (real)n), factor = g * inverse;
    slope = factor * fma_(-inverse, total, slope);
    total = fma_(factor, total, splat(1));
  }
  return -fma_(total, gap, slope);
}

/* With h the fraction: alpha (h (log g - psi(alpha)) + dh/dalpha). */
static __attribute__((noinline)) vreal slope_high(vreal alpha, vreal g, vreal gap) {
  vreal h = splat(0), slope = splat(0);
  for (int n = FRACTION_TERMS; n > 0; --n) {
    const vreal factor = (real)n * ((real)n - alpha);
    const vreal inverse = 1 / (g - alpha + (real)(2 * n - 1) - factor * h);
    slope = inverse * inverse * (1 + factor * slope - (real)n * h);
    h = inverse;
  }
  return fma_(alpha, fma_(h, gap, slope), h);
}

/* alpha D at log g = log(1 + alpha) + delta; alpha > 0, all finite. */
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
  const shape_terms terms = terms_of(a);
  const vreal g = exp_(min_(y, splat(PM_LARGEST_LOG)));
  const vreal slope = scaled_slope(a, terms.s, g, y - terms.log_shift) / a;
  const vmask nothing = (vmask)(alpha == 0) & (vmask)(log_g == -(real)INFINITY);
  return select_(proper, slope, select_(nothing, splat(0), splat((real)NAN)));
}

/* ---- elements in a row --------------------------------------------------------------------------------------- */

/* LANES elements at `at` of a dense array of `count`, the last repeated. */
PM_ALWAYS_INLINE vreal load_elements(const void *from, int is_double, int64_t at, int64_t count) {
  if (is_double == (PM_REAL_BITS == 64) && at + LANES <= count) {
    vreal whole;
    memcpy(&whole, (const real *)from + at, sizeof whole);
    return whole;
  }
  const source in = {from, 0, is_double};
  vreal x = {0};
  for (int l = 0; l < LANES; ++l) x[l] = read_(&in, 0, at + l < count ? at + l : count - 1);
  return x;
}

PM_ALWAYS_INLINE void store_elements(void *to, int is_double, int64_t at, int64_t count, vreal x) {
  if (is_double == (PM_REAL_BITS == 64) && at + LANES <= count) {
    memcpy((real *)to + at, &x, sizeof x);
    return;
  }
  for (int l = 0; l < LANES && at + l < count; ++l) write_(to, is_double, at + l, x[l]);
}

/* dg/dalpha. delta is taken from the quotient, which keeps its digits where alpha is large. Values below the normal
 * range count as 0. */
PM_ALWAYS_INLINE vreal standard_gamma_grad_at(vreal alpha, vreal g, vreal grad) {
  (void)grad;
  const vmask proper = (vmask)(alpha > 0) & (vmask)(alpha <= PM_LARGEST) & (vmask)(g <= PM_LARGEST);
  const vmask usable = proper & (vmask)(g >= PM_REAL_TINY);
  const vreal a = select_(usable, alpha, splat(1)), x = select_(usable, g, splat(1)), s = 1 / (1 + a);
  const vreal quotient = max_(x / (1 + a), splat(PM_REAL_TINY));
  const vreal slope = x * (scaled_slope(a, s, x, log_(quotient)) / a);
  const vmask nothing = (proper | (vmask)(alpha == 0)) & (vmask)(g >= 0) & (vmask)(g < PM_REAL_TINY);
  return select_(usable, slope, select_(nothing, splat(0), splat((real)NAN)));
}

/* The gradient of a draw of log g: grad D. */
PM_ALWAYS_INLINE vreal log_gamma_backward_at(vreal alpha, vreal log_g, vreal grad) {
  return grad * log_gamma_slope(alpha, log_g);
}

/* Element by element, without regard to rows where all inputs are dense. */
#define PM_ELEMENT_KERNEL(name)                                                                             \
  static pm_status name##_elements(const pm_law_job *job) {                                                 \
    const int64_t E = job->shape.experts, stride = job->shape.stride;                                       \
    const int64_t rows = stride == E ? job->shape.rows > 0 : job->shape.rows;                               \
    const int64_t count = stride == E ? job->shape.rows * E : E;                                            \
    const size_t bytes = job->is_double ? sizeof(double) : sizeof(float);                                   \
    for (int64_t row = 0; row < rows; ++row) {                                                              \
      const char *concentration = (const char *)job->concentration + (size_t)(row * stride) * bytes;        \
      const size_t dense = (size_t)(row * E) * bytes;                                                       \
      for (int64_t at = 0; at < count; at += LANES) {                                                       \
        const vreal alpha = load_elements(concentration, job->is_double, at, count);                        \
        const vreal other = load_elements((const char *)job->other + dense, job->is_double, at, count);     \
        vreal grad = splat(1);                                                                              \
        if (job->grad) grad = load_elements((const char *)job->grad + dense, job->is_double, at, count);    \
        store_elements((char *)job->out + dense, job->is_double, at, count, name##_at(alpha, other, grad)); \
      }                                                                                                     \
    }                                                                                                       \
    return PM_OK;                                                                                           \
  }

PM_ELEMENT_KERNEL(standard_gamma_grad)
PM_ELEMENT_KERNEL(log_gamma_backward)

/* The scratch of the family: at most LAW_VECTORS vectors an expert. */
enum { LAW_VECTORS = 9 };
static size_t law_bytes(int64_t E) { return (size_t)(LAW_VECTORS * E + 1) * sizeof(vreal); }

PM_ALWAYS_INLINE vreal *aligned_vectors(void *scratch) {
  return (vreal *)(((uintptr_t)scratch + sizeof(vreal) - 1) & ~(uintptr_t)(sizeof(vreal) - 1));
}

/* The first `rows` lanes, for store_rows. */
PM_ALWAYS_INLINE unsigned rows_mask(int64_t rows) { return (1u << rows) - 1; }

static pm_status log_gamma_sample_rows(const pm_law_job *job) {
  const int64_t E = job->shape.experts;
  const source in = {job->concentration, job->shape.stride, job->is_double};
  vreal *x = aligned_vectors(job->scratch);
  for (int64_t row = 0; row < job->shape.rows; row += LANES) {
    const int64_t rows = job->shape.rows - row < LANES ? job->shape.rows - row : LANES;
    const element_counter at = counter_of(job->seed, (uint64_t)(job->shape.first_row + row), rows, PM_DRAW_GAMMA);
    load_rows(&in, row, rows, E, x);
    for (int64_t i = 0; i < E; ++i) x[i] = draw_log_gamma(x[i], &at, (uint32_t)i);
    store_rows(x, rows_mask(rows), row, E, job->out, job->is_double);
  }
  return PM_OK;
}

#endif
