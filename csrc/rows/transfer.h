/* Between row-major memory and vectors of rows: tiles of LANES rows by up to LANES columns, transposed in registers. */
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

/* A tile is W columns of a block, W = LANES, LANES / 2 or LANES / 4. By rows it is W vectors, the r-th of which has the
 * elements of the rows r, r + W, r + 2 W, ... side by side; transposed, one vector a column. */
enum { HALF = LANES / 2, QUARTER = LANES > 2 ? LANES / 4 : 1 };

/* The exchange of distance d swaps the off-diagonal d x d blocks of every 2d x 2d block. */
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 12
#define PM_NO_SHUFFLE 1
#elif PM_VECTOR_BYTES * 8 / PM_REAL_BITS == 16
#define PM_LOW_1 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define PM_HIGH_1 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
#define PM_LOW_2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define PM_HIGH_2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#define PM_LOW_4 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27
#define PM_HIGH_4 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31
#define PM_LOW_8 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23
#define PM_HIGH_8 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31
#define PM_IN_ORDER 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
#define PM_IN_ORDER_HALF 0, 1, 2, 3, 4, 5, 6, 7
#elif PM_VECTOR_BYTES * 8 / PM_REAL_BITS == 8
#define PM_LOW_1 0, 8, 2, 10, 4, 12, 6, 14
#define PM_HIGH_1 1, 9, 3, 11, 5, 13, 7, 15
#define PM_LOW_2 0, 1, 8, 9, 4, 5, 12, 13
#define PM_HIGH_2 2, 3, 10, 11, 6, 7, 14, 15
#define PM_LOW_4 0, 1, 2, 3, 8, 9, 10, 11
#define PM_HIGH_4 4, 5, 6, 7, 12, 13, 14, 15
#define PM_IN_ORDER 0, 1, 2, 3, 4, 5, 6, 7
#define PM_IN_ORDER_HALF 0, 1, 2, 3
#elif PM_VECTOR_BYTES * 8 / PM_REAL_BITS == 4
#define PM_LOW_1 0, 4, 2, 6
#define PM_HIGH_1 1, 5, 3, 7
#define PM_LOW_2 0, 1, 4, 5
#define PM_HIGH_2 2, 3, 6, 7
#else
#define PM_LOW_1 0, 2
#define PM_HIGH_1 1, 3
#endif

