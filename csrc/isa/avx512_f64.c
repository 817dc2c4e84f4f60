#if defined(__x86_64__)
#define PM_TARGET "avx512f,avx512dq,avx512vl,avx512bw,avx2,fma"
#include "begin.h"
#define PM_REAL_BITS 64
#define PM_VECTOR_BYTES 64
#define PM_TABLE pm_kernels_avx512_f64
#include "../rows/table.h"
#include "end.h"
#endif
