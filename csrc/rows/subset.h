/* Row kernels of the subset family: one prefix pass, and for what needs every expert one adjoint pass back. */
#ifndef PM_ROWS_SUBSET_H
#define PM_ROWS_SUBSET_H

#include "tilt.h"

/* What a pair's two experts have in common, from the state A before it and B after it, a column at a time:
 *     one  = sum_j A[j] B[j+1]            the derivative of Z by the pair's coefficient of X,
 *     both = sum_j A[j] B[j+2]            ... of X^2,
 * and the derivatives of these along the tangent. */
typedef struct meeting {
  vreal one, both, one_slope, both_slope;
} meeting;

/* From one chunk of columns to the next: the sums so far, and the lowest columns of B before the pair changes them. */
typedef struct relayed {
  meeting sum;
  vreal B[2], dB[2];
} relayed;

/* w_i dZ/dw_i of the pair's experts, or with a tangent its derivative, w and q being constants of it. */
PM_ALWAYS_INLINE void part_pair(const block *k, int64_t i, const meeting *m, int plain, int tangent) {
  const vreal w = k->w[i], w2 = k->w[i + 1], v = k->v[i], v2 = k->v[i + 1];
  vreal one = m->one, one2 = m->one, both = m->both;
  if (tangent) {
    one = fma_(v, m->one, m->one_slope);
    one2 = fma_(v2, m->one, m->one_slope);
    both = fma_(v + v2, m->both, m->both_slope);
  }
  k->v[i] = w * fma_(w2, both, plain ? one : k->q[i + 1] * one);
  if (i + 1 < k->E) k->v[i + 1] = w2 * fma_(w, both, plain ? one2 : k->q[i] * one2);
}

/* Back over the experts of a segment, a pair at a time, for the columns done+1 .. done+columns of B, leaving the
 * unscaled results in v. `adjoint` holds B after the segment, and with a tangent dB, on entry, and before it on return.
 * The chunks of columns are taken from the highest down. */
