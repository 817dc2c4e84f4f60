/* Four-word vectors, for any processor: SSE2 on x86-64, NEON on 64-bit Arm. */
#define PM_REAL_BITS 64
#define PM_VECTOR_BYTES 16
#define PM_TABLE pm_kernels_portable_f64
#include "../rows/table.h"
