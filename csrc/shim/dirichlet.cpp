// Schemas and CPU adapters of the Gamma and Dirichlet families.
#include "shim.h"

namespace probmoe {
namespace {

// Runs the function of the row type: call(fn32 or fn64, type tag).
template <class F32, class F64, class Call>
void by_type(const Rows &rows, F32 f32, F64 f64, const Call &call) {
  dispatch(rows, [&](auto type) {
    if constexpr (sizeof(type) == 8)
      call(f64, type);
    else
      call(f32, type);
  });
}

Tensor log_gamma_sample(Tensor concentration, Tensor seed) {
  const char *op = "log_gamma_sample";
  const Rows alpha(op, "concentration", concentration);
  const uint64_t key = read_seed(op, seed);
  Tensor out = alpha.like(alpha.columns);
  by_type(alpha, pm_log_gamma_sample_f32, pm_log_gamma_sample_f64, [&](auto fn, auto type) {
    using T = decltype(type);
    for_rows<T>(op, alpha, 0, 0, [&](const pm_shape &part, int64_t row, void *scratch) {
      return fn(&part, alpha.data<T>() + row * alpha.stride, key, at<T>(out) + row * alpha.columns, scratch);
    });
  });
  return alpha.finish(out);
}

Tensor log_gamma_sample_backward(Tensor grad, Tensor concentration, Tensor log_value) {
  const char *op = "log_gamma_sample_backward";
  const Rows alpha(op, "concentration", concentration);
  const Tensor value = companion(op, "log_value", alpha, log_value, alpha.columns);
  const Tensor upstream = companion(op, "grad", alpha, grad, alpha.columns);
  Tensor out = alpha.like(alpha.columns);
  by_type(alpha, pm_log_gamma_sample_backward_f32, pm_log_gamma_sample_backward_f64, [&](auto fn, auto type) {
    using T = decltype(type);
    for_rows<T>(op, alpha, 0, 0, [&](const pm_shape &part, int64_t row, void *) {
      const int64_t dense = row * alpha.columns;
      return fn(&part, alpha.data<T>() + row * alpha.stride, at<T>(value) + dense, at<T>(upstream) + dense,
                at<T>(out) + dense);
    });
  });
  return alpha.finish(out);
}

Tensor standard_gamma_grad(Tensor concentration, Tensor value) {
  const char *op = "standard_gamma_grad";
  const Rows alpha(op, "concentration", concentration);
  const Tensor variate = companion(op, "value", alpha, value, alpha.columns);
  Tensor out = alpha.like(alpha.columns);
  by_type(alpha, pm_standard_gamma_grad_f32, pm_standard_gamma_grad_f64, [&](auto fn, auto type) {
    using T = decltype(type);
    for_rows<T>(op, alpha, 0, 0, [&](const pm_shape &part, int64_t row, void *) {
      const int64_t dense = row * alpha.columns;
      return fn(&part, alpha.data<T>() + row * alpha.stride, at<T>(variate) + dense, at<T>(out) + dense);
    });
  });
  return alpha.finish(out);
}

std::tuple<Tensor, Tensor> dirichlet_sample(Tensor concentration, Tensor seed) {
  const char *op = "dirichlet_sample";
  const Rows alpha(op, "concentration", concentration);
  const uint64_t key = read_seed(op, seed);
  Tensor out = alpha.like(alpha.columns), total = alpha.like(std::nullopt);
  by_type(alpha, pm_dirichlet_sample_f32, pm_dirichlet_sample_f64, [&](auto fn, auto type) {
    using T = decltype(type);
    for_rows<T>(op, alpha, 0, 0, [&](const pm_shape &part, int64_t row, void *scratch) {
      return fn(&part, alpha.data<T>() + row * alpha.stride, key, at<T>(out) + row * alpha.columns, at<T>(total) + row,
                scratch);
    });
  });
  return {alpha.finish(out), alpha.finish(total)};
}

Tensor dirichlet_sample_backward(Tensor grad, Tensor concentration, Tensor sample, Tensor log_total) {
  const char *op = "dirichlet_sample_backward";
  const Rows alpha(op, "concentration", concentration);
  const Tensor theta = companion(op, "sample", alpha, sample, alpha.columns);
  const Tensor upstream = companion(op, "grad", alpha, grad, alpha.columns);
  const Tensor total = scalars(op, "log_total", alpha, log_total);
  Tensor out = alpha.like(alpha.columns);
  by_type(alpha, pm_dirichlet_sample_backward_f32, pm_dirichlet_sample_backward_f64, [&](auto fn, auto type) {
    using T = decltype(type);
    for_rows<T>(op, alpha, 0, 0, [&](const pm_shape &part, int64_t row, void *scratch) {
      const int64_t dense = row * alpha.columns;
      return fn(&part, alpha.data<T>() + row * alpha.stride, at<T>(theta) + dense, at<T>(total) + row,
                at<T>(upstream) + dense, at<T>(out) + dense, scratch);
    });
  });
  return alpha.finish(out);
}

// Two rows of E to a number, and back.
template <class F32, class F64>
Tensor closed_form(const char *op, const char *name, const Tensor &concentration, const Tensor &other, F32 f32,
                   F64 f64) {
  const Rows alpha(op, "concentration", concentration);
  const Tensor second = companion(op, name, alpha, other, alpha.columns);
  Tensor out = alpha.like(std::nullopt);
  by_type(alpha, f32, f64, [&](auto fn, auto type) {
    using T = decltype(type);
    for_rows<T>(op, alpha, 0, 0, [&](const pm_shape &part, int64_t row, void *scratch) {
      return fn(&part, alpha.data<T>() + row * alpha.stride, at<T>(second) + row * alpha.columns, at<T>(out) + row,
                scratch);
    });
  });
  return alpha.finish(out);
}

template <class F32, class F64>
std::tuple<Tensor, Tensor> gradients(const char *op, const char *name, const Tensor &grad, const Tensor &concentration,
                                     const Tensor &other, F32 f32, F64 f64) {
  const Rows alpha(op, "concentration", concentration);
  const Tensor second = companion(op, name, alpha, other, alpha.columns);
  const Tensor upstream = scalars(op, "grad", alpha, grad);
  Tensor out = alpha.like(alpha.columns), out_second = alpha.like(alpha.columns);
  by_type(alpha, f32, f64, [&](auto fn, auto type) {
    using T = decltype(type);
    for_rows<T>(op, alpha, 0, 0, [&](const pm_shape &part, int64_t row, void *scratch) {
      const int64_t dense = row * alpha.columns;
      return fn(&part, alpha.data<T>() + row * alpha.stride, at<T>(second) + dense, at<T>(upstream) + row,
                at<T>(out) + dense, at<T>(out_second) + dense, scratch);
    });
  });
  return {alpha.finish(out), alpha.finish(out_second)};
}

Tensor log_prob(Tensor concentration, Tensor value) {
  return closed_form("dirichlet_log_prob", "value", concentration, value, pm_dirichlet_log_prob_f32,
                     pm_dirichlet_log_prob_f64);
}

std::tuple<Tensor, Tensor> log_prob_backward(Tensor grad, Tensor concentration, Tensor value) {
  return gradients("dirichlet_log_prob_backward", "value", grad, concentration, value,
                   pm_dirichlet_log_prob_backward_f32, pm_dirichlet_log_prob_backward_f64);
}

Tensor kl(Tensor p, Tensor q) {
  return closed_form("dirichlet_kl", "q_concentration", p, q, pm_dirichlet_kl_f32, pm_dirichlet_kl_f64);
}

std::tuple<Tensor, Tensor> kl_backward(Tensor grad, Tensor p, Tensor q) {
  return gradients("dirichlet_kl_backward", "q_concentration", grad, p, q, pm_dirichlet_kl_backward_f32,
                   pm_dirichlet_kl_backward_f64);
}

Tensor entropy(Tensor concentration) {
  const char *op = "dirichlet_entropy";
  const Rows alpha(op, "concentration", concentration);
  Tensor out = alpha.like(std::nullopt);
  by_type(alpha, pm_dirichlet_entropy_f32, pm_dirichlet_entropy_f64, [&](auto fn, auto type) {
    using T = decltype(type);
    for_rows<T>(op, alpha, 0, 0, [&](const pm_shape &part, int64_t row, void *scratch) {
      return fn(&part, alpha.data<T>() + row * alpha.stride, at<T>(out) + row, scratch);
    });
  });
  return alpha.finish(out);
}

Tensor entropy_backward(Tensor grad, Tensor concentration) {
  const char *op = "dirichlet_entropy_backward";
  const Rows alpha(op, "concentration", concentration);
  const Tensor upstream = scalars(op, "grad", alpha, grad);
  Tensor out = alpha.like(alpha.columns);
  by_type(alpha, pm_dirichlet_entropy_backward_f32, pm_dirichlet_entropy_backward_f64, [&](auto fn, auto type) {
    using T = decltype(type);
    for_rows<T>(op, alpha, 0, 0, [&](const pm_shape &part, int64_t row, void *scratch) {
      return fn(&part, alpha.data<T>() + row * alpha.stride, at<T>(upstream) + row, at<T>(out) + row * alpha.columns,
                scratch);
    });
  });
  return alpha.finish(out);
}

}  // namespace
}  // namespace probmoe

