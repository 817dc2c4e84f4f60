// CUDA adapters of DirMoE routing; an empty file in a CPU-only build.
#if defined(PM_CUDA_VERSION)
#include "cuda.h"

namespace probmoe {
namespace {

using Guard = torch::stable::accelerator::DeviceGuard;

// What is kept for the backward pass: nothing of a decision, and in no half type.
ScalarType kept_type(const DeviceRows &rows) { return rows.type == PM_F64 ? ScalarType::Double : ScalarType::Float; }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> route_dirmoe(
    Tensor gate_logits, Tensor alpha_hi, Tensor alpha_lo, std::optional<Tensor> seed, int64_t k_min, int64_t k_max,
    double temperature, double concentration, double prior_concentration, double prior_hi, double prior_lo,
    bool training, bool normalize) {
  const Guard guard(gate_logits.get_device_index());
  const DeviceRows rows("route_dirmoe", gate_logits, k_min, k_max);
  const int64_t E = rows.shape.experts, kept = training ? E : 0;
  const Tensor hi = rows.companion("alpha_hi", alpha_hi, E), lo = rows.companion("alpha_lo", alpha_lo, E);
  const pm_dirmoe options{temperature, concentration, prior_concentration, prior_hi, prior_lo, training, normalize};
  Tensor weights = rows.like(k_max), indices = rows.like(k_max, ScalarType::Long);
  Tensor kl = rows.like(std::nullopt), expected_k = rows.like(std::nullopt);
  Tensor noise = rows.like(kept, kept_type(rows)), log_gamma = rows.like(kept, kept_type(rows));
  rows.check_launch(pm_cuda_route_dirmoe(&rows.shape, &options, rows.type, rows.data(), hi.const_data_ptr(),
                                         lo.const_data_ptr(), training ? rows.seed(seed) : nullptr,
                                         weights.mutable_data_ptr(), static_cast<int64_t *>(indices.mutable_data_ptr()),
                                         kl.mutable_data_ptr(), expected_k.mutable_data_ptr(), noise.mutable_data_ptr(),
                                         log_gamma.mutable_data_ptr(), rows.stream()));
  return {weights, indices, kl, expected_k, noise, log_gamma};
}

std::tuple<Tensor, Tensor, Tensor> route_dirmoe_backward(Tensor grad_weights, Tensor grad_kl, Tensor grad_expected_k,
                                                         Tensor gate_logits, Tensor alpha_hi, Tensor alpha_lo,
                                                         Tensor indices, Tensor noise, Tensor log_gamma, int64_t k_min,
                                                         int64_t k_max, double temperature, double concentration,
                                                         double prior_concentration, double prior_hi, double prior_lo,
                                                         bool training, bool normalize) {
  const Guard guard(gate_logits.get_device_index());
  const DeviceRows rows("route_dirmoe_backward", gate_logits, k_min, k_max);
  const int64_t E = rows.shape.experts, kept = training ? E : 0;
  const Tensor hi = rows.companion("alpha_hi", alpha_hi, E), lo = rows.companion("alpha_lo", alpha_lo, E);
  const Tensor by_weights = rows.companion("grad_weights", grad_weights, k_max);
  const Tensor by_kl = rows.scalars("grad_kl", grad_kl);
  const Tensor by_expected = rows.scalars("grad_expected_k", grad_expected_k);
  const Tensor chosen = rows.companion_indices(indices, k_max);
  const Tensor drawn = rows.companion("noise", noise, kept, kept_type(rows));
  const Tensor log_g = rows.companion("log_gamma", log_gamma, kept, kept_type(rows));
  const pm_dirmoe options{temperature, concentration, prior_concentration, prior_hi, prior_lo, training, normalize};
  Tensor to_gate = rows.like(E), to_hi = rows.like(E), to_lo = rows.like(E);
  rows.check_launch(pm_cuda_route_dirmoe_backward(
      &rows.shape, &options, rows.type, rows.data(), hi.const_data_ptr(), lo.const_data_ptr(),
      static_cast<const int64_t *>(chosen.const_data_ptr()), drawn.const_data_ptr(), log_g.const_data_ptr(),
      by_weights.const_data_ptr(), by_kl.const_data_ptr(), by_expected.const_data_ptr(), to_gate.mutable_data_ptr(),
      to_hi.mutable_data_ptr(), to_lo.mutable_data_ptr(), rows.stream()));
  return {to_gate, to_hi, to_lo};
}

}  // namespace
}  // namespace probmoe

STABLE_TORCH_LIBRARY_IMPL(PM_CUDA_NAMESPACE, PM_CUDA_KEY, m) {
  m.impl("route_dirmoe", TORCH_BOX(&probmoe::route_dirmoe));
  m.impl("route_dirmoe_backward", TORCH_BOX(&probmoe::route_dirmoe_backward));
}
#endif
