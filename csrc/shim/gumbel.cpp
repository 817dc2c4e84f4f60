// Schemas and CPU adapters of the Gumbel family.
#include "shim.h"

namespace probmoe {
namespace {

std::tuple<Tensor, Tensor> gumbel_top_k(Tensor tensor, Tensor seed, int64_t k) {
  const char *op = "gumbel_top_k";
  const Rows logits(op, "logits", tensor);
  const uint64_t bits = read_seed(op, seed);
  Tensor keys = logits.like(std::max<int64_t>(k, 0)), indices = logits.indices(std::max<int64_t>(k, 0));
  if (k != 0)
    dispatch(logits, [&](auto type) {
      using T = decltype(type);
      T *to = static_cast<T *>(keys.mutable_data_ptr());
      int64_t *at = static_cast<int64_t *>(indices.mutable_data_ptr());
      for_rows<T>(op, logits, k, k, [&](const pm_shape &part, int64_t row, void *scratch) {
        const T *from = logits.data<T>() + row * logits.stride;
        if constexpr (sizeof(T) == 8)
          return pm_gumbel_top_k_f64(&part, from, bits, at + row * k, to + row * k, scratch);
        else
          return pm_gumbel_top_k_f32(&part, from, bits, at + row * k, to + row * k, scratch);
      });
    });
  return {logits.finish(keys), indices};
}

// Ordered choices, [..., k] beside the logits.
Tensor choices(const char *op, const Rows &logits, const Tensor &indices, int64_t k) {
  if (!logits.same_sizes(indices, k) || indices.scalar_type() != ScalarType::Long)
    fail("probmoe_ext::", op, ": indices must be int64 with the shape of logits, but for the last dimension");
  const Tensor dense = torch::stable::contiguous(indices);
  const int64_t *at = static_cast<const int64_t *>(dense.const_data_ptr());
  for (int64_t n = 0; n < logits.rows * k; ++n)
    if (at[n] < 0 || at[n] >= logits.columns)
      fail("probmoe_ext::", op, ": indices must lie in 0..E-1 = ", logits.columns - 1, ", not ", at[n]);
  return dense;
}

int64_t width_of(const Tensor &indices) { return indices.dim() ? indices.size(indices.dim() - 1) : 0; }

Tensor plackett_luce_log_prob(Tensor tensor, Tensor indices) {
  const char *op = "plackett_luce_log_prob";
  const Rows logits(op, "logits", tensor);
  const int64_t k = width_of(indices);
  const Tensor chosen = choices(op, logits, indices, k);
  const int64_t *at = static_cast<const int64_t *>(chosen.const_data_ptr());
  Tensor out = logits.like(std::nullopt);
  dispatch(logits, [&](auto type) {
    using T = decltype(type);
    T *to = static_cast<T *>(out.mutable_data_ptr());
    for_rows<T>(op, logits, 0, k, [&](const pm_shape &part, int64_t row, void *scratch) {
      const T *from = logits.data<T>() + row * logits.stride;
      if constexpr (sizeof(T) == 8)
        return pm_plackett_luce_log_prob_f64(&part, from, at + row * k, to + row, scratch);
      else
        return pm_plackett_luce_log_prob_f32(&part, from, at + row * k, to + row, scratch);
    });
  });
  return logits.finish(out);
}

// fn(shape of a range, first row, logits, grad of `width` columns, grad_logits, scratch) over the rows.
template <class Call>
Tensor gradient(const char *op, const Rows &logits, const Tensor &grad, int64_t width, int64_t k_min, int64_t k_max,
                const Call &call) {
  Tensor out = logits.like(logits.columns);
  dispatch(logits, [&](auto type) {
    using T = decltype(type);
    const T *upstream = static_cast<const T *>(grad.const_data_ptr());
    T *to = static_cast<T *>(out.mutable_data_ptr());
    for_rows<T>(op, logits, k_min, k_max, [&](const pm_shape &part, int64_t row, void *scratch) {
      return call(part, row, logits.data<T>() + row * logits.stride, upstream + row * width, to + row * logits.columns,
                  scratch);
    });
  });
  return logits.finish(out);
}

// A row's scalar gradient, as the type of computation.
Tensor per_row(const char *op, const Rows &logits, const Tensor &grad) {
  if (grad.numel() != logits.rows) fail("probmoe_ext::", op, ": grad must have one element for each row of logits");
  const ScalarType type = logits.is_double() ? ScalarType::Double : ScalarType::Float;
  return torch::stable::contiguous(grad.scalar_type() == type ? grad : torch::stable::to(grad, type));
}

Tensor plackett_luce_log_prob_backward(Tensor grad, Tensor tensor, Tensor indices) {
  const char *op = "plackett_luce_log_prob_backward";
  const Rows logits(op, "logits", tensor);
  const int64_t k = width_of(indices);
  const Tensor chosen = choices(op, logits, indices, k);
  const int64_t *at = static_cast<const int64_t *>(chosen.const_data_ptr());
  return gradient(op, logits, per_row(op, logits, grad), 1, 0, k,
                  [&](const pm_shape &part, int64_t row, auto *from, auto *upstream, auto *to, void *scratch) {
                    if constexpr (sizeof(*from) == 8)
                      return pm_plackett_luce_log_prob_backward_f64(&part, from, at + row * k, upstream, to, scratch);
                    else
                      return pm_plackett_luce_log_prob_backward_f32(&part, from, at + row * k, upstream, to, scratch);
                  });
}

std::tuple<Tensor, Tensor> relaxed_top_k(Tensor tensor, Tensor seed, int64_t k, double temperature) {
  const char *op = "relaxed_top_k";
  const Rows logits(op, "logits", tensor);
  const uint64_t bits = read_seed(op, seed);
  Tensor out = logits.like(logits.columns), keys = logits.like(logits.columns);
  dispatch(logits, [&](auto type) {
    using T = decltype(type);
    T *to = static_cast<T *>(out.mutable_data_ptr()), *key = static_cast<T *>(keys.mutable_data_ptr());
    for_rows<T>(op, logits, k, k, [&](const pm_shape &part, int64_t row, void *scratch) {
      const T *from = logits.data<T>() + row * logits.stride;
      const int64_t at = row * logits.columns;
      if constexpr (sizeof(T) == 8)
        return pm_relaxed_top_k_f64(&part, from, temperature, bits, to + at, key + at, scratch);
      else
        return pm_relaxed_top_k_f32(&part, from, temperature, bits, to + at, key + at, scratch);
    });
  });
  return {logits.finish(out), keys};
}

Tensor relaxed_top_k_backward(Tensor grad, Tensor tensor, int64_t k, double temperature) {
  const char *op = "relaxed_top_k_backward";
  const Rows keys(op, "keys", tensor);
  return gradient(op, keys, companion(op, "grad", keys, grad, keys.columns), keys.columns, k, k,
                  [&](const pm_shape &part, int64_t, auto *from, auto *upstream, auto *to, void *scratch) {
                    if constexpr (sizeof(*from) == 8)
                      return pm_relaxed_top_k_backward_f64(&part, from, upstream, temperature, to, scratch);
                    else
                      return pm_relaxed_top_k_backward_f32(&part, from, upstream, temperature, to, scratch);
                  });
}

Tensor gumbel_sigmoid(Tensor tensor, Tensor seed, double temperature) {
  const char *op = "gumbel_sigmoid";
  const Rows logits(op, "logits", tensor);
  const uint64_t bits = read_seed(op, seed);
  Tensor out = logits.like(logits.columns);
  dispatch(logits, [&](auto type) {
    using T = decltype(type);
    T *to = static_cast<T *>(out.mutable_data_ptr());
    for_rows<T>(op, logits, 0, 0, [&](const pm_shape &part, int64_t row, void *scratch) {
      const T *from = logits.data<T>() + row * logits.stride;
      if constexpr (sizeof(T) == 8)
        return pm_gumbel_sigmoid_f64(&part, from, temperature, bits, to + row * logits.columns, scratch);
      else
        return pm_gumbel_sigmoid_f32(&part, from, temperature, bits, to + row * logits.columns, scratch);
    });
  });
  return logits.finish(out);
}

}  // namespace
}  // namespace probmoe

