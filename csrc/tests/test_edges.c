/* The ends of every range: empty and full subsets, one expert, masks, rows that have no answer, ties. */
#include <math.h>
#include <string.h>

#include "check.h"

/* Rows of each kind between ordinary ones, so that a bad row shares its block with good ones. */
enum kind { ORDINARY, NAN_ROW, PLUS_INFINITY, INFEASIBLE, ALL_MASKED, KINDS };

static enum kind kind_of(int64_t t) { return (enum kind)(t % KINDS); }

static int has_no_answer(enum kind kind, const pm_shape *s) {
  return kind == NAN_ROW || kind == PLUS_INFINITY || ((kind == INFEASIBLE || kind == ALL_MASKED) && s->k_min > 0);
}

static void make_rows(batch *b, uint64_t *state) {
  const pm_shape *s = &b->c.shape;
  fill_batch(b, 0, 0, state);
  for (int64_t t = 0; t < s->rows; ++t) {
    const int64_t at = random_below(state, s->experts);
    if (kind_of(t) == NAN_ROW) set_logit(b, t, at, NAN);
    if (kind_of(t) == PLUS_INFINITY) set_logit(b, t, at, INFINITY);
    for (int64_t i = 0; i < s->experts; ++i)
      if (kind_of(t) == ALL_MASKED || (kind_of(t) == INFEASIBLE && i + 1 >= s->k_min)) set_logit(b, t, i, -INFINITY);
  }
}

static void rows_without_answer(const operation *op, int is_double, pm_shape shape) {
  batch b, alone;
  uint64_t state = 99;
  begin_batch(&b, op, is_double, shape);
  make_rows(&b, &state);
  fill_companions(&b, &state);
  const pm_status status = run_batch(&b);
  CHECK(status == (shape.k_min > 0 ? PM_INFEASIBLE : PM_OK), "%s: %s", op->name, pm_status_text(status));
  CHECK(infeasible_row(is_double, &shape, b.c.logits) == (shape.k_min > 0 ? (int64_t)INFEASIBLE : -1),
        "the first infeasible row");
  const int64_t out = width_of(op->out, &shape), slots = width_of(op->out_indices, &shape);
  for (int64_t t = 0; t < shape.rows; ++t) {
    const int none = has_no_answer(kind_of(t), &shape);
    for (int64_t j = 0; j < out; ++j) {
      const double value = output(&b, t, j);
      CHECK(none ? isnan(value) : !isnan(value), "%s_f%d E=%lld band %lld..%lld row %lld (kind %d): %g", op->name,
            is_double ? 64 : 32, (long long)shape.experts, (long long)shape.k_min, (long long)shape.k_max, (long long)t,
            (int)kind_of(t), value);
    }
    for (int64_t j = 0; j < slots; ++j) {
      const int64_t e = chosen(&b, t)[j];
      CHECK(none ? e == j : e >= 0 && e <= shape.experts, "%s row %lld: index %lld", op->name, (long long)t,
            (long long)e);
    }
    /* An ordinary row does not notice its neighbours. */
    if (none) continue;
    pm_shape one = shape;
    one.rows = 1;
    one.first_row = shape.first_row + t;
    begin_batch(&alone, op, is_double, one);
    for (int64_t i = 0; i < shape.experts; ++i) set_logit(&alone, 0, i, get_logit(&b, t, i));
    const size_t vector = alone.vector.bytes, indices = alone.indices.bytes;
    memcpy(alone.vector.block + alone.vector.before, (const char *)b.c.vector + (size_t)t * vector, vector);
    memcpy(alone.indices.block + alone.indices.before, (const char *)b.c.indices + (size_t)t * indices, indices);
    CHECK(run_batch(&alone) == PM_OK, "%s: an ordinary row alone", op->name);
    CHECK(!memcmp(alone.c.out, (char *)b.c.out + (size_t)t * alone.out.bytes, alone.out.bytes) &&
              !memcmp(alone.c.out_indices, chosen(&b, t), alone.out_indices.bytes),
          "%s_f%d row %lld differs beside rows without an answer", op->name, is_double ? 64 : 32, (long long)t);
    end_batch(&alone);
  }
  end_batch(&b);
}

static double first(operation_id id, int is_double, pm_shape shape, const double *row, int64_t j) {
  batch b;
  begin_batch(&b, &operators[id], is_double, shape);
  for (int64_t i = 0; i < shape.experts; ++i) set_logit(&b, 0, i, row[i]);
  const pm_status status = run_batch(&b);
  CHECK(status == PM_OK, "%s: %s", operators[id].name, pm_status_text(status));
  const double value = operators[id].out ? output(&b, 0, j) : (double)chosen(&b, 0)[j];
  end_batch(&b);
  return value;
}

static void empty_and_full(int is_double) {
  const double row[] = {0.5, -2, 3, 1};
  const pm_shape empty = shape_of(1, 4, 0, 0), full = shape_of(1, 4, 4, 4), one = shape_of(1, 1, 0, 1);
  CHECK(first(LOG_PARTITION, is_double, empty, row, 0) == 0, "log Z of k = 0");
  CHECK(first(ENTROPY, is_double, empty, row, 0) == 0, "entropy of k = 0");
  CHECK(first(CARDINALITY, is_double, empty, row, 0) == 1, "P(|S| = 0) of k = 0");
  CHECK(first(LOG_PROB, is_double, empty, row, 0) == 0, "log P of the empty set");
  CHECK(fabs(first(LOG_PARTITION, is_double, full, row, 0) - 2.5) < 1e-6, "log Z of k = E");
  CHECK(fabs(first(ENTROPY, is_double, full, row, 0)) < 1e-6, "entropy of k = E");
  for (int64_t i = 0; i < 4; ++i) {
    CHECK(first(MARGINALS, is_double, empty, row, i) == 0, "marginal of k = 0");
    CHECK(fabs(first(MARGINALS, is_double, full, row, i) - 1) < 1e-6, "marginal of k = E");
    CHECK(first(SAMPLE, is_double, full, row, i) == (double)i, "sample of k = E");
  }
  CHECK(fabs(first(MARGINALS, is_double, one, row, 0) - 1 / (1 + exp(-0.5))) < 1e-6, "E = 1: the logistic function");
  const double masked[] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};
  CHECK(first(LOG_PARTITION, is_double, shape_of(1, 4, 0, 3), masked, 0) == 0, "all masked, band 0..3");
  CHECK(first(MODE, is_double, shape_of(1, 4, 0, 3), masked, 0) == 4, "all masked: the mode is empty");
}

