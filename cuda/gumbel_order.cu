// Plackett-Luce: the log-probability of an ordered draw, and its gradient.
//
// With L_t the logsumexp of what is left after choice t, its term is -log(1 + exp(L_t - r_t)), which loses nothing. L
// is a scan over the choices from the last to the first: with a choice a lane, log2(lanes) steps rather than k, and the
// terms of all choices at once. A partial sum is a pair, its largest logit and the sum relative to it, so that only
// logits are ever subtracted from one another: single precision serves where a running logarithm, which is as large as
// the logits are, would need double (as the CPU takes it).
#include "gumbel.cuh"

#include <climits>

namespace probmoe {
namespace {

constexpr int kThreads = 128;
constexpr int kNone = INT_MIN, kOutside = INT_MIN + 1;  // no choice in this slot; one that is no expert

// sum exp(largest); nothing at all is -inf, 0.
template <class R>
struct LogSum {
  R largest, sum;
};

template <class R>
__device__ __forceinline__ LogSum<R> nothing() {
  return {static_cast<R>(-INFINITY), 0};
}

template <class R>
__device__ __forceinline__ LogSum<R> operator+(const LogSum<R> &a, const LogSum<R> &b) {
  const R largest = max_(a.largest, b.largest), by = largest > static_cast<R>(-INFINITY) ? largest : R(0);
  return {largest, fused(a.sum, exponential(a.largest - by), b.sum * exponential(b.largest - by))};
}

template <class R>
__device__ __forceinline__ LogSum<R> from_lane(const Group &group, const LogSum<R> &it, int lane) {
  return {from_lane(group, it.largest, lane), from_lane(group, it.sum, lane)};
}

// Each lane's sum with those of all lanes after it (direction 1) or before it (direction -1).
template <class R>
__device__ __forceinline__ LogSum<R> scan(const Group &group, LogSum<R> it, int direction) {
  for (int step = 1; step < group.size; step *= 2) {
    const int other = group.lane + direction * step;
    const LogSum<R> brought = from_lane(group, it, other & (group.size - 1));
    if (other >= 0 && other < group.size) it = it + brought;
  }
  return it;
}

// log(1 + exp(d)).
template <class R>
__device__ __forceinline__ R softplus(R d) {
  return max_(d, R(0)) + log1p_(exponential(d > 0 ? -d : d));
}

// A row, and which of its experts are chosen.
template <class R, int N>
struct Order {
  Group group;
  int k, experts, first;
  int64_t from;  // of its choices
  R x[N];
  uint32_t taken;           // bit n: expert first + n is chosen
  bool poison, impossible;  // NaN, +inf or no index; masked or chosen twice

  __device__ __forceinline__ Order(const Job &job, int size, int width) : group(group_of(size, job.shape.rows)) {
    k = static_cast<int>(job.shape.k_max), experts = static_cast<int>(job.shape.experts), first = group.lane * N;
    from = group.row * k;
    load_experts(job.logits, job.dtype, width, group.row * job.shape.stride, first, experts, static_cast<R>(-INFINITY),
                 x);
    poison = settle(group, first, experts, 0, x);
    taken = 0;
    bool outside = false, never = false;
    for (int base = 0; base < k; base += size) {
      const int at = choice(job, base + group.lane);
      outside |= at == kOutside;
      never |= at >= 0 && !(logit(job, at) > static_cast<R>(-INFINITY));
      for (int lane = 0; lane < size && base + lane < k; ++lane) {
        const int offset = from_lane(group, at, lane) - first;
        if (offset < 0 || offset >= N) continue;
        never |= taken >> offset & 1;
        taken |= 1u << offset;
      }
    }
    poison |= group_vote(group, outside) != 0;
    impossible = group_vote(group, never) != 0;
  }

  // The expert in a slot; negative where there is none.
  __device__ __forceinline__ int choice(const Job &job, int slot) const {
    if (slot >= k) return kNone;
    const int64_t index = job.indices[from + slot];
    return index >= 0 && index < experts ? static_cast<int>(index) : kOutside;
  }

  __device__ __forceinline__ R logit(const Job &job, int at) const {
    return read<R>(job.logits, job.dtype, group.row * job.shape.stride + at);
  }

  // What no choice takes.
  __device__ __forceinline__ LogSum<R> rest() const {
    R largest = -INFINITY, sum = 0;
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (!(taken >> n & 1)) largest = max_(x[n], largest);
    largest = group_max(group, largest);
    const R by = largest > static_cast<R>(-INFINITY) ? largest : R(0);
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (!(taken >> n & 1)) sum += exponential(x[n] - by);
    return {largest, group_sum(group, sum)};
  }

