/* The Gumbel family: definitions in double precision, frequencies, limits, statuses, and that nothing but rows and seed
 * is seen in the results. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"

enum { E_MAX = 8, K_MAX = 5 };

/* One function of the family in either precision, memory guarded: [T, E] logits to one of its outputs. */
typedef enum function { TOP_K, LOG_PROB_OF, LOG_PROB_GRADIENT, RELAXED, RELAXED_GRADIENT, SIGMOID, FUNCTIONS } function;

static const char *const names[] = {"gumbel_top_k",  "plackett_luce_log_prob", "plackett_luce_log_prob_backward",
                                    "relaxed_top_k", "relaxed_top_k_backward", "gumbel_sigmoid"};

typedef struct request {
  function f;
  int is_double;
  pm_shape shape;
  const void *logits, *grad; /* grad: [T] for log-probabilities, else [T, E] */
  int64_t *indices;          /* in, or out for TOP_K */
  double temperature;
  uint64_t seed;
  size_t misalign;
} request;

#define CALL(name, ...) (r->is_double ? name##_f64(&r->shape, __VA_ARGS__) : name##_f32(&r->shape, __VA_ARGS__))

static pm_status run(const request *r, void *out) {
  const int64_t T = r->shape.rows, E = r->shape.experts, k = r->shape.k_max;
  const int per_row = r->f == LOG_PROB_OF;
  const size_t bytes = (size_t)(T * (r->f == TOP_K ? k : per_row ? 1 : E)) * real_size(r->is_double);
  guard guarded, scratch_guard;
  void *to = begin_guard(&guarded, bytes, 0);
  void *scratch = begin_guard(&scratch_guard, pm_scratch_size(E, k), r->misalign);
  pm_status status = PM_OK;
  switch (r->f) {
    case TOP_K: status = CALL(pm_gumbel_top_k, r->logits, r->seed, r->indices, to, scratch); break;
    case LOG_PROB_OF: status = CALL(pm_plackett_luce_log_prob, r->logits, r->indices, to, scratch); break;
    case LOG_PROB_GRADIENT:
      status = CALL(pm_plackett_luce_log_prob_backward, r->logits, r->indices, r->grad, to, scratch);
      break;
    case RELAXED: status = CALL(pm_relaxed_top_k, r->logits, r->temperature, r->seed, to, NULL, scratch); break;
    case RELAXED_GRADIENT:
      status = CALL(pm_relaxed_top_k_backward, r->logits, r->grad, r->temperature, to, scratch);
      break;
    case SIGMOID: status = CALL(pm_gumbel_sigmoid, r->logits, r->temperature, r->seed, to, scratch); break;
    case FUNCTIONS: break;
  }
  if (out) memcpy(out, to, bytes);
  CHECK(end_guard(&guarded) && end_guard(&scratch_guard), "%s wrote outside its memory", names[r->f]);
  return status;
}

static void fill(void *to, int is_double, int64_t count, double spread, uint64_t *state) {
  for (int64_t n = 0; n < count; ++n) put(to, is_double, n, spread * random_normal(state));
}

/* ---- definitions ---- */

/* log P of choices and its gradient, by the definition. */
static double defined_log_prob(const double *r, int E, const int64_t *choice, int k, double *gradient) {
  int gone[E_MAX] = {0};
  double total = 0;
  for (int i = 0; i < E; ++i) gradient[i] = 0;
  for (int t = 0; t < k; ++t) {
    double sum = 0, largest = -INFINITY;
    for (int i = 0; i < E; ++i)
      if (!gone[i]) largest = fmax(largest, r[i]);
    for (int i = 0; i < E; ++i)
      if (!gone[i]) sum += exp(r[i] - largest);
    for (int i = 0; i < E; ++i)
      if (!gone[i]) gradient[i] -= exp(r[i] - largest) / sum;
    gradient[choice[t]] += 1;
    total += r[choice[t]] - largest - log(sum);
    gone[choice[t]] = 1;
  }
  return total;
}

