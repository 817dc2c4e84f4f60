// Relaxed top-k and its gradient: the rounds of csrc/rows/relaxed.h, whose formulas and names these are, on a row in
// the registers of its group.
//
// A round is a chain of reductions: the two largest keys of the row, then the sum of the others' weights. Eight keys a
// lane are enough to do between them (a power, a logarithm and a quotient each), and at E = 64 four rows share every
// shuffle. The rounds are a loop and not unrolled: their number is the caller's, and eight copies would not fit the
// instruction cache.
//
// Backward needs the weights of every round, last round first. They are made again from the keys and kept in shared
// memory, in columns of 16 bytes a lane so that no banks collide: 8.4 KB a warp at (64, 8), 24 warps a multiprocessor
// where there are 228 KB, 8 where there are 100. In registers they would be eight a round, and the number of rounds a
// constant of the code. Rows whose rounds are more than a block can hold (k above 45 at E = 64) take turns in the
// scratch.
#include "gumbel.cuh"

namespace probmoe {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kScratchBytes = 64 * 1024 * 1024;  // rows in flight are limited by it, not the other way round

__device__ __forceinline__ float power_of_two(float x) { return exp2f(x); }
__device__ __forceinline__ double power_of_two(double x) { return exp2(x); }
__device__ __forceinline__ float quotient(float a, float b) { return __fdividef(a, b); }
__device__ __forceinline__ double quotient(double a, double b) { return a / b; }

// What is known of x before a round: the largest key, which of the lane's it is (-1: another lane's), and the largest
// of the others.
template <class R>
struct Leaders {
  R first, second;
  int at;
};

template <class R, int N>
__device__ __forceinline__ Leaders<R> find_leaders(const Group &group, const R (&x)[N]) {
  R first = x[0], second = -INFINITY;
  int at = 0;
#pragma unroll
  for (int n = 1; n < N; ++n) {
    const bool above = x[n] > first;
    second = max_(second, above ? first : x[n]);
    first = above ? x[n] : first;
    at = above ? n : at;
  }
  const R own = first;
  for (int step = 1; step < group.size; step *= 2) {
    const R other = __shfl_xor_sync(kAllLanes, first, step), runner_up = __shfl_xor_sync(kAllLanes, second, step);
    second = max_(max_(second, runner_up), other < first ? other : first);
    first = max_(first, other);
  }
  const int lane = __ffs(static_cast<int>(group_vote(group, own == first))) - 1;
  return {first, second, group.lane == lane ? at : -1};
}

// A, B, what the softmax c of the others is to their weights, and -log(1 - A).
template <class R>
struct Round {
  R share, rest, scale, loss;
};

// The weights of the lane's keys, 0 for the row's largest.
template <class R, int N>
__device__ __forceinline__ Round<R> play_round(const Group &group, const R (&x)[N], const Leaders<R> &lead, R (&w)[N]) {
  const bool alone = lead.second == static_cast<R>(-INFINITY);
  const R second = alone ? R(0) : lead.second;
  R sum = 0;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    w[n] = n == lead.at ? R(0) : power_of_two(x[n] - second);
    sum += w[n];
  }
  sum = group_sum(group, sum);
  const R gap = (lead.first - second) * static_cast<R>(0.693147180559945309) - log_(alone ? R(1) : sum);
  const R odds = alone ? static_cast<R>(INFINITY) : gap, e = exponential(odds > 0 ? -odds : odds);
  const R large = quotient(R(1), 1 + e), small = e * large;
  Round<R> it;
  it.share = odds >= 0 ? large : small;
  it.rest = odds >= 0 ? small : large;
  it.scale = alone ? R(0) : quotient(R(1), sum);
  it.loss = max_(odds, R(0)) + log1p_(e);
  return it;
}

// x after the round.
template <class R, int N>
__device__ __forceinline__ void advance(const Round<R> &it, const Leaders<R> &lead, const R (&w)[N], R unit,
                                        R (&x)[N]) {
  const R scale = it.rest * it.scale;
#pragma unroll
  for (int n = 0; n < N; ++n)
    x[n] = n == lead.at ? fused(-it.loss, unit, lead.first) : fused(log_rest(w[n] * scale), unit, x[n]);
}

