/* The Gamma, Dirichlet and DirMoE functions: values known to 17 digits, gradients by differences, moments of draws, and
 * what holds for all of them, as in test_layout.c, test_status.c and test_edges.c for subsets. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "check.h"
#include "laws.h"

typedef struct law_batch {
  law_call c;
  const law *of;
  int is_double;
  guard in[LAW_INPUTS], out[LAW_OUTPUTS], indices, out_indices, scratch;
} law_batch;

static void *guarded(guard *g, size_t bytes, size_t misalign, int fill) {
  return memset(begin_guard(g, bytes, misalign), fill, bytes);
}

/* Inputs are 1, indices 0, outputs 0xA5. */
static void begin_law(law_batch *b, int id, int is_double, pm_shape shape, size_t misalign) {
  const size_t real = real_size(is_double), rows = (size_t)shape.rows;
  *b = (law_batch){.of = &laws[id], .is_double = is_double, .c = {.shape = shape, .seed = 77}};
  for (int n = 0; n < LAW_INPUTS; ++n) {
    const size_t count = n == 0 ? rows * (size_t)shape.stride : rows * (size_t)width_of(b->of->in[n], &shape);
    void *to = guarded(&b->in[n], count * real, 0, 0);
    for (size_t i = 0; i < count; ++i) put(to, is_double, (int64_t)i, 1);
    b->c.in[n] = to;
  }
  for (int n = 0; n < LAW_OUTPUTS; ++n)
    b->c.out[n] = guarded(&b->out[n], rows * (size_t)width_of(b->of->out[n], &shape) * real, 0, 0xA5);
  const size_t slots = rows * (size_t)shape.k_max * sizeof(int64_t);
  b->c.indices = guarded(&b->indices, slots, 0, 0);
  b->c.out_indices = guarded(&b->out_indices, slots, 0, 0xA5);
  b->c.scratch = guarded(&b->scratch, pm_scratch_size(shape.experts, shape.k_max), misalign, 0xFF);
}

static void set_in(law_batch *b, int n, int64_t row, int64_t i, double value) {
  const int64_t stride = n == 0 ? b->c.shape.stride : width_of(b->of->in[n], &b->c.shape);
  put((void *)(b->in[n].block + b->in[n].before), b->is_double, row * stride + i, value);
}

static double out_at(const law_batch *b, int n, int64_t i) { return get(b->c.out[n], b->is_double, i); }

static void end_law(law_batch *b) {
  int intact = end_guard(&b->indices) & end_guard(&b->out_indices) & end_guard(&b->scratch);
  for (int n = 0; n < LAW_INPUTS; ++n) intact &= end_guard(&b->in[n]);
  for (int n = 0; n < LAW_OUTPUTS; ++n) intact &= end_guard(&b->out[n]);
  CHECK(intact, "%s wrote outside its outputs", b->of->name);
}

/* Positive numbers of many sizes for every input, the same for the same row number. */
static void fill_law(law_batch *b) {
  const pm_shape *s = &b->c.shape;
  for (int64_t t = 0; t < s->rows; ++t) {
    uint64_t state = (uint64_t)(s->first_row + t) * 2654435761u + 99;
    for (int n = 0; n < LAW_INPUTS; ++n)
      for (int64_t i = 0; i < width_of(b->of->in[n], s); ++i) set_in(b, n, t, i, exp(random_normal(&state)));
    int64_t *slots = (int64_t *)(void *)(b->indices.block + b->indices.before);
    for (int64_t j = 0; j < s->k_max; ++j) slots[t * s->k_max + j] = j;
  }
}

