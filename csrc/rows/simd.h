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

#if PM_REAL_BITS == 32
typedef float real;
typedef int32_t bits;
typedef uint32_t pattern;
#define PM_REAL_TINY 0x1p-126f /* smallest normal number */
#define PM_REAL_HALF_ULP 0x1p-24f
#define PM_MANTISSA_BITS 23
#else
typedef double real;
typedef int64_t bits;
typedef uint64_t pattern;
#define PM_REAL_TINY 0x1p-1022
#define PM_REAL_HALF_ULP 0x1p-53
#define PM_MANTISSA_BITS 52
#endif

enum { LANES = PM_VECTOR_BYTES / (PM_REAL_BITS / 8) };

typedef real vreal __attribute__((vector_size(PM_VECTOR_BYTES), aligned(PM_VECTOR_BYTES)));
typedef bits vmask __attribute__((vector_size(PM_VECTOR_BYTES), aligned(PM_VECTOR_BYTES))); /* 0 or -1 a lane */
typedef pattern vpattern __attribute__((vector_size(PM_VECTOR_BYTES), aligned(PM_VECTOR_BYTES)));

/* The three operations that C's vector types do not spell. max(a, b) and min(a, b) return b where either is NaN. */
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

PM_ALWAYS_INLINE vreal splat(real x) { return (vreal){0} + x; }

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

/* exp(x) for -inf <= x <= 80 within 1 ulp, no NaN; 0 where the result is below the normal range.
 * x = n log 2 + r, |r| <= log(2)/2, exp(r) by its Taylor polynomial (degree 7 in single, 13 in double precision: the
 * first omitted term is below half an ulp), times 2^n through the exponent bits. log 2 is split in two so that
 * n log 2 is exact (Cody & Waite 1980). */
PM_ALWAYS_INLINE vreal exp_(vreal x) {
#if PM_REAL_BITS == 32
  const real lowest = -87.33654f, round = 0x1.8p23f, log2_high = 0x1.62e4p-1f, log2_low = 0x1.7f7d1cp-20f;
#else
  const real lowest = -708.3964185322641, round = 0x1.8p52, log2_high = 0x1.62e42fefa38p-1,
             log2_low = 0x1.ef35793c7673p-45;
#endif
  const vmask vanishes = (vmask)(x < lowest);
  const vreal shifted = fma_(x, splat((real)0x1.71547652b82fep0), splat(round));
  const vreal n = shifted - round;
  vreal r = fma_(n, splat(-log2_high), x);
  r = fma_(n, splat(-log2_low), r);
#if PM_REAL_BITS == 32
  vreal y = splat((real)(1.0 / 5040));
#else
  vreal y = splat((real)(1.0 / 6227020800.0));
  y = fma_(y, r, splat((real)(1.0 / 479001600.0)));
  y = fma_(y, r, splat((real)(1.0 / 39916800.0)));
  y = fma_(y, r, splat((real)(1.0 / 3628800.0)));
  y = fma_(y, r, splat((real)(1.0 / 362880.0)));
  y = fma_(y, r, splat((real)(1.0 / 40320.0)));
  y = fma_(y, r, splat((real)(1.0 / 5040.0)));
#endif
  y = fma_(y, r, splat((real)(1.0 / 720)));
  y = fma_(y, r, splat((real)(1.0 / 120)));
  y = fma_(y, r, splat((real)(1.0 / 24)));
  y = fma_(y, r, splat((real)(1.0 / 6)));
  y = fma_(y, r, splat((real)0.5));
  y = fma_(y, r, splat(1));
  y = fma_(y, r, splat(1));
  /* Unsigned: where the result vanishes the exponent wraps, and is masked out. */
  const vpattern power = ((vpattern)shifted - (vpattern)splat(round)) << PM_MANTISSA_BITS;
  return (vreal)(~(vpattern)vanishes & ((vpattern)y + power));
}

/* Rows in, lanes out: x[i] lane l = element i of row l of the block. Lanes past the last row repeat it. */
typedef struct source {
  const void *data;
  int64_t stride; /* elements */
  int is_double;
} source;

PM_ALWAYS_INLINE real read_(const source *in, int64_t row, int64_t i) {
  const int64_t at = row * in->stride + i;
  return in->is_double ? (real)((const double *)in->data)[at] : (real)((const float *)in->data)[at];
}

PM_ALWAYS_INLINE void write_(void *out, int is_double, int64_t at, real value) {
  if (is_double)
    ((double *)out)[at] = (double)value;
  else
    ((float *)out)[at] = (float)value;
}