static void log_probabilities(int is_double, int E, int k, double spread, uint64_t *state) {
  double logits[E_MAX], got[E_MAX], row[E_MAX], gradient[E_MAX], one = 1;
  float single = 1;
  int64_t choice[E_MAX];
  request r = {.is_double = is_double, .shape = shape_of(1, E, k, k), .logits = logits, .indices = choice};
  fill(logits, is_double, E, spread, state);
  for (int i = 0; i < E; ++i) row[i] = get(logits, is_double, i);
  for (int i = 0; i < E; ++i) choice[i] = i;
  for (int i = E - 1; i > 0; --i) {
    const int64_t n = random_below(state, i + 1), swap = choice[i];
    choice[i] = choice[n];
    choice[n] = swap;
  }
  r.grad = is_double ? (const void *)&one : (const void *)&single;
  const double want = defined_log_prob(row, E, choice, k, gradient), allowed = is_double ? 1e-13 : 3e-7;
  r.f = LOG_PROB_OF;
  CHECK(run(&r, got) == PM_OK, "log_prob");
  CHECK(fabs(get(got, is_double, 0) - want) <= allowed * fmax(1, fabs(want)), "log_prob f%d E=%d k=%d: %g, not %g",
        is_double ? 64 : 32, E, k, get(got, is_double, 0), want);
  r.f = LOG_PROB_GRADIENT;
  CHECK(run(&r, got) == PM_OK, "log_prob gradient");
  for (int i = 0; i < E; ++i)
    CHECK(fabs(get(got, is_double, i) - gradient[i]) <= allowed * (k + 1),
          "log_prob gradient f%d E=%d k=%d: %g, not %g", is_double ? 64 : 32, E, k, get(got, is_double, i),
          gradient[i]);
}

/* The gradient of relaxed_top_k against central differences; at a low temperature the k-hot of gumbel_top_k. */
static void relaxation(int E, int k, double temperature, uint64_t *state) {
  double logits[E_MAX], keys[E_MAX], out[E_MAX], g[E_MAX], got[E_MAX], up[E_MAX], down[E_MAX], top[E_MAX];
  int64_t indices[E_MAX];
  request r = {.is_double = 1,
               .shape = shape_of(1, E, k, k),
               .logits = logits,
               .grad = g,
               .temperature = temperature,
               .indices = indices,
               .seed = next_random(state)};
  fill(logits, 1, E, 1, state);
  fill(g, 1, E, 1, state);
  void *scratch = malloc(pm_scratch_size(E, k));
  CHECK(pm_relaxed_top_k_f64(&r.shape, logits, temperature, r.seed, out, keys, scratch) == PM_OK, "relaxed_top_k");
  free(scratch);
  double sum = 0;
  for (int i = 0; i < E; ++i) sum += out[i];
  CHECK(fabs(sum - k) < 1e-12, "relaxed_top_k E=%d k=%d: sums to %.17g", E, k, sum);
  r.f = RELAXED_GRADIENT;
  r.logits = keys;
  CHECK(run(&r, got) == PM_OK, "relaxed_top_k gradient");
  r.f = RELAXED;
  r.logits = logits;
  const double h = 1e-6;
  for (int i = 0; i < E; ++i) {
    const double centre = logits[i];
    double slope = 0;
    logits[i] = centre + h;
    run(&r, up);
    logits[i] = centre - h;
    run(&r, down);
    logits[i] = centre;
    for (int j = 0; j < E; ++j) slope += g[j] * (up[j] - down[j]) / (2 * h);
    CHECK(fabs(slope - got[i]) < 1e-5 * fmax(1, fabs(slope)), "relaxed_top_k gradient E=%d k=%d: %g, not %g", E, k,
          got[i], slope);
  }
  r.f = TOP_K;
  CHECK(run(&r, top) == PM_OK, "gumbel_top_k");
  r.f = RELAXED;
  r.temperature = 1e-6;
  CHECK(run(&r, out) == PM_OK, "relaxed_top_k");
  for (int j = 0; j < k; ++j) {
    CHECK(j == 0 || top[j - 1] >= top[j], "keys descend");
    CHECK(top[j] == keys[indices[j]], "the keys of both are the same");
    CHECK(fabs(out[indices[j]] - 1) < 1e-6, "at a low temperature the draw's k-hot");
  }
}

