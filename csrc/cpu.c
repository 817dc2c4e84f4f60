/* Which kernels run here. */
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

typedef struct instruction_set {
  const char *name;
  const pm_kernels *f32, *f64;
} instruction_set;

static const instruction_set known[] = {
#if defined(__x86_64__)
    {"avx512", &pm_kernels_avx512_f32, &pm_kernels_avx512_f64},
    {"avx2", &pm_kernels_avx2_f32, &pm_kernels_avx2_f64},
#endif
#if defined(__aarch64__)
    {"neon", &pm_kernels_portable_f32, &pm_kernels_portable_f64},
#else
    {"portable", &pm_kernels_portable_f32, &pm_kernels_portable_f64},
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

const pm_kernels *pm_kernels_in_use(int is_double) { return is_double ? in_use()->f64 : in_use()->f32; }

const char *pm_instruction_set(void) { return in_use()->name; }
