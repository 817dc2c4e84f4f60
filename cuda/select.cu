// Which experts: the draw and the mode, with their softmax weights, in one launch each.
#include "draw.cuh"
#include "kernels.cuh"

namespace probmoe {
namespace {

constexpr int kThreads = 128;

// Indices and weights of the row's slots, spread over the lanes. `member(slot)` is the expert in a slot of this lane, E
// if it is unused. Logits are read again, from the cache, rather than kept.
template <class R, class Member>
__device__ __forceinline__ void write_slots(const Group &group, const Job &job, R largest, R inverse, bool poison,
                                            bool wanted, const Member &member) {
  const int k_max = static_cast<int>(job.shape.k_max), experts = static_cast<int>(job.shape.experts);
  const int64_t in = group.row * job.shape.stride, out = group.row * k_max;
  wanted &= group.active;
  if (wanted)
    for (int slot = group.lane; slot < k_max; slot += group.size) job.out_indices[out + slot] = member(slot);
  if (!job.out) return;
  const auto softmax = [&](int at) {
    return at < experts ? exponential(read<R>(job.logits, job.dtype, in + at) - largest) * inverse : R(0);
  };
  R scale = 1;
  if (job.normalize) {
    R sum = 0;
    if (wanted)
      for (int slot = group.lane; slot < k_max; slot += group.size) sum += softmax(member(slot));
    __syncwarp();
    sum = group_sum(group, sum);
    scale = sum > 0 ? R(1) / sum : R(0);
  }
  if (!wanted) return;
  for (int slot = group.lane; slot < k_max; slot += group.size)
    write(job.out, job.dtype, out + slot, poison ? static_cast<R>(NAN) : softmax(member(slot)) * scale);
}

// One form of the draw, from loads to stores: by vote for all rows that the plain form is safe for, by walk for the
// rest
// (`wanted`). The second starts afresh, so that it costs the first no registers. Returns whether the row is answered.
template <int K, bool kPlain>
__device__ __forceinline__ bool draw_pass(const Job &job, const PlainLimits &limits, const Group &group, int width,
                                          bool wanted) {
  const int k_min = static_cast<int>(job.shape.k_min), k_max = static_cast<int>(job.shape.k_max);
  const int experts = static_cast<int>(job.shape.experts), first = group.lane * kSlots;
  Row<float, kSlots> row;
  load_slots(job.logits, job.dtype, width, group.row * job.shape.stride, first, experts, -INFINITY, row.x);
  finish_row(group, first, experts, k_min, row);
  const uint64_t seed = static_cast<uint64_t>(*job.seed),
                 number = static_cast<uint64_t>(job.shape.first_row + group.row);
  int64_t *members = job.out_indices + group.row * k_max;
  int mine[2] = {experts, experts};  // slots `lane` and `lane + size`, which for eight slots and four lanes is all
  Factors factors;
  if constexpr (kPlain) {
    wanted = plain_factors(group, row, k_min, k_max, limits, factors);
    if (!__any_sync(kAllLanes, wanted)) return false;
    wanted &= draw_by_vote<K>(group, factors, k_min, k_max, seed, number, mine);
  } else {
    scaled_factors(group, row, k_min, k_max, factors);
    const int count = draw_by_walk<K>(group, factors, k_min, k_max, seed, number, wanted && group.active, members);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      const int slot = group.lane + n * group.size;
      if (wanted && group.active && slot < count) mine[n] = static_cast<int>(members[slot]);
    }
    __syncwarp();
  }
  write_slots<float>(group, job, row.largest, row.inverse, row.poison, wanted, [&](int slot) {
    return row.poison ? slot : slot == group.lane ? mine[0] : mine[1];
  });
  return wanted;
}

// Four blocks a multiprocessor: 128 registers a lane, of which the states of its experts are 8 x 8.
template <int K>
__device__ __noinline__ void draw_walking(const Job &job, const PlainLimits &limits, int size, int width, bool wanted) {
  draw_pass<K, false>(job, limits, group_of(size, job.shape.rows), width, wanted);
}

template <int K>
__global__ void __launch_bounds__(kThreads, 4)
    draw_kernel(const __grid_constant__ Job job, const __grid_constant__ PlainLimits limits, int size, int width) {
  const bool done = draw_pass<K, true>(job, limits, group_of(size, job.shape.rows), width, true);
  if (!__all_sync(kAllLanes, done)) draw_walking<K>(job, limits, size, width, !done);
}

// k_max rounds of arg-max: for the k of practice fewer instructions than a sort, and in the order of the output.
template <class R, int N>
__global__ void __launch_bounds__(kThreads) mode_kernel(Job job, int size, int width) {
  const Group group = group_of(size, job.shape.rows);
  const int k_min = static_cast<int>(job.shape.k_min), k_max = static_cast<int>(job.shape.k_max);
  const int experts = static_cast<int>(job.shape.experts), first = group.lane * N;
  Row<R, N> row;
  if constexpr (N == kSlots) {
    load_slots(job.logits, job.dtype, width, group.row * job.shape.stride, first, experts, -INFINITY, row.x);
  } else {
#pragma unroll
    for (int n = 0; n < N; ++n)
      row.x[n] = first + n < experts ? read<R>(job.logits, job.dtype, group.row * job.shape.stride + first + n)
                                     : static_cast<R>(-INFINITY);
  }
  finish_row(group, first, experts, k_min, row);
  int64_t *members = job.out_indices + group.row * k_max;
  const bool few = k_max <= group.size;  // a slot a lane; otherwise memory keeps them
  int mine = experts;
  bool open = true;
  for (int j = 0; j < k_max; ++j) {
    int expert;
    const R logit = take_largest(group, row.x, &expert);
    // Beyond k_min only positive logits enter; the order is descending, so the first refusal is the last.
    open &= logit > static_cast<R>(-INFINITY) && (j < k_min || logit > 0);
    if (!open) expert = experts;
    if (row.poison) expert = j;
    if (few) {
      if (group.lane == j) mine = expert;
    } else if (group.active && group.lane == j % group.size) {
      members[j] = expert;
    }
  }
  write_slots<R>(group, job, row.largest, row.inverse, row.poison, true,
                 [&](int slot) { return few ? mine : static_cast<int>(members[slot]); });
}

}  // namespace

pm_cuda_status draw(const Job &job, void *stream) {
  const pm_shape &shape = job.shape;
  const int size = lanes_for((shape.experts + kSlots - 1) / kSlots);
  const int width = access_width(job.dtype, job.logits, shape.experts, shape.stride);
  const auto kernel = shape.k_max <= 4 ? draw_kernel<4> : draw_kernel<8>;
  return launch(kernel, shape.rows, size, kThreads, 0, stream, job, plain_limits(shape), size, width);
}

pm_cuda_status mode(const Job &job, void *stream) {
  const pm_shape &shape = job.shape;
  if (job.dtype != PM_F64 && shape.experts <= kTreeMaxExperts) {
    const int size = lanes_for((shape.experts + kSlots - 1) / kSlots);
    const int width = access_width(job.dtype, job.logits, shape.experts, shape.stride);
    return launch(mode_kernel<float, kSlots>, shape.rows, size, kThreads, 0, stream, job, size, width);
  }
  constexpr int kMany = PM_CUDA_MAX_EXPERTS / kWarp;
  const int size = lanes_for((shape.experts + kMany - 1) / kMany);
  const auto kernel = job.dtype == PM_F64 ? mode_kernel<double, kMany> : mode_kernel<float, kMany>;
  return launch(kernel, shape.rows, size, kThreads, 0, stream, job, size, 1);
}

}  // namespace probmoe