/* Frequencies of ordered pairs of three, as a standard normal deviate. */
static void frequencies(int is_double) {
  const int64_t draws = quick ? 900 : 30000;
  const double r[3] = {0, 1, -0.5};
  double statistic = 0, gradient[3];
  int64_t *indices = malloc((size_t)(2 * draws) * sizeof *indices), count[9] = {0};
  void *logits = malloc((size_t)(3 * draws) * real_size(is_double));
  request q = {.f = TOP_K,
               .is_double = is_double,
               .shape = shape_of(draws, 3, 2, 2),
               .logits = logits,
               .indices = indices,
               .seed = 77};
  for (int64_t n = 0; n < 3 * draws; ++n) put(logits, is_double, n, r[n % 3]);
  CHECK(run(&q, NULL) == PM_OK, "gumbel_top_k");
  for (int64_t t = 0; t < draws; ++t) ++count[3 * indices[2 * t] + indices[2 * t + 1]];
  for (int n = 0; n < 9; ++n) {
    const int64_t pair[2] = {n / 3, n % 3};
    if (pair[0] == pair[1]) {
      CHECK(count[n] == 0, "an expert was drawn twice");
      continue;
    }
    const double want = (double)draws * exp(defined_log_prob(r, 3, pair, 2, gradient));
    statistic += ((double)count[n] - want) * ((double)count[n] - want) / want;
  }
  const double z = (cbrt(statistic / 5) - (1 - 2.0 / 45)) / sqrt(2.0 / 45); /* Wilson & Hilferty, 5 degrees */
  CHECK(fabs(z) < 5, "gumbel_top_k f%d: %g standard deviations", is_double ? 64 : 32, z);
  free(indices);
  free(logits);
}

/* ---- rows and statuses ---- */

/* Any cut of the batch, any stride and any alignment of the scratch give the same bits. */
static void cuts(int is_double, function f, int64_t E, int64_t k) {
  enum { T = 37, GAP = 3 };
  const size_t real = real_size(is_double);
  const int64_t width = f == TOP_K ? k : f == LOG_PROB_OF ? 1 : E;
  uint64_t state = 5;
  char *logits = malloc((size_t)(T * (E + GAP)) * real), *grad = malloc((size_t)(T * E) * real);
  char *whole = malloc((size_t)(T * width) * real), *part = malloc((size_t)(T * width) * real);
  int64_t *indices = malloc((size_t)(T * k + 1) * sizeof *indices),
          *again = malloc((size_t)(T * k + 1) * sizeof *again);
  fill(logits, is_double, T * (E + GAP), 2, &state);
  fill(grad, is_double, T * E, 1, &state);
  for (int64_t n = 0; n < T * k; ++n) indices[n] = again[n] = (n % k * 7 + n / k) % E;
  request r = {.f = f,
               .is_double = is_double,
               .shape = shape_of(T, E, k, k),
               .logits = logits,
               .grad = grad,
               .indices = indices,
               .temperature = 0.6,
               .seed = 9};
  r.shape.stride = E + GAP;
  r.shape.first_row = ((int64_t)1 << 33) - 5;
  CHECK(run(&r, whole) == PM_OK, "%s", names[f]);
  const int64_t first = r.shape.first_row;
  for (int64_t begin = 0, rows = 1; begin < T; begin += rows, rows = rows * 2 + 1) {
    if (begin + rows > T) rows = T - begin;
    r.shape.rows = rows;
    r.shape.first_row = first + begin;
    r.logits = logits + (size_t)(begin * (E + GAP)) * real;
    r.grad = grad + (size_t)(begin * (f == LOG_PROB_GRADIENT ? 1 : E)) * real;
    r.indices = again + begin * k;
    r.misalign = (size_t)(begin * 5 % 64);
    CHECK(run(&r, part) == PM_OK, "%s", names[f]);
    CHECK(!memcmp(part, whole + (size_t)(begin * width) * real, (size_t)(rows * width) * real),
          "%s f%d E=%lld k=%lld: rows %lld.. differ from the whole's", names[f], is_double ? 64 : 32, (long long)E,
          (long long)k, (long long)begin);
  }
  CHECK(!memcmp(indices, again, (size_t)(T * k) * sizeof *indices), "%s: indices differ", names[f]);
  free(logits), free(grad), free(whole), free(part), free(indices), free(again);
}

