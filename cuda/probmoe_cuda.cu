// The public launchers: one job each, to the tree where it serves and to the general kernels elsewhere.
#include "kernels.cuh"

using namespace probmoe;

extern "C" const char *pm_cuda_error_text(pm_cuda_status status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

extern "C" int64_t pm_cuda_scratch_size(const pm_shape *shape, pm_dtype) {
  return shape->rows > 0 ? general_scratch(*shape) : 0;
}

#define PM_PER_ROW(name)                                                                                     \
  extern "C" pm_cuda_status pm_cuda_subset_##name(const pm_shape *shape, pm_dtype dtype, const void *logits, \
                                                  void *out, void *scratch, void *stream) {                  \
    Job job = job_of(shape, dtype, logits);                                                                  \
    job.out = out;                                                                                           \
    job.scratch = scratch;                                                                                   \
    return checked(shape, dtype, [&] { return general(job, Operation::name, stream); });                     \
  }

PM_PER_ROW(log_partition)
PM_PER_ROW(entropy)
PM_PER_ROW(cardinality)

extern "C" pm_cuda_status pm_cuda_subset_cardinality_backward(const pm_shape *shape, pm_dtype dtype, const void *logits,
                                                              const void *grad, void *grad_logits, void *scratch,
                                                              void *stream) {
  Job job = job_of(shape, dtype, logits);
  job.vector = grad;
  job.out = grad_logits;
  job.scratch = scratch;
  return checked(shape, dtype, [&] { return general(job, Operation::cardinality_backward, stream); });
}

extern "C" pm_cuda_status pm_cuda_subset_marginals(const pm_shape *shape, pm_dtype dtype, const void *logits, void *out,
                                                   void *scratch, void *stream) {
  Job job = job_of(shape, dtype, logits);
  job.out = out;
  job.scratch = scratch;
  return checked(shape, dtype, [&] {
    return tree_serves(job) ? marginals(job, stream) : general(job, Operation::marginals, stream);
  });
}

extern "C" pm_cuda_status pm_cuda_subset_covariance_vp(const pm_shape *shape, pm_dtype dtype, const void *logits,
                                                       const void *v, void *out, void *scratch, void *stream) {
  Job job = job_of(shape, dtype, logits);
  job.vector = v;
  job.out = out;
  job.scratch = scratch;
  return checked(shape, dtype, [&] {
    return tree_serves(job) ? gradient(job, false, stream) : general(job, Operation::covariance_vp, stream);
  });
}

extern "C" pm_cuda_status pm_cuda_subset_log_prob(const pm_shape *shape, pm_dtype dtype, const void *logits,
                                                  const int64_t *indices, void *out, void *scratch, void *stream) {
  Job job = job_of(shape, dtype, logits);
  job.indices = indices;
  job.out = out;
  job.scratch = scratch;
  return checked(shape, dtype, [&] { return general(job, Operation::log_prob, stream); });
}

extern "C" pm_cuda_status pm_cuda_route(const pm_shape *shape, pm_dtype dtype, const void *logits, const int64_t *seed,
                                        int normalize, void *weights, int64_t *indices, void *scratch, void *stream) {
  Job job = job_of(shape, dtype, logits);
  job.seed = seed;
  job.normalize = normalize;
  job.out = weights;
  job.out_indices = indices;
  job.scratch = scratch;
  return checked(shape, dtype, [&]() -> pm_cuda_status {
    if (shape->k_max == 0) return cudaSuccess;
    if (!seed) return mode(job, stream);
    return tree_serves(job) ? draw(job, stream) : general(job, Operation::sample, stream);
  });
}

extern "C" pm_cuda_status pm_cuda_subset_sample(const pm_shape *shape, pm_dtype dtype, const void *logits,
                                                const int64_t *seed, int64_t *out, void *scratch, void *stream) {
  if (!seed) return cudaErrorInvalidValue;
  return pm_cuda_route(shape, dtype, logits, seed, 0, nullptr, out, scratch, stream);
}

extern "C" pm_cuda_status pm_cuda_subset_mode(const pm_shape *shape, pm_dtype dtype, const void *logits, int64_t *out,
                                              void *stream) {
  return pm_cuda_route(shape, dtype, logits, nullptr, 0, nullptr, out, nullptr, stream);
}

extern "C" pm_cuda_status pm_cuda_route_backward(const pm_shape *shape, pm_dtype dtype, const void *logits,
                                                 const int64_t *indices, const void *grad_weights, pm_backward backward,
                                                 int normalize, void *grad_logits, void *scratch, void *stream) {
  Job job = job_of(shape, dtype, logits);
  job.indices = indices;
  job.vector = grad_weights;
  job.normalize = normalize;
  job.marginal = backward == PM_BACKWARD_MARGINAL;
  job.out = grad_logits;
  job.scratch = scratch;
  return checked(shape, dtype, [&] {
    const bool serves = tree_serves(job) || (!job.marginal && dtype != PM_F64 && shape->experts <= 256);
    return serves ? gradient(job, true, stream) : general(job, Operation::route_backward, stream);
  });
}
