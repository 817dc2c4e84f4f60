/* Vectors of rows: lane l of every vector belongs to row (block's first row) + l, and no operation crosses lanes.
 *
 * Included once in each isa/<set>_<type>.c, which defines PM_REAL_BITS (32 or 64) and PM_VECTOR_BYTES, and switches the
 * compiler to its instruction set. A row's arithmetic is the same whatever the width of the vectors, so every set
 * with fused multiply-add returns the same bits. */
#ifndef PM_ROWS_SIMD_H
#define PM_ROWS_SIMD_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define PM_ALWAYS_INLINE static inline __attribute__((always_inline))
#define PM_CONSTANT static const

#include "../precision.h"

enum { LANES = PM_VECTOR_BYTES / (PM_REAL_BITS / 8) };

typedef real vreal __attribute__((vector_size(PM_VECTOR_BYTES), aligned(PM_VECTOR_BYTES)));
typedef bits vint __attribute__((vector_size(PM_VECTOR_BYTES), aligned(PM_VECTOR_BYTES)));
typedef vint vmask; /* 0 or -1 a lane */
typedef pattern vpattern __attribute__((vector_size(PM_VECTOR_BYTES), aligned(PM_VECTOR_BYTES)));

/* A few vectors. Compilers would call memset and memcpy, which take longer to start than these loops to run. */
#define PM_REMAIN_A_LOOP __asm__ volatile("")
PM_ALWAYS_INLINE void fill_vectors(vreal *to, vreal value, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = value;
    PM_REMAIN_A_LOOP;
  }
}

PM_ALWAYS_INLINE void copy_vectors(vreal *to, const vreal *from, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    to[i] = from[i];
    PM_REMAIN_A_LOOP;
  }
}

/* The operations that C's vector types do not spell. max(a, b) and min(a, b) return b where either is NaN. */
#if PM_VECTOR_BYTES == 64 && defined(__AVX512F__)
#define PM_FMA(suffix) _mm512_fmadd_##suffix
#define PM_MAX(suffix) _mm512_max_##suffix
#define PM_MIN(suffix) _mm512_min_##suffix
#elif PM_VECTOR_BYTES == 32 && defined(__AVX2__)
#define PM_FMA(suffix) _mm256_fmadd_##suffix
#define PM_MAX(suffix) _mm256_max_##suffix
#define PM_MIN(suffix) _mm256_min_##suffix
#endif

