#if defined(__x86_64__)
#define PM_TARGET "avx2,fma"
#include "begin.h"
#define PM_REAL_BITS 32
#define PM_VECTOR_BYTES 32
#define PM_TABLE pm_kernels_avx2_f32
#include "../rows/table.h"
#include "end.h"
#endif
