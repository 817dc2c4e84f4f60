// CUDA adapters' share of the shim: element types, the device and stream of the call, the launch's status.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../../cuda/probmoe_cuda.h"
#include "shim.h"

// Lives in the CUDA builds of torch alone; weak, so that one binary imports everywhere.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void **stream) __attribute__((weak));

namespace probmoe {

inline pm_dtype element_type(const char *op, const Tensor &tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return PM_F32;
    case ScalarType::Double: return PM_F64;
    case ScalarType::BFloat16: return PM_BF16;
    case ScalarType::Half: return PM_F16;
    default: fail("probmoe_ext::", op, ": logits must be float32, float64, bfloat16 or float16");
  }
}

inline void *current_stream(const Tensor &tensor) {
  void *stream = nullptr;
  if (!aoti_torch_get_current_cuda_stream) fail("probmoe_ext: this torch has no CUDA, but a CUDA tensor arrived");
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

// The shape of dense or row-strided logits; anything else is made dense first.
inline pm_shape rows_of(const char *op, Tensor &logits, int64_t k_min, int64_t k_max) {
  if (logits.dim() < 1) fail("probmoe_ext::", op, ": logits must have at least one dimension, the experts'");
  const int64_t experts = logits.size(logits.dim() - 1);
  if (experts < 1 || experts > PM_CUDA_MAX_EXPERTS)
    fail("probmoe_ext::", op, ": on CUDA, logits must have 1 to ", PM_CUDA_MAX_EXPERTS, " experts, not ", experts);
  if (k_min < 0 || k_min > k_max || k_max > experts)
    fail("probmoe_ext::", op, ": need 0 <= k_min <= k_max <= ", experts, " experts, not k_min = ", k_min,
         ", k_max = ", k_max);
  int64_t stride = experts;
  if (!logits.is_contiguous()) {
    if (logits.dim() == 2 && logits.stride(1) == 1 && logits.stride(0) >= experts)
      stride = logits.stride(0);
    else
      logits = torch::stable::contiguous(logits);
  }
  return pm_shape{logits.numel() / experts, experts, k_min, k_max, stride, 0};
}

inline Tensor like(const Tensor &tensor, int64_t width, ScalarType type) {
  std::vector<int64_t> sizes(tensor.sizes().begin(), tensor.sizes().end());
  sizes.back() = width;
  return torch::stable::new_empty(tensor, sizes, type);
}

inline void check_launch(const char *op, pm_cuda_status status) {
  if (status != 0) fail("probmoe_ext::", op, ": CUDA launch failed: ", pm_cuda_error_text(status));
}

}  // namespace probmoe
