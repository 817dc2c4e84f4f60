/* Gamma variates and their derivative on rows; ../gamma_numerics.h says how. */
#ifndef PM_ROWS_GAMMA_H
#define PM_ROWS_GAMMA_H

#include "../kernels.h"
#include "philox.h"
#include "transfer.h"

/* Out of line, rarely needed in a block of rows. */
#define PM_APART static __attribute__((noinline))
PM_ALWAYS_INLINE vmask not_(vmask mask) { return ~mask; }
#include "../gamma_numerics.h"

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

/* dg/dalpha. */
PM_ALWAYS_INLINE vreal standard_gamma_grad_at(vreal alpha, vreal g, vreal grad) {
  (void)grad;
  return standard_gamma_slope(alpha, g);
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
enum { LAW_VECTORS = 12 };
static size_t law_bytes(int64_t E) { return (size_t)(LAW_VECTORS * pitch(E) + 1) * sizeof(vreal); }

PM_ALWAYS_INLINE vreal *aligned_vectors(void *scratch) {
  return (vreal *)(((uintptr_t)scratch + sizeof(vreal) - 1) & ~(uintptr_t)(sizeof(vreal) - 1));
}

/* The first `rows` lanes, for store_rows. */
PM_ALWAYS_INLINE unsigned rows_mask(int64_t rows) { return (1u << rows) - 1; }

/* Elements whose first attempt was refused, waiting for company. */
enum { POOL = 4 * LANES };
typedef struct gamma_pool {
  real alpha[POOL], boost[POOL];
  uint32_t column[POOL];
  int lane[POOL], count;
} gamma_pool;

/* Draws for the last LANES that wait, or all that do, each with its own counter. */
static void retry_pool(gamma_pool *pool, const element_counter *at, vreal *x) {
  const int first = pool->count > LANES ? pool->count - LANES : 0;
  element_counter counter = *at;
  vword column = {0};
  vreal alpha = splat(1), boost = splat(0);
  for (int l = 0; l < WORDS; ++l) {
    const int n = first + l % LANES < pool->count ? first + l % LANES : first;
    column[l] = pool->column[n];
    counter.row_low[l] = at->row_low[pool->lane[n]];
    counter.row_high[l] = at->row_high[pool->lane[n]];
    alpha[l % LANES] = pool->alpha[n];
    boost[l % LANES] = pool->boost[n];
  }
  counter.column = column;
  const gamma_shape shape = gamma_shape_of(alpha);
  const vreal drawn = log_gamma_from(alpha, &shape, retry_gamma(&shape, &counter, 0, 1, ~(vmask){0}, splat(0)), boost);
  for (int n = first; n < pool->count; ++n) x[pool->column[n]][pool->lane[n]] = drawn[n - first];
  pool->count = first;
}

/* Concentrations become draws of log g. A first attempt is accepted with a probability of 0.95 or a little more, so
 * that most vectors of 16 lanes have one to be tried again: these are gathered, and tried together. */
static void draw_log_gamma(vreal *x, int64_t E, int64_t rows, const element_counter *at) {
  gamma_pool pool;
  pool.count = 0;
  for (int64_t i = 0; i < E; ++i) {
    const vreal alpha = x[i];
    const gamma_shape shape = gamma_shape_of(alpha);
    vreal log_root, boost;
    const vmask pending = begin_gamma(alpha, &shape, at, (uint32_t)i, &log_root, &boost);
    x[i] = log_gamma_from(alpha, &shape, log_root, boost);
    for (unsigned left = lanes_of(pending) & rows_mask(rows); left; left &= left - 1) {
      const int l = __builtin_ctz(left), n = pool.count++;
      pool.alpha[n] = alpha[l], pool.boost[n] = boost[l];
      pool.column[n] = (uint32_t)i, pool.lane[n] = l;
    }
    while (pool.count > POOL - LANES) retry_pool(&pool, at, x);
  }
  while (pool.count > 0) retry_pool(&pool, at, x);
}

static pm_status log_gamma_sample_rows(const pm_law_job *job) {
  const int64_t E = job->shape.experts;
  const source in = {job->concentration, job->shape.stride, job->is_double};
  vreal *x = aligned_vectors(job->scratch);
  for (int64_t row = 0; row < job->shape.rows; row += LANES) {
    const int64_t rows = job->shape.rows - row < LANES ? job->shape.rows - row : LANES;
    const element_counter at = counter_of(job->seed, (uint64_t)(job->shape.first_row + row), rows, PM_DRAW_GAMMA);
    load_rows(&in, row, rows, E, x);
    draw_log_gamma(x, E, rows, &at);
    store_rows(x, rows_mask(rows), row, E, job->out, job->is_double);
  }
  return PM_OK;
}

#endif
