/* Which kernels run here. */
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

typedef struct instruction_set {
  const char *name;
  const pm_kernels *f32, *f64;
  int bytes; /* of a vector */
  int fused; /* has fused multiply-add, and so the same bits as every other set that has */
} instruction_set;

static const instruction_set known[] = {
#if defined(__x86_64__)
    {"avx512", &pm_kernels_avx512_f32, &pm_kernels_avx512_f64, 64, 1},
    {"avx2", &pm_kernels_avx2_f32, &pm_kernels_avx2_f64, 32, 1},
#endif
#if defined(__aarch64__)
    {"neon", &pm_kernels_portable_f32, &pm_kernels_portable_f64, 16, 1},
#else
    {"portable", &pm_kernels_portable_f32, &pm_kernels_portable_f64, 16, 0},
#endif
};

enum { KNOWN = (int)(sizeof known / sizeof known[0]) };

static int runs_here(const char *name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!strcmp(name, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("fma");
  if (!strcmp(name, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  (void)name;
#endif
  return 1;
}

static const instruction_set *choose(void) {
  const char *wanted = getenv("PROBMOE_ISA");
  int best = 0;
  while (best < KNOWN - 1 && !runs_here(known[best].name)) ++best;
  for (int i = best; wanted && i < KNOWN; ++i)
    if (!strcmp(known[i].name, wanted)) return &known[i];
  return &known[best];
}

/* The choice is a constant of the process; racing first calls write the same value. */
static const instruction_set *in_use(void) {
  static _Atomic(const instruction_set *) chosen;
  const instruction_set *set = chosen;
  if (!set) chosen = set = choose();
  return set;
}

/* The next set after this one that gives the same bits on shorter vectors. */
static const instruction_set *narrower(const instruction_set *set) {
  const instruction_set *next = set + 1;
  return next < known + KNOWN && set->fused && next->fused ? next : NULL;
}

const pm_kernels *pm_kernels_for(int is_double, int64_t rows) {
  const instruction_set *set = in_use();
  const int64_t bytes = rows * (is_double ? 8 : 4);
  for (const instruction_set *next; (next = narrower(set)) && bytes <= next->bytes;) set = next;
  return is_double ? set->f64 : set->f32;
}

size_t pm_largest_scratch(int64_t experts, int64_t k_max) {
  size_t largest = 0;
  for (const instruction_set *set = in_use(); set; set = narrower(set)) {
    const size_t sizes[] = {set->f32->scratch_size(experts, k_max), set->f64->scratch_size(experts, k_max),
                            set->f64->law_scratch_size(experts)}; /* of the laws, the same in both precisions */
    for (int n = 0; n < 3; ++n) largest = sizes[n] > largest ? sizes[n] : largest;
  }
  return largest;
}

const char *pm_instruction_set(void) { return in_use()->name; }
