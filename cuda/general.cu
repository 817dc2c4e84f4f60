// The operators on rows of any shape, in double precision: log Z and its like for all types, and what the tree does not
// serve. A group of lanes a row; see general.cuh.
#include "general.cuh"
#include "kernels.cuh"
#include "philox.h"

namespace probmoe {
namespace {

constexpr int kThreads = 64;
constexpr int64_t kSharedBytes = 48 * 1024;          // what every architecture gives without asking
constexpr int64_t kScratchBytes = 64 * 1024 * 1024;  // rows in flight are limited by it, not the other way round

// How a shape is launched: in shared memory one row a group, else as many groups as the scratch holds, in turns.
struct Plan {
  int size, threads;
  int64_t doubles, shared, groups;  // groups: 0 for as many as rows
};

Plan plan_of(const pm_shape &shape) {
  Plan plan = {lanes_for(shape.k_max + 1), kThreads, layout_of(shape.experts, shape.k_max).doubles, 0, 0};
  const int64_t bytes = plan.doubles * 8;
  if (kThreads / plan.size * bytes > kSharedBytes) plan.threads = kWarp;
  plan.shared = plan.threads / plan.size * bytes;
  if (plan.shared <= kSharedBytes) return plan;
  const int64_t a_warp = kWarp / plan.size, most = kScratchBytes / bytes / a_warp * a_warp;
  const int64_t needed = (shape.rows + a_warp - 1) / a_warp * a_warp;
  plan.shared = 0;
  plan.groups = most < a_warp ? a_warp : most < needed ? most : needed;
  return plan;
}

// row(group, General) for every row of this group; all groups of a warp take the same number of turns.
template <class Body>
__device__ __forceinline__ void for_rows(const Job &job, int size, int64_t doubles, const Body &body) {
  const int64_t groups = static_cast<int64_t>(gridDim.x) * (blockDim.x / size);
  const Group first = group_of(size, INT64_MAX);
  double *space = job.scratch ? static_cast<double *>(job.scratch) + first.row * doubles
                              : shared_memory() + threadIdx.x / size * doubles;
  const int64_t warp_row = first.row - first.first / size;  // of the warp's first group: the same in all its lanes
  for (int64_t done = 0; warp_row + done < job.shape.rows; done += groups) {
    const int64_t row = first.row + done;
    const bool active = row < job.shape.rows;
    General it({size, first.lane, first.first, active ? row : job.shape.rows - 1, active}, job.shape, space);
    it.load(job);
    body(it);
    __syncwarp();
  }
}

// A sum of numbers of both signs with its rounding error (Knuth's two-sum): lanes' shares, then over the group.
struct Sum {
  double value, error;
  __device__ __forceinline__ void add(double x) {
    const double sum = value + x, back = sum - value;
    error += (value - (sum - back)) + (x - back);
    value = sum;
  }
};

__device__ __forceinline__ Sum group_sum(const Group &group, Sum it) {
  for (int step = 1; step < group.size; step *= 2) {
    const double value = __shfl_xor_sync(kAllLanes, it.value, step);
    it.error += __shfl_xor_sync(kAllLanes, it.error, step);
    it.add(value);
  }
  return it;
}

__device__ __forceinline__ double log_total(const General &it) { return log(it.total) - log(it.start); }

// log Z = j0 lambda + sum of (x - lambda) over the experts above the tilt + log total.
__device__ double log_partition(const General &it) {
  Sum above = {0, 0};
  int count = 0;
  it.each(it.E, [&](int i) {
    if (it.x[i] > it.pivot) above.add(it.x[i]), ++count;
  });
  above = group_sum(it.group, above);
  count = group_sum(it.group, count);
  const double n = it.base - count, product = n * it.pivot;
  above.error += fma(n, it.pivot, -product);
  above.add(product);
  return above.value + (above.error + log_total(it));
}

// log P(S) = sum over S of min(x, 0) - sum over the others of max(x, 0) - log total + lambda (|S| - j0), x less lambda.
__device__ double log_prob(const General &it, const int64_t *members) {
  it.each(it.E, [&](int i) { it.v[i] = 0; });
  __syncwarp();
  int size = 0, verdict = 0;  // 1: impossible, 2: no index
  if (it.group.lane == 0)
    for (int j = 0; j < it.b; ++j) {
      const int64_t i = members[j];
      if (i < 0 || i > it.E) verdict = 2;
      if (i < 0 || i >= it.E) continue;
      if (it.v[i] != 0 || it.x[i] == static_cast<double>(-INFINITY)) verdict = verdict ? verdict : 1;
      it.v[i] = 1;
      ++size;
    }
  __syncwarp();
  size = from_lane(it.group, size, 0);
  verdict = from_lane(it.group, verdict, 0);
  double value = 0;
  it.each(it.E, [&](int i) {
    const double x = it.x[i] - it.pivot;
    value += it.v[i] != 0 ? (x < 0 ? x : 0) : (x > 0 ? -x : 0);
  });
  value = probmoe::group_sum(it.group, value) + it.pivot * (size - it.base) - log_total(it);
  return verdict == 2 ? NAN : verdict == 1 || size < it.a ? -INFINITY : value;
}

// What the last state alone tells.
__global__ void __launch_bounds__(kThreads) prefix_kernel(Job job, int size, int64_t doubles, Operation operation) {
  for_rows(job, size, doubles, [&](General &it) {
    it.tilt(job.dtype == PM_F64);
    it.prefix(false);
    const int64_t row = it.group.row;
    if (operation == Operation::cardinality) {
      const int width = it.b - it.a + 1;
      if (it.group.active)
        it.each(width, [&](int j) {
          const double share = it.sizes[it.a + j] * it.last_state()[it.a + j] / it.total;
          write(job.out, job.dtype, row * width + j, it.poison ? static_cast<double>(NAN) : share);
        });
      return;
    }
    const double value = operation == Operation::log_prob ? log_prob(it, job.indices + row * it.b) : log_partition(it);
    if (it.group.active && it.group.lane == 0)
      write(job.out, job.dtype, row, it.poison ? static_cast<double>(NAN) : value);
  });
}

// In the precision that the CPU draws this shape in.
__device__ __forceinline__ double uniform_at(const Job &job, uint64_t row, int draw, uint32_t purpose) {
  const uint64_t seed = static_cast<uint64_t>(*job.seed);
  const uint32_t high = pm_random_word(seed, row, static_cast<uint32_t>(draw), purpose);
  if (job.dtype != PM_F64 && job.shape.experts <= 256 && job.shape.k_max <= 32) return pm_uniform_f32(high);
  return pm_uniform_f64(high, pm_random_word(seed, row, static_cast<uint32_t>(draw), purpose + 1));
}

// The group's first lane walks down the experts, segment by segment, as csrc/rows/sample.h does for such factors.
__global__ void __launch_bounds__(kThreads) sample_kernel(Job job, int size, int64_t doubles, Operation) {
  for_rows(job, size, doubles, [&](General &it) {
    it.tilt(job.dtype == PM_F64);
    it.prefix(false);
    const uint64_t number = static_cast<uint64_t>(job.shape.first_row + it.group.row);
    int64_t *members = job.out_indices + it.group.row * it.b;
    const bool walks = it.group.active && it.group.lane == 0;
    int left = 0, count = it.b;
    double level = 0;
    if (walks) {
      const double *all = it.last_state();
      if (it.a < it.b && !it.poison) {
        const double wanted = uniform_at(job, number, 0, PM_DRAW_SIZE) * it.total;
        double mass = 0;
        count = it.a;
        for (int j = it.a; j <= it.b && !(mass > wanted); ++j) {
          const double step = it.sizes[j] * all[j];
          if (step > 0) count = j;
          mass += step;
        }
      }
      left = it.poison ? 0 : count;
      for (int j = 0; j < it.b; ++j) members[j] = j < count ? j : it.E;
      if (left > 0) level = level_of(uniform_at(job, number, 0, PM_DRAW_ITEM), all[left]);
    }
    for (int s = it.layout.segments - 1; s >= 0; --s) {
      if (s + 1 < it.layout.segments) it.fill(s, false);
      for (int i = it.end_of(s) - 1; i >= it.begin_of(s) && left > 0; --i) {
        const double *state = it.table + static_cast<int64_t>(i - it.begin_of(s)) * it.layout.cells;
        const double q = it.q[i], mass = state[left], rest = q * mass;
        if (!(level < rest)) {
          if (it.w[i] * state[left - 1] > 0) {
            const double reach = state[left - 1];
            members[--left] = i;
            if (left > 0) level = level_of(uniform_at(job, number, count - left, PM_DRAW_ITEM), reach);
            continue;
          }
          level = rest;  // an expert that cannot enter is passed over, whatever rounding said
        }
        if (q != 1) level = q > 0 ? level / q : 0;
        if (!(level < mass)) level = mass * (1 - 0x1p-53);
      }
      __syncwarp();
    }
    if (!job.out) return;
    const auto softmax = [&](int64_t at) { return at < it.E ? it.softmax(static_cast<int>(at)) : 0.0; };
    double sum = 0;
    if (it.group.active) it.each(it.b, [&](int j) { sum += softmax(members[j]); });
    sum = probmoe::group_sum(it.group, sum);
    const double scale = !job.normalize ? 1 : sum > 0 ? 1 / sum : 0;
    if (it.group.active)
      it.each(it.b, [&](int j) {
        const double weight = softmax(members[j]) * scale;
        write(job.out, job.dtype, it.group.row * it.b + j, it.poison ? static_cast<double>(NAN) : weight);
      });
  });
}

// H = sum_i (x > 0 ? P(i not in S) x : -P(i in S) x) + log total + lambda (j0 - E|S|), x less lambda: no two large
// terms meet. Marginals, and with the sizes weighed by g_j - sum_j' g_j' P(j') the gradient of the sizes'
// probabilities.
__global__ void __launch_bounds__(kThreads) adjoint_kernel(Job job, int size, int64_t doubles, Operation operation) {
  for_rows(job, size, doubles, [&](General &it) {
    it.tilt(job.dtype == PM_F64);
    it.prefix(false);
    const double *all = it.last_state();
    const int width = it.b - it.a + 1;
    const double inverse = it.poison ? static_cast<double>(NAN) : 1 / it.total;
    double shift = 0, spread = 0;
    if (operation == Operation::cardinality_backward) {
      const auto grad = [&](int j) { return read<double>(job.vector, job.dtype, it.group.row * width + j - it.a); };
      it.each(it.b + 1, [&](int j) {
        if (j >= it.a) shift = fma(grad(j), it.sizes[j] * all[j] / it.total, shift);
      });
      shift = probmoe::group_sum(it.group, shift);
      it.each(it.b + 1, [&](int j) { it.adjoint[j] = j < it.a ? 0 : (grad(j) - shift) * it.sizes[j]; });
    } else {
      it.each(it.b + 1, [&](int j) {
        it.adjoint[j] = it.sizes[j];
        shift = fma(static_cast<double>(it.base - j), it.sizes[j] * all[j] / it.total, shift);
      });
      shift = probmoe::group_sum(it.group, shift);
    }
    __syncwarp();
    it.back(false, [&](int i, double in, double out) {
      const double over = it.x[i] - it.pivot, share = (over > 0 ? it.q[i] * out : it.w[i] * in) / it.total;
      if (share > 0) spread += share * fabs(over);  // 0 (-inf) = 0
      if (it.group.lane == 0) it.v[i] = it.w[i] * in * inverse;
    });
    __syncwarp();
    if (!it.group.active) return;
    if (operation == Operation::entropy) {
      const double value = spread + log_total(it) + it.pivot * shift;
      if (it.group.lane == 0) write(job.out, job.dtype, it.group.row, it.poison ? static_cast<double>(NAN) : value);
    } else {
      it.each(it.E, [&](int i) { write(job.out, job.dtype, it.group.row * it.E + i, it.v[i]); });
    }
  });
}

// h s into v and h s z into direct, h as in probmoe.h; returns the sum of the latter.
__device__ double upstream(const General &it, const Job &job) {
  const int64_t from = it.group.row * it.b;
  const auto slots = [&](const auto &body) {
    it.each(it.b, [&](int j) {
      const int64_t at = job.indices[from + j];
      if (at >= 0 && at < it.E)
        body(static_cast<int>(at), it.softmax(static_cast<int>(at)), read<double>(job.vector, job.dtype, from + j));
    });
  };
  double sum = 0, mean = 0, divisor = 1, through = 0;
  if (job.normalize) {
    slots([&](int, double s, double g) { sum += s, mean = fma(s, g, mean); });
    sum = probmoe::group_sum(it.group, sum);
    mean = probmoe::group_sum(it.group, mean);
    divisor = sum > 0 ? sum : 1;
    mean = sum > 0 ? mean / sum : 0;
  }
  it.each(it.E, [&](int i) { it.v[i] = -it.softmax(i) * (mean / divisor), it.direct[i] = 0; });
  __syncwarp();
  slots([&](int at, double s, double g) {
    const double value = s * ((g - mean) / divisor);
    it.v[at] = it.direct[at] = value;
    through += value;
  });
  __syncwarp();
  return probmoe::group_sum(it.group, through);
}

// C v, by the pass on dual numbers; for exact k the direction is centred first.
__global__ void __launch_bounds__(kThreads) tangent_kernel(Job job, int size, int64_t doubles, Operation operation) {
  for_rows(job, size, doubles, [&](General &it) {
    const bool routing = operation == Operation::route_backward;
    double through = 0;
    if (routing) {
      through = upstream(it, job);
      it.each(it.E, [&](int i) { it.direct[i] = fma(-it.softmax(i), through, it.direct[i]); });
    } else {
      it.each(it.E, [&](int i) { it.v[i] = read<double>(job.vector, job.dtype, it.group.row * it.E + i); });
    }
    if (!routing || job.marginal) {
      it.tilt(job.dtype == PM_F64);
      if (it.a == it.b) {
        double mass = 0, moment = 0;
        it.each(it.E, [&](int i) { mass += it.w[i], moment = fma(it.w[i], it.v[i], moment); });
        mass = probmoe::group_sum(it.group, mass);
        moment = probmoe::group_sum(it.group, moment);
        it.each(it.E, [&](int i) { it.v[i] -= mass > 0 ? moment / mass : 0; });
      }
      __syncwarp();
      it.prefix(true);
      const double *all = it.last_state();
      double slope = 0;
      it.each(it.b + 1, [&](int j) { slope = fma(it.sizes[j], all[it.b + 1 + j], slope); });
      slope = probmoe::group_sum(it.group, slope) / it.total;
      it.each(it.b + 1, [&](int j) {
        it.adjoint[j] = it.sizes[j];
        it.adjoint[it.b + 1 + j] = -slope * it.sizes[j];  // the tangent of 1 / Z
      });
      __syncwarp();
      it.back(true, [&](int i, double in, double) {
        if (it.group.lane == 0) it.v[i] = it.w[i] * in / it.total;
      });
    } else {
      it.each(it.E, [&](int i) { it.v[i] = 0; });
    }
    __syncwarp();
    if (it.group.active)
      it.each(it.E, [&](int i) {
        const double value = routing ? it.v[i] + it.direct[i] : it.v[i];
        write(job.out, job.dtype, it.group.row * it.E + i, it.poison ? static_cast<double>(NAN) : value);
      });
  });
}

}  // namespace

int64_t general_scratch(const pm_shape &shape) {
  const Plan plan = plan_of(shape);
  return plan.groups * plan.doubles * 8;
}

pm_cuda_status general(const Job &job, Operation operation, void *stream) {
  const Plan plan = plan_of(job.shape);
  Job mine = job;
  if (plan.groups == 0) mine.scratch = nullptr;
  auto kernel = tangent_kernel;
  switch (operation) {
    case Operation::log_partition:
    case Operation::cardinality:
    case Operation::log_prob: kernel = prefix_kernel; break;
    case Operation::sample: kernel = sample_kernel; break;
    case Operation::entropy:
    case Operation::marginals:
    case Operation::cardinality_backward: kernel = adjoint_kernel; break;
    case Operation::covariance_vp:
    case Operation::route_backward: break;
  }
  const int64_t groups = plan.groups ? plan.groups : job.shape.rows;
  return launch(kernel, groups, plan.size, plan.threads, static_cast<size_t>(plan.shared), stream, mine, plan.size,
                plan.doubles, operation);
}

}  // namespace probmoe
