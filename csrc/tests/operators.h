/* Every function that writes outputs, in both precisions, behind one signature: what holds for all of them is tested
 * once, in a loop over this table. Shared by the tests and the fuzzer. */
#ifndef PROBMOE_TEST_OPERATORS_H
#define PROBMOE_TEST_OPERATORS_H

#include <stddef.h>
#include <stdint.h>

#include "probmoe.h"

/* One call. What an operator does not take is ignored. */
typedef struct call {
  pm_shape shape;
  const void *logits;
  const void *vector;     /* v [T, E], grad [T, k_max-k_min+1] or grad_weights [T, k_max] */
  const int64_t *indices; /* [T, k_max] */
  void *out;
  int64_t *out_indices; /* [T, k_max] */
  void *scratch;
  uint64_t seed;
} call;

/* Elements a row. */
typedef enum width { NONE, ONE, BAND, EXPERTS, SLOTS } width;

int64_t width_of(width w, const pm_shape *shape);

typedef struct operation {
  const char *name;
  width vector, indices, out, out_indices;
  pm_status (*run[2])(const call *c); /* single, double */
} operation;

typedef enum operation_id {
  LOG_PARTITION,
  CARDINALITY,
  CARDINALITY_BACKWARD,
  MARGINALS,
  COVARIANCE_VP,
  ENTROPY,
  LOG_PROB,
  SAMPLE,
  MODE,
  ROUTE_SAMPLE,
  ROUTE_SAMPLE_NORMALIZED,
  ROUTE_MODE,
  ROUTE_MODE_NORMALIZED,
  ROUTE_BACKWARD,
  ROUTE_BACKWARD_NORMALIZED,
  ROUTE_STRAIGHT,
  ROUTE_STRAIGHT_NORMALIZED,
  OPERATORS
} operation_id;

extern const operation operators[OPERATORS];

/* pm_infeasible_row_*. */
int64_t infeasible_row(int is_double, const pm_shape *shape, const void *logits);

/* Element i of an array of either precision. */
static inline size_t real_size(int is_double) { return is_double ? sizeof(double) : sizeof(float); }
static inline double get(const void *data, int is_double, int64_t i) {
  return is_double ? ((const double *)data)[i] : (double)((const float *)data)[i];
}
static inline void put(void *data, int is_double, int64_t i, double value) {
  if (is_double)
    ((double *)data)[i] = value;
  else
    ((float *)data)[i] = (float)value;
}

/* splitmix64 (Steele, Lea & Flood 2014): the tests' own stream, nothing to do with the library's. */
static inline uint64_t next_random(uint64_t *state) {
  uint64_t z = (*state += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}
static inline int64_t random_below(uint64_t *state, int64_t bound) {
  return (int64_t)(next_random(state) % (uint64_t)bound);
}
static inline double random_unit(uint64_t *state) { return (double)(next_random(state) >> 11) * 0x1p-53; }
double random_normal(uint64_t *state);

#endif
