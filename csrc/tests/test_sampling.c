/* Frequencies of draws against enumerated probabilities, seeds fixed: rows as the stream, seeds as the stream, and
 * pairs of neighbouring rows. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "oracle.h"

/* Chi-square over the bins that expect at least five, the others pooled; as a standard normal deviate (Wilson &
 * Hilferty 1931). A bin that cannot happen and did is a failure by itself. */
static double deviate(const double *probability, const int64_t *count, int bins, double draws) {
  double statistic = 0, rare = 0, rare_count = 0;
  int freedom = -1;
  for (int n = 0; n < bins; ++n) {
    if (probability[n] == 0 && count[n] > 0) return INFINITY;
    const double want = draws * probability[n], got = (double)count[n];
    if (want < 5) {
      rare += want;
      rare_count += got;
      continue;
    }
    statistic += (got - want) * (got - want) / want;
    ++freedom;
  }
  if (rare >= 5) {
    statistic += (rare_count - rare) * (rare_count - rare) / rare;
    ++freedom;
  }
  if (freedom < 1) return 0;
  const double spread = 2.0 / (9.0 * freedom);
  return (cbrt(statistic / freedom) - (1 - spread)) / sqrt(spread);
}

enum stream { BY_ROW, BY_SEED, STREAMS };

static void frequencies(int is_double, int experts, int k_min, int k_max, int family, enum stream stream) {
  const int64_t draws = quick ? 800 : 20000;
  double row[ORACLE_EXPERTS];
  uint64_t state = 7;
  oracle o;
  batch b;
  int64_t count[ORACLE_SUBSETS] = {0};
  fill_row(row, experts, family, k_min > 2 ? k_min : 2, &state);
  const int64_t rows = stream == BY_ROW ? draws : 1;
  begin_batch(&b, &operators[stream == BY_ROW ? SAMPLE : ROUTE_SAMPLE], is_double,
              shape_of(rows, experts, k_min, k_max));
  for (int64_t t = 0; t < rows; ++t)
    for (int i = 0; i < experts; ++i) set_logit(&b, t, i, row[i]);
  for (int i = 0; i < experts; ++i) row[i] = get_logit(&b, 0, i);
  enumerate(&o, row, experts, k_min, k_max);
  for (int64_t n = 0; n < draws; n += rows) {
    b.c.seed = (uint64_t)n + 123;
    CHECK(run_batch(&b) == PM_OK, "sample");
    for (int64_t t = 0; t < rows; ++t) ++count[subset_bits(chosen(&b, t), k_max, experts)];
  }
  const double z = deviate(o.probability, count, 1 << experts, (double)draws);
  CHECK(fabs(z) < 5, "f%d E=%d band %d..%d family %d stream %d: %g standard deviations", is_double ? 64 : 32, experts,
        k_min, k_max, family, (int)stream, z);
  end_batch(&b);
}

/* k = 1 of three: draws of neighbouring rows are independent. */
static void neighbours(int is_double) {
  const int64_t draws = quick ? 800 : 20000;
  batch b;
  double probability[9];
  int64_t count[9] = {0};
  begin_batch(&b, &operators[SAMPLE], is_double, shape_of(2 * draws, 3, 1, 1));
  for (int64_t t = 0; t < 2 * draws; ++t) set_logit(&b, t, 0, log(2));
  CHECK(run_batch(&b) == PM_OK, "sample");
  for (int64_t t = 0; t < 2 * draws; t += 2) ++count[3 * *chosen(&b, t) + *chosen(&b, t + 1)];
  for (int n = 0; n < 9; ++n) probability[n] = (n / 3 == 0 ? 0.5 : 0.25) * (n % 3 == 0 ? 0.5 : 0.25);
  const double z = deviate(probability, count, 9, (double)draws);
  CHECK(fabs(z) < 5, "neighbouring rows: %g standard deviations", z);
  end_batch(&b);
}

/* A uniform of exactly 0 leads to the rarest subset, where products are subnormal and may round up. Word 0 of the seed
 * below is < 256, and the next is large. */
static void rarest_subset(void) {
  const double row[] = {-87, -14.5, 0, 0};
  batch b;
  begin_batch(&b, &operators[SAMPLE], 0, shape_of(1, 4, 3, 3));
  for (int i = 0; i < 4; ++i) set_logit(&b, 0, i, row[i]);
  b.c.seed = 410640897;
  CHECK(run_batch(&b) == PM_OK, "sample");
  const int64_t *got = chosen(&b, 0);
  CHECK(got[0] < got[1] && got[1] < got[2], "the rarest subset has repeated members: %d %d %d", (int)got[0],
        (int)got[1], (int)got[2]);
  end_batch(&b);
}

/* Several draws of each row are those of a batch that repeats it, whether or not the table fits at once. */
static void repeated(int64_t experts, int k_min, int k_max, double spread) {
  enum { ROWS = 19, SAMPLES = 5 };
  const pm_shape once = shape_of(ROWS, experts, k_min, k_max), all = shape_of(ROWS * SAMPLES, experts, k_min, k_max);
  const size_t slots = (size_t)(ROWS * SAMPLES * k_max);
  float *logits = malloc((size_t)(ROWS * SAMPLES * experts) * sizeof *logits);
  int64_t *several = malloc(slots * sizeof *several), *single = malloc(slots * sizeof *single);
  void *scratch = malloc(pm_scratch_size(experts, k_max));
  uint64_t state = 11;
  for (int64_t i = 0; i < ROWS * experts; ++i) logits[i] = (float)(spread * random_normal(&state));
  for (int n = 1; n < SAMPLES; ++n)
    memcpy(logits + n * ROWS * experts, logits, (size_t)(ROWS * experts) * sizeof *logits);
  CHECK(pm_subset_sample_f32(&once, logits, 5, SAMPLES, ROWS, several, scratch) == PM_OK, "several samples");
  CHECK(pm_subset_sample_f32(&all, logits, 5, 1, 0, single, scratch) == PM_OK, "one sample");
  CHECK(memcmp(several, single, slots * sizeof *several) == 0, "E=%d band %d..%d spread %g: samples differ",
        (int)experts, k_min, k_max, spread);
  CHECK(pm_subset_sample_f32(&once, logits, 5, 2, ROWS - 1, several, scratch) == PM_BAD_SHAPE, "overlapping samples");
  CHECK(pm_subset_sample_f32(&once, logits, 5, -1, ROWS, several, scratch) == PM_BAD_SHAPE, "negative samples");
  free(logits), free(several), free(single), free(scratch);
}

void test_sampling(void) {
  rarest_subset();
  for (int peaked = 0; peaked < 2; ++peaked) {
    repeated(64, 8, 8, peaked ? 30 : 1);
    repeated(60, 2, 4, peaked ? 30 : 1);
    repeated(1000, 30, 40, peaked ? 30 : 1);
  }
  static const int bands[][3] = {{8, 3, 3}, {8, 0, 8}, {8, 2, 4}, {5, 1, 1},
                                 {6, 5, 6}, {4, 0, 1}, {7, 4, 4}, {1, 0, 1}};
  static const int families[] = {0, 3, 6, 8, 9};
  for (int is_double = 0; is_double < 2; ++is_double) {
    for (size_t n = 0; n < sizeof bands / sizeof *bands; ++n)
      for (size_t f = 0; f < sizeof families / sizeof *families; ++f)
        for (int stream = 0; stream < STREAMS; ++stream)
          frequencies(is_double, bands[n][0], bands[n][1], bands[n][2], families[f], (enum stream)stream);
    neighbours(is_double);
  }
}
