// CUDA adapters of the Dirichlet family; an empty file in a CPU-only build.
#if defined(PM_CUDA_VERSION)
#include "cuda.h"

namespace probmoe {
namespace {

using Guard = torch::stable::accelerator::DeviceGuard;

std::tuple<Tensor, Tensor> sample(Tensor concentration, Tensor seed) {
  const Guard guard(concentration.get_device_index());
  const DeviceRows rows("dirichlet_sample", concentration, 0, 0);
  Tensor out = rows.like(rows.shape.experts), total = rows.like(std::nullopt);
  rows.check_launch(pm_cuda_dirichlet_sample(&rows.shape, rows.type, rows.data(), rows.seed(seed),
                                             out.mutable_data_ptr(), total.mutable_data_ptr(), rows.stream()));
  return {out, total};
}

Tensor sample_backward(Tensor grad, Tensor concentration, Tensor sample, Tensor log_total) {
  const Guard guard(concentration.get_device_index());
  const DeviceRows rows("dirichlet_sample_backward", concentration, 0, 0);
  const Tensor theta = rows.companion("sample", sample, rows.shape.experts);
  const Tensor upstream = rows.companion("grad", grad, rows.shape.experts);
  const Tensor total = rows.scalars("log_total", log_total);
  Tensor out = rows.like(rows.shape.experts);
  rows.check_launch(pm_cuda_dirichlet_sample_backward(&rows.shape, rows.type, rows.data(), theta.const_data_ptr(),
                                                      total.const_data_ptr(), upstream.const_data_ptr(),
                                                      out.mutable_data_ptr(), rows.stream()));
  return out;
}

// Two rows of E to a number, and back.
template <class Launch>
Tensor closed_form(const char *op, const char *name, const Tensor &concentration, const Tensor &other,
                   const Launch &launch) {
  const Guard guard(concentration.get_device_index());
  const DeviceRows rows(op, concentration, 0, 0);
  const Tensor second = rows.companion(name, other, rows.shape.experts);
  Tensor out = rows.like(std::nullopt);
  rows.check_launch(
      launch(&rows.shape, rows.type, rows.data(), second.const_data_ptr(), out.mutable_data_ptr(), rows.stream()));
  return out;
}

template <class Launch>
std::tuple<Tensor, Tensor> gradients(const char *op, const char *name, const Tensor &grad, const Tensor &concentration,
                                     const Tensor &other, const Launch &launch) {
  const Guard guard(concentration.get_device_index());
  const DeviceRows rows(op, concentration, 0, 0);
  const Tensor second = rows.companion(name, other, rows.shape.experts), upstream = rows.scalars("grad", grad);
  Tensor out = rows.like(rows.shape.experts), out_second = rows.like(rows.shape.experts);
  rows.check_launch(launch(&rows.shape, rows.type, rows.data(), second.const_data_ptr(), upstream.const_data_ptr(),
                           out.mutable_data_ptr(), out_second.mutable_data_ptr(), rows.stream()));
  return {out, out_second};
}

Tensor log_prob(Tensor concentration, Tensor value) {
  return closed_form("dirichlet_log_prob", "value", concentration, value, pm_cuda_dirichlet_log_prob);
}

std::tuple<Tensor, Tensor> log_prob_backward(Tensor grad, Tensor concentration, Tensor value) {
  return gradients("dirichlet_log_prob_backward", "value", grad, concentration, value,
                   pm_cuda_dirichlet_log_prob_backward);
}

Tensor kl(Tensor p, Tensor q) { return closed_form("dirichlet_kl", "q_concentration", p, q, pm_cuda_dirichlet_kl); }

std::tuple<Tensor, Tensor> kl_backward(Tensor grad, Tensor p, Tensor q) {
  return gradients("dirichlet_kl_backward", "q_concentration", grad, p, q, pm_cuda_dirichlet_kl_backward);
}

Tensor entropy(Tensor concentration) {
  const Guard guard(concentration.get_device_index());
  const DeviceRows rows("dirichlet_entropy", concentration, 0, 0);
  Tensor out = rows.like(std::nullopt);
  rows.check_launch(
      pm_cuda_dirichlet_entropy(&rows.shape, rows.type, rows.data(), out.mutable_data_ptr(), rows.stream()));
  return out;
}

Tensor entropy_backward(Tensor grad, Tensor concentration) {
  const Guard guard(concentration.get_device_index());
  const DeviceRows rows("dirichlet_entropy_backward", concentration, 0, 0);
  const Tensor upstream = rows.scalars("grad", grad);
  Tensor out = rows.like(rows.shape.experts);
  rows.check_launch(pm_cuda_dirichlet_entropy_backward(&rows.shape, rows.type, rows.data(), upstream.const_data_ptr(),
                                                       out.mutable_data_ptr(), rows.stream()));
  return out;
}

}  // namespace
}  // namespace probmoe

STABLE_TORCH_LIBRARY_IMPL(PM_CUDA_NAMESPACE, PM_CUDA_KEY, m) {
  m.impl("dirichlet_sample", TORCH_BOX(&probmoe::sample));
  m.impl("dirichlet_sample_backward", TORCH_BOX(&probmoe::sample_backward));
  m.impl("dirichlet_log_prob", TORCH_BOX(&probmoe::log_prob));
  m.impl("dirichlet_log_prob_backward", TORCH_BOX(&probmoe::log_prob_backward));
  m.impl("dirichlet_entropy", TORCH_BOX(&probmoe::entropy));
  m.impl("dirichlet_entropy_backward", TORCH_BOX(&probmoe::entropy_backward));
  m.impl("dirichlet_kl", TORCH_BOX(&probmoe::kl));
  m.impl("dirichlet_kl_backward", TORCH_BOX(&probmoe::kl_backward));
}
#endif
