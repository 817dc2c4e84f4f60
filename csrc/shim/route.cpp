// Schemas and CPU adapters of routing.
#include "shim.h"

namespace probmoe {
namespace {

std::tuple<Tensor, Tensor> route(const char *op, const Tensor &tensor, uint64_t seed, int64_t k_min, int64_t k_max,
                                 pm_forward forward, bool normalize) {
  const Rows logits(op, "logits", tensor);
  Tensor weights = logits.like(std::max<int64_t>(k_max, 0)), indices = logits.indices(std::max<int64_t>(k_max, 0));
  if (k_max != 0)
    dispatch(logits, [&](auto type) {
      using T = decltype(type);
      T *to = static_cast<T *>(weights.mutable_data_ptr());
      int64_t *at = static_cast<int64_t *>(indices.mutable_data_ptr());
      for_rows<T>(op, logits, k_min, k_max, [&](const pm_shape &part, int64_t row, void *scratch) {
        const T *from = logits.data<T>() + row * logits.stride;
        if constexpr (sizeof(T) == 8)
          return pm_route_f64(&part, from, forward, normalize, seed, to + row * k_max, at + row * k_max, scratch);
        else
          return pm_route_f32(&part, from, forward, normalize, seed, to + row * k_max, at + row * k_max, scratch);
      });
    });
  return {logits.finish(weights), indices};
}

std::tuple<Tensor, Tensor> route_probmoe(Tensor logits, std::optional<Tensor> seed, int64_t k_min, int64_t k_max,
                                         bool sample, bool normalize,
                                         bool /* marginal: read by the backward pass alone */) {
  // Eager callers leave the seed out, which saves them a call; a graph, which the fake kernel serves, must have it.
  const uint64_t bits = !sample ? 0 : seed ? read_seed("route_probmoe", seed) : draw_seed();
  return route("route_probmoe", logits, bits, k_min, k_max, sample ? PM_FORWARD_SAMPLE : PM_FORWARD_MODE, normalize);
}

std::tuple<Tensor, Tensor> route_top_k(Tensor logits, int64_t k, bool normalize) {
  return route("route_top_k", logits, 0, k, k, PM_FORWARD_MODE, normalize);
}

Tensor route_probmoe_backward(Tensor grad_weights, Tensor tensor, Tensor indices, int64_t k_min, int64_t k_max,
                              bool normalize, bool marginal) {
  const char *op = "route_probmoe_backward";
  const Rows logits(op, "logits", tensor);
  const Tensor grad = companion(op, "grad_weights", logits, grad_weights, k_max);
  if (!logits.same_sizes(indices, k_max) || indices.scalar_type() != ScalarType::Long)
    fail("probmoe_ext::", op, ": indices must be int64 with the shape of logits, with last dimension ", k_max);
  const Tensor chosen = torch::stable::contiguous(indices);
  Tensor out = logits.like(logits.columns);
  dispatch(logits, [&](auto type) {
    using T = decltype(type);
    const T *upstream = static_cast<const T *>(grad.const_data_ptr());
    const int64_t *at = static_cast<const int64_t *>(chosen.const_data_ptr());
    T *to = static_cast<T *>(out.mutable_data_ptr());
    const pm_backward backward = marginal ? PM_BACKWARD_MARGINAL : PM_BACKWARD_STRAIGHT_THROUGH;
    for_rows<T>(op, logits, k_min, k_max, [&](const pm_shape &part, int64_t row, void *scratch) {
      const T *from = logits.data<T>() + row * logits.stride;
      if constexpr (sizeof(T) == 8)
        return pm_route_backward_f64(&part, from, at + row * k_max, upstream + row * k_max, backward, normalize,
                                     to + row * logits.columns, scratch);
      else
        return pm_route_backward_f32(&part, from, at + row * k_max, upstream + row * k_max, backward, normalize,
                                     to + row * logits.columns, scratch);
    });
  });
  return logits.finish(out);
}

Tensor route_top_k_backward(Tensor grad_weights, Tensor logits, Tensor indices, bool normalize) {
  const int64_t k = indices.dim() ? indices.size(indices.dim() - 1) : 0;
  return route_probmoe_backward(grad_weights, logits, indices, k, k, normalize, false);
}

}  // namespace
}  // namespace probmoe

STABLE_TORCH_LIBRARY_FRAGMENT(probmoe_ext, m) {
  m.def("route_top_k(Tensor logits, int k, bool normalize) -> (Tensor, Tensor)");
  m.def("route_top_k_backward(Tensor grad_weights, Tensor logits, Tensor indices, bool normalize) -> Tensor");
  m.def(
      "route_probmoe(Tensor logits, Tensor? seed, int k_min, int k_max, bool sample, bool normalize, bool marginal)"
      " -> (Tensor, Tensor)");
  m.def(
      "route_probmoe_backward(Tensor grad_weights, Tensor logits, Tensor indices, int k_min, int k_max, bool normalize,"
      " bool marginal) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(probmoe_ext, CPU, m) {
  m.impl("route_top_k", TORCH_BOX(&probmoe::route_top_k));
  m.impl("route_top_k_backward", TORCH_BOX(&probmoe::route_top_k_backward));
  m.impl("route_probmoe", TORCH_BOX(&probmoe::route_probmoe));
  m.impl("route_probmoe_backward", TORCH_BOX(&probmoe::route_probmoe_backward));
}