// Keys to units of tau log 2; they stay in range, and -inf stays what it is.
template <class R, int N>
__device__ __forceinline__ void scale_keys(R unit, R (&x)[N]) {
  const R most = static_cast<R>(sizeof(R) == 4 ? 0x1p125 : 0x1p1021);
#pragma unroll
  for (int n = 0; n < N; ++n) {
    const R scaled = x[n] * unit, low = scaled > most ? most : scaled;
    x[n] = x[n] == static_cast<R>(-INFINITY) ? x[n] : max_(low, -most);
  }
}

struct Widths {
  int in, out, keys;
};

template <class R, int N>
__global__ void __launch_bounds__(kThreads, kBlocks<R, N>)
    relaxed_top_k_kernel(const __grid_constant__ Job job, void *keys, int size, Widths widths, R unit) {
  const Group group = group_of(size, job.shape.rows);
  const int k = static_cast<int>(job.shape.k_max), experts = static_cast<int>(job.shape.experts);
  const int first = group.lane * N;
  const int64_t out = group.row * experts;
  R x[N], w[N], result[N] = {};
  load_experts(job.logits, job.dtype, widths.in, group.row * job.shape.stride, first, experts,
               static_cast<R>(-INFINITY), x);
  const bool poison = settle(group, first, experts, k, x);
  perturb(job, group.row, first, x);
  fill_poison(poison, x);
  if (group.active) store_experts(keys, sizeof(R) == 8 ? PM_F64 : PM_F32, widths.keys, out, first, experts, x);
  scale_keys(unit, x);
  for (int t = 0; t < k; ++t) {
    const Leaders<R> lead = find_leaders(group, x);
    const Round<R> it = play_round(group, x, lead, w);
    const R scale = it.rest * it.scale;
#pragma unroll
    for (int n = 0; n < N; ++n) result[n] += n == lead.at ? it.share : w[n] * scale;
    if (t + 1 < k) advance(it, lead, w, unit, x);
  }
  fill_poison(poison, result);
  if (group.active) store_experts(job.out, job.dtype, widths.out, out, first, experts, result);
}

// A warp's memory: the weights of every round, a column of 16-byte packs a lane, and what else backward needs of it.
template <class R>
struct alignas(16) Pack {
  R value[16 / sizeof(R)];
};

template <class R>
struct Kept {
  R share, rest, scale;
};

template <class R, int N>
int64_t warp_bytes(const pm_shape &shape) {
  const int64_t rows = kWarp / lanes_of<N>(shape);
  return (shape.k_max * static_cast<int64_t>(N * kWarp * sizeof(R) + rows * sizeof(Kept<R>)) + 15) / 16 * 16;
}

template <class R, int N>
__device__ __forceinline__ void keep_weights(Pack<R> *column, int t, int at, const R (&w)[N]) {
  constexpr int V = 16 / sizeof(R);
#pragma unroll
  for (int part = 0; part < N; part += V) {
    Pack<R> pack;
#pragma unroll
    for (int n = 0; n < V; ++n) pack.value[n] = part + n == at ? R(-1) : w[part + n];  // -1 marks the largest
    column[(t * (N / V) + part / V) * kWarp] = pack;
  }
}

template <class R, int N>
__device__ __forceinline__ void recall_weights(const Pack<R> *column, int t, R (&w)[N]) {
  constexpr int V = 16 / sizeof(R);
#pragma unroll
  for (int part = 0; part < N; part += V) {
    const Pack<R> pack = column[(t * (N / V) + part / V) * kWarp];
#pragma unroll
    for (int n = 0; n < V; ++n) w[part + n] = pack.value[n];
  }
}

