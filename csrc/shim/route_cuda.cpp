// CUDA adapters of routing; an empty file in a CPU-only build.
#if defined(PM_CUDA_VERSION)
#include "cuda.h"

namespace probmoe {
namespace {

std::tuple<Tensor, Tensor> route_top_k(Tensor logits, int64_t k, bool normalize) {
  const char *op = "route_top_k";
  const pm_dtype type = element_type(op, logits);
  const pm_shape shape = rows_of(op, logits, k, k);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  Tensor weights = like(logits, k, logits.scalar_type()), indices = like(logits, k, ScalarType::Long);
  check_launch(op, pm_cuda_route_mode(&shape, type, logits.const_data_ptr(), normalize, weights.mutable_data_ptr(),
                                      static_cast<int64_t *>(indices.mutable_data_ptr()), current_stream(logits)));
  return {weights, indices};
}

Tensor route_top_k_backward(Tensor grad_weights, Tensor logits, Tensor indices, bool normalize) {
  const char *op = "route_top_k_backward";
  const int64_t k = indices.dim() ? indices.size(indices.dim() - 1) : 0;
  const pm_dtype type = element_type(op, logits);
  const pm_shape shape = rows_of(op, logits, k, k);
  const auto is_companion = [&](const Tensor &t) {
    return t.dim() == logits.dim() && t.numel() == shape.rows * k && t.get_device_index() == logits.get_device_index();
  };
  if (!is_companion(grad_weights) || !is_companion(indices) || indices.scalar_type() != ScalarType::Long)
    fail("probmoe_ext::", op, ": grad_weights and int64 indices must have the shape of logits, with last dimension ",
         k);
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device_index());
  const Tensor grad = torch::stable::contiguous(torch::stable::to(grad_weights, logits.scalar_type()));
  const Tensor chosen = torch::stable::contiguous(indices);
  Tensor out = like(logits, shape.experts, logits.scalar_type());
  check_launch(op, pm_cuda_route_straight_through(
                       &shape, type, logits.const_data_ptr(), static_cast<const int64_t *>(chosen.const_data_ptr()),
                       grad.const_data_ptr(), normalize, out.mutable_data_ptr(), current_stream(logits)));
  return out;
}

}  // namespace
}  // namespace probmoe

STABLE_TORCH_LIBRARY_IMPL(probmoe_ext, CUDA, m) {
  m.impl("route_top_k", TORCH_BOX(&probmoe::route_top_k));
  m.impl("route_top_k_backward", TORCH_BOX(&probmoe::route_top_k_backward));
}
#endif