  // body(slot, at, r, before, after) for every choice, a lane each, from the last to the first.
  template <class Body>
  __device__ __forceinline__ void back(const Job &job, const Body &body) const {
    LogSum<R> left = rest();
    for (int base = (k - 1) / group.size * group.size; base >= 0; base -= group.size) {
      const int at = choice(job, base + group.lane);
      const R r = at >= 0 ? logit(job, at) : static_cast<R>(-INFINITY);
      const LogSum<R> own = scan(group, at >= 0 && r > static_cast<R>(-INFINITY) ? LogSum<R>{r, 1} : nothing<R>(), 1);
      const LogSum<R> next = from_lane(group, own, (group.lane + 1) & (group.size - 1));
      const LogSum<R> before = own + left, after = group.lane + 1 < group.size ? next + left : left;
      body(base + group.lane, at, r, before, after);
      left = from_lane(group, before, 0);
    }
  }
};

template <class R, int N>
__global__ void __launch_bounds__(kThreads, kBlocks<R, N>)
    plackett_luce_kernel(const __grid_constant__ Job job, int size, int width) {
  const Order<R, N> it(job, size, width);
  R total = 0;
  it.back(job, [&](int, int at, R r, const LogSum<R> &, const LogSum<R> &after) {
    if (at >= 0 && after.sum > 0) total -= softplus((after.largest - r) + log_(after.sum));
  });
  total = group_sum(it.group, total);
  if (it.impossible) total = -INFINITY;
  if (it.poison) total = NAN;
  if (it.group.active && it.group.lane == 0) write(job.out, job.dtype, it.group.row, total);
}

// d/dr_i = [i chosen] - sum over t of exp(r_i - L_t), L_t before t, t up to i's own choice, or to the last: the sums of
// exp(-L_t) are a scan from the first choice to the last. A lane keeps the L of its slots, and then their results, in
// shared memory, since registers have no index and there may be more slots than lanes.
template <class R, int N>
__global__ void __launch_bounds__(kThreads, kBlocks<R, N>)
    plackett_luce_backward_kernel(const __grid_constant__ Job job, int size, int in_width, int out_width) {
  const Order<R, N> it(job, size, in_width);
  const Group &group = it.group;
  const int k = it.k, experts = it.experts;
  LogSum<R> *slots = reinterpret_cast<LogSum<R> *>(shared_memory()) + static_cast<int>(threadIdx.x) / size * k;
  it.back(job, [&](int slot, int at, R, const LogSum<R> &before, const LogSum<R> &) {
    if (slot < k) slots[slot] = at >= 0 ? before : nothing<R>();
  });
  const R grad = read<R>(job.vector, job.dtype, group.row);
  const auto answer = [&](R value) { return it.poison ? static_cast<R>(NAN) : it.impossible ? R(0) : value; };
  LogSum<R> until = nothing<R>();
  for (int base = 0; base < k; base += size) {
    const int slot = base + group.lane, at = it.choice(job, slot);
    const LogSum<R> before = slot < k ? slots[slot] : nothing<R>();
    const LogSum<R> own =
        scan(group, before.sum > 0 ? LogSum<R>{-before.largest, 1 / before.sum} : nothing<R>(), -1) + until;
    if (at >= 0) slots[slot].sum = answer(grad * (1 - exponential(it.logit(job, at) + own.largest) * own.sum));
    until = from_lane(group, own, size - 1);
  }
  const int64_t row = group.row * experts;
  R result[N];
#pragma unroll
  for (int n = 0; n < N; ++n) result[n] = answer(-grad * (exponential(it.x[n] + until.largest) * until.sum));
  if (group.active) store_experts(job.out, job.dtype, out_width, row, it.first, experts, result);
  __syncwarp();  // the choices go over what that has put in their places
  for (int slot = group.lane; slot < k && group.active; slot += size) {
    const int at = it.choice(job, slot);
    if (at >= 0) write(job.out, job.dtype, row + at, slots[slot].sum);
  }
}

// Blocks as large as the slots of their rows leave room for.
template <class R>
int threads_for(const pm_shape &shape, int size, size_t *shared) {
  for (int threads = kThreads;; threads /= 2) {
    *shared = static_cast<size_t>(threads / size * shape.k_max) * sizeof(LogSum<R>);
    if (*shared <= kSharedBytes || threads == kWarp) return threads;
  }
}

}  // namespace

extern "C" pm_cuda_status pm_cuda_plackett_luce_log_prob(const pm_shape *shape, pm_dtype dtype, const void *logits,
                                                         const int64_t *indices, void *out, void *stream) {
  Job job = job_of(shape, dtype, logits);
  job.indices = indices;
  job.out = out;
  return checked(shape, dtype, [&] {
    return by_shape(*shape, dtype, [&](auto real, auto slots) {
      constexpr int N = decltype(slots)::value;
      const int size = lanes_of<N>(*shape);
      return launch(plackett_luce_kernel<decltype(real), N>, shape->rows, size, kThreads, 0, stream, job, size,
                    access_width(dtype, logits, shape->experts, shape->stride));
    });
  });
}

extern "C" pm_cuda_status pm_cuda_plackett_luce_log_prob_backward(const pm_shape *shape, pm_dtype dtype,
                                                                  const void *logits, const int64_t *indices,
                                                                  const void *grad, void *grad_logits, void *stream) {
  Job job = job_of(shape, dtype, logits);
  job.indices = indices;
  job.vector = grad;
  job.out = grad_logits;
  return checked(shape, dtype, [&] {
    return by_shape(*shape, dtype, [&](auto real, auto slots) {
      using R = decltype(real);
      constexpr int N = decltype(slots)::value;
      const int size = lanes_of<N>(*shape);
      size_t shared;
      const int threads = threads_for<R>(*shape, size, &shared);
      return launch(plackett_luce_backward_kernel<R, N>, shape->rows, size, threads, shared, stream, job, size,
                    access_width(dtype, logits, shape->experts, shape->stride),
                    access_width(dtype, grad_logits, shape->experts, shape->experts));
    });
  });
}

}  // namespace probmoe
