/* Where rows lie, how a batch is cut, what the scratch held before: none of it may be seen in the results. */
#include <stdlib.h>
#include <string.h>

#include "check.h"

static const int64_t shapes[][4] = {/* rows, E, k_min, k_max */
                                    {37, 1, 0, 1},    {37, 5, 2, 2},      {37, 16, 4, 4},      {37, 64, 8, 8},
                                    {37, 64, 6, 8},   {21, 60, 11, 11},   {19, 128, 33, 33},   {19, 130, 20, 40},
                                    {5, 300, 2, 150}, {5, 300, 150, 150}, {3, 1024, 150, 150}, {3, 1024, 0, 3}};

/* A copy of some rows of `whole` with another stride, scratch misaligned by `misalign` and filled with `fill`. */
static void piece_equals(const batch *whole, int64_t begin, int64_t end, int64_t gap, size_t misalign, int fill) {
  batch part;
  pm_shape s = whole->c.shape;
  s.rows = end - begin;
  s.first_row += begin;
  s.stride = s.experts + gap;
  begin_batch(&part, whole->op, whole->is_double, s);
  memset(part.logits.block + part.logits.before, 0xFF, part.logits.bytes); /* NaN between the rows */
  for (int64_t t = begin; t < end; ++t)
    for (int64_t i = 0; i < s.experts; ++i) set_logit(&part, t - begin, i, get_logit(whole, t, i));
  const size_t rows = (size_t)s.rows;
  if (rows > 0) {
    memcpy(part.vector.block + part.vector.before,
           (const char *)whole->c.vector + (size_t)begin * (part.vector.bytes / rows), part.vector.bytes);
    memcpy(part.indices.block + part.indices.before,
           (const char *)whole->c.indices + (size_t)begin * (part.indices.bytes / rows), part.indices.bytes);
  }
  end_guard(&part.scratch);
  const size_t scratch = pm_scratch_size(s.experts, s.k_max);
  part.c.scratch = begin_guard(&part.scratch, scratch, misalign);
  if (fill >= 0) memset(part.c.scratch, fill, scratch);
  const pm_status status = run_batch(&part);
  CHECK(status == PM_OK, "%s: %s", part.op->name, pm_status_text(status));
  const size_t out = rows > 0 ? part.out.bytes / rows : 0, slots = rows > 0 ? part.out_indices.bytes / rows : 0;
  CHECK(!memcmp(part.c.out, (const char *)whole->c.out + (size_t)begin * out, part.out.bytes) &&
            !memcmp(part.c.out_indices, (const char *)whole->c.out_indices + (size_t)begin * slots,
                    part.out_indices.bytes),
        "%s_f%d E=%lld band %lld..%lld: rows %lld..%lld (stride +%lld, scratch +%zu of %d) differ from the whole's",
        part.op->name, part.is_double ? 64 : 32, (long long)s.experts, (long long)s.k_min, (long long)s.k_max,
        (long long)begin, (long long)end, (long long)gap, misalign, fill);
  end_batch(&part);
}

static int written(const batch *b) {
  const size_t real = real_size(b->is_double);
  for (size_t n = 0; n < b->out.bytes; n += real)
    if (untouched((const char *)b->c.out + n, real)) return 0;
  for (size_t n = 0; n < b->out_indices.bytes; n += sizeof(int64_t))
    if (untouched((const char *)b->c.out_indices + n, sizeof(int64_t))) return 0;
  return 1;
}

static void splits(const operation *op, int is_double, const int64_t *dims, int family, uint64_t *state) {
  batch whole;
  pm_shape s = shape_of(dims[0], dims[1], dims[2], dims[3]);
  s.first_row = (int64_t)1 << 33; /* row numbers have a high word */
  begin_batch(&whole, op, is_double, s);
  fill_batch(&whole, family, s.k_min + (s.experts - s.k_min) / 2, state);
  fill_companions(&whole, state);
  const pm_status status = run_batch(&whole);
  CHECK(status == PM_OK, "%s: %s", op->name, pm_status_text(status));
  CHECK(written(&whole), "%s_f%d E=%lld left outputs unwritten", op->name, is_double ? 64 : 32, (long long)s.experts);
  static const int fills[] = {-1, 0, 0xFF}; /* as it comes, zeros, NaN */
  for (int64_t begin = 0, n = 0; begin < s.rows; ++n) {
    int64_t end = begin + 1 + random_below(state, 9);
    if (end > s.rows) end = s.rows;
    piece_equals(&whole, begin, end, n % 2 ? 3 : 0, (size_t)(n * 13 % 64), fills[n % 3]);
    begin = end;
  }
  piece_equals(&whole, s.rows / 2, s.rows / 2, 1, 5, 0); /* no rows */
  end_batch(&whole);
}

void test_layout(void) {
  uint64_t state = 5;
  for (size_t n = 0; n < sizeof shapes / sizeof *shapes; n += quick ? 3 : 1)
    for (int id = 0; id < OPERATORS; ++id)
      for (int is_double = 0; is_double < 2; ++is_double)
        for (int family = 0; family < FAMILIES; family += quick ? 5 : 2)
          splits(&operators[id], is_double, shapes[n], family, &state);
}
