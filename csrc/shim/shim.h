// Between torch and the C core: checks, dtypes, rows over threads. Every gap of the stable ABI is bridged here.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../probmoe.h"

namespace probmoe {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts &...parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline bool is_half(ScalarType type) { return type == ScalarType::BFloat16 || type == ScalarType::Half; }

// A floating tensor as dense rows in float32 or float64; bfloat16 and float16 go through float32.
class Rows {
 public:
  Rows(const char *op, const char *name, const Tensor &tensor) : original_type_(tensor.scalar_type()), tensor_(tensor) {
    const ScalarType type = original_type_;
    if (type != ScalarType::Float && type != ScalarType::Double && !is_half(type))
      fail("probmoe_ext::", op, ": ", name, " must be float32, float64, bfloat16 or float16");
    if (tensor.dim() < 1) fail("probmoe_ext::", op, ": ", name, " must have at least one dimension, the experts'");
    if (is_half(type)) tensor_ = torch::stable::to(tensor_, ScalarType::Float);
    sizes_.assign(tensor.sizes().begin(), tensor.sizes().end());
    columns = sizes_.back();
    rows = 1;
    for (size_t d = 0; d + 1 < sizes_.size(); ++d) rows *= sizes_[d];
    stride = columns;
    if (!tensor_.is_contiguous()) {
      if (tensor_.dim() == 2 && tensor_.stride(1) == 1 && tensor_.stride(0) >= columns)
        stride = tensor_.stride(0);
      else
        tensor_ = torch::stable::contiguous(tensor_);
    }
  }

  bool is_double() const { return tensor_.scalar_type() == ScalarType::Double; }
  template <class T>
  const T *data() const {
    return static_cast<const T *>(tensor_.const_data_ptr());
  }

  // The same rows with `width` columns (none: a scalar a row), uninitialised, in the type of computation.
  Tensor like(std::optional<int64_t> width) const { return make(width, tensor_.scalar_type()); }
  Tensor indices(int64_t width, int64_t repeats = 1) const { return make(width, ScalarType::Long, repeats); }
  // ... and back in the caller's type.
  Tensor finish(const Tensor &result) const {
    return is_half(original_type_) ? torch::stable::to(result, original_type_) : result;
  }

  bool same_sizes(const Tensor &other, int64_t width) const {
    if (other.dim() != static_cast<int64_t>(sizes_.size()) || other.size(other.dim() - 1) != width) return false;
    return std::equal(sizes_.begin(), sizes_.end() - 1, other.sizes().begin());
  }

  int64_t rows, columns, stride;

 private:
  // Straight from the CPU's allocator: new_empty's two trips through the dispatcher cost as much as a row's kernel.
  // (torch's fill of uninitialised memory is left out with them; every element is written.)
  Tensor make(std::optional<int64_t> width, ScalarType type, int64_t repeats = 1) const {
    std::vector<int64_t> sizes(sizes_.begin(), sizes_.end() - 1);
    if (width) sizes.push_back(*width);
    if (repeats > 1) sizes[0] *= repeats;
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
    AtenTensorHandle out = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
        torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), aoti_torch_device_type_cpu(), -1, &out));
    return Tensor(out);
  }

  ScalarType original_type_;
  Tensor tensor_;
  std::vector<int64_t> sizes_;
};

// A second input with the rows of the first and `width` dense columns, cast to its type of computation.
inline Tensor companion(const char *op, const char *name, const Rows &rows, const Tensor &tensor, int64_t width) {
  if (!rows.same_sizes(tensor, width))
    fail("probmoe_ext::", op, ": ", name, " must have the shape of logits, with last dimension ", width);
  const ScalarType type = rows.is_double() ? ScalarType::Double : ScalarType::Float;
  const Tensor cast = tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
  return cast.is_contiguous() ? cast : torch::stable::contiguous(cast);
}

// A number for each row, likewise.
inline Tensor scalars(const char *op, const char *name, const Rows &rows, const Tensor &tensor) {
  if (tensor.numel() != rows.rows) fail("probmoe_ext::", op, ": ", name, " must have one element a row");
  const ScalarType type = rows.is_double() ? ScalarType::Double : ScalarType::Float;
  return torch::stable::contiguous(tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type));
}

// Elements of a dense tensor.
template <class T>
T *at(Tensor &tensor) {
  return static_cast<T *>(tensor.mutable_data_ptr());
}