STABLE_TORCH_LIBRARY_FRAGMENT(probmoe_ext, m) {
  m.def("gumbel_top_k(Tensor logits, Tensor seed, int k) -> (Tensor, Tensor)");
  m.def("gumbel_sigmoid(Tensor logits, Tensor seed, float temperature) -> Tensor");
  m.def("plackett_luce_log_prob(Tensor logits, Tensor indices) -> Tensor");
  m.def("plackett_luce_log_prob_backward(Tensor grad, Tensor logits, Tensor indices) -> Tensor");
  m.def("relaxed_top_k(Tensor logits, Tensor seed, int k, float temperature) -> (Tensor, Tensor)");
  m.def("relaxed_top_k_backward(Tensor grad, Tensor keys, int k, float temperature) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(probmoe_ext, CPU, m) {
  m.impl("gumbel_top_k", TORCH_BOX(&probmoe::gumbel_top_k));
  m.impl("gumbel_sigmoid", TORCH_BOX(&probmoe::gumbel_sigmoid));
  m.impl("plackett_luce_log_prob", TORCH_BOX(&probmoe::plackett_luce_log_prob));
  m.impl("plackett_luce_log_prob_backward", TORCH_BOX(&probmoe::plackett_luce_log_prob_backward));
  m.impl("relaxed_top_k", TORCH_BOX(&probmoe::relaxed_top_k));
  m.impl("relaxed_top_k_backward", TORCH_BOX(&probmoe::relaxed_top_k_backward));
}
