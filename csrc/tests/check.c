#include "check.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

long passed, failed;
int quick;

/* ---- guarded memory ---- */

enum { CANARY = 128, FILL = 0xA5 };
static unsigned char canary(size_t at) { return (unsigned char)(0x5C ^ (at * 7)); }

/* Contents are left uninitialised, so that valgrind sees reads before writes. */
void *begin_guard(guard *g, size_t bytes, size_t misalign) {
  g->block = malloc(bytes + 2 * CANARY + 128);
  if (!g->block) abort();
  g->before = (64 - (uintptr_t)g->block % 64) + misalign + CANARY;
  g->bytes = bytes;
  for (size_t i = 0; i < CANARY; ++i) {
    g->block[g->before - CANARY + i] = canary(i);
    g->block[g->before + bytes + i] = canary(i);
  }
  return g->block + g->before;
}

int end_guard(guard *g) {
  int intact = 1;
  for (size_t i = 0; i < CANARY; ++i)
    intact &= g->block[g->before - CANARY + i] == canary(i) && g->block[g->before + g->bytes + i] == canary(i);
  free(g->block);
  return intact;
}

int untouched(const void *data, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i)
    if (((const unsigned char *)data)[i] != FILL) return 0;
  return 1;
}

/* ---- calls ---- */

pm_shape shape_of(int64_t rows, int64_t experts, int64_t k_min, int64_t k_max) {
  return (pm_shape){
      .rows = rows, .experts = experts, .k_min = k_min, .k_max = k_max, .stride = experts, .first_row = 0};
}

static size_t positive(int64_t n) { return n > 0 ? (size_t)n : 0; }

void begin_batch(batch *b, const operation *op, int is_double, pm_shape shape) {
  const size_t real = real_size(is_double), rows = positive(shape.rows);
  const size_t logits = rows > 0 ? (rows - 1) * (size_t)shape.stride + (size_t)shape.experts : 0;
  const size_t vector = rows * positive(width_of(op->vector, &shape)), out = rows * positive(width_of(op->out, &shape));
  const size_t indices = rows * positive(width_of(op->indices, &shape));
  const size_t out_indices = rows * positive(width_of(op->out_indices, &shape));
  *b = (batch){.is_double = is_double, .op = op};
  void *x = begin_guard(&b->logits, logits * real, 0);
  void *v = begin_guard(&b->vector, vector * real, 0);
  int64_t *s = begin_guard(&b->indices, indices * sizeof(int64_t), 0);
  memset(x, 0, logits * real);
  memset(v, 0, vector * real);
  for (size_t n = 0; n < indices; ++n) s[n] = shape.experts;
  b->c = (call){.shape = shape,
                .logits = x,
                .vector = v,
                .indices = s,
                .out = begin_guard(&b->out, out * real, 0),
                .out_indices = begin_guard(&b->out_indices, out_indices * sizeof(int64_t), 0),
                .scratch = begin_guard(&b->scratch, pm_scratch_size(shape.experts, shape.k_max), 1),
                .seed = 20240607};
  memset(b->c.out, FILL, out * real);
  memset(b->c.out_indices, FILL, out_indices * sizeof(int64_t));
}

pm_status run_batch(batch *b) { return b->op->run[b->is_double](&b->c); }

void end_batch(batch *b) {
  const int read_only = end_guard(&b->logits) & end_guard(&b->vector) & end_guard(&b->indices);
  const int outputs = end_guard(&b->out) & end_guard(&b->out_indices);
  const int scratch = end_guard(&b->scratch);
  CHECK(read_only && outputs && scratch, "%s wrote outside its memory (E=%lld, k_max=%lld)", b->op->name,
        (long long)b->c.shape.experts, (long long)b->c.shape.k_max);
}

void set_logit(batch *b, int64_t t, int64_t i, double value) {
  put((void *)(b->logits.block + b->logits.before), b->is_double, t * b->c.shape.stride + i, value);
}
double get_logit(const batch *b, int64_t t, int64_t i) {
  return get(b->c.logits, b->is_double, t * b->c.shape.stride + i);
}
double output(const batch *b, int64_t t, int64_t j) {
  return get(b->c.out, b->is_double, t * width_of(b->op->out, &b->c.shape) + j);
}
const int64_t *chosen(const batch *b, int64_t t) { return b->c.out_indices + t * b->c.shape.k_max; }

