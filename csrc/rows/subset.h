/* Row kernels of the subset family: one prefix pass, and for what needs every expert one adjoint pass back. */
#ifndef PM_ROWS_SUBSET_H
#define PM_ROWS_SUBSET_H

#include "tilt.h"

/* Back over the experts of a segment, for the columns done+1 .. done+columns of B, leaving in v[i] the unscaled
 *   value:    w_i sum_j A_{i-1}[j] B_{i+1}[j+1]                                         (marginals)
 *   tangent:  w_i sum_j A_{i-1}[j] (dB_{i+1}[j+1] + v_i B_{i+1}[j+1]) + dA_{i-1}[j] B_{i+1}[j+1]   (covariance)
 * `adjoint` holds B_{end+1}, and with a tangent dB_{end+1}, on entry, and the same of `begin` on return. The chunks of
 * columns are taken from the highest down; `relay` carries to the next the column above it, and the sums. */
PM_ALWAYS_INLINE void adjoint_columns(const block *k, int64_t begin, int64_t experts, int done, int columns, int plain,
                                      int tangent) {
  const int64_t cells = (int64_t)(k->b + 1) * (tangent ? 2 : 1), beside = k->b + 1;
  const int highest = done + columns == k->b, lowest = done == 0;
  vreal *state = k->adjoint + done + 1;
  vreal *relayed_sum = k->relay, *relayed_B = k->relay + k->E, *relayed_inner = k->relay + 2 * k->E;
  vreal B[PM_CHUNK], dB[PM_CHUNK];
#pragma GCC unroll 8
  for (int c = 0; c < columns; ++c) {
    B[c] = state[c];
    if (tangent) dB[c] = state[beside + c];
  }
  const vreal *A = k->table + experts * cells + done, *dA = A + beside;
  for (int64_t i = begin + experts - 1; i >= begin; --i) {
    A -= cells, dA -= cells;
    const vreal w = k->w[i], q = plain ? w : k->q[i], v = tangent ? k->v[i] : w;
    vreal even = highest ? splat(0) : relayed_sum[i], odd = splat(0), lower = B[0], inner = splat(0);
    /* From below: column c is done with when c - 1 has taken from it. */
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) {
      vreal *sum = c & 1 ? &odd : &even;
      const int one = plain && lowest && c == 0; /* A[0] is 1, and dA[0] is 0 */
      const vreal this_inner = tangent ? fma_(v, B[c], dB[c]) : B[c];
      *sum = one ? *sum + this_inner : fma_(A[c], this_inner, *sum);
      if (tangent && !one) *sum = fma_(dA[c], B[c], *sum);
      if (c == 0) inner = this_inner;
      if (c > 0) {
        if (tangent) dB[c - 1] = fma_(w, this_inner, plain ? dB[c - 1] : q * dB[c - 1]);
        B[c - 1] = fma_(w, B[c], plain ? B[c - 1] : q * B[c - 1]);
      }
    }
    const int top = columns - 1;
    if (!plain) {
      B[top] = q * B[top];
      if (tangent) dB[top] = q * dB[top];
    }
    if (!highest) {
      if (tangent) dB[top] = fma_(w, relayed_inner[i], dB[top]);
      B[top] = fma_(w, relayed_B[i], B[top]);
    }
    if (lowest) {
      k->v[i] = w * (even + odd);
    } else {
      relayed_sum[i] = even + odd;
      relayed_B[i] = lower;
      if (tangent) relayed_inner[i] = inner;
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < columns; ++c) {
    state[c] = B[c];
    if (tangent) state[beside + c] = dB[c];
  }
}