// The gradient of x after a round to that before it, in place.
template <class R, int N>
__device__ __forceinline__ void round_backward(const Group &group, const Kept<R> &it, const R (&g)[N], R inverse,
                                               R (&w)[N], R (&q)[N]) {
  const R scale = it.rest * it.scale;
  R g_sum = 0, q_sum = 0, g_at = 0, q_at = 0;
  int at = -1;
#pragma unroll
  for (int n = 0; n < N; ++n) {
    if (w[n] < 0) at = n, g_at = g[n], q_at = q[n], w[n] = 0;
    const R a = w[n] * scale, product = q[n] * quotient(a, 1 - a);
    g_sum = fused(w[n], g[n], g_sum);
    q_sum += product;
    q[n] = fused(product, -inverse, q[n]);
  }
  g_sum = group_sum(group, g_sum);
  q_sum = group_sum(group, q_sum);
  const int lane = __ffs(static_cast<int>(group_vote(group, at >= 0))) - 1;
  g_at = from_lane(group, g_at, lane);
  q_at = from_lane(group, q_at, lane);
  const R mean = g_sum * it.scale, excess = g_at - mean;
  const R common = fused(it.share, q_at, it.rest * (q_sum - fused(it.share, excess, mean)));
  const R own = fused(it.share * inverse, fused(it.rest, excess, q_sum - q_at), q_at);
  const R slope = scale * inverse, offset = common * it.scale * inverse;
#pragma unroll
  for (int n = 0; n < N; ++n) q[n] = n == at ? own : fused(w[n], fused(slope, g[n], offset), q[n]);
}

// `bytes` of memory a warp, in the scratch or else in shared memory; all groups of a warp take the same number of
// turns.
template <class R, int N>
__global__ void __launch_bounds__(kThreads, kBlocks<R, N>)
    relaxed_top_k_backward_kernel(const __grid_constant__ Job job, pm_dtype grad_type, int size, Widths widths, R unit,
                                  R inverse, int64_t bytes) {
  const int k = static_cast<int>(job.shape.k_max), experts = static_cast<int>(job.shape.experts);
  const Group place = group_of(size, INT64_MAX);
  const int lane = static_cast<int>(threadIdx.x) % kWarp, first = place.lane * N, rows = kWarp / size;
  const int64_t warp = place.row / rows, groups = static_cast<int64_t>(gridDim.x) * (blockDim.x / size);
  char *space = job.scratch ? static_cast<char *>(job.scratch) + warp * bytes
                            : reinterpret_cast<char *>(shared_memory()) + threadIdx.x / kWarp * bytes;
  Pack<R> *column = reinterpret_cast<Pack<R> *>(space) + lane;
  Kept<R> *rounds = reinterpret_cast<Kept<R> *>(space + k * static_cast<int64_t>(N * kWarp * sizeof(R))) + lane / size;
  for (int64_t done = 0; warp * rows + done < job.shape.rows; done += groups) {
    const int64_t wanted = place.row + done;
    const bool active = wanted < job.shape.rows;
    const Group group = {size, place.lane, place.first, active ? wanted : job.shape.rows - 1, active};
    R x[N], w[N], g[N], q[N] = {};
    load_experts(job.logits, job.dtype, widths.keys, group.row * job.shape.stride, first, experts,
                 static_cast<R>(-INFINITY), x);
    const bool poison = settle(group, first, experts, k, x);
    scale_keys(unit, x);
    for (int t = 0; t < k; ++t) {
      const Leaders<R> lead = find_leaders(group, x);
      const Round<R> it = play_round(group, x, lead, w);
      keep_weights(column, t, lead.at, w);
      if (group.lane == 0) rounds[t * rows] = {it.share, it.rest, it.scale};
      if (t + 1 < k) advance(it, lead, w, unit, x);
    }
    __syncwarp();
    load_experts(job.vector, grad_type, widths.in, group.row * experts, first, experts, R(0), g);
    for (int t = k - 1; t >= 0; --t) {
      recall_weights(column, t, w);
      round_backward(group, rounds[t * rows], g, inverse, w, q);
    }
    fill_poison(poison, q);
    if (active) store_experts(job.out, job.dtype, widths.out, group.row * experts, first, experts, q);
    __syncwarp();
  }
}

