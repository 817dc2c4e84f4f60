// Between the public launchers (probmoe_cuda.cu) and the kernel files. Each picks the instantiation for the shape.
#pragma once

#include "launch.cuh"

namespace probmoe {

inline Job job_of(const pm_shape *shape, pm_dtype dtype, const void *logits) {
  Job job = {};
  job.shape = *shape;
  job.dtype = dtype;
  job.logits = logits;
  return job;
}

// run() unless there is nothing to do, or the shape is none that kernels exist for.
template <class Run>
pm_cuda_status checked(const pm_shape *shape, pm_dtype dtype, const Run &run, int64_t most = PM_CUDA_MAX_EXPERTS) {
  if (shape->experts < 1 || shape->experts > most || shape->stride < shape->experts || shape->k_min < 0 ||
      shape->k_min > shape->k_max || shape->k_max > shape->experts || shape->rows < 0 || dtype < PM_F32 ||
      dtype > PM_F16)
    return cudaErrorInvalidValue;
  return shape->rows == 0 ? cudaSuccess : run();
}

// Whether the tree of tree.cuh serves: the shapes of practice, in single precision.
inline bool tree_serves(const Job &job) {
  return job.dtype != PM_F64 && job.shape.experts <= 256 && job.shape.k_max <= 8;
}

// select.cu. The weights are left out where job.out is NULL.
pm_cuda_status draw(const Job &job, void *stream);  // needs tree_serves
pm_cuda_status mode(const Job &job, void *stream);

// gradient.cu. `routing`: job.vector is grad_weights, not v; straight through needs no more than 256 experts and float.
pm_cuda_status marginals(const Job &job, void *stream);
pm_cuda_status gradient(const Job &job, bool routing, void *stream);

// general.cu: any shape, in double precision.
enum class Operation {
  log_partition,
  cardinality,
  log_prob,
  sample,
  entropy,
  marginals,
  cardinality_backward,
  covariance_vp,
  route_backward
};
pm_cuda_status general(const Job &job, Operation operation, void *stream);
int64_t general_scratch(const pm_shape &shape);

}  // namespace probmoe
