/* probmoe: exact cardinality-constrained expert routing.   SPDX-License-Identifier: MIT
 *
 * The C library below probmoe_ext. It needs a C17 compiler and libm, nothing else.
 *
 * WHAT IT COMPUTES
 *   Logits r in (R + {-inf})^E and a band 0 <= k_min <= k_max <= E define a law on subsets S of the E experts,
 *       P(S) = exp(sum_{i in S} r_i) / Z   for k_min <= |S| <= k_max,   Z = sum_{j=k_min..k_max} e_j(exp(r)),
 *   with e_j the j-th elementary symmetric polynomial (conditional Bernoulli; exact k is k_min = k_max = k).
 *   A logit of -inf masks its expert out.
 *
 * LAYOUT
 *   A batch is T rows of E logits; the elements of a row are contiguous, rows are `stride` elements apart.
 *   Outputs and all other inputs are dense row-major. Outputs may not overlap inputs.
 *
 * MEMORY
 *   Nothing is allocated and nothing is kept: no globals, no state, no printing, no threads. The caller gives
 *   pm_scratch_size() bytes of scratch, of any alignment, and may use them again for the next call.
 *
 * THREADS
 *   Every function is pure and safe to call from several threads, each with scratch of its own. To spread a batch,
 *   call it for ranges of rows with `first_row` set to the number of the range's first row: results, samples
 *   included, depend on the row's number and its logits alone, never on the split.
 *
 * RANGE
 *   Logits up to 1e300 in magnitude; beyond it the sums that log Z is made of overflow in double precision.
 *
 * STATUS
 *   PM_OK: every output element is written. PM_INFEASIBLE: some row has fewer than k_min experts above -inf;
 *   that row's outputs are NaN (indices: 0, 1, 2, ...), all other rows are as with PM_OK. Any other status:
 *   no output was written.
 *   A row with a NaN or a +inf has NaN results and indices that stay in range.
 *
 * RANDOMNESS
 *   Philox4x32-10 (Salmon et al., SC 2011), keyed by the seed, counted by (draw, row, purpose): see philox.h.
 *
 * METHOD
 *   Tilting and the linear-domain recursion: with any real lambda, e_j(w) = exp(j lambda) e_j(w exp(-lambda)), and
 *   the tilted polynomials are built by A[j] += w_i A[j-1], a sum of positive terms, so that no digit is lost and
 *   nothing is clamped (Chen, Dempster & Liu 1994 describe the family; the tilt is chosen as in rows/tilt.h).
 *   Cost O(E k_max) a row for every function but pm_subset_mode and pm_route_top_k, which are O(E + k log E) typically.
 *
 * ACCURACY (against a 50-digit oracle; tests/ops/test_accuracy.py repeats the measurement)
 *   _f32: log Z within 3e-6 max(1, |log Z|), marginals within 1e-6 absolute and 1e-5 relative where they exceed
 *   1e-12, covariance products within 5e-6 max|v|. _f64: the same with 1e-13.
 */
#ifndef PROBMOE_H
#define PROBMOE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PM_VERSION_MAJOR 0
#define PM_VERSION_MINOR 1
#define PM_VERSION_PATCH 0

/* The largest number of experts. */
#define PM_MAX_EXPERTS 65536

typedef enum pm_status {
  PM_OK = 0,
  PM_NULL_POINTER = 1,    /* a required pointer is NULL */
  PM_BAD_SHAPE = 2,       /* rows < 0, experts < 1 or > PM_MAX_EXPERTS, stride < experts, or samples < 0 or too close */
  PM_BAD_CARDINALITY = 3, /* not 0 <= k_min <= k_max <= experts */
  PM_INFEASIBLE = 4,      /* a row has fewer than k_min unmasked experts (pm_infeasible_row_* finds it) */
  PM_BAD_INDEX = 5,       /* an index is outside 0 .. experts (Plackett-Luce: 0 .. experts - 1) */
  PM_BAD_OPTION = 6       /* a temperature or concentration is not positive and finite, or out of its bounds */
} pm_status;

/* One sentence, for people. Never NULL. */
const char *pm_status_text(pm_status status);

/* The instruction set in use: "avx512", "avx2", "neon" or "portable". The choice is made from the processor, once;
 * the environment variable PROBMOE_ISA may name a lesser one. All that have fused multiply-add (all but the x86
 * "portable") give the same bits. */
