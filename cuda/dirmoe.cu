// DirMoE routing, forward and backward in one launch each, in double precision for all types as on the CPU.
//
// A group of lanes a row (a warp from E = 17 on). Each lane has the experts lane, lane + size, ...: what a row holds
// for them lies in shared memory, three or four numbers an expert, and is read and written by the owning lane alone;
// sums, maxima and votes go through shuffles. Nothing is stored but what the operator returns. Backward recomputes
// gates and concentrations from the noise and the Gamma variates that were kept, and every quantity of an expert is
// finished in one loop, in which its derivative, the divergence's two and the gate are formed one after another in
// registers.
//
// Double precision is what the products z theta at low temperatures ask for (log z reaches -1e30) and what makes a draw
// the CPU's. It costs little where there are units for it (half the rate of float on a data centre's GPU) and more than
// everything else where there are few.
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

// The type of what is kept between forward and backward: half types are too short for it.
__device__ __forceinline__ pm_dtype kept_type(const DirmoeJob &job) { return job.dtype == PM_F64 ? PM_F64 : PM_F32; }

// A row's inputs; those of a row without an answer are zeros and ones.
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
    const auto is_concentration = [](double alpha) { return alpha > 0 && alpha < static_cast<double>(INFINITY); };
    each_expert(group, experts, [&](int i) {
      const double ell = read<double>(job.gate_logits, job.dtype, in + i);
      bad |= !(ell < static_cast<double>(INFINITY));
      bad |= !is_concentration(read<double>(job.alpha_hi, job.dtype, dense + i));
      bad |= !is_concentration(read<double>(job.alpha_lo, job.dtype, dense + i));
      unmasked += ell > static_cast<double>(-INFINITY);
    });
    poison = group_vote(group, bad) != 0;
    unmasked = group_sum(group, unmasked);
    poison |= !job.options.training && unmasked < job.shape.k_min;
  }

  // size is a power of two
  __device__ __forceinline__ bool owns(int i) const { return (i & (group.size - 1)) == group.lane; }
  __device__ __forceinline__ double gate_logit(const DirmoeJob &job, int i) const {
    return poison ? 0 : read<double>(job.gate_logits, job.dtype, in + i);
  }
  __device__ __forceinline__ double alpha_hi(const DirmoeJob &job, int i) const {
    return poison ? 1 : read<double>(job.alpha_hi, job.dtype, dense + i);
  }
  __device__ __forceinline__ double alpha_lo(const DirmoeJob &job, int i) const {
    return poison ? 1 : read<double>(job.alpha_lo, job.dtype, dense + i);
  }
  // Of posterior and prior, where the gate is this far open.
  __device__ __forceinline__ void mix(const DirmoeJob &job, int i, double open, double closed, double *q,
                                      double *p) const {
    const pm_dirmoe &o = job.options;
    // Rounded as on the CPU: fused with a sum that follows in the draw, the product would give it other bits.
    q[i] = __dmul_rn(o.concentration, fma(open, alpha_hi(job, i), closed * alpha_lo(job, i)));
    p[i] = o.prior_concentration * fma(open, o.prior_hi, closed * o.prior_lo);
  }
  // body(slot, expert) in the lane that owns the expert, for the slots that have one.
  template <class Body>
  __device__ __forceinline__ void each_slot(const int64_t *indices, const Body &body) const {
    for (int j = 0; j < k_max; ++j) {
      const int64_t i = indices[slots + j];
      if (i >= 0 && i < experts && owns(static_cast<int>(i))) body(j, static_cast<int>(i));
    }
  }
  __device__ __forceinline__ double answer(double value) const { return poison ? static_cast<double>(NAN) : value; }
};

