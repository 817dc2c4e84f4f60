// CUDA adapters of the Gumbel family; an empty file in a CPU-only build.
#if defined(PM_CUDA_VERSION)
#include "cuda.h"

namespace probmoe {
namespace {

using Guard = torch::stable::accelerator::DeviceGuard;

int64_t last_size(const Tensor &tensor) { return tensor.dim() ? tensor.size(tensor.dim() - 1) : 0; }

std::tuple<Tensor, Tensor> gumbel_top_k(Tensor logits, Tensor seed, int64_t k) {
  const Guard guard(logits.get_device_index());
  const DeviceRows rows("gumbel_top_k", logits, k, k);
  Tensor keys = rows.like(k), indices = rows.like(k, ScalarType::Long);
  rows.check_launch(pm_cuda_gumbel_top_k(&rows.shape, rows.type, rows.data(), rows.seed(seed), keys.mutable_data_ptr(),
                                         static_cast<int64_t *>(indices.mutable_data_ptr()), rows.stream()));
  return {keys, indices};
}

Tensor gumbel_sigmoid(Tensor logits, Tensor seed, double temperature) {
  const Guard guard(logits.get_device_index());
  const DeviceRows rows("gumbel_sigmoid", logits, 0, 0);
  Tensor out = rows.like(rows.shape.experts);
  rows.check_launch(pm_cuda_gumbel_sigmoid(&rows.shape, rows.type, rows.data(), temperature, rows.seed(seed),
                                           out.mutable_data_ptr(), rows.stream()));
  return out;
}

Tensor plackett_luce_log_prob(Tensor logits, Tensor indices) {
  const Guard guard(logits.get_device_index());
  const DeviceRows rows("plackett_luce_log_prob", logits, 0, last_size(indices));
  const Tensor chosen = rows.companion_indices(indices, rows.shape.k_max);
  Tensor out = rows.like(std::nullopt);
  rows.check_launch(pm_cuda_plackett_luce_log_prob(&rows.shape, rows.type, rows.data(),
                                                   static_cast<const int64_t *>(chosen.const_data_ptr()),
                                                   out.mutable_data_ptr(), rows.stream()));
  return out;
}

Tensor plackett_luce_log_prob_backward(Tensor grad, Tensor logits, Tensor indices) {
  const Guard guard(logits.get_device_index());
  const DeviceRows rows("plackett_luce_log_prob_backward", logits, 0, last_size(indices));
  const Tensor chosen = rows.companion_indices(indices, rows.shape.k_max), upstream = rows.scalars("grad", grad);
  Tensor out = rows.like(rows.shape.experts);
  rows.check_launch(pm_cuda_plackett_luce_log_prob_backward(
      &rows.shape, rows.type, rows.data(), static_cast<const int64_t *>(chosen.const_data_ptr()),
      upstream.const_data_ptr(), out.mutable_data_ptr(), rows.stream()));
  return out;
}

std::tuple<Tensor, Tensor> relaxed_top_k(Tensor logits, Tensor seed, int64_t k, double temperature) {
  const Guard guard(logits.get_device_index());
  const DeviceRows rows("relaxed_top_k", logits, k, k);
  const int64_t experts = rows.shape.experts;
  Tensor out = rows.like(experts);
  Tensor keys = rows.like(experts, rows.type == PM_F64 ? ScalarType::Double : ScalarType::Float);
  rows.check_launch(pm_cuda_relaxed_top_k(&rows.shape, rows.type, rows.data(), temperature, rows.seed(seed),
                                          out.mutable_data_ptr(), keys.mutable_data_ptr(), rows.stream()));
  return {out, keys};
}

Tensor relaxed_top_k_backward(Tensor grad, Tensor keys, int64_t k, double temperature) {
  const Guard guard(keys.get_device_index());
  const DeviceRows rows("relaxed_top_k_backward", keys, k, k);
  // A gradient of half type is widened by the kernel, as it comes.
  const bool single = rows.type != PM_F64 && grad.scalar_type() != ScalarType::Double;
  const Tensor upstream =
      rows.companion("grad", grad, rows.shape.experts, single ? grad.scalar_type() : rows.logits.scalar_type());
  Tensor out = rows.like(rows.shape.experts);
  Tensor scratch = torch::stable::new_empty(
      rows.logits, {pm_cuda_relaxed_top_k_backward_scratch_size(&rows.shape, rows.type)}, ScalarType::Byte);
  rows.check_launch(pm_cuda_relaxed_top_k_backward(&rows.shape, rows.type, rows.data(), element_type(rows.op, upstream),
                                                   upstream.const_data_ptr(), temperature, out.mutable_data_ptr(),
                                                   scratch.mutable_data_ptr(), rows.stream()));
  return out;
}

}  // namespace
}  // namespace probmoe

STABLE_TORCH_LIBRARY_IMPL(PM_CUDA_NAMESPACE, PM_CUDA_KEY, m) {
  m.impl("gumbel_top_k", TORCH_BOX(&probmoe::gumbel_top_k));
  m.impl("gumbel_sigmoid", TORCH_BOX(&probmoe::gumbel_sigmoid));
  m.impl("plackett_luce_log_prob", TORCH_BOX(&probmoe::plackett_luce_log_prob));
  m.impl("plackett_luce_log_prob_backward", TORCH_BOX(&probmoe::plackett_luce_log_prob_backward));
  m.impl("relaxed_top_k", TORCH_BOX(&probmoe::relaxed_top_k));
  m.impl("relaxed_top_k_backward", TORCH_BOX(&probmoe::relaxed_top_k_backward));
}
#endif
