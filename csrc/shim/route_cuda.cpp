// CUDA adapters of routing; an empty file in a CPU-only build.
#if defined(PM_CUDA_VERSION)
#include "cuda.h"

namespace probmoe {
namespace {

using Guard = torch::stable::accelerator::DeviceGuard;

std::tuple<Tensor, Tensor> route(const DeviceRows &rows, const int64_t *seed, bool normalize) {
  const int64_t k_max = rows.shape.k_max;
  Tensor weights = rows.like(k_max), indices = rows.like(k_max, ScalarType::Long), scratch = rows.scratch();
  rows.check_launch(pm_cuda_route(&rows.shape, rows.type, rows.data(), seed, normalize, weights.mutable_data_ptr(),
                                  static_cast<int64_t *>(indices.mutable_data_ptr()), scratch.mutable_data_ptr(),
                                  rows.stream()));
  return {weights, indices};
}

std::tuple<Tensor, Tensor> route_probmoe(Tensor logits, std::optional<Tensor> seed, int64_t k_min, int64_t k_max,
                                         bool sample, bool normalize,
                                         bool /* marginal: read by the backward pass alone */) {
  const Guard guard(logits.get_device_index());
  const DeviceRows rows("route_probmoe", logits, k_min, k_max);
  return route(rows, sample ? rows.seed(seed) : nullptr, normalize);
}

std::tuple<Tensor, Tensor> route_top_k(Tensor logits, int64_t k, bool normalize) {
  const Guard guard(logits.get_device_index());
  return route(DeviceRows("route_top_k", logits, k, k), nullptr, normalize);
}

Tensor route_backward(const DeviceRows &rows, const Tensor &grad_weights, const Tensor &indices, bool normalize,
                      bool marginal) {
  const Tensor grad = rows.companion("grad_weights", grad_weights, rows.shape.k_max);
  const Tensor chosen = rows.companion_indices(indices, rows.shape.k_max);
  Tensor out = rows.like(rows.shape.experts), scratch = rows.scratch();
  rows.check_launch(pm_cuda_route_backward(&rows.shape, rows.type, rows.data(),
                                           static_cast<const int64_t *>(chosen.const_data_ptr()), grad.const_data_ptr(),
                                           marginal ? PM_BACKWARD_MARGINAL : PM_BACKWARD_STRAIGHT_THROUGH, normalize,
                                           out.mutable_data_ptr(), scratch.mutable_data_ptr(), rows.stream()));
  return out;
}

Tensor route_probmoe_backward(Tensor grad_weights, Tensor logits, Tensor indices, int64_t k_min, int64_t k_max,
                              bool normalize, bool marginal) {
  const Guard guard(logits.get_device_index());
  return route_backward(DeviceRows("route_probmoe_backward", logits, k_min, k_max), grad_weights, indices, normalize,
                        marginal);
}

Tensor route_top_k_backward(Tensor grad_weights, Tensor logits, Tensor indices, bool normalize) {
  const Guard guard(logits.get_device_index());
  const int64_t k = indices.dim() ? indices.size(indices.dim() - 1) : 0;
  return route_backward(DeviceRows("route_top_k_backward", logits, k, k), grad_weights, indices, normalize, false);
}

}  // namespace
}  // namespace probmoe

STABLE_TORCH_LIBRARY_IMPL(PM_CUDA_NAMESPACE, PM_CUDA_KEY, m) {
  m.impl("route_top_k", TORCH_BOX(&probmoe::route_top_k));
  m.impl("route_top_k_backward", TORCH_BOX(&probmoe::route_top_k_backward));
  m.impl("route_probmoe", TORCH_BOX(&probmoe::route_probmoe));
  m.impl("route_probmoe_backward", TORCH_BOX(&probmoe::route_probmoe_backward));
}
#endif