/* Ties go to the lower index, whatever surrounds them; all E values equal gives 0, 1, 2, ... */
static void ties(int is_double) {
  const double row[] = {1, 2, 1, 2, 1, 2, 0, -0.0, 0};
  const double want[] = {1, 3, 5, 0, 2, 4, 6, 7, 8};
  for (int64_t k = 1; k <= 9; ++k)
    for (int64_t j = 0; j < k; ++j)
      CHECK(first(MODE, is_double, shape_of(1, 9, k, k), row, j) == want[j], "ties, k = %lld, slot %lld", (long long)k,
            (long long)j);
  double equal[70];
  for (int i = 0; i < 70; ++i) equal[i] = -1.5;
  for (int64_t k = 1; k <= 40; k += 13)
    for (int64_t j = 0; j < k; ++j)
      CHECK(first(ROUTE_MODE, is_double, shape_of(1, 70, k, k), equal, j) > 0 &&
                first(MODE, is_double, shape_of(1, 70, k, k), equal, j) == (double)j,
            "equal logits, k = %lld, slot %lld", (long long)k, (long long)j);
}

/* Logits that agree in all but their last bits are ranked by them, and equal ones by their index: rows of numbers a few
 * units in the last place apart, of either sign, with duplicates. */
static void near_ties(int is_double) {
  static const int64_t shapes[][2] = {{70, 8}, {60, 4}, {200, 8}, {33, 20}, {9, 9}};
  uint64_t state = 3;
  for (size_t n = 0; n < sizeof shapes / sizeof *shapes; ++n) {
    const int64_t E = shapes[n][0], k = shapes[n][1], rows = 37;
    batch b;
    begin_batch(&b, &operators[MODE], is_double, shape_of(rows, E, k, k));
    for (int64_t t = 0; t < rows; ++t)
      for (int64_t i = 0; i < E; ++i) {
        const double step = (double)random_below(&state, t % 3 == 0 ? 4 : 300) * (is_double ? 0x1p-52 : 0x1p-23);
        set_logit(&b, t, i, (t % 2 ? -1 : 1) * (1 + step));
      }
    CHECK(run_batch(&b) == PM_OK, "mode");
    for (int64_t t = 0; t < rows; ++t)
      for (int64_t j = 0; j < k; ++j) {
        const int64_t own = chosen(&b, t)[j];
        int64_t ahead = 0;
        for (int64_t i = 0; i < E; ++i) {
          const double mine = get_logit(&b, t, own), other = get_logit(&b, t, i);
          ahead += other > mine || (other == mine && i < own);
        }
        CHECK(ahead == j, "f%d E=%lld row %lld: expert %lld of rank %lld in slot %lld", is_double ? 64 : 32,
              (long long)E, (long long)t, (long long)own, (long long)ahead, (long long)j);
      }
    end_batch(&b);
  }
}

/* What log_prob refuses without an error. */
static void impossible_subsets(int is_double) {
  const struct {
    const char *what;
    int64_t slots[3];
    int possible;
  } cases[] = {{"two members", {2, 0, 4}, 1}, {"in any slots", {4, 2, 0}, 1}, {"three members", {0, 2, 3}, 1},
               {"too few", {4, 4, 0}, 0},     {"repeated", {2, 2, 0}, 0},     {"masked", {1, 2, 4}, 0}};
  for (size_t n = 0; n < sizeof cases / sizeof *cases; ++n) {
    batch b;
    begin_batch(&b, &operators[LOG_PROB], is_double, shape_of(1, 4, 2, 3));
    set_logit(&b, 0, 0, 0.5);
    set_logit(&b, 0, 1, -INFINITY);
    set_logit(&b, 0, 3, 2);
    memcpy(b.indices.block + b.indices.before, cases[n].slots, sizeof cases[n].slots);
    CHECK(run_batch(&b) == PM_OK, "%s", cases[n].what);
    const double value = output(&b, 0, 0);
    CHECK(cases[n].possible ? value < 0 && value > -10 : value == -INFINITY, "%s: %g", cases[n].what, value);
    end_batch(&b);
  }
}

void test_edges(void) {
  static const int64_t shapes[][3] = {{6, 2, 2}, {6, 2, 4}, {6, 0, 3}, {6, 6, 6}, {40, 9, 9}, {40, 3, 36}, {300, 4, 6}};
  for (int is_double = 0; is_double < 2; ++is_double) {
    for (size_t n = 0; n < sizeof shapes / sizeof *shapes; ++n)
      for (int id = 0; id < OPERATORS; ++id)
        rows_without_answer(&operators[id], is_double, shape_of(23, shapes[n][0], shapes[n][1], shapes[n][2]));
    empty_and_full(is_double);
    ties(is_double);
    near_ties(is_double);
    impossible_subsets(is_double);
  }
}
