#include "laws.h"

static const pm_dirmoe drawing = {0.5, 2.0, 1.5, 2.0, 0.25, 1, 1}, deciding = {0.5, 2.0, 1.5, 2.0, 0.25, 0, 1};

#define DIRMOE(name, suffix, options)                                                                                 \
  static pm_status name##_##suffix(const law_call *c) {                                                               \
    return pm_route_dirmoe_##suffix(&c->shape, &options, c->in[0], c->in[1], c->in[2], c->seed, c->out[0],            \
                                    c->out_indices, c->out[1], c->out[2], c->out[3], c->out[4], c->scratch);          \
  }                                                                                                                   \
  static pm_status name##_backward_##suffix(const law_call *c) {                                                      \
    return pm_route_dirmoe_backward_##suffix(&c->shape, &options, c->in[0], c->in[1], c->in[2], c->indices, c->in[3], \
                                             c->in[4], c->in[5], c->in[6], c->in[7], c->out[0], c->out[1], c->out[2], \
                                             c->scratch);                                                             \
  }

#define CALLS(suffix)                                                                                             \
  static pm_status log_gamma_sample_##suffix(const law_call *c) {                                                 \
    return pm_log_gamma_sample_##suffix(&c->shape, c->in[0], c->seed, c->out[0], c->scratch);                     \
  }                                                                                                               \
  static pm_status log_gamma_sample_backward_##suffix(const law_call *c) {                                        \
    return pm_log_gamma_sample_backward_##suffix(&c->shape, c->in[0], c->in[1], c->in[2], c->out[0]);             \
  }                                                                                                               \
  static pm_status standard_gamma_grad_##suffix(const law_call *c) {                                              \
    return pm_standard_gamma_grad_##suffix(&c->shape, c->in[0], c->in[1], c->out[0]);                             \
  }                                                                                                               \
  static pm_status dirichlet_sample_##suffix(const law_call *c) {                                                 \
    return pm_dirichlet_sample_##suffix(&c->shape, c->in[0], c->seed, c->out[0], c->out[1], c->scratch);          \
  }                                                                                                               \
  static pm_status dirichlet_sample_backward_##suffix(const law_call *c) {                                        \
    return pm_dirichlet_sample_backward_##suffix(&c->shape, c->in[0], c->in[1], c->in[2], c->in[3], c->out[0],    \
                                                 c->scratch);                                                     \
  }                                                                                                               \
  static pm_status dirichlet_log_prob_##suffix(const law_call *c) {                                               \
    return pm_dirichlet_log_prob_##suffix(&c->shape, c->in[0], c->in[1], c->out[0], c->scratch);                  \
  }                                                                                                               \
  static pm_status dirichlet_log_prob_backward_##suffix(const law_call *c) {                                      \
    return pm_dirichlet_log_prob_backward_##suffix(&c->shape, c->in[0], c->in[1], c->in[2], c->out[0], c->out[1], \
                                                   c->scratch);                                                   \
  }                                                                                                               \
  static pm_status dirichlet_entropy_##suffix(const law_call *c) {                                                \
    return pm_dirichlet_entropy_##suffix(&c->shape, c->in[0], c->out[0], c->scratch);                             \
  }                                                                                                               \
  static pm_status dirichlet_entropy_backward_##suffix(const law_call *c) {                                       \
    return pm_dirichlet_entropy_backward_##suffix(&c->shape, c->in[0], c->in[1], c->out[0], c->scratch);          \
  }                                                                                                               \
  static pm_status dirichlet_kl_##suffix(const law_call *c) {                                                     \
    return pm_dirichlet_kl_##suffix(&c->shape, c->in[0], c->in[1], c->out[0], c->scratch);                        \
  }                                                                                                               \
  static pm_status dirichlet_kl_backward_##suffix(const law_call *c) {                                            \
    return pm_dirichlet_kl_backward_##suffix(&c->shape, c->in[0], c->in[1], c->in[2], c->out[0], c->out[1],       \
                                             c->scratch);                                                         \
  }                                                                                                               \
  DIRMOE(dirmoe_draw, suffix, drawing)                                                                            \
  DIRMOE(dirmoe_decide, suffix, deciding)