const char *pm_instruction_set(void);

/* The shape of a batch, and where it lies in a larger one. */
typedef struct pm_shape {
  int64_t rows;      /* T >= 0 */
  int64_t experts;   /* E, 1 .. PM_MAX_EXPERTS */
  int64_t k_min;     /* smallest subset, 0 .. k_max */
  int64_t k_max;     /* largest subset, k_min .. E */
  int64_t stride;    /* elements from one row of logits to the next, >= E */
  int64_t first_row; /* number of the first row: counts its random draws */
} pm_shape;

/* Scratch bytes that suffice for every function at this E and k_max, whatever the number of rows. */
size_t pm_scratch_size(int64_t experts, int64_t k_max);

/* Number (0-based, within the range) of the first row with fewer than k_min unmasked experts; -1 if there is none.
 * No argument may be NULL; the shape must be one that the other functions accept. */
int64_t pm_infeasible_row_f32(const pm_shape *shape, const float *logits);
int64_t pm_infeasible_row_f64(const pm_shape *shape, const double *logits);

/* ---- the subset family -------------------------------------------------------------------------------------- */

/* log Z.  out [T].  Computed in double precision for both types.  k_max = 0 gives 0. */
pm_status pm_subset_log_partition_f32(const pm_shape *shape, const float *logits, float *out, void *scratch);
pm_status pm_subset_log_partition_f64(const pm_shape *shape, const double *logits, double *out, void *scratch);

/* P(|S| = j), j = k_min..k_max.  out [T, k_max-k_min+1].  Computed in double precision for both types. */
pm_status pm_subset_cardinality_f32(const pm_shape *shape, const float *logits, float *out, void *scratch);
pm_status pm_subset_cardinality_f64(const pm_shape *shape, const double *logits, double *out, void *scratch);

/* Its vector-Jacobian product: grad_logits_i = sum_j grad_j P(j) (P(i in S | |S| = j) - m_i).
 * grad [T, k_max-k_min+1], grad_logits [T, E]. */
pm_status pm_subset_cardinality_backward_f32(const pm_shape *shape, const float *logits, const float *grad,
                                             float *grad_logits, void *scratch);
pm_status pm_subset_cardinality_backward_f64(const pm_shape *shape, const double *logits, const double *grad,
                                             double *grad_logits, void *scratch);

/* m_i = P(i in S) = d log Z / d r_i.  out [T, E].  Rows sum to E|S|. */
pm_status pm_subset_marginals_f32(const pm_shape *shape, const float *logits, float *out, void *scratch);
pm_status pm_subset_marginals_f64(const pm_shape *shape, const double *logits, double *out, void *scratch);

/* C v, C_ij = P(i, j in S) - m_i m_j = d m_i / d r_j, never materialised.  v [T, E], out [T, E]. */
pm_status pm_subset_covariance_vp_f32(const pm_shape *shape, const float *logits, const float *v, float *out,
                                      void *scratch);
pm_status pm_subset_covariance_vp_f64(const pm_shape *shape, const double *logits, const double *v, double *out,
                                      void *scratch);

/* Entropy -sum_S P(S) log P(S) = log Z - sum_i m_i r_i.  out [T].  Computed in double precision for both types, term
 * by term, so that nothing cancels at large logits. */
pm_status pm_subset_entropy_f32(const pm_shape *shape, const float *logits, float *out, void *scratch);
pm_status pm_subset_entropy_f64(const pm_shape *shape, const double *logits, double *out, void *scratch);

/* log P(S) = sum over S of r_i - log Z, S given by its members in any order.  indices [T, k_max], unused slots at E;
 * out [T].  -inf for a size outside the band, a masked or a repeated member; PM_BAD_INDEX for an index outside 0..E.
 * Computed in double precision for both types as a sum of terms of one sign, so that nothing cancels. */
pm_status pm_subset_log_prob_f32(const pm_shape *shape, const float *logits, const int64_t *indices, float *out,
                                 void *scratch);
pm_status pm_subset_log_prob_f64(const pm_shape *shape, const double *logits, const int64_t *indices, double *out,
                                 void *scratch);

/* Exact draws of S, `samples` >= 0 for each row at the price of one table.  out [samples, T, k_max], one draw's rows
 * `sample_stride` >= T rows after the last one's, ascending; slots past |S| hold E.  Draw n of row t is the one that
 * row n sample_stride + t would get: that of a batch repeated `samples` times. */