/* Exchanges of a LANES x LANES transpose: step(d) swaps the off-diagonal d x d blocks of every 2d x 2d block. */
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 12
#define PM_NO_SHUFFLE 1
#elif PM_VECTOR_BYTES * 8 / PM_REAL_BITS == 16
#define PM_STEPS 4
#define PM_LOW_1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define PM_HIGH_1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
#define PM_LOW_2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define PM_HIGH_2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define PM_LOW_4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define PM_HIGH_4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define PM_LOW_8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define PM_HIGH_8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#elif PM_VECTOR_BYTES * 8 / PM_REAL_BITS == 8
#define PM_STEPS 3
#define PM_LOW_1 0, 8, 2, 10, 4, 12, 6, 14
#define PM_HIGH_1 1, 9, 3, 11, 5, 13, 7, 15
#define PM_LOW_2 0, 1, 8, 9, 4, 5, 12, 13
#define PM_HIGH_2 2, 3, 10, 11, 6, 7, 14, 15
#define PM_LOW_4 0, 1, 2, 3, 8, 9, 10, 11
#define PM_HIGH_4 4, 5, 6, 7, 12, 13, 14, 15
#elif PM_VECTOR_BYTES * 8 / PM_REAL_BITS == 4
#define PM_STEPS 2
#define PM_LOW_1 0, 4, 2, 6
#define PM_HIGH_1 1, 5, 3, 7
#define PM_LOW_2 0, 1, 4, 5
#define PM_HIGH_2 2, 3, 6, 7
#else
#define PM_STEPS 1
#define PM_LOW_1 0, 2
#define PM_HIGH_1 1, 3
#endif

#if !defined(PM_NO_SHUFFLE)
#define PM_EXCHANGE(d)                                         \
  for (int i = 0; i < LANES; ++i)                              \
    if (!(i & (d))) {                                          \
      const vreal a = x[i], b = x[i + (d)];                    \
      x[i] = __builtin_shufflevector(a, b, PM_LOW_##d);        \
      x[i + (d)] = __builtin_shufflevector(a, b, PM_HIGH_##d); \
    }

PM_ALWAYS_INLINE void transpose(vreal x[LANES]){PM_EXCHANGE(1)
#if PM_STEPS > 1
                                                    PM_EXCHANGE(2)
#endif
#if PM_STEPS > 2
                                                        PM_EXCHANGE(4)
#endif
#if PM_STEPS > 3
                                                            PM_EXCHANGE(8)
#endif
}
#endif

PM_ALWAYS_INLINE vreal load_unaligned(const real *from) {
  vreal v;
  memcpy(&v, from, sizeof v);
  return v;
}

static void load_rows(const source *in, int64_t row, int64_t rows, int64_t E, vreal *x) {
  int64_t i = 0;
#if !defined(PM_NO_SHUFFLE)
  if (in->is_double == (PM_REAL_BITS == 64)) {
    const real *from[LANES];
    for (int l = 0; l < LANES; ++l)
      from[l] = (const real *)in->data + (l < rows ? row + l : row + rows - 1) * in->stride;
    for (; i + LANES <= E; i += LANES) {
      vreal tile[LANES];
      for (int l = 0; l < LANES; ++l) tile[l] = load_unaligned(from[l] + i);
      transpose(tile);
      for (int l = 0; l < LANES; ++l) x[i + l] = tile[l];
    }
  }
#endif
  for (; i < E; ++i)
    for (int l = 0; l < LANES; ++l) x[i][l] = read_(in, l < rows ? row + l : row + rows - 1, i);
}

/* Lanes out to the rows whose lane is set in `mask`, dense with E columns. */
static void store_rows(const vreal *x, vmask mask, int64_t row, int64_t rows, int64_t E, void *out, int is_double) {
  int64_t i = 0;
#if !defined(PM_NO_SHUFFLE)
  if (is_double == (PM_REAL_BITS == 64)) {
    for (; i + LANES <= E; i += LANES) {
      vreal tile[LANES];
      for (int l = 0; l < LANES; ++l) tile[l] = x[i + l];
      transpose(tile);
      for (int l = 0; l < LANES; ++l)
        if (l < rows && mask[l]) memcpy((real *)out + (row + l) * E + i, &tile[l], sizeof tile[l]);
    }
  }
#endif
  for (; i < E; ++i)
    for (int l = 0; l < LANES && l < rows; ++l)
      if (mask[l]) write_(out, is_double, (row + l) * E + i, x[i][l]);
}

#endif