// How a shape is launched: in shared memory one row a group, else as many warps as the scratch holds, in turns.
struct Plan {
  int size, threads;
  int64_t bytes, shared, groups;
  int64_t scratch;
};

template <class R, int N>
Plan plan_of(const pm_shape &shape) {
  Plan plan = {lanes_of<N>(shape), kThreads, warp_bytes<R, N>(shape), 0, shape.rows, 0};
  while (plan.threads > kWarp && plan.threads / kWarp * plan.bytes > kSharedBytes) plan.threads /= 2;
  plan.shared = plan.threads / kWarp * plan.bytes;
  if (plan.shared <= kSharedBytes) return plan;
  const int64_t a_warp = kWarp / plan.size, needed = (shape.rows + a_warp - 1) / a_warp,
                most = kScratchBytes / plan.bytes;
  const int64_t warps = most < 1 ? 1 : most < needed ? most : needed;
  plan.shared = 0;
  plan.groups = warps * a_warp;
  plan.scratch = warps * plan.bytes;
  return plan;
}

}  // namespace

extern "C" pm_cuda_status pm_cuda_relaxed_top_k(const pm_shape *shape, pm_dtype dtype, const void *logits,
                                                double temperature, const int64_t *seed, void *out, void *keys,
                                                void *stream) {
  Job job = job_of(shape, dtype, logits);
  job.seed = seed;
  job.out = out;
  return checked(shape, dtype, [&]() -> pm_cuda_status {
    if (shape->k_min != shape->k_max || !temperature_serves(temperature)) return cudaErrorInvalidValue;
    return by_shape(*shape, dtype, [&](auto real, auto slots) {
      using R = decltype(real);
      constexpr int N = decltype(slots)::value;
      const int size = lanes_of<N>(*shape);
      const int64_t experts = shape->experts;
      const Widths widths = {access_width(dtype, logits, experts, shape->stride),
                             access_width(dtype, out, experts, experts), access_width(PM_F32, keys, experts, experts)};
      return launch(relaxed_top_k_kernel<R, N>, shape->rows, size, kThreads, 0, stream, job, keys, size, widths,
                    static_cast<R>(1.44269504088896341 / temperature));
    });
  });
}

extern "C" int64_t pm_cuda_relaxed_top_k_backward_scratch_size(const pm_shape *shape, pm_dtype dtype) {
  int64_t bytes = 0;
  by_shape(*shape, dtype, [&](auto real, auto slots) -> pm_cuda_status {
    bytes = plan_of<decltype(real), decltype(slots)::value>(*shape).scratch;
    return cudaSuccess;
  });
  return bytes;
}

extern "C" pm_cuda_status pm_cuda_relaxed_top_k_backward(const pm_shape *shape, pm_dtype dtype, const void *keys,
                                                         pm_dtype grad_dtype, const void *grad, double temperature,
                                                         void *grad_logits, void *scratch, void *stream) {
  Job job = job_of(shape, dtype, keys);
  job.vector = grad;
  job.out = grad_logits;
  return checked(shape, dtype, [&]() -> pm_cuda_status {
    if (shape->k_min != shape->k_max || !temperature_serves(temperature) || (dtype == PM_F64) != (grad_dtype == PM_F64))
      return cudaErrorInvalidValue;
    return by_shape(*shape, dtype, [&](auto real, auto slots) {
      using R = decltype(real);
      constexpr int N = decltype(slots)::value;
      const Plan plan = plan_of<R, N>(*shape);
      job.scratch = plan.scratch ? scratch : nullptr;
      const int64_t experts = shape->experts;
      const Widths widths = {access_width(grad_dtype, grad, experts, experts),
                             access_width(dtype, grad_logits, experts, experts),
                             access_width(dtype, keys, experts, shape->stride)};
      return launch(relaxed_top_k_backward_kernel<R, N>, plan.groups, plan.size, plan.threads,
                    static_cast<size_t>(plan.shared), stream, job, grad_dtype, plan.size, widths,
                    static_cast<R>(1.44269504088896341 / temperature), static_cast<R>(1 / temperature), plan.bytes);
    });
  });
}

}  // namespace probmoe