#define PM_ADJOINT_FORM(name, plain, tangent)                                                  \
  static __attribute__((noinline)) void name(const block *k, int64_t begin, int64_t experts) { \
    for (int done = k->b; done > 0;) {                                                         \
      const int columns = chunk_columns(done, 0);                                              \
      done -= columns;                                                                         \
      PM_FOR_COLUMNS(columns, PM_ADJOINT_CALL_##plain##tangent)                                \
    }                                                                                          \
  }
#define PM_ADJOINT_CALL_00(n) adjoint_columns(k, begin, experts, done, n, 0, 0)
#define PM_ADJOINT_CALL_01(n) adjoint_columns(k, begin, experts, done, n, 0, 1)
#define PM_ADJOINT_CALL_10(n) adjoint_columns(k, begin, experts, done, n, 1, 0)
#define PM_ADJOINT_CALL_11(n) adjoint_columns(k, begin, experts, done, n, 1, 1)

PM_ADJOINT_FORM(adjoint_general, 0, 0)
PM_ADJOINT_FORM(adjoint_general_tangent, 0, 1)
PM_ADJOINT_FORM(adjoint_plain, 1, 0)
PM_ADJOINT_FORM(adjoint_plain_tangent, 1, 1)

PM_ALWAYS_INLINE void adjoint_all(block *k, int plain, int tangent) {
  if (k->b == 0) /* no column to go over */
    for (int64_t i = 0; i < k->E; ++i) k->v[i] = splat(0);
  for (int64_t s = k->segments - 1; s >= 0; --s) {
    prefix_segment(k, s, plain, tangent);
    PM_FORM(adjoint, plain, tangent)(k, s * k->segment, segment_experts(k, s));
  }
}

/* ---- marginals ---------------------------------------------------------------------------------------------- */

PM_ALWAYS_INLINE void marginals_body(const pm_job *job, block *k, int64_t row, int64_t rows, vmask wanted, int plain) {
  (void)rows;
  prefix_all(k, plain, 0);
  memcpy(k->adjoint, k->sizes, (size_t)(k->b + 1) * sizeof(vreal));
  adjoint_all(k, plain, 0);
  for (int64_t i = 0; i < k->E; ++i) k->v[i] *= k->inverse_total;
  store_rows(k->v, lanes_of(wanted), row, k->E, job->out, job->is_double);
}

PM_ROW_KERNEL(marginals, 1, 0)

/* ---- covariance-vector product ------------------------------------------------------------------------------ */

/* B and dB after the last expert, from the state there. The tangent of 1 / Z is folded in: dB starts from -(dZ/Z) times
 * the sizes. */
PM_ALWAYS_INLINE void begin_adjoint(block *k, const vreal *end) {
  const int b = k->b;
  vreal slope = splat(0);
  for (int j = k->a; j <= b; ++j) slope = fma_(k->sizes[j], end[b + 1 + j], slope);
  slope /= k->total;
  for (int j = 0; j <= b; ++j) {
    k->adjoint[j] = k->sizes[j];
    k->adjoint[b + 1 + j] = -slope * k->sizes[j];
  }
}

/* C times `direction` into v, but for the factor inverse_total. For exact k, C 1 = 0: the direction is centred first,
 * which keeps the tangents small and with them the rounding. `direction` may be v. */
PM_ALWAYS_INLINE void multiply_covariance(block *k, const vreal *direction, int plain) {
  const int64_t E = k->E;
  const int b = k->b;
  vreal centre = splat(0);
  if (k->a == b) {
    vreal mass = splat(0), moment = splat(0);
    for (int64_t i = 0; i < E; ++i) {
      mass += k->w[i];
      moment = fma_(k->w[i], direction[i], moment);
    }
    centre = select_((vmask)(mass > splat(0)), moment / mass, splat(0));
  }
  for (int64_t i = 0; i < E; ++i) k->v[i] = direction[i] - centre;
  prefix_all(k, plain, 1);
  begin_adjoint(k, prefix_end(k, 1));
  adjoint_all(k, plain, 1);
}

PM_ALWAYS_INLINE void covariance_body(const pm_job *job, block *k, int64_t row, int64_t rows, vmask wanted, int plain) {
  const source v = {job->vector, k->E, job->is_double};
  load_rows(&v, row, rows, k->E, k->v);
  multiply_covariance(k, k->v, plain);
  for (int64_t i = 0; i < k->E; ++i) k->v[i] *= k->inverse_total;
  store_rows(k->v, lanes_of(wanted), row, k->E, job->out, job->is_double);
}

PM_ROW_KERNEL(covariance, 2, 0)

/* ---- scalars of a row: double precision only ----------------------------------------------------------------- */
#if PM_REAL_BITS == 64

/* Log of what the factors were divided by, without the part max(x, 0) = r_i - lambda of the experts above the tilt:
 * the sum of log(1 + exp(-|x_i|)) where they are normalised, nothing where they are scaled. */
static vreal log_normaliser(const block *k) {
  vreal result = splat(0), product = splat(1);
  if (!k->normalised) return result;
  for (int64_t i = 0; i < k->E; ++i) {
    const vreal x = (k->x[i] - k->pivot) - k->offset;
    product *= splat(1) + exp_(select_((vmask)(x < splat(0)), x, -x));
    if (i % 512 == 511 || i == k->E - 1) { /* a product of 512 factors of at most 2 cannot overflow */
      for (int l = 0; l < LANES; ++l) result[l] += log(product[l]);
      product = splat(1);
    }
  }
  return result;
}

/* above + n pivot + rest, where the first two may be large and opposite: their sum's and product's rounding errors
 * are exact by Knuth's two-sum and the fused multiply-add, and go with the small rest. */
static double sum_of(double above, double n, double pivot, double rest) {
  const double product = n * pivot, product_error = fma(n, pivot, -product);
  const double sum = above + product, back = sum - above;
  const double sum_error = (above - (sum - back)) + (product - back);
  return sum + (sum_error + product_error + rest);
}

PM_ALWAYS_INLINE void log_partition_body(const pm_job *job, block *k, int64_t row, int64_t rows, vmask wanted,
                                         int plain) {
  prefix_all(k, plain, 0);
  vreal above = splat(0), lost = splat(0), count = splat(0), normaliser = splat(0);
  if (!plain) {
    /* log Z = j0 lambda + sum of (r_i - lambda) over r_i > lambda + log normaliser + log total: the logits above the
     * tilt are summed as they are (compensated, Neumaier 1974), so that nothing cancels against j0 lambda. */
    for (int64_t i = 0; i < k->E; ++i) {
      const vmask is_above = (vmask)((k->x[i] - k->pivot) - k->offset > splat(0));
      const vreal r = select_(is_above, k->x[i], splat(0)), next = above + r;
      const vmask dominant = (vmask)(max_(above, -above) >= max_(r, -r));
      lost += select_(dominant, (above - next) + r, (r - next) + above);
      above = next;
      count += select_(is_above, splat(1), splat(0));
    }
    normaliser = log_normaliser(k);
  }
  for (int l = 0; l < LANES && l < rows; ++l) {
    if (!wanted[l]) continue;
    double value = log(k->total[l]);
    if (plain)
      value += k->base_size[l] * k->lambda[l];
    else
      value = sum_of(above[l], k->base_size[l] - count[l], k->pivot[l],
                     (k->base_size[l] - count[l]) * k->offset[l] + lost[l] + normaliser[l] + value);
    write_(job->out, job->is_double, row + l, k->poison[l] ? (real)NAN : value);
  }
}

PM_ROW_KERNEL(log_partition, 1, 0)

/* P(|S| = j) of the block, into `top` (no longer needed for the pivot). */
static void size_probabilities(block *k, const vreal *end) {
  for (int j = k->a; j <= k->b; ++j) k->top[j - k->a] = k->sizes[j] * end[j] / k->total;
}

PM_ALWAYS_INLINE void cardinality_body(const pm_job *job, block *k, int64_t row, int64_t rows, vmask wanted,
                                       int plain) {
  (void)rows;
  const int64_t width = k->b - k->a + 1;
  prefix_all(k, plain, 0);
  size_probabilities(k, prefix_end(k, 0));
  for (int64_t j = 0; j < width; ++j) k->top[j] = select_(k->poison, splat((real)NAN), k->top[j]);
  store_rows(k->top, lanes_of(wanted), row, width, job->out, job->is_double);
}

PM_ROW_KERNEL(cardinality, 1, 0)

/* sum_j g_j dP(j)/dr_i = w_i sum_j A_{i-1}[j] B_{i+1}[j+1] / Z with the sizes weighed by g_j - sum_j' g_j' P(j'). */
PM_ALWAYS_INLINE void cardinality_backward_body(const pm_job *job, block *k, int64_t row, int64_t rows, vmask wanted,
                                                int plain) {
  const int64_t width = k->b - k->a + 1;
  const source grad = {job->vector, width, job->is_double};
  prefix_all(k, plain, 0);
  size_probabilities(k, prefix_end(k, 0));
  vreal *g = k->adjoint + k->a, mean = splat(0);
  load_rows(&grad, row, rows, width, g);
  for (int64_t j = 0; j < width; ++j) mean = fma_(g[j], k->top[j], mean);
  for (int64_t j = 0; j < width; ++j) g[j] = (g[j] - mean) * k->sizes[k->a + j];
  for (int64_t j = 0; j < k->a; ++j) k->adjoint[j] = splat(0);
  adjoint_all(k, plain, 0);
  for (int64_t i = 0; i < k->E; ++i) k->v[i] *= k->inverse_total;
  store_rows(k->v, lanes_of(wanted), row, k->E, job->out, job->is_double);
}

PM_ROW_KERNEL(cardinality_backward, 1, 0)

/* H = log Z - sum m_i r_i, rearranged with x_i = r_i - lambda so that no two large terms meet:
 *   sum_i [log(1 + exp(-|x_i|)) + (x_i > 0 ? P(i not in S) x_i : -P(i in S) x_i)] + log total + lambda (j0 - E|S|). */
static void entropy_general(const pm_job *job, block *k, int64_t row, int64_t rows, vmask wanted) {
  prefix_all(k, 0, 0);
  const vreal *end = prefix_end(k, 0);
  vreal drift = splat(0); /* j0 - E|S| */
  for (int j = k->a; j <= k->b; ++j)
    for (int l = 0; l < LANES; ++l) drift[l] += ((int)k->base_size[l] - j) * (k->sizes[j][l] * end[j][l] / k->total[l]);
  const vreal normaliser = log_normaliser(k);
  vreal spread = splat(0);
  vreal *B = k->adjoint;
  memcpy(B, k->sizes, (size_t)(k->b + 1) * sizeof(vreal));
  for (int64_t s = k->segments - 1; s >= 0; --s) {
    const int64_t begin = s * k->segment, stop = s + 1 == k->segments ? k->E : begin + k->segment;
    prefix_segment(k, s, 0, 0);
    for (int64_t i = stop - 1; i >= begin; --i) {
      const vreal *A = k->table + (i - begin) * (k->b + 1);
      const vreal x = (k->x[i] - k->pivot) - k->offset;
      vreal in = splat(0), out = A[k->b] * B[k->b];
      for (int j = 0; j < k->b; ++j) {
        in = fma_(A[j], B[j + 1], in);
        out = fma_(A[j], B[j], out);
        B[j] = fma_(k->w[i], B[j + 1], k->q[i] * B[j]);
      }
      B[k->b] *= k->q[i];
      const vmask positive = (vmask)(x > splat(0));
      const vreal share = select_(positive, k->q[i] * out, k->w[i] * in) / k->total, size = max_(x, -x);
      spread += select_((vmask)(share > splat(0)), share * size, splat(0)); /* 0 (-inf) = 0 */
    }
  }
  for (int l = 0; l < LANES && l < rows; ++l)
    if (wanted[l]) {
      const double value = spread[l] + normaliser[l] + log(k->total[l]) + k->lambda[l] * drift[l];
      write_(job->out, job->is_double, row + l, k->poison[l] ? (real)NAN : value);
    }
}

static pm_status entropy_rows(const pm_job *job) { return for_each_block(job, 1, 0, NULL, entropy_general); }

/* log P(S) = sum over S of r - log Z, with x_i = r_i - lambda and log Z as above:
 *   sum over S of min(x_i, 0) - sum over the others of max(x_i, 0) - log normaliser - log total + lambda (|S| - j0). */
static void log_prob_general(const pm_job *job, block *k, int64_t row, int64_t rows, vmask wanted) {
  prefix_all(k, 0, 0);
  const vreal normaliser = log_normaliser(k);
  for (int l = 0; l < LANES && l < rows; ++l) {
    if (!wanted[l]) continue;
    const int64_t *members = job->indices + (row + l) * k->b;
    int size = 0, possible = 1;
    for (int64_t i = 0; i < k->E; ++i) k->v[i][l] = 0; /* 1 on S */
    for (int j = 0; j < k->b; ++j) {
      if (members[j] >= k->E) continue;
      possible &= k->v[members[j]][l] == 0 && k->x[members[j]][l] > -INFINITY;
      k->v[members[j]][l] = 1;
      ++size;
    }
    double value = 0;
    for (int64_t i = 0; i < k->E; ++i) {
      const double x = (k->x[i][l] - k->pivot[l]) - k->offset[l];
      value += k->v[i][l] != 0 ? (x < 0 ? x : 0) : (x > 0 ? -x : 0);
    }
    value += k->lambda[l] * (size - k->base_size[l]) - normaliser[l] - log(k->total[l]);
    if (!possible || size < k->a) value = -INFINITY;
    write_(job->out, job->is_double, row + l, k->poison[l] ? (real)NAN : value);
  }
}

static pm_status log_prob_rows(const pm_job *job) { return for_each_block(job, 1, 0, NULL, log_prob_general); }

#endif
#endif
