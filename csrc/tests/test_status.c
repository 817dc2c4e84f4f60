/* The status of every wrong argument, and that nothing is written with it. */
#include <string.h>

#include "check.h"

static void expect(const operation *op, int is_double, pm_status wanted, const char *what, pm_shape shape,
                   const char *missing) {
  batch b;
  /* Memory for a legal shape; the call is made with the wrong one. */
  begin_batch(&b, op, is_double, shape_of(3, 4, 1, 2));
  b.c.shape = shape;
  if (!strcmp(missing, "logits")) b.c.logits = NULL;
  if (!strcmp(missing, "scratch")) b.c.scratch = NULL;
  if (!strcmp(missing, "vector")) b.c.vector = NULL;
  if (!strcmp(missing, "indices")) b.c.indices = NULL;
  if (!strcmp(missing, "out")) b.c.out = NULL;
  if (!strcmp(missing, "out_indices")) b.c.out_indices = NULL;
  const pm_status got = op->run[is_double](&b.c);
  CHECK(got == wanted, "%s_f%d, %s: %s", op->name, is_double ? 64 : 32, what, pm_status_text(got));
  CHECK(untouched(b.out.block + b.out.before, b.out.bytes) &&
            untouched(b.out_indices.block + b.out_indices.before, b.out_indices.bytes),
        "%s_f%d, %s: wrote", op->name, is_double ? 64 : 32, what);
  end_batch(&b);
}

static void wrong_shapes(const operation *op, int is_double) {
  static const struct {
    const char *what;
    pm_shape shape;
    pm_status wanted;
  } cases[] = {
      {"rows -1", {-1, 4, 1, 2, 4, 0}, PM_BAD_SHAPE},
      {"experts 0", {3, 0, 0, 0, 4, 0}, PM_BAD_SHAPE},
      {"experts -4", {3, -4, 1, 2, 4, 0}, PM_BAD_SHAPE},
      {"experts too many", {3, PM_MAX_EXPERTS + 1, 1, 2, PM_MAX_EXPERTS + 1, 0}, PM_BAD_SHAPE},
      {"stride 3", {3, 4, 1, 2, 3, 0}, PM_BAD_SHAPE},
      {"stride -4", {3, 4, 1, 2, -4, 0}, PM_BAD_SHAPE},
      {"k_min -1", {3, 4, -1, 2, 4, 0}, PM_BAD_CARDINALITY},
      {"k_min > k_max", {3, 4, 2, 1, 4, 0}, PM_BAD_CARDINALITY},
      {"k_max > experts", {1, 4, 1, 5, 4, 0}, PM_BAD_CARDINALITY},
      {"no rows, experts 0", {0, 0, 0, 0, 4, 0}, PM_BAD_SHAPE},
      {"no rows, k_max > experts", {0, 4, 1, 5, 4, 0}, PM_BAD_CARDINALITY},
  };
  for (size_t n = 0; n < sizeof cases / sizeof *cases; ++n)
    expect(op, is_double, cases[n].wanted, cases[n].what, cases[n].shape, "");
}

static void missing_pointers(const operation *op, int is_double) {
  const pm_shape legal = shape_of(3, 4, 1, 2);
  expect(op, is_double, PM_NULL_POINTER, "no logits", legal, "logits");
  expect(op, is_double, PM_NULL_POINTER, "no scratch", legal, "scratch");
  if (op->vector) expect(op, is_double, PM_NULL_POINTER, "no vector", legal, "vector");
  if (op->indices) expect(op, is_double, PM_NULL_POINTER, "no indices", legal, "indices");
  if (op->out) expect(op, is_double, PM_NULL_POINTER, "no out", legal, "out");
  if (op->out_indices) expect(op, is_double, PM_NULL_POINTER, "no out_indices", legal, "out_indices");
}

