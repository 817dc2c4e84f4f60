// DirMoE routing, forward and backward in one launch each, in the precision of the type as on the CPU.
//
// A group of lanes a row (a warp from E = 17 on). Each lane has the experts lane, lane + size, ...: what a row holds
// for them lies in shared memory, three or four numbers an expert, and is read and written by the owning lane alone;
// sums, maxima and votes go through shuffles. Nothing is stored but what the operator returns. Backward recomputes
// gates and concentrations from the noise and the Gamma variates that were kept, and every quantity of an expert is
// finished in one loop, in which its derivative, the divergence's two and the gate are formed one after another in
// registers.
#include "gamma.cuh"

namespace probmoe {
namespace {

constexpr int kThreads = 128, kBlocks = 3;          // three blocks a multiprocessor leave registers for everything
constexpr int kHeldForward = 3, kHeldBackward = 4;  // numbers an expert

// As pm_dirmoe_job of csrc/kernels.h.
struct DirmoeJob {
  pm_shape shape;
  pm_dirmoe options;
  pm_dtype dtype;
  const void *gate_logits, *alpha_hi, *alpha_lo;
  const int64_t *seed;                                     // on the device; forward, training
  const void *grad_weights, *grad_kl, *grad_expected;      // backward
  const int64_t *indices;                                  // backward
  void *weights, *kl, *expected_k;                         // forward
  int64_t *out_indices;                                    // forward
  void *noise, *log_gamma;                                 // written forward, read backward, training
  void *grad_gate_logits, *grad_alpha_hi, *grad_alpha_lo;  // backward
};

// The options in the kernel's precision, away from the ends of its range; made on the host.
template <class R>
struct Numbers {
  R inverse_temperature, concentration, prior_concentration, prior_hi, prior_lo;

  explicit Numbers(const pm_dirmoe &o)
      : inverse_temperature(held(1 / o.temperature)),
        concentration(held(o.concentration)),
        prior_concentration(held(o.prior_concentration)),
        prior_hi(held(o.prior_hi)),
        prior_lo(held(o.prior_lo)) {}

  static R held(double option) { return static_cast<R>(option < 1e-30 ? 1e-30 : option > 1e30 ? 1e30 : option); }
};

// Standard logistic noise of a gate, from the word of its draw.
template <class R>
__device__ __forceinline__ R logistic_noise(const element_counter &at, uint32_t column) {
  const uint32_t high = pm_random_word(at.seed, at.row, column, at.purpose);
  R u, complement;
  if constexpr (sizeof(R) == 4)
    open_uniform(high, &u, &complement);
  else
    open_uniform(uint64_t{high} << 32 | pm_random_word(at.seed, at.row, column, at.purpose + 1), &u, &complement);
  return logistic_from(u, complement);
}

// The type of what is kept between forward and backward: half types are too short for it.
__device__ __forceinline__ pm_dtype kept_type(const DirmoeJob &job) { return job.dtype == PM_F64 ? PM_F64 : PM_F32; }

// A row's inputs; those of a row without an answer are zeros and ones.
template <class R>
struct DirmoeRow {
  Group group;
  int experts, k_max;
  int64_t in, dense, slots;  // its first element in the gate logits, in [T, E] and in [T, k_max]
  bool poison;

  __device__ __forceinline__ DirmoeRow(const DirmoeJob &job, int size) : group(group_of(size, job.shape.rows)) {
    experts = static_cast<int>(job.shape.experts), k_max = static_cast<int>(job.shape.k_max);
    in = group.row * job.shape.stride, dense = group.row * experts, slots = group.row * k_max;
    bool bad = false;
    int unmasked = 0;
    const auto is_concentration = [](R alpha) { return alpha > 0 && alpha < static_cast<R>(INFINITY); };
    each_expert(group, experts, [&](int i) {
      const R ell = read<R>(job.gate_logits, job.dtype, in + i);
      bad |= !(ell < static_cast<R>(INFINITY));
      bad |= !is_concentration(read<R>(job.alpha_hi, job.dtype, dense + i));
      bad |= !is_concentration(read<R>(job.alpha_lo, job.dtype, dense + i));
      unmasked += ell > static_cast<R>(-INFINITY);
    });
    poison = group_vote(group, bad) != 0;
    unmasked = group_sum(group, unmasked);
    poison |= !job.options.training && unmasked < job.shape.k_min;
  }