/* ---- inputs ---- */

void fill_row(double *row, int64_t experts, int family, int64_t unmasked, uint64_t *state) {
  static const double spread[] = {1, 10, 100};
  for (int64_t i = 0; i < experts; ++i) {
    const double normal = random_normal(state);
    switch (family) {
      case 0:
      case 1:
      case 2: row[i] = spread[family] * normal; break;
      case 3: row[i] = 0.75; break;
      case 4: row[i] = normal; break;
      case 5: row[i] = normal > 0 ? 2000 : -2000; break;
      case 6: row[i] = (double)(int)(2 * normal); break; /* ties */
      case 7: row[i] = normal + 100; break;
      case 8: row[i] = normal - 3; break;
      default: row[i] = 3 * normal; break;
    }
  }
  if (family == 4) row[random_below(state, experts)] += 87;
  if (family == 9) /* masks, down to `unmasked` experts */
    for (int64_t masked = 0; masked < experts - unmasked;) {
      const int64_t i = random_below(state, experts);
      masked += row[i] > -INFINITY;
      row[i] = -INFINITY;
    }
}

void fill_batch(batch *b, int family, int64_t unmasked, uint64_t *state) {
  const pm_shape *s = &b->c.shape;
  double *row = malloc((size_t)s->experts * sizeof(double));
  if (!row) abort();
  for (int64_t t = 0; t < s->rows; ++t) {
    fill_row(row, s->experts, family, unmasked, state);
    for (int64_t i = 0; i < s->experts; ++i) set_logit(b, t, i, row[i]);
  }
  free(row);
}

void fill_companions(batch *b, uint64_t *state) {
  const pm_shape *s = &b->c.shape;
  const int64_t vector = s->rows * width_of(b->op->vector, s);
  for (int64_t n = 0; n < vector; ++n)
    put((void *)(b->vector.block + b->vector.before), b->is_double, n, random_normal(state));
  if (b->op->indices == NONE) return;
  call mode = b->c;
  mode.out_indices = (int64_t *)(void *)(b->indices.block + b->indices.before);
  operators[MODE].run[b->is_double](&mode);
}

/* ---- a fingerprint of all results, which every instruction set with fused multiply-add must share ---- */

static uint64_t mix(uint64_t hash, const void *data, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) hash = (hash ^ ((const unsigned char *)data)[i]) * 0x100000001B3u;
  return hash;
}

uint64_t digest(void) {
  static const int64_t shapes[][3] = {{64, 8, 8}, {60, 4, 4}, {64, 6, 8}, {7, 0, 7}, {300, 150, 150}, {33, 5, 5}};
  uint64_t hash = 0xCBF29CE484222325u, state = 17;
  for (size_t n = 0; n < sizeof shapes / sizeof *shapes; ++n)
    for (int id = 0; id < OPERATORS; ++id)
      for (int family = 0; family < FAMILIES; family += 2)
        for (int is_double = 0; is_double < 2; ++is_double) {
          batch b;
          begin_batch(&b, &operators[id], is_double, shape_of(19, shapes[n][0], shapes[n][1], shapes[n][2]));
          fill_batch(&b, family, shapes[n][0], &state);
          fill_companions(&b, &state);
          run_batch(&b);
          hash = mix(hash, b.c.out, b.out.bytes);
          hash = mix(hash, b.c.out_indices, b.out_indices.bytes);
          end_batch(&b);
        }
  return hash;
}

int main(int argc, char **argv) {
  if (argc > 1 && !strcmp(argv[1], "--instruction-set")) {
    puts(pm_instruction_set());
    return 0;
  }
  quick = getenv("PROBMOE_CHECK_QUICK") != NULL;
  test_status();
  test_edges();
  test_values();
  test_layout();
  test_large();
  test_sampling();
  test_laws();
  test_gumbel();
  printf("%s: bits %016llx\n", pm_instruction_set(), (unsigned long long)(digest() ^ laws_digest()));
  printf("%ld passed, %ld failed\n", passed, failed);
  return failed > 0;
}