// take(j, expert, x[expert]) in all lanes for the k_max largest of x, descending, ties to the lower expert; expert E
// where none above -inf is left. A round is an arg-max over the lanes' own best ones, of which only the winner has to
// look for another: fewer steps than a sort for the k of practice, and no bound on k.
template <class Take>
__device__ __forceinline__ void largest_first(const DirmoeRow &row, const double *x, const Take &take) {
  double best = -INFINITY;
  int at = row.experts;
  each_expert(row.group, row.experts, [&](int i) {
    if (x[i] > best) best = x[i], at = i;
  });
  for (int j = 0; j < row.k_max; ++j) {
    const double largest = group_max(row.group, best);
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

__device__ __forceinline__ double divergence(const DirmoeRow &row, const double *p, const double *q) {
  double sum_p = 0, sum_q = 0;
  each_expert(row.group, row.experts, [&](int i) { sum_p += p[i], sum_q += q[i]; });
  sum_p = group_sum(row.group, sum_p);
  sum_q = group_sum(row.group, sum_q);
  const gamma_values whole = gamma_at(sum_p);
  double value = 0;
  each_expert(row.group, row.experts, [&](int i) {
    const gamma_values at = gamma_at(p[i]);
    value += fma(p[i] - q[i], at.digamma - whole.digamma, gamma_at(q[i]).log_gamma - at.log_gamma);
  });
  return whole.log_gamma - gamma_at(sum_q).log_gamma + group_sum(row.group, value);
}

__global__ void __launch_bounds__(kThreads, kBlocks) dirmoe_kernel(const __grid_constant__ DirmoeJob job, int size) {
  const DirmoeRow row(job, size);
  const Group &group = row.group;
  const int experts = row.experts, k_max = row.k_max;
  double *const score = shared_memory() + static_cast<int>(threadIdx.x) / size * kHeldForward * experts;
  double *const q = score + experts, *const p = q + experts;
  int64_t *const indices = job.out_indices + row.slots;
  const auto choose = [&](int j, int expert) {
    if (group.active && row.owns(j)) indices[j] = row.poison ? j : expert;
  };
  double expected = 0, largest = 0, sum = 0;
  if (job.options.training) {
    const element_counter logistic = counter_of(job.seed, job.shape, group.row, PM_DRAW_LOGISTIC);
    const element_counter gamma = counter_of(job.seed, job.shape, group.row, PM_DRAW_GAMMA);
    each_expert(group, experts, [&](int i) {
      const double noise = logistic_noise(&logistic, static_cast<uint32_t>(i));
      const gate at = relaxed_gate(row.gate_logit(job, i), noise, job.options.temperature);
      row.mix(job, i, at.open, at.closed, q, p);
      const double log_g = draw_log_gamma(q[i], &gamma, static_cast<uint32_t>(i));
      score[i] = at.log_open + log_g;
      expected += at.open;
      if (!group.active) return;
      write(job.noise, kept_type(job), row.dense + i, noise);
      write(job.log_gamma, kept_type(job), row.dense + i, log_g);
    });
    expected = group_sum(group, expected);
    largest_first(row, score, [&](int j, int expert, double top) {
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
    largest_first(row, p, [&](int j, int expert, double logit) {
      // Beyond k_min only positive logits enter; the order is descending, so the first refusal is the last.
      open &= expert < experts && (j < job.shape.k_min || logit > 0);
      choose(j, open ? expert : experts);
      if (open && row.owns(expert)) score[expert] = 1;
      chosen += open;
    });
    expected = chosen;
    each_expert(group, experts, [&](int i) {
      row.mix(job, i, score[i], 1 - score[i], q, p);
      sum += score[i] > 0 ? q[i] : 0;
    });
    sum = group_sum(group, sum);
  }
  if (!(sum > 0)) sum = 1;
  const double kl = divergence(row, q, p), inverse = 1 / sum;
  __syncwarp();
  if (!group.active) return;
  for (int j = group.lane; j < k_max; j += size) {
    const int64_t i = indices[j];
    double weight = 0;
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
__global__ void __launch_bounds__(kThreads, kBlocks)
    dirmoe_backward_kernel(const __grid_constant__ DirmoeJob job, int size) {
  const DirmoeRow row(job, size);
  const Group &group = row.group;
  const pm_dirmoe &o = job.options;
  const int experts = row.experts;
  double *const share = shared_memory() + static_cast<int>(threadIdx.x) / size * kHeldBackward * experts;
  double *const held = share + experts, *const q = held + experts, *const p = q + experts;
  const auto gate_at = [&](int i) {
    const double noise = row.poison ? 0 : read<double>(job.noise, kept_type(job), row.dense + i);
    return relaxed_gate(row.gate_logit(job, i), noise, o.temperature);
  };
  const auto log_gamma_at = [&](int i) {
    return row.poison ? 0 : read<double>(job.log_gamma, kept_type(job), row.dense + i);
  };
  const auto grad_at = [&](int j) { return read<double>(job.grad_weights, job.dtype, row.slots + j); };
  double sum = 0, mean = 0;
  if (o.training) {
    double largest = -INFINITY;
    each_expert(group, experts, [&](int i) {
      const gate at = gate_at(i);
      row.mix(job, i, at.open, at.closed, q, p);
      share[i] = row.poison ? 0 : at.log_open + log_gamma_at(i);
      largest = share[i] > largest ? share[i] : largest;
    });
    largest = group_max(group, largest);
    if (largest == static_cast<double>(-INFINITY)) largest = 0;
    each_expert(group, experts, [&](int i) {
      share[i] = exp_(share[i] - largest);
      if (!o.normalize) sum += share[i];
    });
    if (o.normalize) row.each_slot(job.indices, [&](int, int i) { sum += share[i]; });
  } else {
    each_expert(group, experts, [&](int i) { share[i] = 0; });
    row.each_slot(job.indices, [&](int, int i) { share[i] = 1; });
    each_expert(group, experts, [&](int i) {
      row.mix(job, i, share[i], 1 - share[i], q, p);
      if (share[i] > 0) sum += q[i];
    });
  }
  sum = group_sum(group, sum);
  const double inverse = sum > 0 ? 1 / sum : 1;
  row.each_slot(job.indices, [&](int j, int i) {
    const double weight = (o.training ? share[i] : q[i]) * inverse;
    if (weight > 0) mean = fma(grad_at(j), weight, mean);
  });
  mean = group_sum(group, mean);
  const bool over_slots = o.normalize || !o.training;
  each_expert(group, experts, [&](int i) { held[i] = over_slots ? 0 : -mean; });
  row.each_slot(job.indices, [&](int j, int i) { held[i] += over_slots ? grad_at(j) - mean : grad_at(j); });
  double sum_q = 0, sum_p = 0;
  each_expert(group, experts, [&](int i) { sum_q += q[i], sum_p += p[i]; });
  sum_q = group_sum(group, sum_q);
  sum_p = group_sum(group, sum_p);
  if (!group.active) return;
  const gamma_values whole = gamma_at(sum_q);
  const double shared = (sum_q - sum_p) * whole.trigamma, digamma = whole.digamma - gamma_at(sum_p).digamma;
  const double by_kl = read<double>(job.grad_kl, job.dtype, group.row);
  const double by_expected = read<double>(job.grad_expected, job.dtype, group.row);
  each_expert(group, experts, [&](int i) {
    const gamma_values at_q = gamma_at(q[i]);
    const double kl_by_q = fma(q[i] - p[i], at_q.trigamma, -shared);
    double open = share[i], closed = 1 - share[i], by_draw = held[i] * inverse, by_score = 0, kl_by_p = 0;
    bool moves = false;
    if (o.training) {
      const gate at = gate_at(i);
      by_score = share[i] * inverse * held[i];
      by_draw = by_score != 0 ? by_score * log_gamma_slope(q[i], log_gamma_at(i)) : 0;
      kl_by_p = gamma_at(p[i]).digamma - at_q.digamma + digamma;
      open = at.open, closed = at.closed, moves = at.moves;
    }
    const double by_q = o.concentration * fma(by_kl, kl_by_q, by_draw);
    const double by_p = o.prior_concentration * (by_kl * kl_by_p);
    const double by_gate =
        by_q * (row.alpha_hi(job, i) - row.alpha_lo(job, i)) + by_p * (o.prior_hi - o.prior_lo) + by_expected;
    const double by_gate_logit = moves ? fma(by_gate, open, by_score) * (closed / o.temperature) : 0;
    write(job.grad_gate_logits, job.dtype, row.dense + i, row.answer(by_gate_logit));
    write(job.grad_alpha_hi, job.dtype, row.dense + i, row.answer(by_q * open));
    write(job.grad_alpha_lo, job.dtype, row.dense + i, row.answer(by_q * closed));
  });
}

pm_cuda_status per_row(const DirmoeJob &job, int held, void (*kernel)(DirmoeJob, int), void *stream) {
  const pm_dirmoe &o = job.options;
  for (double number : {o.temperature, o.concentration, o.prior_concentration, o.prior_hi, o.prior_lo})
    if (!(number > 0) || std::isinf(number)) return cudaErrorInvalidValue;
  return checked(&job.shape, job.dtype, [&] {
    const int size = lanes_for(job.shape.experts);
    const int64_t bytes = held * job.shape.experts * 8;
    const int threads = threads_for(size, bytes);
    return launch(kernel, job.shape.rows, size, threads, static_cast<size_t>(threads / size * bytes), stream, job,
                  size);
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
  return per_row(job, kHeldForward, dirmoe_kernel, stream);
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
  return per_row(job, kHeldBackward, dirmoe_backward_kernel, stream);
}