/* Any cut of the batch, any stride, any scratch: the bits of the whole. */
static void splits(int id, int is_double, int64_t experts) {
  pm_shape s = shape_of(37, experts, experts / 3, (experts + 1) / 2);
  s.first_row = (int64_t)1 << 33;
  law_batch whole, part;
  begin_law(&whole, id, is_double, s, 0);
  fill_law(&whole);
  pm_status status = whole.of->run[is_double](&whole.c);
  CHECK(status == PM_OK, "%s: %s", whole.of->name, pm_status_text(status));
  for (int n = 0; n < LAW_OUTPUTS; ++n)
    for (size_t i = 0; i < whole.out[n].bytes; i += real_size(is_double))
      CHECK(!untouched((const char *)whole.c.out[n] + i, real_size(is_double)), "%s: unwritten output", whole.of->name);
  for (int64_t begin = 0, step = 1; begin < 37; begin += step, step = step * 2 + 1) {
    pm_shape piece = s;
    piece.rows = begin + step < 37 ? step : 37 - begin;
    piece.first_row += begin;
    piece.stride += 3;
    begin_law(&part, id, is_double, piece, 13);
    fill_law(&part);
    status = part.of->run[is_double](&part.c);
    CHECK(status == PM_OK, "%s: %s", part.of->name, pm_status_text(status));
    for (int n = 0; n < LAW_OUTPUTS; ++n) {
      const size_t row = whole.out[n].bytes / 37;
      CHECK(!memcmp((const char *)whole.c.out[n] + (size_t)begin * row, part.c.out[n], part.out[n].bytes),
            "%s_f%d E=%lld output %d: rows from %lld differ from the whole's", part.of->name, is_double ? 64 : 32,
            (long long)experts, n, (long long)begin);
    }
    CHECK(!part.of->out_indices || !memcmp(whole.c.out_indices + begin * s.k_max, part.c.out_indices,
                                           (size_t)(piece.rows * s.k_max) * sizeof(int64_t)),
          "%s: indices of rows from %lld differ", part.of->name, (long long)begin);
    end_law(&part);
  }
  end_law(&whole);
}

static void statuses(int id, int is_double) {
  const pm_shape legal = shape_of(3, 5, 1, 2), no_rows = shape_of(0, 5, 1, 2), narrow = {3, 5, 1, 2, 4, 0};
  law_batch b;
  for (int missing = 0; missing < LAW_INPUTS + LAW_OUTPUTS + 3; ++missing) {
    begin_law(&b, id, is_double, legal, 0);
    int needed = 1;
    if (missing < LAW_INPUTS) {
      b.c.in[missing] = NULL;
      needed = b.of->in[missing] != NONE;
      /* Deciding, there are no draws to look at. */
      if (id == DIRMOE_DECIDE_BACKWARD && (missing == 3 || missing == 4)) needed = 0;
    } else if (missing < LAW_INPUTS + LAW_OUTPUTS) {
      b.c.out[missing - LAW_INPUTS] = NULL;
      needed = b.of->out[missing - LAW_INPUTS] != NONE;
    } else if (missing == LAW_INPUTS + LAW_OUTPUTS) {
      b.c.scratch = NULL;
      needed = b.of->scratch;
    } else if (missing == LAW_INPUTS + LAW_OUTPUTS + 1) {
      b.c.indices = NULL;
      needed = b.of->indices != NONE;
    } else {
      b.c.out_indices = NULL;
      needed = b.of->out_indices != NONE;
    }
    const pm_status got = b.of->run[is_double](&b.c);
    CHECK(got == (needed ? PM_NULL_POINTER : PM_OK), "%s without pointer %d: %s", b.of->name, missing,
          pm_status_text(got));
    end_law(&b);
  }
  begin_law(&b, id, is_double, no_rows, 0);
  CHECK(b.of->run[is_double](&b.c) == PM_OK, "%s of no rows", b.of->name);
  b.c.shape = narrow;
  CHECK(b.of->run[is_double](&b.c) == PM_BAD_SHAPE, "%s of rows that overlap", b.of->name);
  b.c.shape = shape_of(-1, 5, 1, 2);
  CHECK(b.of->run[is_double](&b.c) == PM_BAD_SHAPE, "%s of -1 rows", b.of->name);
  end_law(&b);
}

