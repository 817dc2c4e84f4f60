/* Every function on arbitrary shapes, bands, bit patterns, seeds and indices. What must hold whatever comes in:
 * statuses as documented, indices in range, distinct and in number within the band, weights and probabilities in range,
 * no NaN for a row that has an answer and only NaN for one that has none, and the same bits however the batch is cut.
 * Memory is of the exact size, for the address sanitizer to guard.
 *
 * LLVMFuzzerTestOneInput is libFuzzer's entry; with PM_FUZZ_MAIN a driver feeds it random bytes instead:
 *   fuzz-random SECONDS [FIRST [COUNT]]   inputs number FIRST, FIRST + 1, ... */
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "laws.h"
#include "operators.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* ---- the input: bytes first, then the shape's own random stream ---- */

typedef struct source {
  const uint8_t *data;
  size_t size, at;
} source;

static uint64_t take(source *in, int bytes) {
  uint64_t value = 0;
  for (int n = 0; n < bytes; ++n) value = value << 8 | (in->at < in->size ? in->data[in->at++] : 0);
  return value;
}

typedef struct problem {
  pm_shape shape;
  int is_double, style, wild; /* wild: vectors are arbitrary as well, and their results are not looked at */
  size_t misalign;
  uint64_t seed, state;
  void *logits, *scratch_block;
  char *scratch;
  void *vector[OPERATORS], *out[OPERATORS];
  int64_t *indices[OPERATORS], *out_indices[OPERATORS];
} problem;

static void describe(const problem *p) {
  const pm_shape *s = &p->shape;
  fprintf(stderr,
          "f%d rows=%" PRId64 " experts=%" PRId64 " band %" PRId64 "..%" PRId64 " stride=%" PRId64 " first_row=%" PRId64
          " seed=%" PRIu64 " style=%d, %s\n",
          p->is_double ? 64 : 32, s->rows, s->experts, s->k_min, s->k_max, s->stride, s->first_row, p->seed, p->style,
          pm_instruction_set());
}

static void print_row(const problem *p, int64_t t) {
  if (p->shape.experts > 64) return;
  fprintf(stderr, "row %" PRId64 ":", t);
  for (int64_t i = 0; i < p->shape.experts; ++i)
    fprintf(stderr, " %a", get(p->logits, p->is_double, t * p->shape.stride + i));
  fprintf(stderr, "\n");
}

