/* One row by enumeration of all 2^E subsets, E <= 8, from the definitions at the head of probmoe.h. */
#ifndef PROBMOE_TEST_ORACLE_H
#define PROBMOE_TEST_ORACLE_H

#include <stdint.h>

enum { ORACLE_EXPERTS = 8, ORACLE_SUBSETS = 1 << ORACLE_EXPERTS };

typedef struct oracle {
  int experts, k_min, k_max;
  double logits[ORACLE_EXPERTS];
  double softmax[ORACLE_EXPERTS];
  double probability[ORACLE_SUBSETS]; /* of the subset with these bits */
  double log_prob[ORACLE_SUBSETS];
  double log_partition;
  double entropy;
  double size[ORACLE_EXPERTS + 1];                  /* P(|S| = j) */
  double marginal[ORACLE_EXPERTS];                  /* P(i in S) */
  double joint[ORACLE_EXPERTS + 1][ORACLE_EXPERTS]; /* P(i in S, |S| = j) */
  double covariance[ORACLE_EXPERTS][ORACLE_EXPERTS];
  int mode[ORACLE_EXPERTS], mode_size; /* all experts by descending logit; the mode's members come first */
} oracle;

/* The row must be feasible. */
void enumerate(oracle *o, const double *logits, int experts, int k_min, int k_max);

/* The subset that the uniforms of probmoe.h's sampling scheme choose, ascending; returns its size. `margin` is the
 * least relative distance of any decision from the other outcome. */
int draw(const oracle *o, uint64_t seed, uint64_t row, int is_double, int64_t *subset, double *margin);

int subset_bits(const int64_t *subset, int count, int experts);

#endif
