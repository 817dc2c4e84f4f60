/* One precision, PM_REAL_BITS = 32 or 64: its types and constants. No guard: CUDA takes both into one file, each in a
 * namespace of its own, and the macros are then those of the last one. */
#include <stdint.h>

#undef PM_REAL_TINY
#undef PM_REAL_HALF_ULP
#undef PM_MANTISSA_BITS
#undef PM_LARGEST_BITS
#undef PM_LARGEST_EXPONENT
#undef PM_EXP_ROUND
#undef PM_EXP_LOWEST

#if PM_REAL_BITS == 32
typedef float real;
typedef int32_t bits;
typedef uint32_t pattern;
#define PM_REAL_TINY 0x1p-126f /* smallest normal number */
#define PM_REAL_HALF_ULP 0x1p-24f
#define PM_MANTISSA_BITS 23
#define PM_LARGEST_BITS INT32_MAX
#define PM_LARGEST_EXPONENT 127
#define PM_EXP_ROUND 0x1.8p23f   /* adding it rounds to a whole number, which is then in the low bits */
#define PM_EXP_LOWEST -87.33654f /* exp of it is the smallest normal number */
#else
typedef double real;
typedef int64_t bits;
typedef uint64_t pattern;
#define PM_REAL_TINY 0x1p-1022
#define PM_REAL_HALF_ULP 0x1p-53
#define PM_MANTISSA_BITS 52
#define PM_LARGEST_BITS INT64_MAX
#define PM_LARGEST_EXPONENT 1023
#define PM_EXP_ROUND 0x1.8p52
#define PM_EXP_LOWEST -708.3964185322641
#endif
