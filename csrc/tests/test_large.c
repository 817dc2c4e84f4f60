/* Beyond enumeration, where the table is kept a segment at a time: identities that tie the functions together. */
#include <math.h>
#include <string.h>

#include "check.h"

enum { ROWS = 3 };

static const int64_t shapes[][3] = {/* E, k_min, k_max */
                                    {64, 8, 8},       {64, 6, 8},         {128, 33, 33},   {256, 8, 8},
                                    {256, 32, 32},    {300, 150, 150},    {300, 140, 150}, {1024, 8, 8},
                                    {1024, 150, 150}, {1024, 1020, 1024}, {1024, 0, 40},   {257, 257, 257},
                                    {5000, 3, 3}};

typedef struct suite {
  batch b[OPERATORS];
  pm_shape shape;
  int is_double, family;
} suite;

static int64_t E, T;

#define WHERE "f%d E=%lld band %lld..%lld family %d row %lld: "
#define HERE                                                                                                 \
  s->is_double ? 64 : 32, (long long)s->shape.experts, (long long)s->shape.k_min, (long long)s->shape.k_max, \
      s->family, (long long)t

/* Probabilities are probabilities, and the marginals sum to the expected size. */
static void sums(const suite *s, int64_t t, double tolerance) {
  const int64_t band = s->shape.k_max - s->shape.k_min + 1;
  double total = 0, size = 0, marginals = 0, least = 0, most = 0;
  for (int64_t j = 0; j < band; ++j) {
    const double p = output(&s->b[CARDINALITY], t, j);
    total += p;
    size += p * (double)(s->shape.k_min + j);
  }
  for (int64_t i = 0; i < E; ++i) {
    const double m = output(&s->b[MARGINALS], t, i);
    marginals += m;
    least = fmin(least, m);
    most = fmax(most, m);
  }
  CHECK(fabs(total - 1) <= tolerance, WHERE "sizes sum to %.17g", HERE, total);
  CHECK(fabs(marginals - size) <= tolerance * fmax(1, size), WHERE "marginals sum to %.17g, not %.17g", HERE, marginals,
        size);
  CHECK(least >= 0 && most <= 1 + tolerance, WHERE "marginals from %g to %g", HERE, least, most);
}

/* C 1 = 0 for exact k, v C v >= 0, and |C v| is bounded by the variances. */
static void covariance(const suite *s, int64_t t, double tolerance) {
  double form = 0, largest = 0;
  for (int64_t i = 0; i < E; ++i) {
    const double v = get(s->b[COVARIANCE_VP].c.vector, s->is_double, t * E + i);
    form += v * output(&s->b[COVARIANCE_VP], t, i);
    largest = fmax(largest, fabs(v));
  }
  CHECK(form >= -tolerance * largest * largest * (double)E, WHERE "v C v = %g", HERE, form);
}

/* log Z = entropy + sum m r, and -log P averaged over draws tends to the entropy; here only: P is at most 1, the mode
 * is the largest, and a draw is possible. */
static void likelihoods(const suite *s, int64_t t, double tolerance) {
  double energy = 0, size = 0;
  for (int64_t i = 0; i < E; ++i) {
    const double m = output(&s->b[MARGINALS], t, i), r = get_logit(&s->b[0], t, i);
    if (m > 0) energy += m * r, size += m * fabs(r);
  }
  const double log_partition = output(&s->b[LOG_PARTITION], t, 0), entropy = output(&s->b[ENTROPY], t, 0);
  CHECK(fabs(log_partition - energy - entropy) <= tolerance * fmax(1, size + fabs(log_partition)),
        WHERE "log Z %.17g, energy %.17g, entropy %.17g", HERE, log_partition, energy, entropy);
  double mode_score = 0;
  for (int64_t j = 0; j < s->shape.k_max; ++j) {
    const int64_t e = s->b[LOG_PROB].c.indices[t * s->shape.k_max + j];
    if (e < E) mode_score += get_logit(&s->b[0], t, e);
  }
  const double mode = output(&s->b[LOG_PROB], t, 0);
  CHECK(fabs(mode - (mode_score - log_partition)) <= tolerance * fmax(1, fabs(mode_score) + fabs(log_partition)),
        WHERE "log P of the mode %.17g, its score %.17g", HERE, mode, mode_score);
  CHECK(mode <= tolerance, WHERE "log P of the mode %g", HERE, mode);
}

