// CUDA adapters of the subset family; an empty file in a CPU-only build.
#if defined(PM_CUDA_VERSION)
#include "cuda.h"

namespace probmoe {
namespace {

using Guard = torch::stable::accelerator::DeviceGuard;

// A scalar (no width) or a row of `width` for each row of logits.
template <class Launch>
Tensor unary(const DeviceRows &rows, std::optional<int64_t> width, const Launch &launch) {
  Tensor out = rows.like(width), scratch = rows.scratch();
  rows.check_launch(
      launch(&rows.shape, rows.type, rows.data(), out.mutable_data_ptr(), scratch.mutable_data_ptr(), rows.stream()));
  return out;
}

// One row of logits and one of `other` (of `width`) to a row of E.
template <class Launch>
Tensor binary(const DeviceRows &rows, const char *name, const Tensor &other, int64_t width, const Launch &launch) {
  const Tensor vector = rows.companion(name, other, width);
  Tensor out = rows.like(rows.shape.experts), scratch = rows.scratch();
  rows.check_launch(launch(&rows.shape, rows.type, rows.data(), vector.const_data_ptr(), out.mutable_data_ptr(),
                           scratch.mutable_data_ptr(), rows.stream()));
  return out;
}

Tensor log_partition(Tensor logits, int64_t k_min, int64_t k_max) {
  const Guard guard(logits.get_device_index());
  return unary(DeviceRows("subset_log_partition", logits, k_min, k_max), std::nullopt, pm_cuda_subset_log_partition);
}

Tensor entropy(Tensor logits, int64_t k_min, int64_t k_max) {
  const Guard guard(logits.get_device_index());
  return unary(DeviceRows("subset_entropy", logits, k_min, k_max), std::nullopt, pm_cuda_subset_entropy);
}

Tensor cardinality(Tensor logits, int64_t k_min, int64_t k_max) {
  const Guard guard(logits.get_device_index());
  return unary(DeviceRows("subset_cardinality", logits, k_min, k_max), k_max - k_min + 1, pm_cuda_subset_cardinality);
}

Tensor cardinality_backward(Tensor grad, Tensor logits, int64_t k_min, int64_t k_max) {
  const Guard guard(logits.get_device_index());
  return binary(DeviceRows("subset_cardinality_backward", logits, k_min, k_max), "grad", grad, k_max - k_min + 1,
                pm_cuda_subset_cardinality_backward);
}

Tensor marginals(Tensor logits, int64_t k_min, int64_t k_max) {
  const Guard guard(logits.get_device_index());
  const DeviceRows rows("subset_marginals", logits, k_min, k_max);
  return unary(rows, rows.shape.experts, pm_cuda_subset_marginals);
}

Tensor covariance_vp(Tensor logits, Tensor v, int64_t k_min, int64_t k_max) {
  const Guard guard(logits.get_device_index());
  const DeviceRows rows("subset_covariance_vp", logits, k_min, k_max);
  return binary(rows, "v", v, rows.shape.experts, pm_cuda_subset_covariance_vp);
}

Tensor log_prob(Tensor logits, Tensor indices, int64_t k_min, int64_t k_max) {
  const Guard guard(logits.get_device_index());
  const DeviceRows rows("subset_log_prob", logits, k_min, k_max);
  const Tensor members = rows.companion_indices(indices, k_max);
  Tensor out = rows.like(std::nullopt), scratch = rows.scratch();
  rows.check_launch(pm_cuda_subset_log_prob(&rows.shape, rows.type, rows.data(),
                                            static_cast<const int64_t *>(members.const_data_ptr()),
                                            out.mutable_data_ptr(), scratch.mutable_data_ptr(), rows.stream()));
  return out;
}

Tensor sample(Tensor logits, Tensor seed, int64_t k_min, int64_t k_max) {
  const Guard guard(logits.get_device_index());
  const DeviceRows rows("subset_sample", logits, k_min, k_max);
  Tensor out = rows.like(k_max, ScalarType::Long), scratch = rows.scratch();
  rows.check_launch(pm_cuda_subset_sample(&rows.shape, rows.type, rows.data(), rows.seed(seed),
                                          static_cast<int64_t *>(out.mutable_data_ptr()), scratch.mutable_data_ptr(),
                                          rows.stream()));
  return out;
}

Tensor mode(Tensor logits, int64_t k_min, int64_t k_max) {
  const Guard guard(logits.get_device_index());
  const DeviceRows rows("subset_mode", logits, k_min, k_max);
  Tensor out = rows.like(k_max, ScalarType::Long);
  rows.check_launch(pm_cuda_subset_mode(&rows.shape, rows.type, rows.data(),
                                        static_cast<int64_t *>(out.mutable_data_ptr()), rows.stream()));
  return out;
}

}  // namespace
}  // namespace probmoe

STABLE_TORCH_LIBRARY_IMPL(PM_CUDA_NAMESPACE, PM_CUDA_KEY, m) {
  m.impl("subset_log_partition", TORCH_BOX(&probmoe::log_partition));
  m.impl("subset_cardinality", TORCH_BOX(&probmoe::cardinality));
  m.impl("subset_cardinality_backward", TORCH_BOX(&probmoe::cardinality_backward));
  m.impl("subset_marginals", TORCH_BOX(&probmoe::marginals));
  m.impl("subset_covariance_vp", TORCH_BOX(&probmoe::covariance_vp));
  m.impl("subset_entropy", TORCH_BOX(&probmoe::entropy));
  m.impl("subset_log_prob", TORCH_BOX(&probmoe::log_prob));
  m.impl("subset_sample", TORCH_BOX(&probmoe::sample));
  m.impl("subset_mode", TORCH_BOX(&probmoe::mode));
}
#endif