/* A NaN in the first input spoils its row (in the Gamma family its element), and no other. */
static void poison(int id, int is_double) {
  law_batch clean, spoilt;
  const pm_shape s = shape_of(5, 6, 1, 3);
  begin_law(&clean, id, is_double, s, 0);
  begin_law(&spoilt, id, is_double, s, 0);
  fill_law(&clean);
  fill_law(&spoilt);
  set_in(&spoilt, 0, 2, 4, NAN);
  if (id == DIRICHLET_SAMPLE_BACKWARD) set_in(&spoilt, 1, 2, 4, NAN); /* as the draw was */
  clean.of->run[is_double](&clean.c);
  spoilt.of->run[is_double](&spoilt.c);
  for (int n = 0; n < LAW_OUTPUTS; ++n) {
    if ((id == DIRMOE_DRAW) && n > 2) continue; /* what is kept for the backward pass */
    const int64_t width = width_of(laws[id].out[n], &s);
    for (int64_t i = 0; i < 5 * width; ++i) {
      const int touched = id < DIRICHLET_SAMPLE ? i == 2 * width + 4 : i / width == 2;
      CHECK(touched ? isnan(out_at(&spoilt, n, i)) : out_at(&spoilt, n, i) == out_at(&clean, n, i),
            "%s output %d[%lld] beside a NaN: %g", laws[id].name, n, (long long)i, out_at(&spoilt, n, i));
    }
  }
  for (int64_t j = 0; laws[id].out_indices && j < 3; ++j)
    CHECK(spoilt.c.out_indices[6 + j] == j, "%s: indices of a spoilt row", laws[id].name);
  end_law(&clean);
  end_law(&spoilt);
}

/* alpha, log g, d log g / d alpha (mpmath): every region, in and beyond the quantiles 1e-3 .. 1 - 1e-3. */
static const double slopes[][3] = {
    {0.001, -1204.5491979242192, 1203973.6259924089},
    {0.4, -11.811952453697032, 29.37658483009301},
    {1.0, -0.36651292058166401, 1.3965934762369348},
    {2.5, 2.3280094208609938, 0.19398646020121211},
    {80.0, 4.2820914649413275, 0.013162383916003241},
    {9000.0, 9.1184214202058289, 0.00011036807430528986},
    {5.0, -3.0, 0.94936983754925876},
    {0.2, 3.0, 0.39975146968795506},
};

static void known_values(int is_double) {
  const double tolerance = is_double ? 2e-12 : 3e-6;
  const int64_t count = (int64_t)(sizeof slopes / sizeof *slopes);
  law_batch b;
  begin_law(&b, LOG_GAMMA_SAMPLE_BACKWARD, is_double, shape_of(count, 1, 0, 0), 0);
  for (int64_t t = 0; t < count; ++t)
    for (int n = 0; n < 2; ++n) set_in(&b, n, t, 0, slopes[t][n]);
  b.of->run[is_double](&b.c);
  for (int64_t t = 0; t < count; ++t)
    CHECK(fabs(out_at(&b, 0, t) / slopes[t][2] - 1) <= tolerance, "slope at alpha = %g: %.17g", slopes[t][0],
          out_at(&b, 0, t));
  end_law(&b);
  static const double p[] = {0.25, 2, 7.5}, q[] = {1.5, 0.5, 3}, theta[] = {0.125, 0.5, 0.375};
  static const double want[] = {-2.0891379902823368, -4.6476269497732938, 5.4961260411090937};
  static const int ids[] = {DIRICHLET_LOG_PROB, DIRICHLET_ENTROPY, DIRICHLET_KL};
  for (int n = 0; n < 3; ++n) {
    begin_law(&b, ids[n], is_double, shape_of(1, 3, 0, 0), 0);
    for (int64_t i = 0; i < 3; ++i) {
      set_in(&b, 0, 0, i, p[i]);
      if (n != 1) set_in(&b, 1, 0, i, n == 0 ? theta[i] : q[i]);
    }
    b.of->run[is_double](&b.c);
    CHECK(fabs(out_at(&b, 0, 0) / want[n] - 1) <= (is_double ? 1e-14 : 1e-7), "%s: %.17g", b.of->name,
          out_at(&b, 0, 0));
    end_law(&b);
  }
}