#define REQUIRE(condition, row, ...)                                          \
  do {                                                                        \
    if (!(condition)) {                                                       \
      fprintf(stderr, "fuzz.c:%d: %s does not hold: ", __LINE__, #condition); \
      fprintf(stderr, __VA_ARGS__);                                           \
      fprintf(stderr, "\n");                                                  \
      describe(p);                                                            \
      if ((row) >= 0) print_row(p, row);                                      \
      abort();                                                                \
    }                                                                         \
  } while (0)

static double from_bits(uint64_t bits, int is_double) {
  double wide;
  float narrow;
  const uint32_t low = (uint32_t)bits;
  memcpy(&wide, &bits, sizeof wide);
  memcpy(&narrow, &low, sizeof narrow);
  return is_double ? wide : (double)narrow;
}

static double special(problem *p) {
  static const double values[] = {0,     -0.0,   1,      -1,      0.5,       -0.5,      16,       -16,
                                  87,    -87,    88.8,   -88.8,   103.9,     -103.9,    709.7,    -709.7,
                                  745.2, -745.2, 2000,   -2000,   1e4,       -1e4,      1e30,     -1e30,
                                  1e-30, -1e-30, 3e38,   -3e38,   0x1p-126,  -0x1p-126, 0x1p-149, -0x1p-1074,
                                  1e300, -1e300, 1e-320, -1e-300, -INFINITY, -INFINITY};
  const double value = values[random_below(&p->state, (int64_t)(sizeof values / sizeof *values))];
  return !p->is_double && fabs(value) > 3.4e38 && value > -INFINITY ? copysign(3e38, value) : value;
}

enum style { BYTES, NORMAL, SPECIAL, PATTERN, TIES, MIXED, STYLES };

static double element(problem *p, source *in, int style, double spread, double shift) {
  switch ((enum style)style) {
    case BYTES:
      if (in->at >= in->size) in->at = in->size < 32 ? 0 : 32; /* around again */
      return from_bits(take(in, p->is_double ? 8 : 4), p->is_double);
    case SPECIAL: return special(p);
    case PATTERN: return from_bits(next_random(&p->state), p->is_double);
    case TIES: return shift + (double)random_below(&p->state, 3);
    case MIXED: return element(p, in, (int)random_below(&p->state, MIXED), spread, shift);
    default: return shift + spread * random_normal(&p->state);
  }
}

static void *allocate(size_t bytes) {
  void *memory = malloc(bytes ? bytes : 1);
  if (!memory) abort();
  return memory;
}

static size_t elements(const problem *p, width w) { return (size_t)(p->shape.rows * width_of(w, &p->shape)); }

static void read_shape(problem *p, source *in) {
  const uint64_t flags = take(in, 1), size = take(in, 1), rows = take(in, 1);
  pm_shape *s = &p->shape;
  p->is_double = flags & 1;
  p->wild = (flags & 14) == 14;
  s->experts = 1 + (int64_t)(size < 224 ? size % 40 : take(in, 2) % 420);
  s->k_max = (int64_t)(take(in, 2) % (uint64_t)(s->experts + 1));
  const int64_t cells = 60000; /* an execution stays short, and still takes several segments of experts */
  if (s->experts * (s->k_max + 1) > cells) s->k_max = cells / s->experts - 1;
  const uint64_t least = take(in, 2);
  s->k_min = flags & 16 ? s->k_max : (int64_t)(least % (uint64_t)(s->k_max + 1));
  s->rows = (int64_t)(rows % 21);
  const int64_t affordable = 1 + cells / 4 / (s->experts * (s->k_max + 1));
  if (s->rows > affordable) s->rows = affordable;
  s->stride = s->experts + (int64_t)(flags >> 6);
  s->first_row = (int64_t)(take(in, 6));
  p->seed = take(in, 8);
  p->misalign = (size_t)take(in, 1) % 64;
  p->style = (int)(take(in, 1) % STYLES);
  p->state = p->seed ^ (uint64_t)s->first_row << 7 ^ rows;
}

static void make_inputs(problem *p, source *in) {
  const pm_shape *s = &p->shape;
  const size_t real = real_size(p->is_double);
  const double spread = ldexp(1, (int)(take(in, 1) % 16) - 6);
  const double shift = (double)(int8_t)take(in, 1) * (take(in, 1) % 8 ? 0.125 : 50);
  const int64_t masks = (int64_t)take(in, 1) % 8; /* eighths */
  const int64_t reach = s->rows > 0 ? (s->rows - 1) * s->stride + s->experts : 0;
  p->logits = allocate((size_t)reach * real);
  for (int64_t n = 0; n < reach; ++n) put(p->logits, p->is_double, n, NAN); /* between the rows */
  for (int64_t t = 0; t < s->rows; ++t)
    for (int64_t i = 0; i < s->experts; ++i) {
      double r = element(p, in, p->style, spread, shift);
      if (masks > 3 && random_below(&p->state, 8) < masks - 3) r = -INFINITY;
      put(p->logits, p->is_double, t * s->stride + i, r);
    }
  const size_t scratch = pm_scratch_size(s->experts, s->k_max);
  p->scratch_block = allocate(scratch + p->misalign);
  p->scratch = (char *)p->scratch_block + p->misalign;
  memset(p->scratch_block, 0xFF, scratch + p->misalign);
  for (int id = 0; id < OPERATORS; ++id) {
    const operation *op = &operators[id];
    const size_t vector = elements(p, op->vector), out = elements(p, op->out);
    const size_t indices = elements(p, op->indices), chosen = elements(p, op->out_indices);
    p->vector[id] = allocate(vector * real);
    p->out[id] = allocate(out * real);
    p->indices[id] = allocate(indices * sizeof(int64_t));
    p->out_indices[id] = allocate(chosen * sizeof(int64_t));
    for (size_t n = 0; n < vector; ++n)
      put(p->vector[id], p->is_double, (int64_t)n, p->wild ? element(p, in, MIXED, 1, 0) : random_normal(&p->state));
    for (size_t n = 0; n < indices; ++n) p->indices[id][n] = s->experts;
    memset(p->out[id], 0xA5, out * real);
    for (size_t n = 0; n < chosen; ++n) p->out_indices[id][n] = INT64_MIN;
  }
}

static void release(problem *p) {
  free(p->logits);
  free(p->scratch_block);
  for (int id = 0; id < OPERATORS; ++id) {
    free(p->vector[id]);
    free(p->out[id]);
    free(p->indices[id]);
    free(p->out_indices[id]);
  }
}

static call call_of(const problem *p, int id) {
  return (call){.shape = p->shape,
                .logits = p->logits,
                .vector = p->vector[id],
                .indices = p->indices[id],
                .out = p->out[id],
                .out_indices = p->out_indices[id],
                .scratch = p->scratch,
                .seed = p->seed};
}

/* ---- what must hold ---- */

typedef struct row_kind {
  int none;       /* has no answer */
  int infeasible; /* for want of experts */
  int vast;       /* sums of its logits may leave the range of double: scalars of the row are not looked at */
} row_kind;

static row_kind kind_of(const problem *p, int64_t t) {
  int64_t unmasked = 0;
  int poisoned = 0;
  double reach = 0;
  for (int64_t i = 0; i < p->shape.experts; ++i) {
    const double r = get(p->logits, p->is_double, t * p->shape.stride + i);
    unmasked += r > -INFINITY;
    poisoned |= isnan(r) || r == INFINITY;
    reach = fmax(reach, r > -INFINITY ? fabs(r) : 0);
  }
  const int infeasible = !poisoned && unmasked < p->shape.k_min;
  return (row_kind){poisoned || infeasible, infeasible, reach > 1e300};
}

static void run_all(problem *p) {
  const pm_shape *s = &p->shape;
  int64_t infeasible = -1;
  for (int64_t t = s->rows - 1; t >= 0; --t)
    if (kind_of(p, t).infeasible) infeasible = t;
  REQUIRE(infeasible_row(p->is_double, s, p->logits) == infeasible, infeasible, "pm_infeasible_row");
  /* The selections first: their subsets are what log_prob and the gradients are asked about. */
  static const operation_id order[OPERATORS] = {SAMPLE,
                                                MODE,
                                                ROUTE_SAMPLE,
                                                ROUTE_SAMPLE_NORMALIZED,
                                                ROUTE_MODE,
                                                ROUTE_MODE_NORMALIZED,
                                                LOG_PARTITION,
                                                CARDINALITY,
                                                MARGINALS,
                                                ENTROPY,
                                                COVARIANCE_VP,
                                                CARDINALITY_BACKWARD,
                                                LOG_PROB,
                                                ROUTE_BACKWARD,
                                                ROUTE_BACKWARD_NORMALIZED,
                                                ROUTE_STRAIGHT,
                                                ROUTE_STRAIGHT_NORMALIZED};
  for (int n = 0; n < OPERATORS; ++n) {
    const operation_id id = order[n];
    if (operators[id].indices) memcpy(p->indices[id], p->out_indices[SAMPLE], elements(p, SLOTS) * sizeof(int64_t));
    const call c = call_of(p, id);
    const pm_status status = operators[id].run[p->is_double](&c);
    REQUIRE(status == (infeasible < 0 ? PM_OK : PM_INFEASIBLE), infeasible, "%s: %s", operators[id].name,
            pm_status_text(status));
  }
}

static void check_choice(const problem *p, int id, int64_t t, int none) {
  const pm_shape *s = &p->shape;
  const int64_t *slots = p->out_indices[id] + t * s->k_max;
  const int ascending = id == SAMPLE || id == ROUTE_SAMPLE || id == ROUTE_SAMPLE_NORMALIZED;
  int64_t size = 0;
  for (; size < s->k_max && slots[size] != s->experts; ++size)
    REQUIRE(slots[size] >= 0 && slots[size] < s->experts, t, "%s: index %" PRId64, operators[id].name, slots[size]);
  for (int64_t j = size; j < s->k_max; ++j)
    REQUIRE(slots[j] == s->experts, t, "%s: slot %" PRId64 " after an unused one", operators[id].name, j);
  REQUIRE(size >= s->k_min, t, "%s: %" PRId64 " members", operators[id].name, size);
  for (int64_t j = 0; j < size; ++j) {
    if (none) {
      REQUIRE(slots[j] == j, t, "%s: a row without an answer", operators[id].name);
      continue;
    }
    const double now = get(p->logits, p->is_double, t * s->stride + slots[j]);
    REQUIRE(now > -INFINITY, t, "%s: a masked expert, %" PRId64, operators[id].name, slots[j]);
    if (j == 0) continue;
    const double before = get(p->logits, p->is_double, t * s->stride + slots[j - 1]);
    REQUIRE(ascending ? slots[j] > slots[j - 1] : before > now || (before == now && slots[j] > slots[j - 1]), t,
            "%s: order or repetition at slot %" PRId64, operators[id].name, j);
  }
}

static double epsilon(const problem *p) { return p->is_double ? 1e-11 : 2e-5; }

static void check_weights(const problem *p, int id, int64_t t) {
  const int64_t k = p->shape.k_max;
  double sum = 0;
  for (int64_t j = 0; j < k; ++j) {
    const double w = get(p->out[id], p->is_double, t * k + j);
    REQUIRE(w >= 0 && w <= 1 + epsilon(p), t, "%s: weight %g", operators[id].name, w);
    REQUIRE(p->out_indices[id][t * k + j] < p->shape.experts || w == 0, t, "%s: weight of an unused slot",
            operators[id].name);
    sum += w;
  }
  REQUIRE(sum <= 1 + epsilon(p), t, "%s: weights sum to %g", operators[id].name, sum);
}

static void check_probabilities(const problem *p, int64_t t, int vast) {
  const pm_shape *s = &p->shape;
  const int64_t band = s->k_max - s->k_min + 1;
  double total = 0, size = 0, sum = 0;
  for (int64_t j = 0; j < band; ++j) {
    const double probability = get(p->out[CARDINALITY], p->is_double, t * band + j);
    REQUIRE(probability >= 0 && probability <= 1 + epsilon(p), t, "P(|S| = %" PRId64 ") = %g", s->k_min + j,
            probability);
    total += probability;
    size += probability * (double)(s->k_min + j);
  }
  REQUIRE(fabs(total - 1) <= epsilon(p), t, "sizes sum to %.17g", total);
  for (int64_t i = 0; i < s->experts; ++i) {
    const double m = get(p->out[MARGINALS], p->is_double, t * s->experts + i);
    REQUIRE(m >= 0 && m <= 1 + epsilon(p), t, "marginal %" PRId64 " is %g", i, m);
    REQUIRE(m == 0 || get(p->logits, p->is_double, t * s->stride + i) > -INFINITY, t, "masked marginal");
    sum += m;
  }
  const double allowed = epsilon(p) * fmax(1, (double)s->k_max);
  REQUIRE(sum >= (double)s->k_min - allowed && sum <= (double)s->k_max + allowed, t, "marginals sum to %.17g", sum);
  REQUIRE(fabs(sum - size) <= allowed, t, "marginals sum to %.17g, the expected size is %.17g", sum, size);
  if (vast) return;
  const double entropy = get(p->out[ENTROPY], p->is_double, t);
  REQUIRE(entropy >= -epsilon(p) && entropy <= 0.6931471805599453 * (double)s->experts * (1 + epsilon(p)), t,
          "entropy %.17g", entropy);
  const double likelihood = get(p->out[LOG_PROB], p->is_double, t);
  REQUIRE(likelihood <= epsilon(p) && likelihood > -INFINITY, t, "log P of a draw %.17g", likelihood);
}

static void check_row(const problem *p, int64_t t) {
  const row_kind kind = kind_of(p, t);
  for (int id = 0; id < OPERATORS; ++id) {
    const int64_t out = width_of(operators[id].out, &p->shape);
    if (operators[id].out_indices) check_choice(p, id, t, kind.none);
    for (int64_t j = 0; j < out; ++j) {
      const double value = get(p->out[id], p->is_double, t * out + j);
      const int looked_at = !(p->wild && operators[id].vector) && !(kind.vast && operators[id].out == ONE);
      if (kind.none || looked_at)
        REQUIRE(isnan(value) == kind.none, t, "%s[%" PRId64 "] is %g", operators[id].name, j, value);
    }
    if (operators[id].out_indices && operators[id].out && !kind.none) check_weights(p, id, t);
  }
  const size_t slots = (size_t)p->shape.k_max * sizeof(int64_t), at = (size_t)(t * p->shape.k_max);
  for (int id = ROUTE_SAMPLE; id <= ROUTE_MODE_NORMALIZED; ++id)
    REQUIRE(!memcmp(p->out_indices[id < ROUTE_MODE ? SAMPLE : MODE] + at, p->out_indices[id] + at, slots), t,
            "%s chose another subset", operators[id].name);
  if (!kind.none) check_probabilities(p, t, kind.vast);
}

/* Rows begin..end alone give the bits they have in the whole batch. */
static void check_piece(const problem *p, int id, int64_t begin, int64_t end) {
  const operation *op = &operators[id];
  const pm_shape *s = &p->shape;
  const size_t real = real_size(p->is_double), rows = (size_t)(end - begin), first = (size_t)begin;
  const size_t vector = (size_t)width_of(op->vector, s) * real, out = (size_t)width_of(op->out, s) * real;
  const size_t slots = (size_t)s->k_max;
  call c = call_of(p, id);
  c.shape.rows = end - begin;
  c.shape.first_row += begin;
  c.logits = (const char *)p->logits + (size_t)(begin * s->stride) * real;
  c.vector = (const char *)p->vector[id] + first * vector;
  c.indices = p->indices[id] + (op->indices ? first * slots : 0);
  c.out = allocate(rows * out);
  c.out_indices = allocate(rows * slots * sizeof(int64_t));
  op->run[p->is_double](&c);
  for (int64_t t = begin; t < end; ++t) {
    if (kind_of(p, t).none || p->wild) continue; /* NaN has many patterns */
    const size_t at = (size_t)(t - begin);
    REQUIRE(!memcmp((char *)c.out + at * out, (char *)p->out[id] + (size_t)t * out, out), t,
            "%s of rows %" PRId64 "..%" PRId64 " differs from the whole's", op->name, begin, end);
    REQUIRE(!op->out_indices ||
                !memcmp(c.out_indices + at * slots, p->out_indices[id] + (size_t)t * slots, slots * sizeof(int64_t)),
            t, "%s of rows %" PRId64 "..%" PRId64 " differs from the whole's", op->name, begin, end);
  }
  free(c.out);
  free(c.out_indices);
}

/* Any indices at all: log_prob refuses what is out of range, the gradients take it for an unused slot. */
static void check_any_indices(problem *p) {
  static const int64_t odd[] = {-1, INT64_MAX, INT64_MIN, PM_MAX_EXPERTS};
  const pm_shape *s = &p->shape;
  const size_t slots = elements(p, SLOTS);
  const int legal = (int)random_below(&p->state, 2);
  int outside = 0, infeasible = 0;
  for (size_t n = 0; n < slots; ++n) {
    int64_t e = random_below(&p->state, s->experts + 1);
    if (!legal && random_below(&p->state, 8) == 0) e = odd[random_below(&p->state, 4)];
    if (!legal && random_below(&p->state, 8) == 0) e = s->experts + 1;
    outside |= e < 0 || e > s->experts;
    for (int id = LOG_PROB; id < OPERATORS; ++id)
      if (operators[id].indices) p->indices[id][n] = e;
  }
  for (int64_t t = 0; t < s->rows; ++t) infeasible |= kind_of(p, t).infeasible;
  const pm_status usual = infeasible ? PM_INFEASIBLE : PM_OK;
  for (int id = LOG_PROB; id < OPERATORS; ++id) {
    if (!operators[id].indices) continue;
    const call c = call_of(p, id);
    const pm_status status = operators[id].run[p->is_double](&c);
    REQUIRE(status == (id == LOG_PROB && outside ? PM_BAD_INDEX : usual), -1, "%s: %s", operators[id].name,
            pm_status_text(status));
  }
}

/* One function of the other family on arbitrary numbers of the same shape: indices and shares in range, and no memory
 * but its own. */
static void check_law(problem *p) {
  const int id = (int)random_below(&p->state, LAWS), orderly = (int)random_below(&p->state, 2);
  const law *of = &laws[id];
  const pm_shape *s = &p->shape;
  const size_t real = real_size(p->is_double), rows = (size_t)s->rows;
  law_call c = {.shape = *s, .seed = p->seed, .scratch = p->scratch};
  void *in[LAW_INPUTS];
  for (int n = 0; n < LAW_INPUTS; ++n) {
    const size_t width = n == 0 ? (size_t)s->stride : (size_t)width_of(of->in[n], s);
    c.in[n] = in[n] = allocate(rows * width * real);
    for (size_t i = 0; i < rows * width; ++i)
      put(in[n], p->is_double, (int64_t)i,
          orderly ? exp(8 * random_normal(&p->state)) : from_bits(next_random(&p->state), p->is_double));
  }
  int64_t *indices = allocate(rows * (size_t)s->k_max * sizeof(int64_t));
  for (size_t n = 0; n < rows * (size_t)s->k_max; ++n) indices[n] = random_below(&p->state, s->experts + 3) - 1;
  c.indices = indices;
  c.out_indices = allocate(rows * (size_t)s->k_max * sizeof(int64_t));
  for (int n = 0; n < LAW_OUTPUTS; ++n) c.out[n] = allocate(rows * (size_t)width_of(of->out[n], s) * real);
  const pm_status status = of->run[p->is_double](&c);
  const int decides = id == DIRMOE_DECIDE || id == DIRMOE_DECIDE_BACKWARD;
  REQUIRE(status == PM_OK || (decides && status == PM_INFEASIBLE), -1, "%s: %s", of->name, pm_status_text(status));
  for (int64_t n = 0; of->out_indices && n < s->rows * s->k_max; ++n)
    REQUIRE(c.out_indices[n] >= 0 && c.out_indices[n] <= s->experts, -1, "%s: index %" PRId64, of->name,
            c.out_indices[n]);
  const int shares = id == DIRICHLET_SAMPLE || id == DIRMOE_DRAW || id == DIRMOE_DECIDE;
  for (int64_t n = 0; shares && n < s->rows * width_of(of->out[0], s); ++n) {
    const double share = get(c.out[0], p->is_double, n);
    REQUIRE(isnan(share) || (share >= 0 && share <= 1 + epsilon(p)), -1, "%s: share %g", of->name, share);
  }
  for (int n = 0; n < LAW_INPUTS; ++n) free(in[n]);
  for (int n = 0; n < LAW_OUTPUTS; ++n) free(c.out[n]);
  free(indices);
  free(c.out_indices);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  source in = {data, size, 0};
  problem whole = {0}, *p = &whole;
  read_shape(p, &in);
  make_inputs(p, &in);
  run_all(p);
  for (int64_t t = 0; t < p->shape.rows; ++t) check_row(p, t);
  const int64_t cut = random_below(&p->state, p->shape.rows + 1);
  const int id = (int)random_below(&p->state, OPERATORS);
  check_piece(p, id, 0, cut);
  check_piece(p, id, cut, p->shape.rows);
  check_any_indices(p);
  check_law(p);
  release(p);
  return 0;
}

#ifdef PM_FUZZ_MAIN
static uint64_t number; /* of the input under test */

int main(int argc, char **argv) {
  const double seconds = argc > 1 ? atof(argv[1]) : 60;
  const uint64_t first = argc > 2 ? strtoull(argv[2], NULL, 0) : 0;
  const uint64_t count = argc > 3 ? strtoull(argv[3], NULL, 0) : UINT64_MAX;
  const time_t begin = time(NULL);
  double slowest = 0;
  for (number = first; number - first < count && difftime(time(NULL), begin) < seconds; ++number) {
    uint8_t data[512];
    uint64_t state = number * 0x9E3779B97F4A7C15u + 1;
    const size_t size = 24 + (size_t)random_below(&state, (int64_t)sizeof data - 24 + 1);
    for (size_t n = 0; n < size; ++n) data[n] = (uint8_t)next_random(&state);
    /* The last line before a crash says which input it was. */
    if ((number - first) % 1000 == 0) fprintf(stderr, "input %" PRIu64 "\r", number);
    const clock_t start = clock();
    LLVMFuzzerTestOneInput(data, size);
    slowest = fmax(slowest, (double)(clock() - start) / CLOCKS_PER_SEC);
  }
  printf("%s: %" PRIu64 " executions without a failure, the slowest %.3f s\n", pm_instruction_set(), number - first,
         slowest);
  return 0;
}
#endif
