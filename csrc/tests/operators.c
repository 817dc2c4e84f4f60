#include "operators.h"

#include <math.h>

#define UNARY(name)                                                          \
  static pm_status name##_f32(const call *c) {                               \
    return pm_subset_##name##_f32(&c->shape, c->logits, c->out, c->scratch); \
  }                                                                          \
  static pm_status name##_f64(const call *c) {                               \
    return pm_subset_##name##_f64(&c->shape, c->logits, c->out, c->scratch); \
  }
UNARY(log_partition)
UNARY(cardinality)
UNARY(marginals)
UNARY(entropy)

#define BINARY(name, second)                                                            \
  static pm_status name##_f32(const call *c) {                                          \
    return pm_subset_##name##_f32(&c->shape, c->logits, c->second, c->out, c->scratch); \
  }                                                                                     \
  static pm_status name##_f64(const call *c) {                                          \
    return pm_subset_##name##_f64(&c->shape, c->logits, c->second, c->out, c->scratch); \
  }
BINARY(cardinality_backward, vector)
BINARY(covariance_vp, vector)
BINARY(log_prob, indices)

#define SELECTION(suffix)                                                                              \
  static pm_status sample_##suffix(const call *c) {                                                    \
    return pm_subset_sample_##suffix(&c->shape, c->logits, c->seed, 1, 0, c->out_indices, c->scratch); \
  }                                                                                                    \
  static pm_status mode_##suffix(const call *c) {                                                      \
    return pm_subset_mode_##suffix(&c->shape, c->logits, c->out_indices, c->scratch);                  \
  }
SELECTION(f32)
SELECTION(f64)

#define ROUTE(name, forward, normalize)                                                                         \
  static pm_status name##_f32(const call *c) {                                                                  \
    return pm_route_f32(&c->shape, c->logits, forward, normalize, c->seed, c->out, c->out_indices, c->scratch); \
  }                                                                                                             \
  static pm_status name##_f64(const call *c) {                                                                  \
    return pm_route_f64(&c->shape, c->logits, forward, normalize, c->seed, c->out, c->out_indices, c->scratch); \
  }
ROUTE(route_sample, PM_FORWARD_SAMPLE, 0)
ROUTE(route_sample_normalized, PM_FORWARD_SAMPLE, 1)
ROUTE(route_mode, PM_FORWARD_MODE, 0)
ROUTE(route_mode_normalized, PM_FORWARD_MODE, 1)

#define ROUTE_GRADIENT(name, backward, normalize)                                                          \
  static pm_status name##_f32(const call *c) {                                                             \
    return pm_route_backward_f32(&c->shape, c->logits, c->indices, c->vector, backward, normalize, c->out, \
                                 c->scratch);                                                              \
  }                                                                                                        \
  static pm_status name##_f64(const call *c) {                                                             \
    return pm_route_backward_f64(&c->shape, c->logits, c->indices, c->vector, backward, normalize, c->out, \
                                 c->scratch);                                                              \
  }
ROUTE_GRADIENT(route_backward, PM_BACKWARD_MARGINAL, 0)
ROUTE_GRADIENT(route_backward_normalized, PM_BACKWARD_MARGINAL, 1)
ROUTE_GRADIENT(route_straight, PM_BACKWARD_STRAIGHT_THROUGH, 0)
ROUTE_GRADIENT(route_straight_normalized, PM_BACKWARD_STRAIGHT_THROUGH, 1)

#define ENTRY(name, vector, indices, out, out_indices)                   \
  {                                                                      \
    #name, vector, indices, out, out_indices, { name##_f32, name##_f64 } \
  }

const operation operators[OPERATORS] = {
    [LOG_PARTITION] = ENTRY(log_partition, NONE, NONE, ONE, NONE),
    [CARDINALITY] = ENTRY(cardinality, NONE, NONE, BAND, NONE),
    [CARDINALITY_BACKWARD] = ENTRY(cardinality_backward, BAND, NONE, EXPERTS, NONE),
    [MARGINALS] = ENTRY(marginals, NONE, NONE, EXPERTS, NONE),
    [COVARIANCE_VP] = ENTRY(covariance_vp, EXPERTS, NONE, EXPERTS, NONE),
    [ENTROPY] = ENTRY(entropy, NONE, NONE, ONE, NONE),
    [LOG_PROB] = ENTRY(log_prob, NONE, SLOTS, ONE, NONE),
    [SAMPLE] = ENTRY(sample, NONE, NONE, NONE, SLOTS),
    [MODE] = ENTRY(mode, NONE, NONE, NONE, SLOTS),
    [ROUTE_SAMPLE] = ENTRY(route_sample, NONE, NONE, SLOTS, SLOTS),
    [ROUTE_SAMPLE_NORMALIZED] = ENTRY(route_sample_normalized, NONE, NONE, SLOTS, SLOTS),
    [ROUTE_MODE] = ENTRY(route_mode, NONE, NONE, SLOTS, SLOTS),
    [ROUTE_MODE_NORMALIZED] = ENTRY(route_mode_normalized, NONE, NONE, SLOTS, SLOTS),
    [ROUTE_BACKWARD] = ENTRY(route_backward, SLOTS, SLOTS, EXPERTS, NONE),
    [ROUTE_BACKWARD_NORMALIZED] = ENTRY(route_backward_normalized, SLOTS, SLOTS, EXPERTS, NONE),
    [ROUTE_STRAIGHT] = ENTRY(route_straight, SLOTS, SLOTS, EXPERTS, NONE),
    [ROUTE_STRAIGHT_NORMALIZED] = ENTRY(route_straight_normalized, SLOTS, SLOTS, EXPERTS, NONE),
};

int64_t width_of(width w, const pm_shape *shape) {
  switch (w) {
    case ONE: return 1;
    case BAND: return shape->k_max - shape->k_min + 1;
    case EXPERTS: return shape->experts;
    case SLOTS: return shape->k_max;
    case NONE: break;
  }
  return 0;
}

int64_t infeasible_row(int is_double, const pm_shape *shape, const void *logits) {
  return is_double ? pm_infeasible_row_f64(shape, logits) : pm_infeasible_row_f32(shape, logits);
}

/* Box & Muller. */
double random_normal(uint64_t *state) {
  const double radius = sqrt(-2 * log(1 - random_unit(state)));
  return radius * cos(6.283185307179586 * random_unit(state));
}
