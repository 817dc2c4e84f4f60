// The Dirichlet law: draws and their gradient in the type of the row, the closed forms in double precision for all.
//
// A group of lanes a row (a warp from E = 17 on), its sums by shuffles. Drawing is arithmetic: some 500 instructions an
// element of four bytes, so that loads and stores hide behind it. The variates of a row stay in shared memory until
// their sum is known, each read by the lane that wrote it: an array of registers would have to be indexed statically,
// with a copy of the rejection loop for each of E / 32 experts. Backward nothing is kept: theta and its upstream
// gradient are read twice, the second time from the cache.
//
// The closed forms are sums in which large terms of both signs meet: log Gamma of the sum of 64 concentrations of 10 is
// 3494, of which float would leave a divergence of 0.01 two digits. They are in double precision, as on the CPU.
#include "gamma.cuh"

namespace probmoe {
namespace {

constexpr int kThreads = 128, kBlocks = 3;  // three blocks a multiprocessor leave registers for everything

template <class R>
__device__ __forceinline__ R smallest_normal() {
  return static_cast<R>(sizeof(R) == 8 ? 0x1p-1022 : 0x1p-126);
}

template <class R>
__global__ void __launch_bounds__(kThreads) dirichlet_sample_kernel(const __grid_constant__ LawJob job, int size) {
  const Group group = group_of(size, job.shape.rows);
  const int experts = static_cast<int>(job.shape.experts);
  R *const mine = reinterpret_cast<R *>(shared_memory()) + threadIdx.x / size * experts;
  const element_counter at = counter_of(job.seed, job.shape, group.row, PM_DRAW_GAMMA);
  const int64_t in = group.row * job.shape.stride, out = group.row * experts;
  R largest = -INFINITY;
  bool bad = false;
  each_expert(group, experts, [&](int i) {
    const R log_g = draw_log_gamma(read<R>(job.concentration, job.dtype, in + i), &at, static_cast<uint32_t>(i));
    mine[i] = log_g;
    bad |= log_g != log_g;
    largest = log_g > largest ? log_g : largest;
  });
  largest = group_max(group, largest);
  const bool poison = group_vote(group, bad) != 0 || largest == static_cast<R>(-INFINITY);
  if (poison) largest = 0;
  R sum = 0;
  each_expert(group, experts, [&](int i) {
    const R below = mine[i] - largest;
    mine[i] = exp_(below < 0 ? below : R(0));
    sum += mine[i];
  });
  sum = group_sum(group, sum);
  if (!group.active) return;
  const R scale = poison ? static_cast<R>(NAN) : 1 / sum;
  each_expert(group, experts, [&](int i) { write(job.out, job.dtype, out + i, mine[i] * scale); });
  if (group.lane == 0) write(job.out_other, job.dtype, group.row, poison ? static_cast<R>(NAN) : largest + log_(sum));
}

// grad_alpha_j = D_j theta_j (h_j - h.theta), log g_j = log theta_j + total. A theta below the normal range counts as
// 0: its gradient is.
template <class R>
__global__ void __launch_bounds__(kThreads) dirichlet_backward_kernel(const __grid_constant__ LawJob job, int size) {
  const Group group = group_of(size, job.shape.rows);
  const int experts = static_cast<int>(job.shape.experts);
  const int64_t in = group.row * job.shape.stride, dense = group.row * experts;
  R mean = 0;
  each_expert(group, experts, [&](int i) {
    mean = fused(read<R>(job.grad, job.dtype, dense + i), read<R>(job.other, job.dtype, dense + i), mean);
  });
  mean = group_sum(group, mean);
  if (!group.active) return;
  const R total = read<R>(job.total, job.dtype, group.row);
  each_expert(group, experts, [&](int i) {
    const R theta = read<R>(job.other, job.dtype, dense + i), h = read<R>(job.grad, job.dtype, dense + i);
    const bool positive = theta >= smallest_normal<R>(), lost = theta != theta;
    const R slope =
        log_gamma_slope(read<R>(job.concentration, job.dtype, in + i), log_(positive ? theta : R(1)) + total);
    write(job.out, job.dtype, dense + i, positive || lost ? slope * (theta * (h - mean)) : R(0));
  });
}

// ---- closed forms
// ----------------------------------------------------------------------------------------------------

// A law needs positive, finite concentrations: a row without them is computed as if they were ones, and answered with
// NaN.
struct Concentrations {
  const void *data;
  pm_dtype dtype;
  int64_t row;  // its first element

