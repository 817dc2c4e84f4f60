/* Every function against enumeration: E <= 8, every band, ten families of logits, both precisions. */
#include <math.h>
#include <string.h>

#include "check.h"
#include "oracle.h"

enum { ROWS = 5 };

static const double scalar_error[] = {3e-6, 1e-13}, marginal_error[] = {1e-6, 1e-13}, relative_error[] = {1e-5, 1e-13};
static const double gradient_error[] = {5e-6, 1e-13};

typedef struct expectation {
  double value, allowed;
} expectation;

static expectation scalar(double value, int is_double) {
  return (expectation){value, scalar_error[is_double] * fmax(1, fabs(value))};
}

static expectation probability(double value, int is_double) {
  double allowed = marginal_error[is_double];
  if (value >= 1e-12) allowed = fmin(allowed, relative_error[is_double] * value);
  return (expectation){value, allowed};
}

static double largest_of(const batch *b, int64_t t) {
  const int64_t width = width_of(b->op->vector, &b->c.shape);
  double largest = 0;
  for (int64_t j = 0; j < width; ++j) largest = fmax(largest, fabs(get(b->c.vector, b->is_double, t * width + j)));
  return largest;
}

/* C h + J_softmax^T (h z), h as in probmoe.h, and the largest term of h s. */
static double route_gradient(const batch *b, const oracle *o, int64_t t, int i, double *scale) {
  const int marginal = b->op == &operators[ROUTE_BACKWARD] || b->op == &operators[ROUTE_BACKWARD_NORMALIZED];
  const int normalize =
      b->op == &operators[ROUTE_BACKWARD_NORMALIZED] || b->op == &operators[ROUTE_STRAIGHT_NORMALIZED];
  double g[ORACLE_EXPERTS] = {0}, z[ORACLE_EXPERTS] = {0}, sum = 0, mean = 0, direct = 0, result = 0;
  for (int j = 0; j < o->k_max; ++j) {
    const int64_t e = b->c.indices[t * o->k_max + j];
    if (e >= o->experts) continue;
    g[e] = get(b->c.vector, b->is_double, t * o->k_max + j);
    z[e] = 1;
    sum += o->softmax[e];
    mean += g[e] * o->softmax[e];
  }
  *scale = 0;
  for (int e = 0; e < o->experts; ++e) {
    const double h = !normalize ? g[e] : sum > 0 ? (g[e] - mean / sum) / sum : 0, hs = h * o->softmax[e];
    *scale = fmax(*scale, fabs(hs));
    if (marginal) result += o->covariance[i][e] * hs;
    direct += z[e] * hs;
    if (e == i) result += z[e] * hs;
  }
  return result - o->softmax[i] * direct;
}

/* What element j of row t must be. */
static expectation expected(const batch *b, const oracle *o, int64_t t, int64_t j) {
  const int d = b->is_double;
  const int64_t width = width_of(b->op->vector, &b->c.shape);
  double sum = 0, scale;
  switch ((operation_id)(b->op - operators)) {
    case LOG_PARTITION: return scalar(o->log_partition, d);
    case ENTROPY: return scalar(o->entropy, d);
    case CARDINALITY: return probability(o->size[o->k_min + j], d);
    case MARGINALS: return probability(o->marginal[j], d);
    case LOG_PROB: return scalar(o->log_prob[subset_bits(b->c.indices + t * o->k_max, o->k_max, o->experts)], d);
    case CARDINALITY_BACKWARD:
      for (int64_t n = 0; n < width; ++n)
        sum +=
            get(b->c.vector, d, t * width + n) * (o->joint[o->k_min + n][j] - o->size[o->k_min + n] * o->marginal[j]);
      return (expectation){sum, gradient_error[d] * largest_of(b, t)};
    case COVARIANCE_VP:
      for (int64_t n = 0; n < width; ++n) sum += o->covariance[j][n] * get(b->c.vector, d, t * width + n);
      return (expectation){sum, gradient_error[d] * largest_of(b, t)};
    case ROUTE_BACKWARD:
    case ROUTE_BACKWARD_NORMALIZED:
    case ROUTE_STRAIGHT:
    case ROUTE_STRAIGHT_NORMALIZED:
      sum = route_gradient(b, o, t, (int)j, &scale);
      return (expectation){sum, gradient_error[d] * fmax(scale, largest_of(b, t))};
    default: return (expectation){0, 0};
  }
}

static void check_reals(const batch *b, const oracle *o, int64_t t, int family) {
  const int64_t width = width_of(b->op->out, &b->c.shape);
  for (int64_t j = 0; j < width; ++j) {
    const expectation e = expected(b, o, t, j);
    const double value = output(b, t, j);
    CHECK(value == e.value || fabs(value - e.value) <= e.allowed,
          "%s_f%d E=%d band %d..%d family %d row %lld [%lld]: %.17g, not %.17g (off by %.3g, allowed %.3g)",
          b->op->name, b->is_double ? 64 : 32, o->experts, o->k_min, o->k_max, family, (long long)t, (long long)j,
          value, e.value, value - e.value, e.allowed);
  }
}