/* The functions themselves: `operators` cannot pass a shape of NULL. */
#define NO_SHAPE(suffix, type)                                                                                      \
  static void no_shape_##suffix(void) {                                                                             \
    type r[4] = {0};                                                                                                \
    int64_t s[4] = {0};                                                                                             \
    char w[1];                                                                                                      \
    CHECK(pm_subset_log_partition_##suffix(NULL, r, r, w) == PM_NULL_POINTER, "log_partition");                     \
    CHECK(pm_subset_cardinality_##suffix(NULL, r, r, w) == PM_NULL_POINTER, "cardinality");                         \
    CHECK(pm_subset_cardinality_backward_##suffix(NULL, r, r, r, w) == PM_NULL_POINTER, "cardinality_backward");    \
    CHECK(pm_subset_marginals_##suffix(NULL, r, r, w) == PM_NULL_POINTER, "marginals");                             \
    CHECK(pm_subset_covariance_vp_##suffix(NULL, r, r, r, w) == PM_NULL_POINTER, "covariance_vp");                  \
    CHECK(pm_subset_entropy_##suffix(NULL, r, r, w) == PM_NULL_POINTER, "entropy");                                 \
    CHECK(pm_subset_log_prob_##suffix(NULL, r, s, r, w) == PM_NULL_POINTER, "log_prob");                            \
    CHECK(pm_subset_sample_##suffix(NULL, r, 0, 1, 0, s, w) == PM_NULL_POINTER, "sample");                          \
    CHECK(pm_subset_mode_##suffix(NULL, r, s, w) == PM_NULL_POINTER, "mode");                                       \
    CHECK(pm_route_##suffix(NULL, r, PM_FORWARD_MODE, 0, 0, r, s, w) == PM_NULL_POINTER, "route");                  \
    CHECK(pm_route_backward_##suffix(NULL, r, s, r, PM_BACKWARD_MARGINAL, 0, r, w) == PM_NULL_POINTER, "backward"); \
  }
NO_SHAPE(f32, float)
NO_SHAPE(f64, double)

static void wrong_indices(int is_double) {
  static const int64_t bad[] = {-1, 5, INT64_MAX, INT64_MIN};
  for (size_t n = 0; n < sizeof bad / sizeof *bad; ++n)
    for (int64_t at = 0; at < 6; at += 5) { /* the first slot, the last one */
      batch b;
      begin_batch(&b, &operators[LOG_PROB], is_double, shape_of(3, 4, 0, 2));
      ((int64_t *)(void *)(b.indices.block + b.indices.before))[at] = bad[n];
      const pm_status got = run_batch(&b);
      CHECK(got == PM_BAD_INDEX, "index %lld: %s", (long long)bad[n], pm_status_text(got));
      CHECK(untouched(b.c.out, b.out.bytes), "index %lld: wrote", (long long)bad[n]);
      end_batch(&b);
    }
  /* The band is wrong as well: it is what says how many indices there are, so it is looked at first. */
  batch b;
  begin_batch(&b, &operators[LOG_PROB], is_double, shape_of(3, 4, 1, 2));
  b.c.shape = shape_of(1, 4, 1, 5);
  ((int64_t *)(void *)(b.indices.block + b.indices.before))[4] = 99;
  const pm_status got = run_batch(&b);
  CHECK(got == PM_BAD_CARDINALITY, "k_max > experts, and an index: %s", pm_status_text(got));
  end_batch(&b);
}

void test_status(void) {
  for (int status = -1; status < 8; ++status) {
    const char *text = pm_status_text((pm_status)status);
    CHECK(text && *text, "status %d has no text", status);
  }
  no_shape_f32();
  no_shape_f64();
  for (int is_double = 0; is_double < 2; ++is_double) {
    for (int id = 0; id < OPERATORS; ++id) {
      wrong_shapes(&operators[id], is_double);
      missing_pointers(&operators[id], is_double);
      const call nothing = {.shape = shape_of(0, 4, 1, 2)};
      CHECK(operators[id].run[is_double](&nothing) == PM_OK, "%s: no rows need no memory", operators[id].name);
    }
    wrong_indices(is_double);
  }
  static const int64_t wrong[][2] = {{0, 0}, {-1, 0}, {4, 5}, {4, -1}, {PM_MAX_EXPERTS + 1, 4}};
  for (size_t n = 0; n < sizeof wrong / sizeof *wrong; ++n)
    CHECK(pm_scratch_size(wrong[n][0], wrong[n][1]) == 0, "scratch of an illegal shape");
  CHECK(pm_scratch_size(PM_MAX_EXPERTS, 8) > 0, "scratch of the largest E");
}