  // size is a power of two
  __device__ __forceinline__ bool owns(int i) const { return (i & (group.size - 1)) == group.lane; }
  __device__ __forceinline__ R gate_logit(const DirmoeJob &job, int i) const {
    return poison ? 0 : read<R>(job.gate_logits, job.dtype, in + i);
  }
  __device__ __forceinline__ R alpha_hi(const DirmoeJob &job, int i) const {
    return poison ? 1 : read<R>(job.alpha_hi, job.dtype, dense + i);
  }
  __device__ __forceinline__ R alpha_lo(const DirmoeJob &job, int i) const {
    return poison ? 1 : read<R>(job.alpha_lo, job.dtype, dense + i);
  }
  // Of posterior and prior, where the gate is this far open.
  __device__ __forceinline__ void mix(const DirmoeJob &job, const Numbers<R> &by, int i, R open, R closed, R *q,
                                      R *p) const {
    q[i] = mixed(open, closed, by.concentration, alpha_hi(job, i), alpha_lo(job, i));
    p[i] = mixed(open, closed, by.prior_concentration, by.prior_hi, by.prior_lo);
  }
  // body(slot, expert) in the lane that owns the expert, for the slots that have one.
  template <class Body>
  __device__ __forceinline__ void each_slot(const int64_t *indices, const Body &body) const {
    for (int j = 0; j < k_max; ++j) {
      const int64_t i = indices[slots + j];
      if (i >= 0 && i < experts && owns(static_cast<int>(i))) body(j, static_cast<int>(i));
    }
  }
  __device__ __forceinline__ R answer(R value) const { return poison ? static_cast<R>(NAN) : value; }
};

// take(j, expert, x[expert]) in all lanes for the k_max largest of x, descending, ties to the lower expert; expert E
// where none above -inf is left. A round is an arg-max over the lanes' own best ones, of which only the winner has to
// look for another: fewer steps than a sort for the k of practice, and no bound on k.
template <class R, class Take>
__device__ __forceinline__ void largest_first(const DirmoeRow<R> &row, const R *x, const Take &take) {
  R best = -INFINITY;
  int at = row.experts;
  each_expert(row.group, row.experts, [&](int i) {
    if (x[i] > best) best = x[i], at = i;
  });
  for (int j = 0; j < row.k_max; ++j) {
    const R largest = group_max(row.group, best);
    const int expert = -group_max(row.group, best == largest ? -at : -row.experts);
    if (at == expert && expert < row.experts) {
      best = -INFINITY, at = row.experts;
      each_expert(row.group, row.experts, [&](int i) {
        if ((x[i] < largest || (x[i] == largest && i > expert)) && x[i] > best) best = x[i], at = i;
      });
    }
    take(j, expert, largest);
  }
}

// The sums of p, of q and of their differences, the first two no larger than the divergence takes them.
template <class R>
struct Sums {
  R p = 0, q = 0, difference = 0;