pm_status pm_subset_sample_f32(const pm_shape *shape, const float *logits, uint64_t seed, int64_t samples,
                               int64_t sample_stride, int64_t *out, void *scratch);
pm_status pm_subset_sample_f64(const pm_shape *shape, const double *logits, uint64_t seed, int64_t samples,
                               int64_t sample_stride, int64_t *out, void *scratch);

/* The most probable S: every r_i > 0, then the count clamped to the band along the descending order, ties to the
 * lower index.  out [T, k_max], by descending logit; slots past |S| hold E. */
pm_status pm_subset_mode_f32(const pm_shape *shape, const float *logits, int64_t *out, void *scratch);
pm_status pm_subset_mode_f64(const pm_shape *shape, const double *logits, int64_t *out, void *scratch);

/* ---- routing ------------------------------------------------------------------------------------------------ */

typedef enum pm_forward { PM_FORWARD_SAMPLE = 0, PM_FORWARD_MODE = 1 } pm_forward;
typedef enum pm_backward { PM_BACKWARD_MARGINAL = 0, PM_BACKWARD_STRAIGHT_THROUGH = 1 } pm_backward;

/* ProbMoE routing (arXiv 2606.01509): s = softmax(r), S drawn (PM_FORWARD_SAMPLE, ascending) or the mode
 * (PM_FORWARD_MODE, descending); weights s_i on S, divided by their sum if `normalize`.
 * weights, indices [T, k_max]; unused slots carry index E and weight 0.  With k_min = k_max and PM_FORWARD_MODE this is
 * the fused softmax + top-k of conventional routing.  `seed` is read by PM_FORWARD_SAMPLE alone. */
pm_status pm_route_f32(const pm_shape *shape, const float *logits, pm_forward forward, int normalize, uint64_t seed,
                       float *weights, int64_t *indices, void *scratch);
pm_status pm_route_f64(const pm_shape *shape, const double *logits, pm_forward forward, int normalize, uint64_t seed,
                       double *weights, int64_t *indices, void *scratch);

/* Gradient of the above from logits, indices and g = dL/dweights alone.  With z the indicator of S and
 * u = (stopgrad(z - m) + m) s:  dL/dr = C (h s) + J_softmax^T (h z), where h = g on S and 0 elsewhere, or with
 * `normalize` h_i = (g_i [i in S] - g.w) / sum(u) for every i.  PM_BACKWARD_STRAIGHT_THROUGH drops the first term.
 * An index outside 0..E-1 is an unused slot.  grad_logits [T, E]. */
pm_status pm_route_backward_f32(const pm_shape *shape, const float *logits, const int64_t *indices,
                                const float *grad_weights, pm_backward backward, int normalize, float *grad_logits,
                                void *scratch);
pm_status pm_route_backward_f64(const pm_shape *shape, const double *logits, const int64_t *indices,
                                const double *grad_weights, pm_backward backward, int normalize, double *grad_logits,
                                void *scratch);

/* ---- Gamma and Dirichlet ------------------------------------------------------------------------------------- */

/* Rows of E concentrations alpha > 0 in place of the logits; a shape's k_min and k_max are not looked at (0 will do).
 * A concentration that is negative, infinite or NaN gives NaN: for the element in the Gamma family, for the whole row
 * in the Dirichlet family. Draws depend on the seed, the row's number and the element's column alone. Cost O(E) a row.
 *
 * In log space nothing underflows: concentrations down to 1e-37 (single) or 1e-307 (double precision) are ordinary.
 * ACCURACY against 50 digits: docs/gamma.md. */

/* log g, g ~ Gamma(alpha, 1).  out [T, E].  alpha = 0 gives -inf.  Marsaglia & Tsang (ACM TOMS 26, 2000) in log space.
 */
pm_status pm_log_gamma_sample_f32(const pm_shape *shape, const float *concentration, uint64_t seed, float *out,
                                  void *scratch);
pm_status pm_log_gamma_sample_f64(const pm_shape *shape, const double *concentration, uint64_t seed, double *out,
                                  void *scratch);

/* Its implicit derivative (Figurnov, Mohamed & Mnih, NeurIPS 2018) times grad: grad D, D = d log g / d alpha at the
 * quantile that log_value = log g has.  log_value, grad, grad_concentration [T, E]. */