#if defined(PM_FMA) && PM_REAL_BITS == 32
PM_ALWAYS_INLINE vreal fma_(vreal a, vreal b, vreal c) { return PM_FMA(ps)(a, b, c); }
PM_ALWAYS_INLINE vreal max_(vreal a, vreal b) { return PM_MAX(ps)(a, b); }
PM_ALWAYS_INLINE vreal min_(vreal a, vreal b) { return PM_MIN(ps)(a, b); }
#elif defined(PM_FMA)
PM_ALWAYS_INLINE vreal fma_(vreal a, vreal b, vreal c) { return PM_FMA(pd)(a, b, c); }
PM_ALWAYS_INLINE vreal max_(vreal a, vreal b) { return PM_MAX(pd)(a, b); }
PM_ALWAYS_INLINE vreal min_(vreal a, vreal b) { return PM_MIN(pd)(a, b); }
#elif defined(__aarch64__) && PM_REAL_BITS == 32
PM_ALWAYS_INLINE vreal fma_(vreal a, vreal b, vreal c) {
  return (vreal)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
#elif defined(__aarch64__)
PM_ALWAYS_INLINE vreal fma_(vreal a, vreal b, vreal c) {
  return (vreal)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
}
#else
PM_ALWAYS_INLINE vreal fma_(vreal a, vreal b, vreal c) { return a * b + c; }
#endif

PM_ALWAYS_INLINE vreal select_(vmask mask, vreal yes, vreal no) {
  return (vreal)((mask & (vmask)yes) | (~mask & (vmask)no));
}

#if !defined(PM_FMA)
PM_ALWAYS_INLINE vreal max_(vreal a, vreal b) { return select_((vmask)(a > b), a, b); }
PM_ALWAYS_INLINE vreal min_(vreal a, vreal b) { return select_((vmask)(a < b), a, b); }
#endif

PM_ALWAYS_INLINE vpattern pattern_of(vreal x) { return (vpattern)x; }
PM_ALWAYS_INLINE vreal real_of(vpattern x) { return (vreal)x; }
PM_ALWAYS_INLINE vreal whole(vmask x) { return __builtin_convertvector(x, vreal); }

PM_ALWAYS_INLINE vreal splat(real x) { return (vreal){0} + x; }
PM_ALWAYS_INLINE vint splat_bits(bits x) { return (vint){0} + x; }

#if PM_VECTOR_BYTES == 64 && defined(__AVX512F__) && PM_REAL_BITS == 32
PM_ALWAYS_INLINE vint int_max_(vint a, vint b) { return (vint)_mm512_max_epi32((__m512i)a, (__m512i)b); }
PM_ALWAYS_INLINE vint int_min_(vint a, vint b) { return (vint)_mm512_min_epi32((__m512i)a, (__m512i)b); }
#elif PM_VECTOR_BYTES == 64 && defined(__AVX512F__)
PM_ALWAYS_INLINE vint int_max_(vint a, vint b) { return (vint)_mm512_max_epi64((__m512i)a, (__m512i)b); }
PM_ALWAYS_INLINE vint int_min_(vint a, vint b) { return (vint)_mm512_min_epi64((__m512i)a, (__m512i)b); }
#elif PM_VECTOR_BYTES == 32 && defined(__AVX2__) && PM_REAL_BITS == 32
PM_ALWAYS_INLINE vint int_max_(vint a, vint b) { return (vint)_mm256_max_epi32((__m256i)a, (__m256i)b); }
PM_ALWAYS_INLINE vint int_min_(vint a, vint b) { return (vint)_mm256_min_epi32((__m256i)a, (__m256i)b); }
#else
PM_ALWAYS_INLINE vint int_max_(vint a, vint b) { return (vint)select_((vmask)(a > b), (vreal)a, (vreal)b); }
PM_ALWAYS_INLINE vint int_min_(vint a, vint b) { return (vint)select_((vmask)(a < b), (vreal)a, (vreal)b); }
#endif

PM_ALWAYS_INLINE vint int_select_(vmask mask, vint yes, vint no) { return (mask & yes) | (~mask & no); }

/* count + step where a <= b, and count elsewhere: a comparison and a masked addition. */
PM_ALWAYS_INLINE vint count_where_at_most(vint count, bits step, vreal a, vreal b) {
#if PM_VECTOR_BYTES == 64 && defined(__AVX512F__) && PM_REAL_BITS == 32
  return (vint)_mm512_mask_add_epi32((__m512i)count, _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_LE_OQ),
                                     (__m512i)count, _mm512_set1_epi32(step));
#elif PM_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (vint)_mm512_mask_add_epi64((__m512i)count, _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_LE_OQ),
                                     (__m512i)count, _mm512_set1_epi64(step));
#else
  return count + ((vmask)(a <= b) & step);
#endif
}

/* The same where, moreover, `room` is not negative. */
PM_ALWAYS_INLINE vint count_where_room(vint count, bits step, vreal a, vreal b, vreal room) {
#if PM_VECTOR_BYTES == 64 && defined(__AVX512F__) && PM_REAL_BITS == 32
  const __mmask16 found =
      _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(room, splat(0), _CMP_GE_OQ), (__m512)a, (__m512)b, _CMP_LE_OQ);
  return (vint)_mm512_mask_add_epi32((__m512i)count, found, (__m512i)count, _mm512_set1_epi32(step));