  __device__ __forceinline__ double at(int i, bool *proper) const {
    const double alpha = read<double>(data, dtype, row + i);
    const bool good = alpha > 0 && alpha < static_cast<double>(INFINITY);
    *proper &= good;
    return good ? alpha : 1;
  }
  __device__ __forceinline__ double operator[](int i) const {
    bool ignored;
    return at(i, &ignored);
  }
  // Of all experts, in every lane; `proper` where they all are.
  __device__ __forceinline__ double sum(const Group &group, int experts, bool *proper) const {
    double sum = 0;
    each_expert(group, experts, [&](int i) { sum += at(i, proper); });
    *proper = group_vote(group, !*proper) == 0;
    return group_sum(group, sum);
  }
};

enum class ClosedForm { log_prob, entropy, kl };

// A number a row.
template <ClosedForm form>
__global__ void __launch_bounds__(kThreads, kBlocks) closed_form_kernel(const __grid_constant__ LawJob job, int size) {
  const Group group = group_of(size, job.shape.rows);
  const int experts = static_cast<int>(job.shape.experts);
  const int64_t dense = group.row * experts;
  const Concentrations alpha = {job.concentration, job.dtype, group.row * job.shape.stride};
  const Concentrations other = {job.other, job.dtype, dense};
  bool proper = true;
  const double sum = alpha.sum(group, experts, &proper);
  const gamma_values whole = gamma_at(sum);
  double value = 0, beside = 0;
  if constexpr (form == ClosedForm::log_prob) {
    beside = whole.log_gamma;
    each_expert(group, experts, [&](int i) {
      const double a = alpha[i], theta = read<double>(job.other, job.dtype, dense + i);
      const bool one = a == 1 && theta == theta;  // 0 log 0 = 0
      value += (one ? 0 : (a - 1) * log_of_value(theta)) - gamma_at(a).log_gamma;
    });
  } else if constexpr (form == ClosedForm::entropy) {
    beside = fma(sum - experts, whole.digamma, -whole.log_gamma);
    each_expert(group, experts, [&](int i) {
      const double a = alpha[i];
      const gamma_values at = gamma_at(a);
      value += fma(1 - a, at.digamma, at.log_gamma);
    });
  } else {
    bool other_proper = true;
    beside = whole.log_gamma - gamma_at(other.sum(group, experts, &other_proper)).log_gamma;
    proper &= other_proper;
    each_expert(group, experts, [&](int i) {
      const double p = alpha[i], q = other[i];
      const gamma_values at = gamma_at(p);
      value += fma(p - q, at.digamma - whole.digamma, gamma_at(q).log_gamma - at.log_gamma);
    });
  }
  value = beside + group_sum(group, value);
  if (group.active && group.lane == 0) write(job.out, job.dtype, group.row, proper ? value : static_cast<double>(NAN));
}

// Its gradient from that of the row's number:
//   log density   psi(A) - psi(alpha_i) + log theta_i,   (alpha_i - 1) / theta_i
//   entropy       (A - E) psi'(A) - (alpha_i - 1) psi'(alpha_i)
//   KL(p || q)    (p_i - q_i) psi'(p_i) - (P - Q) psi'(P),   psi(q_i) - psi(Q) - (psi(p_i) - psi(P))
template <ClosedForm form>
__global__ void __launch_bounds__(kThreads, kBlocks)
    closed_form_backward_kernel(const __grid_constant__ LawJob job, int size) {
  const Group group = group_of(size, job.shape.rows);
  const int experts = static_cast<int>(job.shape.experts);
  const int64_t dense = group.row * experts;
  const Concentrations alpha = {job.concentration, job.dtype, group.row * job.shape.stride};
  const Concentrations other = {job.other, job.dtype, dense};
  bool proper = true, other_proper = true;
  const double sum = alpha.sum(group, experts, &proper);
  double other_sum = 0;
  if constexpr (form == ClosedForm::kl) other_sum = other.sum(group, experts, &other_proper);
  if (!group.active) return;
  proper &= other_proper;
  const gamma_values whole = gamma_at(sum);
  const double grad = proper ? read<double>(job.grad, job.dtype, group.row) : static_cast<double>(NAN);
  if constexpr (form == ClosedForm::log_prob) {
    each_expert(group, experts, [&](int i) {
      const double a = alpha[i], theta = read<double>(job.other, job.dtype, dense + i);
      const double by_value = a == 1 && proper ? 0 : grad * ((a - 1) / theta);
      write(job.out, job.dtype, dense + i, grad * (whole.digamma - gamma_at(a).digamma + log_of_value(theta)));
      write(job.out_other, job.dtype, dense + i, by_value);
    });
  } else if constexpr (form == ClosedForm::entropy) {
    const double shared = (sum - experts) * whole.trigamma;
    each_expert(group, experts, [&](int i) {
      const double a = alpha[i];
      write(job.out, job.dtype, dense + i, grad * fma(1 - a, gamma_at(a).trigamma, shared));
    });
  } else {
    const double shared = (sum - other_sum) * whole.trigamma, digamma = whole.digamma - gamma_at(other_sum).digamma;
    each_expert(group, experts, [&](int i) {
      const double p = alpha[i], q = other[i];
      const gamma_values at = gamma_at(p);
      write(job.out, job.dtype, dense + i, grad * fma(p - q, at.trigamma, -shared));
      write(job.out_other, job.dtype, dense + i, grad * (gamma_at(q).digamma - at.digamma + digamma));
    });
  }
}

using Kernel = void (*)(LawJob, int);

// `held`: numbers that a row keeps in shared memory for each expert.
pm_cuda_status per_row(const LawJob &job, int held, Kernel single, Kernel twice, void *stream) {
  return checked(&job.shape, job.dtype, [&] {
    const int size = lanes_for(job.shape.experts);
    const int64_t bytes = held * job.shape.experts * (job.dtype == PM_F64 ? 8 : 4);
    const int threads = threads_for(size, bytes);
    return launch(job.dtype == PM_F64 ? twice : single, job.shape.rows, size, threads,
                  static_cast<size_t>(threads / size * bytes), stream, job, size);
  });
}

pm_cuda_status in_double(const LawJob &job, Kernel kernel, void *stream) {
  return per_row(job, 0, kernel, kernel, stream);
}

}  // namespace
}  // namespace probmoe