STABLE_TORCH_LIBRARY_FRAGMENT(probmoe_ext, m) {
  m.def("log_gamma_sample(Tensor concentration, Tensor seed) -> Tensor");
  m.def("log_gamma_sample_backward(Tensor grad, Tensor concentration, Tensor log_value) -> Tensor");
  m.def("standard_gamma_grad(Tensor concentration, Tensor value) -> Tensor");
  m.def("dirichlet_sample(Tensor concentration, Tensor seed) -> (Tensor, Tensor)");
  m.def("dirichlet_sample_backward(Tensor grad, Tensor concentration, Tensor sample, Tensor log_total) -> Tensor");
  m.def("dirichlet_log_prob(Tensor concentration, Tensor value) -> Tensor");
  m.def("dirichlet_log_prob_backward(Tensor grad, Tensor concentration, Tensor value) -> (Tensor, Tensor)");
  m.def("dirichlet_entropy(Tensor concentration) -> Tensor");
  m.def("dirichlet_entropy_backward(Tensor grad, Tensor concentration) -> Tensor");
  m.def("dirichlet_kl(Tensor p_concentration, Tensor q_concentration) -> Tensor");
  m.def("dirichlet_kl_backward(Tensor grad, Tensor p_concentration, Tensor q_concentration) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(probmoe_ext, CPU, m) {
  m.impl("log_gamma_sample", TORCH_BOX(&probmoe::log_gamma_sample));
  m.impl("log_gamma_sample_backward", TORCH_BOX(&probmoe::log_gamma_sample_backward));
  m.impl("standard_gamma_grad", TORCH_BOX(&probmoe::standard_gamma_grad));
  m.impl("dirichlet_sample", TORCH_BOX(&probmoe::dirichlet_sample));
  m.impl("dirichlet_sample_backward", TORCH_BOX(&probmoe::dirichlet_sample_backward));
  m.impl("dirichlet_log_prob", TORCH_BOX(&probmoe::log_prob));
  m.impl("dirichlet_log_prob_backward", TORCH_BOX(&probmoe::log_prob_backward));
  m.impl("dirichlet_entropy", TORCH_BOX(&probmoe::entropy));
  m.impl("dirichlet_entropy_backward", TORCH_BOX(&probmoe::entropy_backward));
  m.impl("dirichlet_kl", TORCH_BOX(&probmoe::kl));
  m.impl("dirichlet_kl_backward", TORCH_BOX(&probmoe::kl_backward));
}