static void statuses(void) {
  double logits[8] = {0, 1, 2, 3, 0, -INFINITY, -INFINITY, -INFINITY}, keys[8], scratch[4096];
  int64_t indices[4] = {0, 1, 0, 1};
  pm_shape s = shape_of(2, 4, 2, 2);
  CHECK(pm_scratch_size(4, 2) <= sizeof scratch, "scratch");
  CHECK(pm_gumbel_top_k_f64(&s, logits, 1, indices, keys, scratch) == PM_INFEASIBLE, "one row has one expert");
  CHECK(indices[2] == 0 && indices[3] == 1 && isnan(keys[2]) && !isnan(keys[0]), "the other row is answered");
  CHECK(pm_relaxed_top_k_f64(&s, logits, 1, 1, keys, NULL, scratch) == PM_INFEASIBLE, "relaxed");
  CHECK(isnan(keys[4]) && fabs(keys[0] + keys[1] + keys[2] + keys[3] - 2) < 1e-12, "the other row is answered");
  const double bad[] = {0, -1, 1e-7, 1e7, INFINITY, NAN};
  for (size_t n = 0; n < sizeof bad / sizeof *bad; ++n) {
    CHECK(pm_relaxed_top_k_f64(&s, logits, bad[n], 1, keys, NULL, scratch) == PM_BAD_OPTION, "%g", bad[n]);
    CHECK(pm_gumbel_sigmoid_f64(&s, logits, bad[n], 1, keys, scratch) == PM_BAD_OPTION, "%g", bad[n]);
    CHECK(pm_relaxed_top_k_backward_f64(&s, logits, logits, bad[n], keys, scratch) == PM_BAD_OPTION, "%g", bad[n]);
  }
  indices[3] = 4;
  CHECK(pm_plackett_luce_log_prob_f64(&s, logits, indices, keys, scratch) == PM_BAD_INDEX, "E is no choice");
  indices[3] = -1;
  CHECK(pm_plackett_luce_log_prob_backward_f64(&s, logits, indices, logits, keys, scratch) == PM_BAD_INDEX, "-1");
  CHECK(pm_plackett_luce_log_prob_f64(&s, logits, NULL, keys, scratch) == PM_NULL_POINTER, "indices");
  CHECK(pm_gumbel_top_k_f64(&s, logits, 1, NULL, keys, scratch) == PM_NULL_POINTER, "indices");
  CHECK(pm_gumbel_top_k_f64(&s, logits, 1, indices, NULL, scratch) == PM_NULL_POINTER, "keys");
  CHECK(pm_relaxed_top_k_backward_f64(&s, logits, NULL, 1, keys, scratch) == PM_NULL_POINTER, "grad");
  s.k_min = 1;
  CHECK(pm_gumbel_top_k_f64(&s, logits, 1, indices, keys, scratch) == PM_BAD_CARDINALITY, "a band");
  s = shape_of(0, 4, 2, 2);
  CHECK(pm_gumbel_top_k_f64(&s, NULL, 1, NULL, NULL, NULL) == PM_OK, "no rows");
}

void test_gumbel(void) {
  uint64_t state = 11;
  for (int n = 0; n < (quick ? 20 : 400); ++n)
    for (int is_double = 0; is_double < 2; ++is_double) {
      const int E = 1 + (int)random_below(&state, E_MAX);
      log_probabilities(is_double, E, (int)random_below(&state, E + 1), n % 3 == 0 ? 100 : 1, &state);
    }
  for (int n = 0; n < (quick ? 5 : 60); ++n) {
    const int E = 2 + (int)random_below(&state, E_MAX - 1), most = E < K_MAX ? E : K_MAX;
    relaxation(E, 1 + (int)random_below(&state, most), n % 2 ? 0.5 : 1.5, &state);
  }
  for (int is_double = 0; is_double < 2; ++is_double) {
    frequencies(is_double);
    for (function f = TOP_K; f < FUNCTIONS; ++f) {
      cuts(is_double, f, 5, 2);
      cuts(is_double, f, 64, 8);
      if (!quick) cuts(is_double, f, 300, 40);
    }
  }
  statuses();
}
