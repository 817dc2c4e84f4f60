/* Random words for every lane: the rounds of ../philox.h on vectors of counters. Word l serves lane l % LANES; in
 * double precision the upper half of the words are the low parts of what is drawn. */
#ifndef PM_ROWS_PHILOX_H
#define PM_ROWS_PHILOX_H

#include "../philox.h"
#include "simd.h"

PM_ALWAYS_INLINE void random_words(uint64_t seed, vword c[4]) {
  uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < PM_PHILOX_ROUNDS; ++round) {
    vword high0, low0, high1, low1;
    multiply_words(c[0], PM_PHILOX_M0, &high0, &low0);
    multiply_words(c[2], PM_PHILOX_M1, &high1, &low1);
    c[0] = high1 ^ c[1] ^ key0;
    c[1] = low1;
    c[2] = high0 ^ c[3] ^ key1;
    c[3] = low0;
    key0 += PM_PHILOX_W0;
    key1 += PM_PHILOX_W1;
  }
}

/* The counters of a block of rows, but for their first word, and a key. Lanes may stand for elements of any rows and
 * columns: `column` is what the first words of theirs are ahead. */
typedef struct element_counter {
  vword column, row_low, row_high, purpose;
  uint64_t seed;
} element_counter;

/* Lanes past the last of the block's rows repeat it. */
PM_ALWAYS_INLINE element_counter counter_of(uint64_t seed, uint64_t row, int64_t rows, uint32_t purpose) {
  vword low = {0}, high = {0}, use = {0};
  for (int l = 0; l < WORDS; ++l) {
    const int64_t lane = l % LANES;
    const uint64_t number = row + (uint64_t)(lane < rows ? lane : rows - 1);
    low[l] = (uint32_t)number;
    high[l] = (uint32_t)(number >> 32);
    use[l] = purpose + (uint32_t)(l / LANES);
  }
  return (element_counter){{0}, low, high, use, seed};
}

PM_ALWAYS_INLINE void element_words(const element_counter *at, uint32_t first, vword words[4]) {
  words[0] = at->column + first, words[1] = at->row_low, words[2] = at->row_high, words[3] = at->purpose;
  random_words(at->seed, words);
}

#if PM_REAL_BITS == 64
/* The leading 52 bits of each lane's word. */
PM_ALWAYS_INLINE vpattern leading_bits(vword word) {
  typedef uint32_t half __attribute__((vector_size(PM_VECTOR_BYTES / 2)));
  half high, low;
  memcpy(&high, &word, sizeof high);
  memcpy(&low, (const char *)&word + sizeof high, sizeof low);
  return (__builtin_convertvector(high, vpattern) << 20) | (__builtin_convertvector(low, vpattern) >> 12);
}
#endif

#endif