PM_ALWAYS_INLINE void adjoint_columns(const block *k, int64_t begin, int64_t experts, int done, int columns, int plain,
                                      int tangent) {
  const int64_t cells = (int64_t)(k->b + 1) * (tangent ? 2 : 1), beside = k->b + 1;
  const int64_t pairs = states_of(experts, PAIRS);
  const int highest = done + columns == k->b, lowest = done == 0;
  const vreal zero = splat(0);
  vreal *state = k->adjoint + done + 1;
  relayed *relay = (relayed *)k->relay + begin / 2 + pairs;
  vreal B[PM_CHUNK + 2], dB[PM_CHUNK + 2];
#pragma GCC unroll 8
  for (int c = 0; c < columns; ++c) {
    B[c] = state[c];
    if (tangent) dB[c] = state[beside + c];
  }
  B[columns] = B[columns + 1] = dB[columns] = dB[columns + 1] = zero;
  const vreal *A = k->table + pairs * cells + done, *dA = A + beside;
  for (int64_t i = begin + 2 * (pairs - 1); i >= begin; i -= 2) {
    A -= cells, dA -= cells, --relay;
    const pair f = pair_at(k, i, plain), df = tangent ? pair_slope(k, i, plain) : f;
    meeting m = {zero, zero, zero, zero};
    if (!highest) {
      m = relay->sum;
      for (int above = 0; above < 2; ++above) {
        B[columns + above] = relay->B[above];
        if (tangent) dB[columns + above] = relay->dB[above];
      }
    }
    if (!lowest)
      for (int low = 0; low < 2; ++low) {
        relay->B[low] = B[low];
        if (tangent) relay->dB[low] = dB[low];
      }
    /* From below: column c is done with when the two below it have taken from it. */
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) {
      const int one_is_1 = plain && lowest && c == 0; /* A[0] is 1, and dA[0] is 0 */
      const int none_above = highest && c + 1 == columns;
      m.one = one_is_1 ? m.one + B[c] : fma_(A[c], B[c], m.one);
      if (!none_above) m.both = one_is_1 ? m.both + B[c + 1] : fma_(A[c], B[c + 1], m.both);
      if (tangent) {
        m.one_slope = one_is_1 ? m.one_slope + dB[c] : fma_(A[c], dB[c], fma_(dA[c], B[c], m.one_slope));
        if (!none_above)
          m.both_slope =
              one_is_1 ? m.both_slope + dB[c + 1] : fma_(A[c], dB[c + 1], fma_(dA[c], B[c + 1], m.both_slope));
        vreal sum = plain ? dB[c] : f.none * dB[c];
        if (!none_above) sum = fma_(df.one, B[c + 1], fma_(f.one, dB[c + 1], sum));
        if (!(highest && c + 2 >= columns)) sum = fma_(df.both, B[c + 2], fma_(f.both, dB[c + 2], sum));
        dB[c] = sum;
      }
      vreal sum = plain ? B[c] : f.none * B[c];
      if (!none_above) sum = fma_(f.one, B[c + 1], sum);
      if (!(highest && c + 2 >= columns)) sum = fma_(f.both, B[c + 2], sum);
      B[c] = sum;
    }
    if (lowest)
      part_pair(k, i, &m, plain, tangent);
    else
      relay->sum = m;
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
PM_ADJOINT_FORM(adjoint_general_tangents, 0, 1)
PM_ADJOINT_FORM(adjoint_plain, 1, 0)
PM_ADJOINT_FORM(adjoint_plain_tangents, 1, 1)

PM_ALWAYS_INLINE void adjoint_states(const block *k, int64_t begin, int64_t experts, int plain, states of) {
  if (of == TANGENTS)
    (plain ? adjoint_plain_tangents : adjoint_general_tangents)(k, begin, experts);
  else
    (plain ? adjoint_plain : adjoint_general)(k, begin, experts);
}

PM_ALWAYS_INLINE void adjoint_all(block *k, int plain, states of) {
  if (k->b == 0) fill_vectors(k->v, splat(0), k->E); /* no column to go over */
  for (int64_t s = k->segments - 1; s >= 0; --s) {
    prefix_segment(k, s, plain, of);
    adjoint_states(k, s * k->segment, segment_experts(k, s), plain, of);
  }
}

/* ---- marginals ---------------------------------------------------------------------------------------------- */

PM_ALWAYS_INLINE void marginals_body(const pm_job *job, block *k, int64_t row, int64_t rows, vmask wanted, int plain) {
  (void)rows;
  prefix_all(k, plain, PAIRS);
  copy_vectors(k->adjoint, k->sizes, k->b + 1);
  adjoint_all(k, plain, PAIRS);
  store_scaled(k->v, k->inverse_total, lanes_of(wanted), row, k->E, job->out, job->is_double);
}

PM_ROW_KERNEL(marginals, PAIRS, 0)

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
  prefix_all(k, plain, TANGENTS);
  begin_adjoint(k, prefix_end(k, TANGENTS));
  adjoint_all(k, plain, TANGENTS);
}

PM_ALWAYS_INLINE void covariance_body(const pm_job *job, block *k, int64_t row, int64_t rows, vmask wanted, int plain) {
  const source v = {job->vector, k->E, job->is_double};
  load_rows(&v, row, rows, k->E, k->v);
  multiply_covariance(k, k->v, plain);
  store_scaled(k->v, k->inverse_total, lanes_of(wanted), row, k->E, job->out, job->is_double);
}

PM_ROW_KERNEL(covariance, TANGENTS, 0)

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
  prefix_all(k, plain, PAIRS);
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

PM_ROW_KERNEL(log_partition, PAIRS, 0)

/* P(|S| = j) of the block, into `top` (no longer needed for the pivot). */
static void size_probabilities(block *k, const vreal *end) {
  for (int j = k->a; j <= k->b; ++j) k->top[j - k->a] = k->sizes[j] * end[j] / k->total;
}

