/* Philox4x32-10 (Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011), and how this
 * library counts: key = seed, counter = (draw / 4, row low, row high, purpose); word draw % 4 belongs to the draw.
 * Shared by C and CUDA; rows/philox.h holds the same rounds on vectors of rows. */
#ifndef PROBMOE_PHILOX_H
#define PROBMOE_PHILOX_H

#include <stdint.h>

#if defined(__CUDACC__)
#define PM_INLINE static __host__ __device__ __forceinline__
#else
#define PM_INLINE static inline
#endif

#define PM_PHILOX_ROUNDS 10
#define PM_PHILOX_M0 0xD2511F53u
#define PM_PHILOX_M1 0xCD9E8D57u
#define PM_PHILOX_W0 0x9E3779B9u
#define PM_PHILOX_W1 0xBB67AE85u

/* What a draw is for: the fourth counter word. Odd purposes are the low words of the even ones before them, read in
 * double precision alone, so that both precisions see the same leading bits. */
enum {
  PM_DRAW_ITEM = 0, /* which expert is taken next, t = 0, 1, ... from the last to the first */
  PM_DRAW_ITEM_LOW = 1,
  PM_DRAW_SIZE = 2, /* how many experts, t = 0 */
  PM_DRAW_SIZE_LOW = 3,
  PM_DRAW_GUMBEL = 4, /* the Gumbel variate of expert t */
  PM_DRAW_GUMBEL_LOW = 5,
  PM_DRAW_CONCRETE = 6, /* the logistic variate of expert t */
  PM_DRAW_CONCRETE_LOW = 7,
  PM_DRAW_LOGISTIC = 18, /* the logistic variate of DirMoE's gate t */
  PM_DRAW_LOGISTIC_LOW = 19,
  /* Counted by the element instead: counter word 0 is attempt * PM_MAX_EXPERTS + column, and all four words are used.
   */
  PM_DRAW_GAMMA = 16, /* radius, angle, acceptance, boost */
  PM_DRAW_GAMMA_LOW = 17
};

PM_INLINE void pm_philox(uint64_t seed, uint32_t counter[4]) {
  uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < PM_PHILOX_ROUNDS; ++round) {
    const uint64_t product0 = (uint64_t)PM_PHILOX_M0 * counter[0];
    const uint64_t product1 = (uint64_t)PM_PHILOX_M1 * counter[2];
    counter[0] = (uint32_t)(product1 >> 32) ^ counter[1] ^ key0;
    counter[1] = (uint32_t)product1;
    counter[2] = (uint32_t)(product0 >> 32) ^ counter[3] ^ key1;
    counter[3] = (uint32_t)product0;
    key0 += PM_PHILOX_W0;
    key1 += PM_PHILOX_W1;
  }
}

/* 32 random bits for one draw of one row. */
PM_INLINE uint32_t pm_random_word(uint64_t seed, uint64_t row, uint32_t draw, uint32_t purpose) {
  uint32_t counter[4];
  counter[0] = draw / 4;
  counter[1] = (uint32_t)row;
  counter[2] = (uint32_t)(row >> 32);
  counter[3] = purpose;
  pm_philox(seed, counter);
  /* selected, not indexed: a GPU's registers have no addresses */
  const uint32_t low = draw & 1 ? counter[1] : counter[0], high = draw & 1 ? counter[3] : counter[2];
  return draw & 2 ? high : low;
}

/* Uniforms in [0, 1): 24 bits in single, 53 in double precision; both round down, so 1 is never returned. */
PM_INLINE float pm_uniform_f32(uint32_t word) { return (float)(word >> 8) * 0x1p-24f; }
PM_INLINE double pm_uniform_f64(uint32_t high, uint32_t low) {
  return (double)(((uint64_t)high << 21) | (low >> 11)) * 0x1p-53;
}

#endif
