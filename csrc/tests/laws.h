/* The Gamma, Dirichlet and DirMoE functions behind one signature, as operators.h has those of subsets. */
#ifndef PROBMOE_TEST_LAWS_H
#define PROBMOE_TEST_LAWS_H

#include "operators.h"

enum { LAW_INPUTS = 8, LAW_OUTPUTS = 5 };

typedef struct law_call {
  pm_shape shape;
  const void *in[LAW_INPUTS]; /* the first with the shape's stride */
  const int64_t *indices;     /* [T, k_max] */
  void *out[LAW_OUTPUTS];
  int64_t *out_indices; /* [T, k_max] */
  void *scratch;
  uint64_t seed;
} law_call;

typedef struct law {
  const char *name;
  width in[LAW_INPUTS], out[LAW_OUTPUTS]; /* NONE past the last */
  width indices, out_indices;
  int scratch; /* whether it takes any */
  pm_status (*run[2])(const law_call *c);
} law;

typedef enum law_id {
  LOG_GAMMA_SAMPLE,
  LOG_GAMMA_SAMPLE_BACKWARD,
  STANDARD_GAMMA_GRAD,
  DIRICHLET_SAMPLE,
  DIRICHLET_SAMPLE_BACKWARD,
  DIRICHLET_LOG_PROB,
  DIRICHLET_LOG_PROB_BACKWARD,
  DIRICHLET_ENTROPY,
  DIRICHLET_ENTROPY_BACKWARD,
  DIRICHLET_KL,
  DIRICHLET_KL_BACKWARD,
  DIRMOE_DRAW,
  DIRMOE_DECIDE,
  DIRMOE_DRAW_BACKWARD,
  DIRMOE_DECIDE_BACKWARD,
  LAWS
} law_id;

extern const law laws[LAWS];

#endif