CALLS(f32)
CALLS(f64)

#define IN(...) {__VA_ARGS__}
#define OUT(...) {__VA_ARGS__}
#define ENTRY(name, in, out, indices, out_indices, scratch)                   \
  {                                                                           \
    #name, in, out, indices, out_indices, scratch, { name##_f32, name##_f64 } \
  }

const law laws[LAWS] = {
    [LOG_GAMMA_SAMPLE] = ENTRY(log_gamma_sample, IN(EXPERTS), OUT(EXPERTS), NONE, NONE, 1),
    [LOG_GAMMA_SAMPLE_BACKWARD] =
        ENTRY(log_gamma_sample_backward, IN(EXPERTS, EXPERTS, EXPERTS), OUT(EXPERTS), NONE, NONE, 0),
    [STANDARD_GAMMA_GRAD] = ENTRY(standard_gamma_grad, IN(EXPERTS, EXPERTS), OUT(EXPERTS), NONE, NONE, 0),
    [DIRICHLET_SAMPLE] = ENTRY(dirichlet_sample, IN(EXPERTS), OUT(EXPERTS, ONE), NONE, NONE, 1),
    [DIRICHLET_SAMPLE_BACKWARD] =
        ENTRY(dirichlet_sample_backward, IN(EXPERTS, EXPERTS, ONE, EXPERTS), OUT(EXPERTS), NONE, NONE, 1),
    [DIRICHLET_LOG_PROB] = ENTRY(dirichlet_log_prob, IN(EXPERTS, EXPERTS), OUT(ONE), NONE, NONE, 1),
    [DIRICHLET_LOG_PROB_BACKWARD] =
        ENTRY(dirichlet_log_prob_backward, IN(EXPERTS, EXPERTS, ONE), OUT(EXPERTS, EXPERTS), NONE, NONE, 1),
    [DIRICHLET_ENTROPY] = ENTRY(dirichlet_entropy, IN(EXPERTS), OUT(ONE), NONE, NONE, 1),
    [DIRICHLET_ENTROPY_BACKWARD] = ENTRY(dirichlet_entropy_backward, IN(EXPERTS, ONE), OUT(EXPERTS), NONE, NONE, 1),
    [DIRICHLET_KL] = ENTRY(dirichlet_kl, IN(EXPERTS, EXPERTS), OUT(ONE), NONE, NONE, 1),
    [DIRICHLET_KL_BACKWARD] =
        ENTRY(dirichlet_kl_backward, IN(EXPERTS, EXPERTS, ONE), OUT(EXPERTS, EXPERTS), NONE, NONE, 1),
    [DIRMOE_DRAW] =
        ENTRY(dirmoe_draw, IN(EXPERTS, EXPERTS, EXPERTS), OUT(SLOTS, ONE, ONE, EXPERTS, EXPERTS), NONE, SLOTS, 1),
    [DIRMOE_DECIDE] = ENTRY(dirmoe_decide, IN(EXPERTS, EXPERTS, EXPERTS), OUT(SLOTS, ONE, ONE), NONE, SLOTS, 1),
    [DIRMOE_DRAW_BACKWARD] =
        ENTRY(dirmoe_draw_backward, IN(EXPERTS, EXPERTS, EXPERTS, EXPERTS, EXPERTS, SLOTS, ONE, ONE),
              OUT(EXPERTS, EXPERTS, EXPERTS), SLOTS, NONE, 1),
    [DIRMOE_DECIDE_BACKWARD] =
        ENTRY(dirmoe_decide_backward, IN(EXPERTS, EXPERTS, EXPERTS, EXPERTS, EXPERTS, SLOTS, ONE, ONE),
              OUT(EXPERTS, EXPERTS, EXPERTS), SLOTS, NONE, 1),
};
