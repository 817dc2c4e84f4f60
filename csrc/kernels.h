/* Between the public functions (<family>.c) and the row kernels (rows/, compiled in isa/): one job, one table of
 * kernels for each instruction set and precision. Not part of the public interface. */
#ifndef PROBMOE_KERNELS_H
#define PROBMOE_KERNELS_H

#include "probmoe.h"

typedef struct pm_job {
  pm_shape shape;
  const void *logits;
  const void *vector;     /* grad, v or grad_weights, dense */
  const int64_t *indices; /* routing backward, log-probability */
  void *out;
  int64_t *out_indices;
  void *scratch;
  uint64_t seed;
  int64_t samples;       /* draws of each row */
  int64_t sample_stride; /* rows from one draw to the next, in out_indices and in their numbers */
  int is_double;         /* the type of logits, vector and out; the kernel's own precision may be higher */
  int sample;            /* routing: draw, or take the mode */
  int normalize;
  int marginal; /* routing backward: through the marginals, or straight through */
  double temperature;
  void *keys; /* relaxed top-k: where the perturbed logits go, or NULL */
} pm_job;

typedef pm_status (*pm_kernel)(const pm_job *job);

/* A job of the Gamma and Dirichlet family: rows of concentrations (with the shape's stride), the rest dense. */
typedef struct pm_law_job {
  pm_shape shape; /* its band is not looked at */
  const void *concentration;
  const void *other; /* the variates, the value, or the second law's concentration */
  const void *total; /* the logarithm of each row's sum of Gamma variates */
  const void *grad;
  void *out;
  void *out_other;
  void *scratch;
  uint64_t seed;
  int is_double;
} pm_law_job;

typedef pm_status (*pm_law_kernel)(const pm_law_job *job);

typedef struct pm_dirmoe_job {
  pm_shape shape;
  pm_dirmoe options;
  const void *gate_logits, *alpha_hi, *alpha_lo;          /* the first with the shape's stride, the rest dense */
  const void *grad_weights, *grad_kl, *grad_expected;     /* backward */
  const void *saved_noise, *saved_log_gamma;              /* backward, training */
  const int64_t *indices;                                 /* backward */
  void *weights, *kl, *expected_k, *noise, *log_gamma;    /* forward; the last two are written when training */
  int64_t *out_indices;                                   /* forward */
  void *grad_gate_logits, *grad_alpha_hi, *grad_alpha_lo; /* backward */
  void *scratch;
  uint64_t seed;
  int is_double;
} pm_dirmoe_job;

typedef pm_status (*pm_dirmoe_kernel)(const pm_dirmoe_job *job);

typedef struct pm_kernels {
  size_t (*scratch_size)(int64_t experts, int64_t k_max);
  pm_kernel log_partition; /* NULL in single precision, as are the next four */
  pm_kernel cardinality;
  pm_kernel cardinality_backward;
  pm_kernel entropy;
  pm_kernel log_prob;
  pm_kernel marginals;
  pm_kernel covariance_vp;
  pm_kernel sample;
  pm_kernel route;
  pm_kernel route_backward;
  size_t (*law_scratch_size)(int64_t experts);
  pm_law_kernel log_gamma_sample;
  pm_law_kernel log_gamma_backward;
  pm_law_kernel standard_gamma_grad;
  pm_law_kernel dirichlet_sample;
  pm_law_kernel dirichlet_sample_backward;
  pm_law_kernel dirichlet_log_prob; /* NULL in single precision, as are those that follow */
  pm_law_kernel dirichlet_log_prob_backward;
  pm_law_kernel dirichlet_entropy;
  pm_law_kernel dirichlet_entropy_backward;
  pm_law_kernel dirichlet_kl;
  pm_law_kernel dirichlet_kl_backward;
  pm_dirmoe_kernel dirmoe;
  pm_dirmoe_kernel dirmoe_backward;
  pm_kernel gumbel_top_k;
  pm_kernel gumbel_sigmoid;
  pm_kernel relaxed_top_k;
  pm_kernel relaxed_top_k_backward;
  pm_kernel plackett_luce_log_prob; /* NULL in single precision, as is its gradient */
  pm_kernel plackett_luce_log_prob_backward;
} pm_kernels;

extern const pm_kernels pm_kernels_portable_f32, pm_kernels_portable_f64;
#if defined(__x86_64__)
extern const pm_kernels pm_kernels_avx2_f32, pm_kernels_avx2_f64;
extern const pm_kernels pm_kernels_avx512_f32, pm_kernels_avx512_f64;
#endif

/* The kernels to run for so many rows: those of the instruction set in use, or of one with shorter vectors and the same
 * bits where these hold the batch (a vector costs the same however few of its rows are there). `is_double` asks for
 * double precision. */
const pm_kernels *pm_kernels_for(int is_double, int64_t rows);

/* Scratch for any of them. */
size_t pm_largest_scratch(int64_t experts, int64_t k_max);

/* Single-precision problems up to these bounds are computed in single precision; beyond them rounding and the range of
 * exp(k) would break the promised accuracy, and double precision is used. */
#define PM_SINGLE_MAX_EXPERTS 256
#define PM_SINGLE_MAX_K 32

/* Fills the shape, checks it and picks the precision. */
pm_status pm_check(const pm_shape *shape, const void *logits, const void *out, const void *scratch);
int pm_double_needed(const pm_shape *shape, int is_double);

#endif
