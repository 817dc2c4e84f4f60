/* Between row-major memory and vectors of rows: tiles of LANES rows by LANES columns, transposed in registers. */
#ifndef PM_ROWS_TRANSFER_H
#define PM_ROWS_TRANSFER_H

#include "simd.h"

/* From one array of E vectors to the next: a few more, or arrays of 64 experts would lie a multiple of 4096 bytes
 * apart, where processors take a load for one that waits on the store to another array. */
PM_ALWAYS_INLINE int64_t pitch(int64_t E) { return E + 5; }

/* Rows of float or double. */
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

PM_ALWAYS_INLINE void transpose(vreal x[LANES]) {
  PM_EXCHANGE(1);
#if PM_STEPS > 1
  PM_EXCHANGE(2);
#endif
#if PM_STEPS > 2
  PM_EXCHANGE(4);
#endif
#if PM_STEPS > 3
  PM_EXCHANGE(8);
#endif
}
#else
PM_ALWAYS_INLINE void transpose(vreal x[LANES]) {
  for (int i = 0; i < LANES; ++i)
    for (int l = 0; l < i; ++l) {
      const real swapped = x[i][l];
      x[i][l] = x[l][i];
      x[l][i] = swapped;
    }
}
#endif

/* The first column of the tile that starts at column i: the last tile of a wide row overlaps the one before it. */
PM_ALWAYS_INLINE int64_t tile_column(int64_t i, int64_t columns) {
  return i + LANES <= columns || columns < LANES ? i : columns - LANES;
}

/* x[i] lane l = element i of row l of the block. Lanes past the last row repeat it. */
static void load_rows(const source *in, int64_t row, int64_t rows, int64_t columns, vreal *x) {
  if (columns < LANES || in->is_double != (PM_REAL_BITS == 64)) {
    for (int64_t i = 0; i < columns; ++i)
      for (int l = 0; l < LANES; ++l) x[i][l] = read_(in, l < rows ? row + l : row + rows - 1, i);
    return;
  }
  const real *from[LANES];
  for (int l = 0; l < LANES; ++l) from[l] = (const real *)in->data + (l < rows ? row + l : row + rows - 1) * in->stride;
  for (int64_t i = 0; i < columns; i += LANES) {
    const int64_t at = tile_column(i, columns);
    vreal tile[LANES];
    for (int l = 0; l < LANES; ++l) memcpy(&tile[l], from[l] + at, sizeof tile[l]);
    transpose(tile);
    for (int l = 0; l < LANES; ++l) x[at + l] = tile[l];
  }
}

/* Asks for the n-th of the `columns` pieces of LANES elements that make up the block of rows from `row` on: one call
 * for each expert of a block brings in the next one meanwhile. */
PM_ALWAYS_INLINE void prefetch_piece(const source *in, int64_t row, int64_t rows, int64_t n, int64_t columns) {
  const int64_t at = row + n % LANES, column = n / LANES * LANES;
  if (at >= rows || column >= columns) return;
  __builtin_prefetch((const char *)in->data + (at * in->stride + column) * (in->is_double ? 8 : 4));
}

/* Lanes out to the rows whose bit is set in `wanted`, dense. */
static void store_rows(const vreal *x, unsigned wanted, int64_t row, int64_t columns, void *out, int is_double) {
  const int native = is_double == (PM_REAL_BITS == 64);
  const int64_t width = columns < LANES ? columns : LANES;
  for (int64_t i = 0; i < columns; i += LANES) {
    const int64_t at = tile_column(i, columns);
    vreal tile[LANES];
    for (int l = 0; l < LANES; ++l) tile[l] = l < width ? x[at + l] : splat(0);
    transpose(tile);
    for (unsigned left = wanted; left; left &= left - 1) {
      const int l = __builtin_ctz(left);
      const int64_t to = (row + l) * columns + at;
      if (native && width == LANES)
        memcpy((real *)out + to, &tile[l], sizeof tile[l]);
      else if (native && width == LANES / 2)
        memcpy((real *)out + to, &tile[l], sizeof tile[l] / 2);
      else
        for (int64_t c = 0; c < width; ++c) write_(out, is_double, to + c, tile[l][c]);
    }
  }
}

/* The same for whole numbers, widened to 64 bits. */
static void store_indices(const vint *x, unsigned wanted, int64_t row, int64_t columns, int64_t *out) {
  const int64_t width = columns < LANES ? columns : LANES;
  for (int64_t i = 0; i < columns; i += LANES) {
    const int64_t at = tile_column(i, columns);
    vreal tile[LANES];
    for (int l = 0; l < LANES; ++l) tile[l] = l < width ? (vreal)x[at + l] : splat(0);
    transpose(tile);
    for (unsigned left = wanted; left; left &= left - 1) {
      const int l = __builtin_ctz(left);
      const vint whole = (vint)tile[l];
      int64_t *to = out + (row + l) * columns + at;
      if (width == LANES)
        for (int c = 0; c < LANES; ++c) to[c] = whole[c];
      else if (width == LANES / 2)
        for (int c = 0; c < LANES / 2; ++c) to[c] = whole[c];
      else
        for (int64_t c = 0; c < width; ++c) to[c] = whole[c];
    }
  }
}

#endif