template <class T>
const T *at(const Tensor &tensor) {
  return static_cast<const T *>(tensor.const_data_ptr());
}

inline uint64_t read_seed(const char *op, const std::optional<Tensor> &seed) {
  if (!seed || seed->scalar_type() != ScalarType::Long || seed->numel() != 1 || !seed->is_cpu())
    fail("probmoe_ext::", op, ": seed must be an int64 tensor of one element on the CPU");
  return static_cast<uint64_t>(*static_cast<const int64_t *>(seed->const_data_ptr()));
}

// A seed from torch's default CPU generator: the value that torch.randint(-2**63, 2**63 - 1, ()) would have drawn.
inline uint64_t draw_seed() {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(0, nullptr, nullptr, aoti_torch_dtype_int64(),
                                                         aoti_torch_device_type_cpu(), -1, &handle));
  const Tensor seed(handle);
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_randint_low_out(handle, INT64_MIN, INT64_MAX, nullptr, 0));
  return static_cast<uint64_t>(*static_cast<const int64_t *>(seed.const_data_ptr()));
}

// Scratch of the calling thread, kept between calls unless it is large.
class Scratch {
 public:
  void *reserve(size_t bytes) {
    if (bytes > size_) {
      size_ = 0;
      memory_.reset(std::malloc(bytes));
      if (memory_) size_ = bytes;
    }
    return memory_.get();
  }
  void release_large() {
    if (size_ > (size_t(4) << 20)) size_ = 0, memory_.reset();
  }

 private:
  struct Free {
    void operator()(void *p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

inline Scratch &thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

// Runs call(shape of a range, its first row, scratch) over torch's threads. A callback never throws: the first status
// that is not PM_OK is kept, and raised after the loop.
template <class T, class Call>
void for_rows(const char *op, const Rows &logits, int64_t k_min, int64_t k_max, const Call &call) {
  pm_shape whole{logits.rows, logits.columns, k_min, k_max, logits.stride, 0};
  if (logits.columns < 1 || logits.columns > PM_MAX_EXPERTS)
    fail("probmoe_ext::", op, ": logits must have 1 to ", PM_MAX_EXPERTS, " experts, not ", logits.columns);
  if (k_min < 0 || k_min > k_max || k_max > logits.columns)
    fail("probmoe_ext::", op, ": need 0 <= k_min <= k_max <= ", logits.columns, " experts, not k_min = ", k_min,
         ", k_max = ", k_max);
  if (logits.rows == 0) return;
  const size_t bytes = pm_scratch_size(logits.columns, k_max);
  // About 20 microseconds of work a task, in whole vectors of rows.
  const int64_t grain = (std::max<int64_t>(32768 / (logits.columns * (k_max + 2)), 1) + 15) / 16 * 16;
  std::atomic<int> first_bad{PM_OK};
  std::atomic<bool> out_of_memory{false};
  const auto range = [&](int64_t begin, int64_t end) {
    void *scratch = thread_scratch().reserve(bytes);
    if (!scratch) {
      out_of_memory = true;
      return;
    }
    pm_shape part = whole;
    part.rows = end - begin;
    part.first_row = begin;
    const pm_status status = call(part, begin, scratch);
    int expected = PM_OK;
    if (status != PM_OK) first_bad.compare_exchange_strong(expected, status);
    thread_scratch().release_large();
  };
  if (logits.rows <= grain)
    range(0, logits.rows);
  else
    torch::stable::parallel_for(0, logits.rows, grain, range);
  if (out_of_memory) fail("probmoe_ext::", op, ": out of memory for ", bytes, " bytes of scratch a thread");
  if (first_bad == PM_INFEASIBLE) {
    int64_t row;
    if constexpr (sizeof(T) == 8)
      row = pm_infeasible_row_f64(&whole, logits.data<T>());
    else
      row = pm_infeasible_row_f32(&whole, logits.data<T>());
    fail("probmoe_ext::", op, ": row ", row, " of logits has fewer than k_min = ", k_min, " experts above -inf");
  }
  if (first_bad != PM_OK) fail("probmoe_ext::", op, ": ", pm_status_text(static_cast<pm_status>(first_bad.load())));
}

// fn(type tag) for the type of computation.
template <class F>
void dispatch(const Rows &logits, const F &fn) {
  if (logits.is_double())
    fn(double{});
  else
    fn(float{});
}

}  // namespace probmoe