pm_status pm_log_gamma_sample_backward_f32(const pm_shape *shape, const float *concentration, const float *log_value,
                                           const float *grad, float *grad_concentration);
pm_status pm_log_gamma_sample_backward_f64(const pm_shape *shape, const double *concentration, const double *log_value,
                                           const double *grad, double *grad_concentration);

/* dg/dalpha = g D.  value (g), out [T, E].  0 where g is 0 or below the normal range. */
pm_status pm_standard_gamma_grad_f32(const pm_shape *shape, const float *concentration, const float *value, float *out);
pm_status pm_standard_gamma_grad_f64(const pm_shape *shape, const double *concentration, const double *value,
                                     double *out);

/* theta ~ Dir(alpha), theta = g / sum(g), and log sum(g).  out [T, E], log_total [T].  alpha_i = 0 gives theta_i = 0; a
 * row of zeros gives NaN. */
pm_status pm_dirichlet_sample_f32(const pm_shape *shape, const float *concentration, uint64_t seed, float *out,
                                  float *log_total, void *scratch);
pm_status pm_dirichlet_sample_f64(const pm_shape *shape, const double *concentration, uint64_t seed, double *out,
                                  double *log_total, void *scratch);

/* Its pathwise gradient from h = dL/dtheta: grad_concentration_j = D_j theta_j (h_j - h.theta), from what the draw
 * returned.  sample, grad, grad_concentration [T, E], log_total [T]. */
pm_status pm_dirichlet_sample_backward_f32(const pm_shape *shape, const float *concentration, const float *sample,
                                           const float *log_total, const float *grad, float *grad_concentration,
                                           void *scratch);
pm_status pm_dirichlet_sample_backward_f64(const pm_shape *shape, const double *concentration, const double *sample,
                                           const double *log_total, const double *grad, double *grad_concentration,
                                           void *scratch);

/* The closed forms are computed in double precision for both types; out, grad [T], all else [T, E]. With A = sum alpha:
 * log density     log Gamma(A) - sum log Gamma(alpha_i) + sum (alpha_i - 1) log theta_i   (0 log 0 = 0)
 * entropy         sum log Gamma(alpha_i) - log Gamma(A) + (A - E) psi(A) - sum (alpha_i - 1) psi(alpha_i)
 * KL(p || q)      log Gamma(P) - log Gamma(Q) + sum [log Gamma(q_i) - log Gamma(p_i) + (p_i - q_i)(psi(p_i) - psi(P))]
 */
pm_status pm_dirichlet_log_prob_f32(const pm_shape *shape, const float *concentration, const float *value, float *out,
                                    void *scratch);
pm_status pm_dirichlet_log_prob_f64(const pm_shape *shape, const double *concentration, const double *value,
                                    double *out, void *scratch);
pm_status pm_dirichlet_log_prob_backward_f32(const pm_shape *shape, const float *concentration, const float *value,
                                             const float *grad, float *grad_concentration, float *grad_value,
                                             void *scratch);
pm_status pm_dirichlet_log_prob_backward_f64(const pm_shape *shape, const double *concentration, const double *value,
                                             const double *grad, double *grad_concentration, double *grad_value,
                                             void *scratch);
pm_status pm_dirichlet_entropy_f32(const pm_shape *shape, const float *concentration, float *out, void *scratch);
pm_status pm_dirichlet_entropy_f64(const pm_shape *shape, const double *concentration, double *out, void *scratch);
pm_status pm_dirichlet_entropy_backward_f32(const pm_shape *shape, const float *concentration, const float *grad,
                                            float *grad_concentration, void *scratch);
pm_status pm_dirichlet_entropy_backward_f64(const pm_shape *shape, const double *concentration, const double *grad,
                                            double *grad_concentration, void *scratch);
pm_status pm_dirichlet_kl_f32(const pm_shape *shape, const float *p_concentration, const float *q_concentration,
                              float *out, void *scratch);
pm_status pm_dirichlet_kl_f64(const pm_shape *shape, const double *p_concentration, const double *q_concentration,
                              double *out, void *scratch);
pm_status pm_dirichlet_kl_backward_f32(const pm_shape *shape, const float *p_concentration,
                                       const float *q_concentration, const float *grad, float *grad_p, float *grad_q,
                                       void *scratch);
pm_status pm_dirichlet_kl_backward_f64(const pm_shape *shape, const double *p_concentration,
                                       const double *q_concentration, const double *grad, double *grad_p,
                                       double *grad_q, void *scratch);
