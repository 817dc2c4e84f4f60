// Schemas and CPU adapters of the subset family.
#include "shim.h"

namespace probmoe {
namespace {

// A scalar (no width) or a row of `width` for each row of logits.
template <class F32, class F64>
Tensor unary(const char *op, const Tensor &tensor, int64_t k_min, int64_t k_max, std::optional<int64_t> width, F32 f32,
             F64 f64) {
  const Rows logits(op, "logits", tensor);
  Tensor out = logits.like(width);
  dispatch(logits, [&](auto type) {
    using T = decltype(type);
    T *to = static_cast<T *>(out.mutable_data_ptr());
    for_rows<T>(op, logits, k_min, k_max, [&](const pm_shape &part, int64_t row, void *scratch) {
      const T *from = logits.data<T>() + row * logits.stride;
      if constexpr (sizeof(T) == 8)
        return f64(&part, from, to + row * width.value_or(1), scratch);
      else
        return f32(&part, from, to + row * width.value_or(1), scratch);
    });
  });
  return logits.finish(out);
}

// One row of logits and one of `other` (of `width`) to a row of E.
template <class F32, class F64>
Tensor binary(const char *op, const char *name, const Tensor &tensor, const Tensor &other, int64_t k_min, int64_t k_max,
              int64_t width, F32 f32, F64 f64) {
  const Rows logits(op, "logits", tensor);
  const Tensor vector = companion(op, name, logits, other, width);
  Tensor out = logits.like(logits.columns);
  dispatch(logits, [&](auto type) {
    using T = decltype(type);
    const T *with = static_cast<const T *>(vector.const_data_ptr());
    T *to = static_cast<T *>(out.mutable_data_ptr());
    for_rows<T>(op, logits, k_min, k_max, [&](const pm_shape &part, int64_t row, void *scratch) {
      const T *from = logits.data<T>() + row * logits.stride;
      if constexpr (sizeof(T) == 8)
        return f64(&part, from, with + row * width, to + row * logits.columns, scratch);
      else
        return f32(&part, from, with + row * width, to + row * logits.columns, scratch);
    });
  });
  return logits.finish(out);
}

Tensor log_partition(Tensor logits, int64_t k_min, int64_t k_max) {
  return unary("subset_log_partition", logits, k_min, k_max, std::nullopt, pm_subset_log_partition_f32,
               pm_subset_log_partition_f64);
}

Tensor entropy(Tensor logits, int64_t k_min, int64_t k_max) {
  return unary("subset_entropy", logits, k_min, k_max, std::nullopt, pm_subset_entropy_f32, pm_subset_entropy_f64);
}

Tensor cardinality(Tensor logits, int64_t k_min, int64_t k_max) {
  return unary("subset_cardinality", logits, k_min, k_max, std::max<int64_t>(k_max - k_min + 1, 0),
               pm_subset_cardinality_f32, pm_subset_cardinality_f64);
}

Tensor cardinality_backward(Tensor grad, Tensor logits, int64_t k_min, int64_t k_max) {
  return binary("subset_cardinality_backward", "grad", logits, grad, k_min, k_max, k_max - k_min + 1,
                pm_subset_cardinality_backward_f32, pm_subset_cardinality_backward_f64);
}

Tensor marginals(Tensor logits, int64_t k_min, int64_t k_max) {
  return unary("subset_marginals", logits, k_min, k_max, logits.dim() ? logits.size(logits.dim() - 1) : 0,
               pm_subset_marginals_f32, pm_subset_marginals_f64);
}

Tensor covariance_vp(Tensor logits, Tensor v, int64_t k_min, int64_t k_max) {
  return binary("subset_covariance_vp", "v", logits, v, k_min, k_max, logits.dim() ? logits.size(logits.dim() - 1) : 0,
                pm_subset_covariance_vp_f32, pm_subset_covariance_vp_f64);
}

Tensor log_prob(Tensor tensor, Tensor indices, int64_t k_min, int64_t k_max) {
  const char *op = "subset_log_prob";
  const Rows logits(op, "logits", tensor);
  if (!logits.same_sizes(indices, k_max) || indices.scalar_type() != ScalarType::Long)
    fail("probmoe_ext::", op, ": indices must be int64 with the shape of logits, with last dimension ", k_max);
  const Tensor members = torch::stable::contiguous(indices);
  const int64_t *at = static_cast<const int64_t *>(members.const_data_ptr());
  for (int64_t n = 0; n < logits.rows * k_max; ++n)
    if (at[n] < 0 || at[n] > logits.columns)
      fail("probmoe_ext::", op, ": indices must lie in 0..E = ", logits.columns, " (E marks an unused slot), not ",
           at[n]);
  Tensor out = logits.like(std::nullopt);
  dispatch(logits, [&](auto type) {
    using T = decltype(type);
    T *to = static_cast<T *>(out.mutable_data_ptr());
    for_rows<T>(op, logits, k_min, k_max, [&](const pm_shape &part, int64_t row, void *scratch) {
      const T *from = logits.data<T>() + row * logits.stride;
      if constexpr (sizeof(T) == 8)
        return pm_subset_log_prob_f64(&part, from, at + row * k_max, to + row, scratch);
      else
        return pm_subset_log_prob_f32(&part, from, at + row * k_max, to + row, scratch);
    });
  });
  return logits.finish(out);
}

// `samples` choices for each row, along the first dimension; draws of a row lie `logits.rows` rows apart.
template <class Call>
Tensor choose(const char *op, const Tensor &tensor, int64_t k_min, int64_t k_max, int64_t samples, const Call &call) {
  const Rows logits(op, "logits", tensor);
  Tensor out = logits.indices(std::max<int64_t>(k_max, 0), samples);
  int64_t *to = static_cast<int64_t *>(out.mutable_data_ptr());
  if (k_max == 0) return out;
  dispatch(logits, [&](auto type) {
    using T = decltype(type);
    for_rows<T>(op, logits, k_min, k_max, [&](const pm_shape &part, int64_t row, void *scratch) {
      return call(part, logits.data<T>() + row * logits.stride, logits.rows, to + row * k_max, scratch);
    });
  });
  return out;
}

struct Sample {
  uint64_t seed;
  int64_t samples;
  pm_status operator()(const pm_shape &s, const float *x, int64_t stride, int64_t *to, void *scratch) const {
    return pm_subset_sample_f32(&s, x, seed, samples, stride, to, scratch);
  }
  pm_status operator()(const pm_shape &s, const double *x, int64_t stride, int64_t *to, void *scratch) const {
    return pm_subset_sample_f64(&s, x, seed, samples, stride, to, scratch);
  }
};

struct Mode {
  pm_status operator()(const pm_shape &s, const float *x, int64_t, int64_t *to, void *scratch) const {
    return pm_subset_mode_f32(&s, x, to, scratch);
  }
  pm_status operator()(const pm_shape &s, const double *x, int64_t, int64_t *to, void *scratch) const {
    return pm_subset_mode_f64(&s, x, to, scratch);
  }
};

// A batch that was expanded along its first dimension, as num_samples does, has one table for all draws of a row.
Tensor sample(Tensor logits, Tensor seed, int64_t k_min, int64_t k_max) {
  const bool repeated = logits.dim() >= 2 && logits.size(0) > 1 && logits.stride(0) == 0;
  const int64_t samples = repeated ? logits.size(0) : 1;
  return choose("subset_sample", repeated ? torch::stable::narrow(logits, 0, 0, 1) : logits, k_min, k_max, samples,
                Sample{read_seed("subset_sample", seed), samples});
}

Tensor mode(Tensor logits, int64_t k_min, int64_t k_max) {
  return choose("subset_mode", logits, k_min, k_max, 1, Mode{});
}

}  // namespace
}  // namespace probmoe

STABLE_TORCH_LIBRARY_FRAGMENT(probmoe_ext, m) {
  m.def("subset_log_partition(Tensor logits, int k_min, int k_max) -> Tensor");
  m.def("subset_cardinality(Tensor logits, int k_min, int k_max) -> Tensor");
  m.def("subset_cardinality_backward(Tensor grad, Tensor logits, int k_min, int k_max) -> Tensor");
  m.def("subset_marginals(Tensor logits, int k_min, int k_max) -> Tensor");
  m.def("subset_covariance_vp(Tensor logits, Tensor v, int k_min, int k_max) -> Tensor");
  m.def("subset_entropy(Tensor logits, int k_min, int k_max) -> Tensor");
  m.def("subset_log_prob(Tensor logits, Tensor indices, int k_min, int k_max) -> Tensor");
  m.def("subset_sample(Tensor logits, Tensor seed, int k_min, int k_max) -> Tensor");
  m.def("subset_mode(Tensor logits, int k_min, int k_max) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(probmoe_ext, CPU, m) {
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