static void check_selection(const batch *b, const oracle *o, int64_t t, int family) {
  const int id = (int)(b->op - operators),
            sampled = id == SAMPLE || id == ROUTE_SAMPLE || id == ROUTE_SAMPLE_NORMALIZED;
  const int64_t *got = chosen(b, t);
  int64_t want[ORACLE_EXPERTS];
  double margin = 1, sum = 0;
  int size = o->mode_size;
  if (sampled)
    size = draw(o, b->c.seed, (uint64_t)(b->c.shape.first_row + t), b->is_double, want, &margin);
  else
    for (int j = 0; j < size; ++j) want[j] = o->mode[j];
  int same = 1;
  for (int j = 0; j < o->k_max; ++j) same &= got[j] == (j < size ? want[j] : o->experts);
  /* Where rounding decides, the two may differ. */
  const int open = margin < (b->is_double ? 1e-12 : 1e-5);
  CHECK(same || open, "%s_f%d E=%d band %d..%d family %d row %lld: wrong subset", b->op->name, b->is_double ? 64 : 32,
        o->experts, o->k_min, o->k_max, family, (long long)t);
  if (!same || b->op->out == NONE) return;
  const int normalize = id == ROUTE_SAMPLE_NORMALIZED || id == ROUTE_MODE_NORMALIZED;
  for (int j = 0; j < size; ++j) sum += o->softmax[want[j]];
  for (int j = 0; j < o->k_max; ++j) {
    const double s = j < size ? o->softmax[want[j]] : 0;
    const expectation e = probability(normalize && sum > 0 ? s / sum : s, b->is_double);
    const double weight = output(b, t, j);
    CHECK(j < size ? fabs(weight - e.value) <= e.allowed : weight == 0,
          "%s_f%d E=%d band %d..%d family %d row %lld: weight %d is %.17g, not %.17g", b->op->name,
          b->is_double ? 64 : 32, o->experts, o->k_min, o->k_max, family, (long long)t, j, weight, e.value);
  }
}

/* Members for log_prob: any subset of the band, in any order. */
static void random_subset(batch *b, int64_t t, uint64_t *state) {
  const pm_shape *s = &b->c.shape;
  int64_t *slots = (int64_t *)(void *)(b->indices.block + b->indices.before) + t * s->k_max;
  const int64_t size = s->k_min + random_below(state, s->k_max - s->k_min + 1);
  for (int64_t j = 0; j < s->k_max; ++j) slots[j] = s->experts;
  for (int64_t j = 0; j < size;) {
    const int64_t e = random_below(state, s->experts);
    int fresh = 1;
    for (int64_t n = 0; n < s->k_max; ++n) fresh &= slots[n] != e;
    if (fresh) slots[j++] = e;
  }
  for (int64_t j = s->k_max - 1; j > 0; --j) { /* unused slots anywhere */
    const int64_t n = random_below(state, j + 1), swap = slots[j];
    slots[j] = slots[n];
    slots[n] = swap;
  }
}

void test_values(void) {
  uint64_t state = 2606;
  for (int experts = 1; experts <= ORACLE_EXPERTS; experts += quick ? 3 : 1)
    for (int k_max = 0; k_max <= experts; ++k_max)
      for (int k_min = 0; k_min <= k_max; ++k_min)
        for (int family = 0; family < FAMILIES; family += quick ? 3 : 1)
          for (int is_double = 0; is_double < 2; ++is_double) {
            batch b[OPERATORS];
            for (int id = 0; id < OPERATORS; ++id) {
              begin_batch(&b[id], &operators[id], is_double, shape_of(ROWS, experts, k_min, k_max));
              if (id == 0)
                fill_batch(&b[0], family, k_min + (experts - k_min) / 2, &state);
              else
                memcpy(b[id].logits.block + b[id].logits.before, b[0].c.logits, b[0].logits.bytes);
              fill_companions(&b[id], &state);
              for (int64_t t = 0; t < ROWS && id == LOG_PROB; ++t) random_subset(&b[id], t, &state);
              const pm_status status = run_batch(&b[id]);
              CHECK(status == PM_OK, "%s: %s", operators[id].name, pm_status_text(status));
            }
            for (int64_t t = 0; t < ROWS; ++t) {
              double row[ORACLE_EXPERTS];
              oracle o;
              for (int i = 0; i < experts; ++i) row[i] = get_logit(&b[0], t, i);
              enumerate(&o, row, experts, k_min, k_max);
              for (int id = 0; id < OPERATORS; ++id) {
                if (operators[id].out_indices == NONE)
                  check_reals(&b[id], &o, t, family);
                else
                  check_selection(&b[id], &o, t, family);
              }
            }
            for (int id = 0; id < OPERATORS; ++id) end_batch(&b[id]);
          }
}