  __device__ __forceinline__ Sums(const DirmoeRow<R> &row, const R *p_of, const R *q_of) {
    each_expert(row.group, row.experts, [&](int i) {
      p += p_of[i], q += q_of[i];
      difference += p_of[i] - q_of[i];
    });
    const R most = sizeof(R) == 4 ? R(0x1p42) : R(0x1p316);
    p = group_sum(row.group, p), q = group_sum(row.group, q);
    p = p < most ? p : most, q = q < most ? q : most;
    difference = group_sum(row.group, difference);
  }
};

template <class R>
__device__ __forceinline__ R divergence(const DirmoeRow<R> &row, const R *p, const R *q) {
  const Sums<R> whole(row, p, q);
  R value = 0;
  each_expert(row.group, row.experts, [&](int i) { value += bregman(p[i], q[i], p[i] - q[i]); });
  return group_sum(row.group, value) - bregman(whole.p, whole.q, whole.difference);
}

template <class R>
__global__ void __launch_bounds__(kThreads, kBlocks)
    dirmoe_kernel(const __grid_constant__ DirmoeJob job, const __grid_constant__ Numbers<R> by, int size) {
  const DirmoeRow<R> row(job, size);
  const Group &group = row.group;
  const int experts = row.experts, k_max = row.k_max;
  R *const score =
      reinterpret_cast<R *>(shared_memory()) + static_cast<int>(threadIdx.x) / size * kHeldForward * experts;
  R *const q = score + experts, *const p = q + experts;
  int64_t *const indices = job.out_indices + row.slots;
  const auto choose = [&](int j, int expert) {
    if (group.active && row.owns(j)) indices[j] = row.poison ? j : expert;
  };
  R expected = 0, largest = 0, sum = 0;
  if (job.options.training) {
    const element_counter logistic = counter_of(job.seed, job.shape, group.row, PM_DRAW_LOGISTIC);
    const element_counter gamma = counter_of(job.seed, job.shape, group.row, PM_DRAW_GAMMA);
    each_expert(group, experts, [&](int i) {
      const R noise = logistic_noise<R>(logistic, static_cast<uint32_t>(i));
      const auto at = relaxed_gate(row.gate_logit(job, i), noise, by.inverse_temperature);
      row.mix(job, by, i, at.open, at.closed, q, p);
      const R log_g = draw_log_gamma(q[i], &gamma, static_cast<uint32_t>(i));
      score[i] = at.log_open + log_g;
      expected += at.open;
      if (!group.active) return;
      write(job.noise, kept_type(job), row.dense + i, noise);
      write(job.log_gamma, kept_type(job), row.dense + i, log_g);
    });
    expected = group_sum(group, expected);
    largest_first(row, score, [&](int j, int expert, R top) {
      choose(j, expert);
      if (j == 0 && expert < experts) largest = top;
      if (job.options.normalize && expert < experts) sum += exp_(top - largest);
    });
    if (!job.options.normalize) {
      each_expert(group, experts, [&](int i) { sum += exp_(score[i] - largest); });
      sum = group_sum(group, sum);
    }
  } else {
    each_expert(group, experts, [&](int i) {
      p[i] = row.gate_logit(job, i);
      score[i] = 0;
    });
    bool open = true;
    int chosen = 0;
    largest_first(row, p, [&](int j, int expert, R logit) {
      // Beyond k_min only positive logits enter; the order is descending, so the first refusal is the last.
      open &= expert < experts && (j < job.shape.k_min || logit > 0);
      choose(j, open ? expert : experts);
      if (open && row.owns(expert)) score[expert] = 1;
      chosen += open;
    });
    expected = chosen;
    each_expert(group, experts, [&](int i) {
      row.mix(job, by, i, score[i], 1 - score[i], q, p);
      sum += score[i] > 0 ? q[i] : 0;
    });
    sum = group_sum(group, sum);
  }
  if (!(sum > 0)) sum = 1;
  const R kl = divergence(row, p, q), inverse = 1 / sum;
  __syncwarp();
  if (!group.active) return;
  for (int j = group.lane; j < k_max; j += size) {
    const int64_t i = indices[j];
    R weight = 0;
    if (i < experts) weight = job.options.training ? exp_(score[i] - largest) * inverse : q[i] / sum;
    write(job.weights, job.dtype, row.slots + j, row.answer(weight));
  }
  if (group.lane != 0) return;
  write(job.kl, job.dtype, group.row, row.answer(kl));
  write(job.expected_k, job.dtype, group.row, row.answer(expected));
}

// Training: with r the softmax of the scores log z + log g, over the slots (normalize) or over all experts, and h the
// gradient of the weights, 0 outside the slots, dL/dscore_i = r_i (h_i - h.r); r_i is 0 outside the slots where it is
// over them. From the score it reaches q implicitly, through log g. Otherwise theta = q / sum over the slots. `held` is
// the factor of r_i, or of 1 / sum.
template <class R>
__global__ void __launch_bounds__(kThreads, kBlocks)
    dirmoe_backward_kernel(const __grid_constant__ DirmoeJob job, const __grid_constant__ Numbers<R> by, int size) {
  const DirmoeRow<R> row(job, size);
  const Group &group = row.group;
  const pm_dirmoe &o = job.options;
  const int experts = row.experts;
  R *const share =
      reinterpret_cast<R *>(shared_memory()) + static_cast<int>(threadIdx.x) / size * kHeldBackward * experts;
  R *const held = share + experts, *const q = held + experts, *const p = q + experts;
  const auto gate_at = [&](int i) {
    const R noise = row.poison ? 0 : read<R>(job.noise, kept_type(job), row.dense + i);
    return relaxed_gate(row.gate_logit(job, i), noise, by.inverse_temperature);
  };
  const auto log_gamma_at = [&](int i) {
    return row.poison ? 0 : read<R>(job.log_gamma, kept_type(job), row.dense + i);
  };
  const auto grad_at = [&](int j) { return read<R>(job.grad_weights, job.dtype, row.slots + j); };
  R sum = 0, mean = 0;
  if (o.training) {
    R largest = -INFINITY;
    each_expert(group, experts, [&](int i) {
      const auto at = gate_at(i);
      row.mix(job, by, i, at.open, at.closed, q, p);
      share[i] = row.poison ? 0 : at.log_open + log_gamma_at(i);
      largest = share[i] > largest ? share[i] : largest;
    });
    largest = group_max(group, largest);
    if (largest == static_cast<R>(-INFINITY)) largest = 0;
    each_expert(group, experts, [&](int i) {
      share[i] = exp_(share[i] - largest);
      if (!o.normalize) sum += share[i];
    });
    if (o.normalize) row.each_slot(job.indices, [&](int, int i) { sum += share[i]; });
  } else {
    each_expert(group, experts, [&](int i) { share[i] = 0; });
    row.each_slot(job.indices, [&](int, int i) { share[i] = 1; });
    each_expert(group, experts, [&](int i) {
      row.mix(job, by, i, share[i], 1 - share[i], q, p);
      if (share[i] > 0) sum += q[i];
    });
  }
  sum = group_sum(group, sum);
  const R inverse = sum > 0 ? 1 / sum : 1;
  row.each_slot(job.indices, [&](int j, int i) {
    const R weight = (o.training ? share[i] : q[i]) * inverse;
    if (weight > 0) mean = fma(grad_at(j), weight, mean);
  });
  mean = group_sum(group, mean);
  const bool over_slots = o.normalize || !o.training;
  each_expert(group, experts, [&](int i) { held[i] = over_slots ? 0 : -mean; });
  row.each_slot(job.indices, [&](int j, int i) { held[i] += over_slots ? grad_at(j) - mean : grad_at(j); });
  const Sums<R> sums(row, p, q);
  const auto whole = bregman_slopes_at(sums.p, sums.q, sums.difference);
  if (!group.active) return;
  const R by_kl = read<R>(job.grad_kl, job.dtype, group.row);
  const R by_expected = read<R>(job.grad_expected, job.dtype, group.row);
  const R prior_gap = by_kl * (by.prior_concentration * (by.prior_hi - by.prior_lo));
  each_expert(group, experts, [&](int i) {
    const auto kl = bregman_slopes_at(p[i], q[i], p[i] - q[i]);
    R open = share[i], closed = 1 - share[i], by_draw = held[i] * inverse, by_score = 0, slope = 0;
    if (o.training) {
      const auto at = gate_at(i);
      by_score = share[i] * inverse * held[i];
      by_draw = by_score != 0 ? by_score * log_gamma_slope(q[i], log_gamma_at(i)) : 0;
      open = at.open, closed = at.closed, slope = at.moves ? at.closed * by.inverse_temperature : 0;
    }
    const R by_q = by.concentration * fma(by_kl, kl.by_q - whole.by_q, by_draw);
    const R by_gate =
        fma(by_q, row.alpha_hi(job, i) - row.alpha_lo(job, i), fma(prior_gap, kl.by_p - whole.by_p, by_expected));
    const R by_gate_logit = fma(by_gate, open, by_score) * slope;
    write(job.grad_gate_logits, job.dtype, row.dense + i, row.answer(by_gate_logit));
    write(job.grad_alpha_hi, job.dtype, row.dense + i, row.answer(by_q * open));
    write(job.grad_alpha_lo, job.dtype, row.dense + i, row.answer(by_q * closed));
  });
}

template <class R>
pm_cuda_status per_row(const DirmoeJob &job, int held, void (*kernel)(DirmoeJob, Numbers<R>, int), void *stream) {
  const pm_dirmoe &o = job.options;
  for (double number : {o.temperature, o.concentration, o.prior_concentration, o.prior_hi, o.prior_lo})
    if (!(number > 0) || std::isinf(number)) return cudaErrorInvalidValue;
  return checked(&job.shape, job.dtype, [&] {
    const int size = lanes_for(job.shape.experts);
    const int64_t bytes = held * job.shape.experts * static_cast<int64_t>(sizeof(R));
    const int threads = threads_for(size, bytes);
    return launch(kernel, job.shape.rows, size, threads, static_cast<size_t>(threads / size * bytes), stream, job,
                  Numbers<R>(o), size);
  });
}

}  // namespace
}  // namespace probmoe