/* ---- the Gumbel family ---------------------------------------------------------------------------------------- */

/* Below, k is k_max, and k_min must be the same (PM_BAD_CARDINALITY); a row needs k unmasked experts (PM_INFEASIBLE).
 * The noise of expert i is draw i of its row, G = -log(-log(1 - u)) with u in (0, 1) of 32 bits in single and 64 in
 * double precision (rows/noise.h): its tails reach to probabilities of 2^-33 and 2^-65. The ordered draw is one without
 * replacement, the Plackett-Luce law (Kool, van Hoof & Welling 2019). As a law on subsets it is NOT the conditional
 * Bernoulli law of the subset family: with the same logits the probabilities differ wherever 1 < k < E. */
/* Bounds of the temperatures below (PM_BAD_OPTION). */
#define PM_MIN_TEMPERATURE 1e-6
#define PM_MAX_TEMPERATURE 1e6

/* The k largest keys r_i + G_i, descending, ties to the lower index; a masked expert is never among them.
 * indices, keys [T, k].  Cost O(E k). */
pm_status pm_gumbel_top_k_f32(const pm_shape *shape, const float *logits, uint64_t seed, int64_t *indices, float *keys,
                              void *scratch);
pm_status pm_gumbel_top_k_f64(const pm_shape *shape, const double *logits, uint64_t seed, int64_t *indices,
                              double *keys, void *scratch);

/* sum over t of r_{i_t} - logsumexp(r over what is left before t), for ordered choices i_1, ..., i_k.
 * indices [T, k], in 0..E-1 (PM_BAD_INDEX); out [T].  -inf where a choice is masked or repeated; k_min is not read.
 * Computed in double precision for both types as a sum of terms of one sign.  Cost O(E + k). */
pm_status pm_plackett_luce_log_prob_f32(const pm_shape *shape, const float *logits, const int64_t *indices, float *out,
                                        void *scratch);
pm_status pm_plackett_luce_log_prob_f64(const pm_shape *shape, const double *logits, const int64_t *indices,
                                        double *out, void *scratch);

/* Its gradient: grad_logits_i = grad ([i chosen] - sum over t, up to i's own choice, of exp(r_i - L_t)), L_t the
 * logsumexp above; 0 where the log-probability is -inf.  grad [T], grad_logits [T, E]. */
pm_status pm_plackett_luce_log_prob_backward_f32(const pm_shape *shape, const float *logits, const int64_t *indices,
                                                 const float *grad, float *grad_logits, void *scratch);
pm_status pm_plackett_luce_log_prob_backward_f64(const pm_shape *shape, const double *logits, const int64_t *indices,
                                                 const double *grad, double *grad_logits, void *scratch);

/* Relaxed top-k (Xie & Ermon 2019): x = r + G; k times a = softmax(x / temperature), x += log(1 - a); the sum of the a.
 * Rows sum to k; as the temperature goes to 0 they tend to the k-hot of pm_gumbel_top_k with the same seed.
 * out, keys [T, E]: the result, and r + G for the backward pass unless that is NULL.  Cost O(E k). */
pm_status pm_relaxed_top_k_f32(const pm_shape *shape, const float *logits, double temperature, uint64_t seed,
                               float *out, float *keys, void *scratch);
pm_status pm_relaxed_top_k_f64(const pm_shape *shape, const double *logits, double temperature, uint64_t seed,
                               double *out, double *keys, void *scratch);

/* Its vector-Jacobian product from the keys r + G, by the logits as by the keys.  keys [T, E] with shape->stride, grad,
 * grad_logits [T, E].  Cost O(E k); the scratch of a call holds the rounds of a few rows, O(E sqrt(k)) where all of
 * them would not fit the cache. */
pm_status pm_relaxed_top_k_backward_f32(const pm_shape *shape, const float *keys, const float *grad, double temperature,
                                        float *grad_logits, void *scratch);
pm_status pm_relaxed_top_k_backward_f64(const pm_shape *shape, const double *keys, const double *grad,
                                        double temperature, double *grad_logits, void *scratch);

/* Relaxed Bernoulli variables (Maddison, Mnih & Teh 2017), elementwise: sigmoid((r + log u - log(1 - u)) /
 * temperature), u of draw i, of another purpose than G.  out [T, E] in [0, 1].  -inf gives 0, +inf 1, NaN NaN; k is not
 * read. */