PM_ALWAYS_INLINE void cardinality_body(const pm_job *job, block *k, int64_t row, int64_t rows, vmask wanted,
                                       int plain) {
  (void)rows;
  const int64_t width = k->b - k->a + 1;
  prefix_all(k, plain, PAIRS);
  size_probabilities(k, prefix_end(k, PAIRS));
  for (int64_t j = 0; j < width; ++j) k->top[j] = select_(k->poison, splat((real)NAN), k->top[j]);
  store_rows(k->top, lanes_of(wanted), row, width, job->out, job->is_double);
}

PM_ROW_KERNEL(cardinality, PAIRS, 0)

/* sum_j g_j dP(j)/dr_i = w_i sum_j A_{i-1}[j] B_{i+1}[j+1] / Z with the sizes weighed by g_j - sum_j' g_j' P(j'). */
PM_ALWAYS_INLINE void cardinality_backward_body(const pm_job *job, block *k, int64_t row, int64_t rows, vmask wanted,
                                                int plain) {
  const int64_t width = k->b - k->a + 1;
  const source grad = {job->vector, width, job->is_double};
  prefix_all(k, plain, PAIRS);
  size_probabilities(k, prefix_end(k, PAIRS));
  vreal *g = k->adjoint + k->a, mean = splat(0);
  load_rows(&grad, row, rows, width, g);
  for (int64_t j = 0; j < width; ++j) mean = fma_(g[j], k->top[j], mean);
  for (int64_t j = 0; j < width; ++j) g[j] = (g[j] - mean) * k->sizes[k->a + j];
  fill_vectors(k->adjoint, splat(0), k->a);
  adjoint_all(k, plain, PAIRS);
  store_scaled(k->v, k->inverse_total, lanes_of(wanted), row, k->E, job->out, job->is_double);
}

PM_ROW_KERNEL(cardinality_backward, PAIRS, 0)

/* H = log Z - sum m_i r_i, rearranged with x_i = r_i - lambda so that no two large terms meet:
 *   sum_i [log(1 + exp(-|x_i|)) + (x_i > 0 ? P(i not in S) x_i : -P(i in S) x_i)] + log total + lambda (j0 - E|S|). */
static void entropy_general(const pm_job *job, block *k, int64_t row, int64_t rows, vmask wanted) {
  prefix_all(k, 0, SINGLES);
  const vreal *end = prefix_end(k, SINGLES);
  vreal drift = splat(0); /* j0 - E|S| */
  for (int j = k->a; j <= k->b; ++j)
    for (int l = 0; l < LANES; ++l) drift[l] += ((int)k->base_size[l] - j) * (k->sizes[j][l] * end[j][l] / k->total[l]);
  const vreal normaliser = log_normaliser(k);
  vreal spread = splat(0);
  vreal *B = k->adjoint;
  copy_vectors(B, k->sizes, k->b + 1);
  for (int64_t s = k->segments - 1; s >= 0; --s) {
    const int64_t begin = s * k->segment, stop = s + 1 == k->segments ? k->E : begin + k->segment;
    prefix_segment(k, s, 0, SINGLES);
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

static pm_status entropy_rows(const pm_job *job) { return for_each_block(job, SINGLES, 0, NULL, entropy_general); }

/* log P(S) = sum over S of r - log Z, with x_i = r_i - lambda and log Z as above:
 *   sum over S of min(x_i, 0) - sum over the others of max(x_i, 0) - log normaliser - log total + lambda (|S| - j0). */
static void log_prob_general(const pm_job *job, block *k, int64_t row, int64_t rows, vmask wanted) {
  prefix_all(k, 0, PAIRS);
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

static pm_status log_prob_rows(const pm_job *job) { return for_each_block(job, PAIRS, 0, NULL, log_prob_general); }

#endif
#endif
