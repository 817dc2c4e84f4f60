// CUDA adapters of the Gamma family; an empty file in a CPU-only build.
#if defined(PM_CUDA_VERSION)
#include "cuda.h"

namespace probmoe {
namespace {

using Guard = torch::stable::accelerator::DeviceGuard;

// Elementwise: columns without the bound that rows in shared memory have.
DeviceRows elements(const char *op, const Tensor &concentration) {
  return DeviceRows(op, concentration, 0, 0, PM_MAX_EXPERTS);
}

Tensor log_gamma_sample(Tensor concentration, Tensor seed) {
  const Guard guard(concentration.get_device_index());
  const DeviceRows rows = elements("log_gamma_sample", concentration);
  Tensor out = rows.like(rows.shape.experts);
  rows.check_launch(pm_cuda_log_gamma_sample(&rows.shape, rows.type, rows.data(), rows.seed(seed),
                                             out.mutable_data_ptr(), rows.stream()));
  return out;
}

Tensor log_gamma_sample_backward(Tensor grad, Tensor concentration, Tensor log_value) {
  const Guard guard(concentration.get_device_index());
  const DeviceRows rows = elements("log_gamma_sample_backward", concentration);
  const Tensor value = rows.companion("log_value", log_value, rows.shape.experts);
  const Tensor upstream = rows.companion("grad", grad, rows.shape.experts);
  Tensor out = rows.like(rows.shape.experts);
  rows.check_launch(pm_cuda_log_gamma_sample_backward(&rows.shape, rows.type, rows.data(), value.const_data_ptr(),
                                                      upstream.const_data_ptr(), out.mutable_data_ptr(),
                                                      rows.stream()));
  return out;
}

Tensor standard_gamma_grad(Tensor concentration, Tensor value) {
  const Guard guard(concentration.get_device_index());
  const DeviceRows rows = elements("standard_gamma_grad", concentration);
  const Tensor variate = rows.companion("value", value, rows.shape.experts);
  Tensor out = rows.like(rows.shape.experts);
  rows.check_launch(pm_cuda_standard_gamma_grad(&rows.shape, rows.type, rows.data(), variate.const_data_ptr(),
                                                out.mutable_data_ptr(), rows.stream()));
  return out;
}

}  // namespace
}  // namespace probmoe

STABLE_TORCH_LIBRARY_IMPL(PM_CUDA_NAMESPACE, PM_CUDA_KEY, m) {
  m.impl("log_gamma_sample", TORCH_BOX(&probmoe::log_gamma_sample));
  m.impl("log_gamma_sample_backward", TORCH_BOX(&probmoe::log_gamma_sample_backward));
  m.impl("standard_gamma_grad", TORCH_BOX(&probmoe::standard_gamma_grad));
}
#endif