#elif PM_VECTOR_BYTES == 64 && defined(__AVX512F__)
  const __mmask8 found =
      _mm512_mask_cmp_pd_mask(_mm512_cmp_pd_mask(room, splat(0), _CMP_GE_OQ), (__m512d)a, (__m512d)b, _CMP_LE_OQ);
  return (vint)_mm512_mask_add_epi64((__m512i)count, found, (__m512i)count, _mm512_set1_epi64(step));
#else
  return count + ((vmask)(a <= b) & (vmask)(room >= splat(0)) & step);
#endif
}

/* Bit l of the result: is lane l set? */
PM_ALWAYS_INLINE unsigned lanes_of(vmask mask) {
#if PM_VECTOR_BYTES == 64 && defined(__AVX512DQ__) && PM_REAL_BITS == 32
  return _mm512_movepi32_mask((__m512i)mask);
#elif PM_VECTOR_BYTES == 64 && defined(__AVX512DQ__)
  return _mm512_movepi64_mask((__m512i)mask);
#elif PM_VECTOR_BYTES == 32 && defined(__AVX2__) && PM_REAL_BITS == 32
  return (unsigned)_mm256_movemask_ps((__m256)mask);
#elif PM_VECTOR_BYTES == 32 && defined(__AVX2__)
  return (unsigned)_mm256_movemask_pd((__m256d)mask);
#else
  unsigned found = 0;
  for (int l = 0; l < LANES; ++l) found |= (unsigned)(mask[l] & 1) << l;
  return found;
#endif
}

PM_ALWAYS_INLINE int any(vmask mask) { return lanes_of(mask) != 0; }

PM_ALWAYS_INLINE vint lane_numbers(void) {
  vint lane = {0};
  for (int l = 0; l < LANES; ++l) lane[l] = l;
  return lane;
}

PM_ALWAYS_INLINE vmask first_lanes(int64_t count) { return (vmask)(lane_numbers() < (bits)count); }

/* Lane l of the vector at[l], for every lane. */
PM_ALWAYS_INLINE vreal pick(const vreal *from, vint at) {
  const vint lane = lane_numbers();
#if PM_VECTOR_BYTES == 64 && defined(__AVX512F__) && PM_REAL_BITS == 32
  return (vreal)_mm512_i32gather_ps((__m512i)(at * LANES + lane), from, 4);
#elif PM_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (vreal)_mm512_i64gather_pd((__m512i)(at * LANES + lane), from, 8);
#elif PM_VECTOR_BYTES == 32 && defined(__AVX2__) && PM_REAL_BITS == 32
  return (vreal)_mm256_i32gather_ps((const float *)from, (__m256i)(at * LANES + lane), 4);
#else
  vreal picked = {0};
  for (int l = 0; l < LANES; ++l) picked[l] = ((const real *)from)[at[l] * LANES + lane[l]];
  return picked;
#endif
}

/* Vectors of 32-bit words, as many as fit, and the two halves of their product with one word. */
enum { WORDS = PM_VECTOR_BYTES / 4 };
typedef uint32_t vword __attribute__((vector_size(PM_VECTOR_BYTES), aligned(PM_VECTOR_BYTES)));

PM_ALWAYS_INLINE void multiply_words(vword a, uint32_t b, vword *high, vword *low) {
#if PM_VECTOR_BYTES == 64 && defined(__AVX512F__)
  const __m512i m = _mm512_set1_epi64(b), even = _mm512_mul_epu32((__m512i)a, m);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), m);
  *low = (vword)_mm512_mask_blend_epi32(0xaaaa, even, _mm512_slli_epi64(odd, 32));
  *high = (vword)_mm512_mask_blend_epi32(0xaaaa, _mm512_srli_epi64(even, 32), odd);
#elif PM_VECTOR_BYTES == 32 && defined(__AVX2__)
  const __m256i m = _mm256_set1_epi64x(b), even = _mm256_mul_epu32((__m256i)a, m);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), m);
  *low = (vword)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  *high = (vword)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
