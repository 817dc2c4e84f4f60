// Schemas and CPU adapters of DirMoE routing.
#include "shim.h"

namespace probmoe {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> route_dirmoe(
    Tensor gate_logits, Tensor alpha_hi, Tensor alpha_lo, std::optional<Tensor> seed, int64_t k_min, int64_t k_max,
    double temperature, double concentration, double prior_concentration, double prior_hi, double prior_lo,
    bool training, bool normalize) {
  const char *op = "route_dirmoe";
  const Rows logits(op, "gate_logits", gate_logits);
  const Tensor hi = companion(op, "alpha_hi", logits, alpha_hi, logits.columns);
  const Tensor lo = companion(op, "alpha_lo", logits, alpha_lo, logits.columns);
  const uint64_t key = training ? read_seed(op, seed) : 0;
  const pm_dirmoe options{temperature, concentration, prior_concentration, prior_hi, prior_lo, training, normalize};
  const int64_t width = std::max<int64_t>(k_max, 0), E = logits.columns, saved = training ? E : 0;
  Tensor weights = logits.like(width), indices = logits.indices(width);
  Tensor kl = logits.like(std::nullopt), expected_k = logits.like(std::nullopt);
  Tensor noise = logits.like(saved), log_gamma = logits.like(saved);
  dispatch(logits, [&](auto type) {
    using T = decltype(type);
    for_rows<T>(op, logits, k_min, k_max, [&](const pm_shape &part, int64_t row, void *scratch) {
      const auto route = [&](auto fn) {
        return fn(&part, &options, logits.data<T>() + row * logits.stride, at<T>(hi) + row * E, at<T>(lo) + row * E,
                  key, at<T>(weights) + row * k_max, at<int64_t>(indices) + row * k_max, at<T>(kl) + row,
                  at<T>(expected_k) + row, at<T>(noise) + row * saved, at<T>(log_gamma) + row * saved, scratch);
      };
      if constexpr (sizeof(T) == 8)
        return route(pm_route_dirmoe_f64);
      else
        return route(pm_route_dirmoe_f32);
    });
  });
  return {logits.finish(weights), indices, logits.finish(kl), logits.finish(expected_k), noise, log_gamma};
}

std::tuple<Tensor, Tensor, Tensor> route_dirmoe_backward(Tensor grad_weights, Tensor grad_kl, Tensor grad_expected_k,
                                                         Tensor gate_logits, Tensor alpha_hi, Tensor alpha_lo,
                                                         Tensor indices, Tensor noise, Tensor log_gamma, int64_t k_min,
                                                         int64_t k_max, double temperature, double concentration,
                                                         double prior_concentration, double prior_hi, double prior_lo,
                                                         bool training, bool normalize) {
  const char *op = "route_dirmoe_backward";
  const Rows logits(op, "gate_logits", gate_logits);
  const int64_t E = logits.columns, saved = training ? E : 0;
  const Tensor hi = companion(op, "alpha_hi", logits, alpha_hi, E), lo = companion(op, "alpha_lo", logits, alpha_lo, E);
  const Tensor by_weights = companion(op, "grad_weights", logits, grad_weights, k_max);
  const Tensor by_kl = scalars(op, "grad_kl", logits, grad_kl);
  const Tensor by_expected = scalars(op, "grad_expected_k", logits, grad_expected_k);
  const Tensor drawn = companion(op, "noise", logits, noise, saved);
  const Tensor log_g = companion(op, "log_gamma", logits, log_gamma, saved);
  if (!logits.same_sizes(indices, k_max) || indices.scalar_type() != ScalarType::Long)
    fail("probmoe_ext::", op, ": indices must be int64 with the shape of gate_logits, with last dimension ", k_max);
  const Tensor chosen = torch::stable::contiguous(indices);
  const pm_dirmoe options{temperature, concentration, prior_concentration, prior_hi, prior_lo, training, normalize};
  Tensor to_gate = logits.like(E), to_hi = logits.like(E), to_lo = logits.like(E);
  dispatch(logits, [&](auto type) {
    using T = decltype(type);
    for_rows<T>(op, logits, k_min, k_max, [&](const pm_shape &part, int64_t row, void *scratch) {
      const auto route = [&](auto fn) {
        return fn(&part, &options, logits.data<T>() + row * logits.stride, at<T>(hi) + row * E, at<T>(lo) + row * E,
                  at<int64_t>(chosen) + row * k_max, at<T>(drawn) + row * saved, at<T>(log_g) + row * saved,
                  at<T>(by_weights) + row * k_max, at<T>(by_kl) + row, at<T>(by_expected) + row,
                  at<T>(to_gate) + row * E, at<T>(to_hi) + row * E, at<T>(to_lo) + row * E, scratch);
      };
      if constexpr (sizeof(T) == 8)
        return route(pm_route_dirmoe_backward_f64);
      else
        return route(pm_route_dirmoe_backward_f32);
    });
  });
  return {logits.finish(to_gate), logits.finish(to_hi), logits.finish(to_lo)};
}

}  // namespace
}  // namespace probmoe

STABLE_TORCH_LIBRARY_FRAGMENT(probmoe_ext, m) {
  m.def(
      "route_dirmoe(Tensor gate_logits, Tensor alpha_hi, Tensor alpha_lo, Tensor? seed, int k_min, int k_max,"
      " float temperature, float concentration, float prior_concentration, float prior_hi, float prior_lo,"
      " bool training, bool normalize) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "route_dirmoe_backward(Tensor grad_weights, Tensor grad_kl, Tensor grad_expected_k, Tensor gate_logits,"
      " Tensor alpha_hi, Tensor alpha_lo, Tensor indices, Tensor noise, Tensor log_gamma, int k_min, int k_max,"
      " float temperature, float concentration, float prior_concentration, float prior_hi, float prior_lo,"
      " bool training, bool normalize) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(probmoe_ext, CPU, m) {
  m.impl("route_dirmoe", TORCH_BOX(&probmoe::route_dirmoe));
  m.impl("route_dirmoe_backward", TORCH_BOX(&probmoe::route_dirmoe_backward));
}