using namespace probmoe;

extern "C" pm_cuda_status pm_cuda_dirichlet_sample(const pm_shape *shape, pm_dtype dtype, const void *concentration,
                                                   const int64_t *seed, void *out, void *log_total, void *stream) {
  LawJob job = {*shape, dtype, concentration};
  job.seed = seed;
  job.out = out;
  job.out_other = log_total;
  return per_row(job, 1, dirichlet_sample_kernel<float>, dirichlet_sample_kernel<double>, stream);
}

extern "C" pm_cuda_status pm_cuda_dirichlet_sample_backward(const pm_shape *shape, pm_dtype dtype,
                                                            const void *concentration, const void *sample,
                                                            const void *log_total, const void *grad,
                                                            void *grad_concentration, void *stream) {
  LawJob job = {*shape, dtype, concentration, sample, log_total, grad};
  job.out = grad_concentration;
  return per_row(job, 0, dirichlet_backward_kernel<float>, dirichlet_backward_kernel<double>, stream);
}

extern "C" pm_cuda_status pm_cuda_dirichlet_log_prob(const pm_shape *shape, pm_dtype dtype, const void *concentration,
                                                     const void *value, void *out, void *stream) {
  LawJob job = {*shape, dtype, concentration, value};
  job.out = out;
  return in_double(job, closed_form_kernel<ClosedForm::log_prob>, stream);
}

extern "C" pm_cuda_status pm_cuda_dirichlet_log_prob_backward(const pm_shape *shape, pm_dtype dtype,
                                                              const void *concentration, const void *value,
                                                              const void *grad, void *grad_concentration,
                                                              void *grad_value, void *stream) {
  const LawJob job = {*shape, dtype, concentration, value, nullptr, grad, nullptr, grad_concentration, grad_value};
  return in_double(job, closed_form_backward_kernel<ClosedForm::log_prob>, stream);
}

extern "C" pm_cuda_status pm_cuda_dirichlet_entropy(const pm_shape *shape, pm_dtype dtype, const void *concentration,
                                                    void *out, void *stream) {
  LawJob job = {*shape, dtype, concentration};
  job.out = out;
  return in_double(job, closed_form_kernel<ClosedForm::entropy>, stream);
}

extern "C" pm_cuda_status pm_cuda_dirichlet_entropy_backward(const pm_shape *shape, pm_dtype dtype,
                                                             const void *concentration, const void *grad,
                                                             void *grad_concentration, void *stream) {
  const LawJob job = {*shape, dtype, concentration, nullptr, nullptr, grad, nullptr, grad_concentration};
  return in_double(job, closed_form_backward_kernel<ClosedForm::entropy>, stream);
}

extern "C" pm_cuda_status pm_cuda_dirichlet_kl(const pm_shape *shape, pm_dtype dtype, const void *p_concentration,
                                               const void *q_concentration, void *out, void *stream) {
  LawJob job = {*shape, dtype, p_concentration, q_concentration};
  job.out = out;
  return in_double(job, closed_form_kernel<ClosedForm::kl>, stream);
}

extern "C" pm_cuda_status pm_cuda_dirichlet_kl_backward(const pm_shape *shape, pm_dtype dtype,
                                                        const void *p_concentration, const void *q_concentration,
                                                        const void *grad, void *grad_p, void *grad_q, void *stream) {
  const LawJob job = {*shape, dtype, p_concentration, q_concentration, nullptr, grad, nullptr, grad_p, grad_q};
  return in_double(job, closed_form_backward_kernel<ClosedForm::kl>, stream);
}
