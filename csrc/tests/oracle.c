#include "oracle.h"

#include <math.h>
#include <string.h>

static int count_bits(int set) {
  int count = 0;
  for (; set; set &= set - 1) ++count;
  return count;
}

static void find_mode(oracle *o) {
  int order[ORACLE_EXPERTS], positive = 0;
  for (int i = 0; i < o->experts; ++i) { /* stable: ties to the lower index */
    int at = i;
    for (; at > 0 && o->logits[order[at - 1]] < o->logits[i]; --at) order[at] = order[at - 1];
    order[at] = i;
    positive += o->logits[i] > 0;
  }
  o->mode_size = positive < o->k_min ? o->k_min : positive > o->k_max ? o->k_max : positive;
  memcpy(o->mode, order, sizeof order);
}

void enumerate(oracle *o, const double *logits, int experts, int k_min, int k_max) {
  memset(o, 0, sizeof *o);
  o->experts = experts;
  o->k_min = k_min;
  o->k_max = k_max;
  memcpy(o->logits, logits, (size_t)experts * sizeof *logits);
  const int subsets = 1 << experts;
  long double score[ORACLE_SUBSETS], largest = -INFINITY, total = 0;
  for (int set = 0; set < subsets; ++set) {
    const int size = count_bits(set);
    score[set] = size < k_min || size > k_max ? -INFINITY : 0;
    for (int i = 0; i < experts; ++i)
      if (set >> i & 1) score[set] += (long double)logits[i];
    if (score[set] > largest) largest = score[set];
  }
  for (int set = 0; set < subsets; ++set) total += expl(score[set] - largest);
  const long double log_partition = largest + logl(total);
  o->log_partition = (double)log_partition;
  for (int set = 0; set < subsets; ++set) {
    const int size = count_bits(set);
    const long double log_prob = (score[set] - largest) - logl(total), p = expl(log_prob);
    o->log_prob[set] = (double)log_prob;
    o->probability[set] = (double)p;
    if (!(p > 0)) continue;
    o->entropy -= (double)(p * log_prob);
    o->size[size] += (double)p;
    for (int i = 0; i < experts; ++i)
      if (set >> i & 1) {
        o->marginal[i] += (double)p;
        o->joint[size][i] += (double)p;
        for (int j = 0; j < experts; ++j)
          if (set >> j & 1) o->covariance[i][j] += (double)p;
      }
  }
  /* P(i, j in S) - m_i m_j without cancellation: E[(z_i - m_i)(z_j - m_j)]. */
  for (int i = 0; i < experts; ++i)
    for (int j = 0; j < experts; ++j) {
      double sum = 0;
      for (int set = 0; set < subsets; ++set)
        sum += o->probability[set] * ((set >> i & 1) - o->marginal[i]) * ((set >> j & 1) - o->marginal[j]);
      o->covariance[i][j] = sum;
    }
  double top = -INFINITY, sum = 0;
  for (int i = 0; i < experts; ++i) top = fmax(top, logits[i]);
  for (int i = 0; i < experts; ++i) sum += top > -INFINITY ? exp(logits[i] - top) : 0;
  for (int i = 0; i < experts; ++i) o->softmax[i] = sum > 0 ? exp(logits[i] - top) / sum : 0;
  find_mode(o);
}

/* Philox4x32-10, from the paper (Salmon et al., SC 2011). */
static uint32_t philox_word(uint64_t seed, uint64_t row, uint32_t draw, uint32_t purpose) {
  uint32_t x[4] = {draw / 4, (uint32_t)row, (uint32_t)(row >> 32), purpose};
  uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = 0xD2511F53ull * x[0], b = 0xCD9E8D57ull * x[2];
    const uint32_t next[4] = {(uint32_t)(b >> 32) ^ x[1] ^ key[0], (uint32_t)b, (uint32_t)(a >> 32) ^ x[3] ^ key[1],
                              (uint32_t)a};
    memcpy(x, next, sizeof x);
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return x[draw % 4];
}

static double unit(uint64_t seed, uint64_t row, uint32_t draw, uint32_t purpose, int is_double) {
  const uint64_t high = philox_word(seed, row, draw, purpose);
  if (!is_double) return (double)(high >> 8) * 0x1p-24;
  return (double)(high << 21 | philox_word(seed, row, draw, purpose + 1) >> 11) * 0x1p-53;
}

/* exp(sum over S of logits - largest) summed over the j-subsets of the first n experts. */
static long double mass(const oracle *o, int n, int j, long double largest) {
  long double total = 0;
  for (int set = 0; set < 1 << n; ++set) {
    if (count_bits(set) != j) continue;
    long double score = 0;
    for (int i = 0; i < n; ++i)
      if (set >> i & 1) score += (long double)o->logits[i];
    total += expl(score - largest);
  }
  return total;
}

/* The largest score of a j-subset of the first n experts. */
static long double largest_score(const oracle *o, int n, int j) {
  long double largest = 0;
  for (int taken = 0, at = 0; taken < j; ++at)
    if (o->mode[at] < n) {
      largest += (long double)o->logits[o->mode[at]];
      ++taken;
    }
  return largest;
}

static void narrow(double *margin, long double passed, long double level) {
  if (level > 0) *margin = fmin(*margin, (double)fabsl(passed / level - 1));
}

int draw(const oracle *o, uint64_t seed, uint64_t row, int is_double, int64_t *subset, double *margin) {
  int size = o->k_max;
  *margin = 1;
  if (o->k_min < o->k_max) {
    const double u = unit(seed, row, 0, 2, is_double);
    double below = 0;
    for (int j = o->k_min; j <= o->k_max; ++j) {
      below += o->size[j];
      narrow(margin, below, u);
      if (below > u) {
        size = j;
        break;
      }
    }
  }
  int experts = o->experts;
  for (int t = 0; t < size; ++t) {
    const int left = size - t;
    const long double largest = largest_score(o, experts, left);
    const long double level = unit(seed, row, (uint32_t)t, 0, is_double) * mass(o, experts, left, largest);
    int n = left;
    for (; n < experts; ++n) {
      const long double passed = mass(o, n, left, largest);
      narrow(margin, passed, level);
      if (passed > level) break;
    }
    subset[left - 1] = n - 1;
    experts = n - 1;
  }
  return size;
}

int subset_bits(const int64_t *subset, int count, int experts) {
  int bits = 0;
  for (int j = 0; j < count; ++j)
    if (subset[j] >= 0 && subset[j] < experts) bits |= 1 << subset[j];
  return bits;
}