pm_status pm_gumbel_sigmoid_f32(const pm_shape *shape, const float *logits, double temperature, uint64_t seed,
                                float *out, void *scratch);
pm_status pm_gumbel_sigmoid_f64(const pm_shape *shape, const double *logits, double temperature, uint64_t seed,
                                double *out, void *scratch);

/* ---- DirMoE routing ----------------------------------------------------------------------------------------- */

typedef struct pm_dirmoe {
  double temperature;         /* tau */
  double concentration;       /* lambda_q, of the posterior */
  double prior_concentration; /* lambda_p */
  double prior_hi, prior_lo;  /* the prior's concentrations of open and closed gates */
  int training;               /* draw, or decide */
  int normalize;              /* training: divide the kept weights by their sum */
} pm_dirmoe;

/* DirMoE (arXiv 2602.09001), which experts and how much of each apart.
 *   training   z = sigmoid((gate_logits + Logistic) / tau),  q = lambda_q (z alpha_hi + (1 - z) alpha_lo),
 *              p = lambda_p (z prior_hi + (1 - z) prior_lo),  theta ~ Dir(q),  r = z theta / sum(z theta); the k_max
 *              largest r are kept, by descending r, ties to the lower index.
 *   otherwise  z marks the most probable subset (pm_subset_mode) and theta = q / sum(q); the weights are theta on the
 *              subset, divided by their sum, by descending gate logit.
 * gate_logits (-inf closes a gate), alpha_hi, alpha_lo (positive; dense) [T, E].
 * weights, indices [T, k_max]; slots without an expert carry index E and weight 0.  kl = KL(Dir(q) || Dir(p)) and
 * expected_k = sum z, both [T].  noise, log_gamma [T, E] are what the backward pass needs; written when training alone.
 * A row with a NaN, a gate logit of +inf or a concentration that is not positive and finite has NaN results and indices
 * 0, 1, 2, ...  PM_INFEASIBLE as for pm_subset_mode, when not training.  Cost O(E k_max) a row.
 * q and p are held within 2^-40 and 2^40 in single, 2^-300 and 2^300 in double precision, the options within 1e-30 and
 * 1e30.  kl is 0 where posterior and prior agree to the bit, and elsewhere off by some ulps of sum |p - q| (1 + 1 / q)
 * and of 1, whatever the size of log Gamma.  A gate's logistic variate is log u - log(1 - u) of one word, as in
 * pm_gumbel_sigmoid, of another purpose. */
pm_status pm_route_dirmoe_f32(const pm_shape *shape, const pm_dirmoe *options, const float *gate_logits,
                              const float *alpha_hi, const float *alpha_lo, uint64_t seed, float *weights,
                              int64_t *indices, float *kl, float *expected_k, float *noise, float *log_gamma,
                              void *scratch);
pm_status pm_route_dirmoe_f64(const pm_shape *shape, const pm_dirmoe *options, const double *gate_logits,
                              const double *alpha_hi, const double *alpha_lo, uint64_t seed, double *weights,
                              int64_t *indices, double *kl, double *expected_k, double *noise, double *log_gamma,
                              void *scratch);

/* Its gradients from those of the weights [T, k_max], of kl and of expected_k [T]. Which experts were kept is a
 * constant; when not training, so is z. theta is differentiated implicitly, by q. */
pm_status pm_route_dirmoe_backward_f32(const pm_shape *shape, const pm_dirmoe *options, const float *gate_logits,
                                       const float *alpha_hi, const float *alpha_lo, const int64_t *indices,
                                       const float *noise, const float *log_gamma, const float *grad_weights,
                                       const float *grad_kl, const float *grad_expected_k, float *grad_gate_logits,
                                       float *grad_alpha_hi, float *grad_alpha_lo, void *scratch);
pm_status pm_route_dirmoe_backward_f64(const pm_shape *shape, const pm_dirmoe *options, const double *gate_logits,
                                       const double *alpha_hi, const double *alpha_lo, const int64_t *indices,
                                       const double *noise, const double *log_gamma, const double *grad_weights,
                                       const double *grad_kl, const double *grad_expected_k, double *grad_gate_logits,
                                       double *grad_alpha_hi, double *grad_alpha_lo, void *scratch);

#ifdef __cplusplus
}
#endif

#endif