#if !defined(PM_NO_SHUFFLE)
#define PM_EXCHANGE(d)                                         \
  for (int i = 0; i < width; ++i)                              \
    if (!(i & (d))) {                                          \
      const vreal a = x[i], b = x[i + (d)];                    \
      x[i] = __builtin_shufflevector(a, b, PM_LOW_##d);        \
      x[i + (d)] = __builtin_shufflevector(a, b, PM_HIGH_##d); \
    }

/* Transposes a tile, either way. */
PM_ALWAYS_INLINE void transpose(vreal *x, int width) {
#if defined(PM_LOW_1)
  if (width > 1) PM_EXCHANGE(1);
#endif
#if defined(PM_LOW_2)
  if (width > 2) PM_EXCHANGE(2);
#endif
#if defined(PM_LOW_4)
  if (width > 4) PM_EXCHANGE(4);
#endif
#if defined(PM_LOW_8)
  if (width > 8) PM_EXCHANGE(8);
#endif
}
#else
PM_ALWAYS_INLINE void transpose(vreal *x, int width) {
  for (int first = 0; first < LANES; first += width)
    for (int i = 0; i < width; ++i)
      for (int l = 0; l < i; ++l) {
        const real swapped = x[i][first + l];
        x[i][first + l] = x[l][first + i];
        x[l][first + i] = swapped;
      }
}
#endif

/* The elements at `at` of the rows r, r + width, r + 2 width, ... side by side. */
PM_ALWAYS_INLINE vreal side_by_side(const real *const *rows, int64_t at, int r, int width) {
  vreal result;
#if defined(PM_IN_ORDER_HALF)
  typedef real half __attribute__((vector_size(PM_VECTOR_BYTES / 2)));
  typedef real quarter __attribute__((vector_size(PM_VECTOR_BYTES / 4)));
  half side[2];
  if (width == QUARTER)
    for (int n = 0; n < 2; ++n) {
      quarter part[2];
      memcpy(&part[0], rows[r + 2 * n * QUARTER] + at, sizeof part[0]);
      memcpy(&part[1], rows[r + (2 * n + 1) * QUARTER] + at, sizeof part[1]);
      side[n] = __builtin_shufflevector(part[0], part[1], PM_IN_ORDER_HALF);
    }
  if (width == HALF)
    for (int n = 0; n < 2; ++n) memcpy(&side[n], rows[r + n * HALF] + at, sizeof side[n]);
  if (width < LANES) return __builtin_shufflevector(side[0], side[1], PM_IN_ORDER);
#endif
  for (int n = 0; n < LANES / width; ++n)
    memcpy((real *)&result + n * width, rows[r + n * width] + at, (size_t)width * sizeof(real));
  return result;
}

/* Calls move(W) for the widest tile that is not wider than `columns`, or move(0) where a quarter is too wide. */
#define PM_FOR_TILES(columns, move) \
  if ((columns) >= LANES)           \
    move(LANES);                    \
  else if ((columns) >= HALF)       \
    move(HALF);                     \
  else if ((columns) >= QUARTER)    \
    move(QUARTER);                  \
  else                              \
    move(0)

/* The first column of the tile that starts at column i: the last tile of a wide row overlaps the one before it. */
PM_ALWAYS_INLINE int64_t tile_column(int64_t i, int64_t columns, int width) {
  return i + width <= columns ? i : columns - width;
}

PM_ALWAYS_INLINE void load_tiles(const source *in, int64_t row, int64_t rows, int64_t columns, vreal *x, int width) {
  if (width == 0 || in->is_double != (PM_REAL_BITS == 64)) {
    for (int64_t i = 0; i < columns; ++i)
      for (int l = 0; l < LANES; ++l) x[i][l] = read_(in, l < rows ? row + l : row + rows - 1, i);
    return;
  }
  const real *from[LANES];
  for (int l = 0; l < LANES; ++l) from[l] = (const real *)in->data + (l < rows ? row + l : row + rows - 1) * in->stride;
  for (int64_t i = 0; i < columns; i += width) {
    const int64_t at = tile_column(i, columns, width);
    vreal tile[LANES];
    for (int r = 0; r < width; ++r) tile[r] = side_by_side(from, at, r, width);
    transpose(tile, width);
    for (int c = 0; c < width; ++c) x[at + c] = tile[c];
  }
}

/* x[i] lane l = element i of row l of the block. Lanes past the last row repeat it. */
static void load_rows(const source *in, int64_t row, int64_t rows, int64_t columns, vreal *x) {
#define PM_LOAD(width) load_tiles(in, row, rows, columns, x, width)
  PM_FOR_TILES(columns, PM_LOAD);
#undef PM_LOAD
}

/* Asks for the n-th of the `columns` pieces of LANES elements that make up the block of rows from `row` on: one call
 * for each expert of a block brings in the next one meanwhile. */
PM_ALWAYS_INLINE void prefetch_piece(const source *in, int64_t row, int64_t rows, int64_t n, int64_t columns) {
  const int64_t at = row + n % LANES, column = n / LANES * LANES;
  if (at >= rows || column >= columns) return;
  __builtin_prefetch((const char *)in->data + (at * in->stride + column) * (in->is_double ? 8 : 4));
}

/* Asks for the memory of dense rows, `size` bytes an element, that are to be written: else each line waits for it. */
PM_ALWAYS_INLINE void prefetch_rows(void *out, int64_t size, int64_t row, int64_t rows, int64_t columns) {
  size *= columns;
  for (char *at = (char *)out + row * size, *end = at + rows * size; at < end; at += 64) __builtin_prefetch(at, 1);
}

/* x[i] factor - less[i] share, or x[i] factor, or x[i]: whatever is given. */
typedef struct affine {
  const vreal *x, *factor, *less, *share;
} affine;

PM_ALWAYS_INLINE vreal value_at(const affine *of, int64_t i) {
  if (of->less) return fma_(of->x[i], *of->factor, -of->less[i] * *of->share);
  return of->factor ? of->x[i] * *of->factor : of->x[i];
}

PM_ALWAYS_INLINE void store_tiles(const affine *of, unsigned wanted, int64_t row, int64_t columns, void *out,
                                  int is_double, int width) {
  const int native = is_double == (PM_REAL_BITS == 64);
  if (width == 0) {
    for (int64_t i = 0; i < columns; ++i) {
      const vreal value = value_at(of, i);
      for (unsigned left = wanted; left; left &= left - 1) {
        const unsigned l = (unsigned)__builtin_ctz(left);
        write_(out, is_double, (row + l) * columns + i, value[l]);
      }
    }
    return;
  }
  for (int64_t i = 0; i < columns; i += width) {
    const int64_t at = tile_column(i, columns, width);
    vreal tile[LANES];
    for (int c = 0; c < width; ++c) tile[c] = value_at(of, at + c);
    transpose(tile, width);
    for (unsigned left = wanted; left; left &= left - 1) {
      const unsigned l = (unsigned)__builtin_ctz(left);
      const real *from = (const real *)&tile[l % (unsigned)width] + l / (unsigned)width * (unsigned)width;
      const int64_t to = (row + l) * columns + at;
      if (native)
        memcpy((real *)out + to, from, (size_t)width * sizeof(real));
      else
        for (int c = 0; c < width; ++c) write_(out, is_double, to + c, from[c]);
    }
  }
}

#define PM_STORE(width) store_tiles(&of, wanted, row, columns, out, is_double, width)

/* Lanes out to the rows whose bit is set in `wanted`, dense. */
static void store_rows(const vreal *x, unsigned wanted, int64_t row, int64_t columns, void *out, int is_double) {
  const affine of = {.x = x};
  PM_FOR_TILES(columns, PM_STORE);
}

/* The same for x factor. */
static void store_scaled(const vreal *x, vreal factor, unsigned wanted, int64_t row, int64_t columns, void *out,
                         int is_double) {
  const affine of = {.x = x, .factor = &factor};
  PM_FOR_TILES(columns, PM_STORE);
}

/* The same for x factor - less share. */
static void store_difference(const vreal *x, vreal factor, const vreal *less, vreal share, unsigned wanted, int64_t row,
                             int64_t columns, void *out, int is_double) {
  const affine of = {.x = x, .factor = &factor, .less = less, .share = &share};
  PM_FOR_TILES(columns, PM_STORE);
}
#undef PM_STORE

PM_ALWAYS_INLINE void store_whole(const vint *x, unsigned wanted, int64_t row, int64_t columns, int64_t *out,
                                  int width) {
  if (width == 0) {
    for (int64_t i = 0; i < columns; ++i)
      for (unsigned left = wanted; left; left &= left - 1) {
        const unsigned l = (unsigned)__builtin_ctz(left);
        out[(row + l) * columns + i] = x[i][l];
      }
    return;
  }
  for (int64_t i = 0; i < columns; i += width) {
    const int64_t at = tile_column(i, columns, width);
    vreal tile[LANES];
    for (int c = 0; c < width; ++c) tile[c] = (vreal)x[at + c];
    transpose(tile, width);
    for (unsigned left = wanted; left; left &= left - 1) {
      const unsigned l = (unsigned)__builtin_ctz(left);
      const vint whole = (vint)tile[l % (unsigned)width];
      const int from = (int)(l / (unsigned)width) * width;
      int64_t *to = out + (row + l) * columns + at;
      for (int c = 0; c < width; ++c) to[c] = whole[from + c];
    }
  }
}

/* Whole numbers likewise, widened to 64 bits. */
static void store_indices(const vint *x, unsigned wanted, int64_t row, int64_t columns, int64_t *out) {
#define PM_STORE(width) store_whole(x, wanted, row, columns, out, width)
  PM_FOR_TILES(columns, PM_STORE);
#undef PM_STORE
}

#endif
