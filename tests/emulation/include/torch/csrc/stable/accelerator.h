// In place of torch's: the adapters of csrc/shim run on CPU tensors here, which have no device to guard.
#pragma once

#include <cstdint>

namespace torch::stable::accelerator {
using DeviceIndex = int32_t;
struct DeviceGuard {
  explicit DeviceGuard(DeviceIndex) {}
};
}  // namespace torch::stable::accelerator
