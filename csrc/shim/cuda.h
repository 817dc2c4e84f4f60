// CUDA adapters' share of the shim: element types, the device and stream of the call, the launch's status.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../../cuda/probmoe_cuda.h"
#include "shim.h"

// Lives in the CUDA builds of torch alone; weak, so that one binary imports everywhere.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void **stream) __attribute__((weak));

// Where the kernels are registered; the test-only emulation registers them elsewhere.
#ifndef PM_CUDA_NAMESPACE
#define PM_CUDA_NAMESPACE probmoe_ext
#define PM_CUDA_KEY CUDA
#endif

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

// Logits as the launchers take them: dense or row-strided as they are, anything else made dense first.
class DeviceRows {
 public:
  DeviceRows(const char *name, const Tensor &tensor, int64_t k_min, int64_t k_max, int64_t most = PM_CUDA_MAX_EXPERTS)
      : op(name), type(element_type(name, tensor)), logits(tensor) {
    if (logits.dim() < 1) fail("probmoe_ext::", op, ": logits must have at least one dimension, the experts'");
    const int64_t experts = logits.size(logits.dim() - 1);
    if (experts < 1 || experts > most)
      fail("probmoe_ext::", op, ": on CUDA, logits must have 1 to ", most, " experts, not ", experts);
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
    shape = pm_shape{logits.numel() / experts, experts, k_min, k_max, stride, 0};
  }

  const void *data() const { return logits.const_data_ptr(); }

  // The same rows with `width` columns (none: a scalar a row), uninitialised.
  Tensor like(std::optional<int64_t> width, ScalarType element) const {
    std::vector<int64_t> sizes(logits.sizes().begin(), logits.sizes().end() - 1);
    if (width) sizes.push_back(*width);
    return torch::stable::new_empty(logits, sizes, element);
  }
  Tensor like(std::optional<int64_t> width) const { return like(width, logits.scalar_type()); }

  // A second input with the rows of the first and `width` dense columns of its type, or of `element`.
  Tensor companion(const char *name, const Tensor &tensor, int64_t width, ScalarType element) const {
    check_companion(name, tensor, width);
    const Tensor cast = tensor.scalar_type() == element ? tensor : torch::stable::to(tensor, element);
    return torch::stable::contiguous(cast);
  }
  Tensor companion(const char *name, const Tensor &tensor, int64_t width) const {
    return companion(name, tensor, width, logits.scalar_type());
  }
  // A number for each row, likewise.
  Tensor scalars(const char *name, const Tensor &tensor) const {
    if (tensor.numel() != shape.rows || !beside(tensor))
      fail("probmoe_ext::", op, ": ", name, " must have one element a row, on the device of logits");
    const ScalarType element = logits.scalar_type();
    return torch::stable::contiguous(tensor.scalar_type() == element ? tensor : torch::stable::to(tensor, element));
  }
  Tensor companion_indices(const Tensor &tensor, int64_t width) const {
    if (tensor.scalar_type() != ScalarType::Long) fail("probmoe_ext::", op, ": indices must be int64");
    check_companion("indices", tensor, width);
    return torch::stable::contiguous(tensor);
  }

  // Read by the kernel, not here: no wait for the device, and a captured graph draws anew.
  const int64_t *seed(const std::optional<Tensor> &tensor) const {
    if (!tensor || tensor->scalar_type() != ScalarType::Long || tensor->numel() != 1 || !beside(*tensor))
      fail("probmoe_ext::", op, ": seed must be an int64 tensor of one element on the device of logits");
    return static_cast<const int64_t *>(tensor->const_data_ptr());
  }

  // Empty for all shapes of practice.
  Tensor scratch() const {
    return torch::stable::new_empty(logits, {pm_cuda_scratch_size(&shape, type)}, ScalarType::Byte);
  }
  void *stream() const { return current_stream(logits); }

  void check_launch(pm_cuda_status status) const {
    if (status != 0) fail("probmoe_ext::", op, ": CUDA launch failed: ", pm_cuda_error_text(status));
  }

  const char *op;
  pm_dtype type;
  Tensor logits;
  pm_shape shape;

 private:
  bool beside(const Tensor &tensor) const {
    return tensor.get_device_index() == logits.get_device_index() && tensor.is_cpu() == logits.is_cpu();
  }
  void check_companion(const char *name, const Tensor &tensor, int64_t width) const {
    const bool same_rows = tensor.dim() == logits.dim() && tensor.size(tensor.dim() - 1) == width &&
                           std::equal(logits.sizes().begin(), logits.sizes().end() - 1, tensor.sizes().begin());
    if (!same_rows || !beside(tensor))
      fail("probmoe_ext::", op, ": ", name, " must have the shape and device of logits, with last dimension ", width);
  }
};

}  // namespace probmoe