static void selections(const suite *s, int64_t t, double tolerance) {
  const int64_t k = s->shape.k_max;
  for (int id = SAMPLE; id <= ROUTE_MODE_NORMALIZED; ++id) {
    const int ascending = id == SAMPLE || id == ROUTE_SAMPLE || id == ROUTE_SAMPLE_NORMALIZED;
    const int64_t *slots = chosen(&s->b[id], t);
    int64_t size = 0;
    while (size < k && slots[size] < E) ++size;
    int legal = size >= s->shape.k_min;
    for (int64_t j = 0; j < k; ++j) {
      legal &= j < size ? slots[j] >= 0 && get_logit(&s->b[0], t, slots[j]) > -INFINITY : slots[j] == E;
      if (j == 0 || j >= size) continue;
      const double before = get_logit(&s->b[0], t, slots[j - 1]), now = get_logit(&s->b[0], t, slots[j]);
      legal &= ascending ? slots[j] > slots[j - 1] : before > now || (before == now && slots[j] > slots[j - 1]);
    }
    CHECK(legal, WHERE "%s is no legal subset in order", HERE, operators[id].name);
    if (operators[id].out == NONE) continue;
    double sum = 0;
    for (int64_t j = 0; j < k; ++j) {
      const double w = output(&s->b[id], t, j);
      CHECK(w >= 0 && w <= 1 + tolerance && (j < size || w == 0), WHERE "%s: weight %g", HERE, operators[id].name, w);
      sum += w;
    }
    const int normalized = id == ROUTE_SAMPLE_NORMALIZED || id == ROUTE_MODE_NORMALIZED;
    CHECK(normalized && size > 0 ? fabs(sum - 1) <= tolerance || sum == 0 : sum <= 1 + tolerance,
          WHERE "%s: weights sum to %g", HERE, operators[id].name, sum);
  }
  CHECK(!memcmp(chosen(&s->b[SAMPLE], t), chosen(&s->b[ROUTE_SAMPLE], t), (size_t)k * sizeof(int64_t)) &&
            !memcmp(chosen(&s->b[MODE], t), chosen(&s->b[ROUTE_MODE], t), (size_t)k * sizeof(int64_t)),
        WHERE "routing chooses another subset than the sampler or the mode", HERE);
}

/* Both precisions see the same logits: they must agree. */
static void precisions(const suite *s, const suite *twice) {
  static const struct {
    operation_id id;
    double allowed;
  } pairs[] = {{LOG_PARTITION, 3e-6}, {ENTROPY, 3e-6}, {CARDINALITY, 1e-6}, {MARGINALS, 1e-6}, {COVARIANCE_VP, 5e-6}};
  for (size_t n = 0; n < sizeof pairs / sizeof *pairs; ++n)
    for (int64_t t = 0; t < T; ++t) {
      const int64_t width = width_of(operators[pairs[n].id].out, &s->shape);
      double worst = 0, scale = 1;
      for (int64_t j = 0; j < width; ++j) {
        const double one = output(&s->b[pairs[n].id], t, j), two = output(&twice->b[pairs[n].id], t, j);
        worst = fmax(worst, fabs(one - two));
        if (pairs[n].id == LOG_PARTITION || pairs[n].id == ENTROPY) scale = fmax(scale, fabs(two));
        if (pairs[n].id == COVARIANCE_VP)
          scale = fmax(scale, fabs(get(twice->b[COVARIANCE_VP].c.vector, 1, t * E + j)));
      }
      CHECK(worst <= pairs[n].allowed * scale, WHERE "%s: f32 and f64 differ by %g", HERE, operators[pairs[n].id].name,
            worst);
    }
}

static void run_suite(suite *s, const suite *like, uint64_t *state) {
  for (int id = 0; id < OPERATORS; ++id) {
    batch *b = &s->b[id];
    begin_batch(b, &operators[id], s->is_double, s->shape);
    if (id == 0 && !like)
      fill_batch(b, s->family, s->shape.k_max, state);
    else
      for (int64_t t = 0; t < T; ++t)
        for (int64_t i = 0; i < E; ++i) set_logit(b, t, i, get_logit(like ? &like->b[0] : &s->b[0], t, i));
    fill_companions(b, state);
    const int64_t vector = T * width_of(b->op->vector, &s->shape);
    for (int64_t n = 0; like && n < vector; ++n)
      put(b->vector.block + b->vector.before, s->is_double, n, get(like->b[id].c.vector, like->is_double, n));
    const pm_status status = run_batch(b);
    CHECK(status == PM_OK, "%s: %s", operators[id].name, pm_status_text(status));
  }
}

void test_large(void) {
  uint64_t state = 31;
  for (size_t n = 0; n < sizeof shapes / sizeof *shapes; n += quick ? 4 : 1)
    for (int family = 0; family < FAMILIES; family += quick ? 5 : 1) {
      suite both[2];
      for (int is_double = 0; is_double < 2; ++is_double) {
        suite *s = &both[is_double];
        *s = (suite){.shape = shape_of(ROWS, shapes[n][0], shapes[n][1], shapes[n][2]),
                     .is_double = is_double,
                     .family = family};
        E = s->shape.experts;
        T = s->shape.rows;
        run_suite(s, is_double ? &both[0] : NULL, &state);
        const double tolerance = (is_double ? 1e-12 : 1e-5);
        for (int64_t t = 0; t < T; ++t) {
          sums(s, t, tolerance);
          covariance(s, t, tolerance);
          likelihoods(s, t, tolerance);
          selections(s, t, tolerance);
        }
      }
      precisions(&both[0], &both[1]);
      for (int is_double = 0; is_double < 2; ++is_double)
        for (int id = 0; id < OPERATORS; ++id) end_batch(&both[is_double].b[id]);
    }
}