using namespace probmoe;

extern "C" pm_cuda_status pm_cuda_route_dirmoe(const pm_shape *shape, const pm_dirmoe *options, pm_dtype dtype,
                                               const void *gate_logits, const void *alpha_hi, const void *alpha_lo,
                                               const int64_t *seed, void *weights, int64_t *indices, void *kl,
                                               void *expected_k, void *noise, void *log_gamma, void *stream) {
  if (options->training && !seed) return cudaErrorInvalidValue;
  DirmoeJob job = {*shape, *options, dtype, gate_logits, alpha_hi, alpha_lo, seed};
  job.weights = weights, job.kl = kl, job.expected_k = expected_k;
  job.out_indices = indices;
  job.noise = noise, job.log_gamma = log_gamma;
  return dtype == PM_F64 ? per_row(job, kHeldForward, dirmoe_kernel<double>, stream)
                         : per_row(job, kHeldForward, dirmoe_kernel<float>, stream);
}

extern "C" pm_cuda_status pm_cuda_route_dirmoe_backward(const pm_shape *shape, const pm_dirmoe *options, pm_dtype dtype,
                                                        const void *gate_logits, const void *alpha_hi,
                                                        const void *alpha_lo, const int64_t *indices, const void *noise,
                                                        const void *log_gamma, const void *grad_weights,
                                                        const void *grad_kl, const void *grad_expected_k,
                                                        void *grad_gate_logits, void *grad_alpha_hi,
                                                        void *grad_alpha_lo, void *stream) {
  DirmoeJob job = {*shape, *options, dtype, gate_logits, alpha_hi, alpha_lo};
  job.indices = indices;
  job.noise = const_cast<void *>(noise), job.log_gamma = const_cast<void *>(log_gamma);
  job.grad_weights = grad_weights, job.grad_kl = grad_kl, job.grad_expected = grad_expected_k;
  job.grad_gate_logits = grad_gate_logits, job.grad_alpha_hi = grad_alpha_hi, job.grad_alpha_lo = grad_alpha_lo;
  return dtype == PM_F64 ? per_row(job, kHeldBackward, dirmoe_backward_kernel<double>, stream)
                         : per_row(job, kHeldBackward, dirmoe_backward_kernel<float>, stream);
}
