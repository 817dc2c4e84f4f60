/* Routes four tokens over eight experts without torch: exactly two experts each, then one to three.
 *   cc route_batch.c $(pkg-config --cflags --libs probmoe) -o route_batch && ./route_batch */
#include <probmoe.h>
#include <stdio.h>
#include <stdlib.h>

enum { TOKENS = 4, EXPERTS = 8, MOST = 3 };

/* In a model: the hidden states times the gate's weight. */
static const float logits[TOKENS][EXPERTS] = {
    {0.2f, 1.9f, -0.4f, 0.3f, 2.2f, -1.1f, 0.0f, 0.6f},
    {-0.7f, 0.1f, 3.4f, -0.2f, 0.4f, 0.9f, -1.5f, 0.2f},
    {0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f, 0.5f},
    {-2.1f, -1.3f, -0.9f, -3.0f, -1.8f, -0.2f, -2.5f, -1.0f},
};

static pm_status route(const char *title, int k_min, int k_max, pm_forward forward, uint64_t seed) {
  const pm_shape shape = {
      .rows = TOKENS, .experts = EXPERTS, .k_min = k_min, .k_max = k_max, .stride = EXPERTS, .first_row = 0};
  float weights[TOKENS * MOST], marginals[TOKENS * EXPERTS];
  int64_t experts[TOKENS * MOST];
  void *scratch = malloc(pm_scratch_size(EXPERTS, k_max)); /* once for all batches of this shape */
  if (!scratch) return PM_NULL_POINTER;

  pm_status status = pm_route_f32(&shape, logits[0], forward, 1, seed, weights, experts, scratch);
  if (status == PM_OK) status = pm_subset_marginals_f32(&shape, logits[0], marginals, scratch);
  free(scratch);
  if (status != PM_OK) {
    fprintf(stderr, "%s: %s\n", title, pm_status_text(status));
    return status;
  }

  printf("%s\n", title);
  for (int t = 0; t < TOKENS; ++t) {
    printf("  token %d ->", t);
    for (int j = 0; j < k_max; ++j) {
      const int64_t e = experts[t * k_max + j];
      if (e == EXPERTS) continue; /* an unused slot of the band */
      printf("  expert %d: weight %.3f (chosen with probability %.3f)", (int)e, weights[t * k_max + j],
             marginals[t * EXPERTS + e]);
    }
    printf("\n");
  }
  return PM_OK;
}

int main(void) {
  printf("instruction set: %s\n", pm_instruction_set());
  const pm_status exact = route("training, exactly 2 experts, sampled", 2, 2, PM_FORWARD_SAMPLE, 2024);
  const pm_status band = route("training, 1 to 3 experts, sampled", 1, 3, PM_FORWARD_SAMPLE, 2024);
  const pm_status mode = route("inference, 1 to 3 experts, the most probable", 1, 3, PM_FORWARD_MODE, 0);
  return exact != PM_OK || band != PM_OK || mode != PM_OK;
}