#else
  for (int l = 0; l < WORDS; ++l) {
    const uint64_t product = (uint64_t)a[l] * b;
    (*low)[l] = (uint32_t)product;
    (*high)[l] = (uint32_t)(product >> 32);
  }
#endif
}

/* y 2^(the whole number in `shifted` less the one in `origin`), which must be normal; 0 where x < lowest. The left
 * shift drops all of the difference but its low bits. */
PM_ALWAYS_INLINE vreal scale_by_shifted(vreal y, vreal shifted, vreal origin, vreal x, vreal lowest) {
  const vpattern power = ((vpattern)shifted - (vpattern)origin) << PM_MANTISSA_BITS;
#if PM_VECTOR_BYTES == 64 && defined(__AVX512F__) && PM_REAL_BITS == 32
  return (vreal)_mm512_maskz_add_epi32(_mm512_cmp_ps_mask((__m512)x, (__m512)lowest, _CMP_GE_OQ), (__m512i)y,
                                       (__m512i)power);
#elif PM_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (vreal)_mm512_maskz_add_epi64(_mm512_cmp_pd_mask((__m512d)x, (__m512d)lowest, _CMP_GE_OQ), (__m512i)y,
                                       (__m512i)power);
#else
  return (vreal)((vpattern)(x >= lowest) & ((vpattern)y + power));
#endif
}

/* 2^n for whole n with the result in the normal range. */
PM_ALWAYS_INLINE vreal power_of_two(vreal n) {
  return (vreal)(((vpattern)(n + splat(PM_EXP_ROUND)) << PM_MANTISSA_BITS) + (vpattern)splat(1));
}

/* n, for a power of two in the normal range; some finite number for 0. */
PM_ALWAYS_INLINE vreal exponent_of(vreal power) {
  const real ones = (real)((pattern)1 << PM_MANTISSA_BITS); /* its last bit counts ones */
  return (vreal)(((vpattern)power >> PM_MANTISSA_BITS) | (vpattern)splat(ones)) - splat(ones + PM_LARGEST_EXPONENT);
}

/* a 2^n for whole n >= 0, whatever the size of n: out of range is +inf, or at least beyond 2^100. */
PM_ALWAYS_INLINE vreal scale_up(vreal a, vreal n) {
#if PM_VECTOR_BYTES == 64 && defined(__AVX512F__) && PM_REAL_BITS == 32
  return (vreal)_mm512_scalef_ps((__m512)a, (__m512)n);
#elif PM_VECTOR_BYTES == 64 && defined(__AVX512F__)
  return (vreal)_mm512_scalef_pd((__m512d)a, (__m512d)n);
#else
  const vreal most = splat(PM_LARGEST_EXPONENT), first = min_(n, most), second = min_(n - first, most);
  return a * power_of_two(first) * power_of_two(second);
#endif
}

#if PM_VECTOR_BYTES == 64 && defined(__AVX512F__) && PM_REAL_BITS == 32
PM_ALWAYS_INLINE vreal sqrt_(vreal x) { return _mm512_sqrt_ps(x); }
#elif PM_VECTOR_BYTES == 64 && defined(__AVX512F__)
PM_ALWAYS_INLINE vreal sqrt_(vreal x) { return _mm512_sqrt_pd(x); }
#elif PM_VECTOR_BYTES == 32 && defined(__AVX2__) && PM_REAL_BITS == 32
PM_ALWAYS_INLINE vreal sqrt_(vreal x) { return _mm256_sqrt_ps(x); }
#elif PM_VECTOR_BYTES == 32 && defined(__AVX2__)
PM_ALWAYS_INLINE vreal sqrt_(vreal x) { return _mm256_sqrt_pd(x); }
#else
PM_ALWAYS_INLINE vreal sqrt_(vreal x) {
  for (int l = 0; l < LANES; ++l) x[l] = PM_REAL_BITS == 32 ? (real)sqrtf((float)x[l]) : (real)sqrt((double)x[l]);
  return x;
}
#endif

#include "../numerics.h"

#endif
