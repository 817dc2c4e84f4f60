/* What the C tests share: counting, guarded memory, and calls with everything allocated. */
#ifndef PROBMOE_TEST_CHECK_H
#define PROBMOE_TEST_CHECK_H

#include <stdio.h>

#include "operators.h"

extern long passed, failed;
extern int quick; /* fewer repetitions: under valgrind */

/* Counts; says where and what on failure, up to a limit. Further arguments are printed as by printf. */
#define CHECK(condition, ...)                                \
  do {                                                       \
    if (condition)                                           \
      ++passed;                                              \
    else if (++failed <= 40) {                               \
      printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      printf(__VA_ARGS__);                                   \
      printf("\n");                                          \
    }                                                        \
  } while (0)

/* `bytes` at `misalign` past a 64-byte boundary, between canaries, filled with 0xA5; freed by `end_guard`, which
 * returns whether the canaries still sing. */
typedef struct guard {
  unsigned char *block;
  size_t before, bytes;
} guard;

void *begin_guard(guard *g, size_t bytes, size_t misalign);
int end_guard(guard *g);
int untouched(const void *data, size_t bytes);

/* A call with inputs and guarded outputs of its own. */
typedef struct batch {
  call c;
  int is_double;
  const operation *op;
  guard logits, vector, indices, out, out_indices, scratch;
} batch;

/* Allocates for `op`. Inputs are given the values 0, indices E (unused). */
void begin_batch(batch *b, const operation *op, int is_double, pm_shape shape);
/* Runs and checks that nothing was written outside the outputs. */
pm_status run_batch(batch *b);
void end_batch(batch *b);

pm_shape shape_of(int64_t rows, int64_t experts, int64_t k_min, int64_t k_max);
/* Logits of row t, expert i. */
void set_logit(batch *b, int64_t t, int64_t i, double value);
double get_logit(const batch *b, int64_t t, int64_t i);
/* Element j of row t of the output. */
double output(const batch *b, int64_t t, int64_t j);
const int64_t *chosen(const batch *b, int64_t t);

/* Families of logits. */
enum { FAMILIES = 10 };
void fill_row(double *row, int64_t experts, int family, int64_t unmasked, uint64_t *state);
void fill_batch(batch *b, int family, int64_t unmasked, uint64_t *state);
/* v, grad and grad_weights of order one; indices: the mode of the logits. */
void fill_companions(batch *b, uint64_t *state);

void test_values(void);
void test_edges(void);
void test_status(void);
void test_layout(void);
void test_large(void);
void test_sampling(void);
void test_laws(void);
void test_gumbel(void);
uint64_t digest(void);
uint64_t laws_digest(void);

#endif