/* Gradients of the closed forms against central differences, in double precision. */
static void gradients(int value_id, int gradient_id) {
  const int64_t E = 4;
  law_batch g, v;
  begin_law(&g, gradient_id, 1, shape_of(6, E, 0, 0), 0);
  fill_law(&g);
  const int inputs = laws[value_id].in[1] == NONE ? 1 : 2, upstream = inputs;
  for (int64_t t = 0; t < 6; ++t) set_in(&g, upstream, t, 0, 1);
  g.of->run[1](&g.c);
  for (int n = 0; n < inputs; ++n)
    for (int64_t i = 0; i < E; ++i) {
      double side[2][6];
      for (int up = 0; up < 2; ++up) {
        begin_law(&v, value_id, 1, shape_of(6, E, 0, 0), 0);
        fill_law(&v);
        for (int64_t t = 0; t < 6; ++t) {
          const double x = get(v.c.in[n], 1, t * E + i);
          set_in(&v, n, t, i, x * (1 + (up ? 1e-5 : -1e-5)));
        }
        v.of->run[1](&v.c);
        for (int64_t t = 0; t < 6; ++t) side[up][t] = out_at(&v, 0, t);
        end_law(&v);
      }
      for (int64_t t = 0; t < 6; ++t) {
        const double x = get(g.c.in[n], 1, t * E + i), slope = (side[1][t] - side[0][t]) / (2e-5 * x);
        const double got = out_at(&g, n, t * E + i);
        CHECK(fabs(got - slope) <= 1e-6 * (1 + fabs(slope)), "%s output %d: %g, by differences %g", g.of->name, n, got,
              slope);
      }
    }
  end_law(&g);
}

/* Mean of log g within 4 standard errors of psi(alpha), whose variance is psi'(alpha); rows or seeds as the stream. */
static void moments(int is_double, double alpha, double mean, double variance) {
  const int64_t draws = quick ? 500 : 20000;
  for (int by_seed = 0; by_seed < 2; ++by_seed) {
    law_batch b;
    begin_law(&b, LOG_GAMMA_SAMPLE, is_double, shape_of(by_seed ? 1 : draws, 1, 0, 0), 0);
    for (int64_t t = 0; t < b.c.shape.rows; ++t) set_in(&b, 0, t, 0, alpha);
    double sum = 0;
    for (int64_t n = 0; n < (by_seed ? draws : 1); ++n) {
      b.c.seed = (uint64_t)n;
      b.of->run[is_double](&b.c);
      for (int64_t t = 0; t < b.c.shape.rows; ++t) sum += out_at(&b, 0, t);
    }
    CHECK(fabs(sum / (double)draws - mean) <= 4 * sqrt(variance / (double)draws), "alpha = %g: mean of log g is %g",
          alpha, sum / (double)draws);
    end_law(&b);
  }
}

void test_laws(void) {
  static const int64_t widths[] = {1, 5, 16, 64, 67};
  for (int id = 0; id < LAWS; ++id)
    for (int is_double = 0; is_double < 2; ++is_double) {
      for (size_t n = 0; n < sizeof widths / sizeof *widths; n += quick ? 2 : 1) splits(id, is_double, widths[n]);
      statuses(id, is_double);
      poison(id, is_double);
    }
  for (int is_double = 0; is_double < 2; ++is_double) {
    known_values(is_double);
    moments(is_double, 0.05, -20.4978449912998692, 401.532357342115075);
    moments(is_double, 3, 0.922784335098467139, 0.394934066848226436);
  }
  gradients(DIRICHLET_LOG_PROB, DIRICHLET_LOG_PROB_BACKWARD);
  gradients(DIRICHLET_ENTROPY, DIRICHLET_ENTROPY_BACKWARD);
  gradients(DIRICHLET_KL, DIRICHLET_KL_BACKWARD);
  pm_dirmoe wrong = {0.0, 2.0, 1.5, 2.0, 0.25, 1, 1};
  const pm_shape s = shape_of(0, 4, 1, 2);
  CHECK(pm_route_dirmoe_f32(&s, &wrong, NULL, NULL, NULL, 0, NULL, NULL, NULL, NULL, NULL, NULL, NULL) == PM_BAD_OPTION,
        "temperature 0");
}

/* Bits of every function on fixed inputs, which instruction sets with fused multiply-add must share. */
uint64_t laws_digest(void) {
  uint64_t hash = 0xCBF29CE484222325u;
  for (int id = 0; id < LAWS; ++id)
    for (int is_double = 0; is_double < 2; ++is_double) {
      law_batch b;
      begin_law(&b, id, is_double, shape_of(37, 67, 3, 8), 0);
      fill_law(&b);
      b.of->run[is_double](&b.c);
      for (int n = 0; n < LAW_OUTPUTS; ++n)
        for (size_t i = 0; i < b.out[n].bytes; ++i)
          hash = (hash ^ ((const unsigned char *)b.c.out[n])[i]) * 0x100000001B3u;
      end_law(&b);
    }
  return hash;
}
