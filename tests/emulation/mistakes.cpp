// Kernels with one mistake each, to see the emulation find it.
#include "include/cuda_runtime.h"

namespace {

enum Mistake { none, divergent_shuffle, left_early, outside_mask, divergent_barrier, past_shared, before_shared, race };

int64_t result[64];

void faulty(int mistake) {
  const int lane = static_cast<int>(threadIdx.x);
  double *shared = emulation::dynamic_shared_memory();
  if (mistake != race) shared[lane] = lane;
  if (mistake == left_early && lane == 5) return;
  if (mistake == divergent_shuffle && lane % 2) {
    result[lane] = __shfl_xor_sync(0xffffffffu, lane, 1);
  } else {
    result[lane] = __shfl_xor_sync(0xffffffffu, lane, 1);
  }
  if (mistake == outside_mask) __ballot_sync(0xffu, true);
  if (mistake == divergent_barrier && lane == 7) __syncthreads();
  if (mistake == race) shared[lane] = lane;  // a warp that is ahead reads before it
  if (mistake != race) __syncthreads();
  if (mistake == past_shared && lane == 63) shared[64] = 1;
  if (mistake == before_shared && lane == 0) shared[-1] = 1;
  const double other = shared[(lane + 32) % 64];  // of the other warp: needs the barrier
  result[lane] += std::isnan(other) ? -1000 : static_cast<int64_t>(other);
}

}  // namespace

// Runs it, and returns what is said; the sum of the results, NaN ones included, in *sum.
extern "C" __attribute__((visibility("default"))) const char *emulation_mistake(int mistake, int64_t *sum) {
  cudaLaunchConfig_t config = {dim3(1), dim3(64), 64 * sizeof(double), nullptr};
  const cudaError_t status = cudaLaunchKernelEx(&config, faulty, mistake);
  *sum = 0;
  for (int64_t value : result) *sum += value;
  return cudaGetErrorString(status);
}
