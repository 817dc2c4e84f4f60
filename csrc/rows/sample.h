/* Drawing a subset from the prefix table.
 *
 * A_i[j] is the (tilted) mass of the j-subsets of experts 1..i, that is, of those whose last member is at most i. So
 * with j members still to choose among experts 1..n, the last one is the smallest i with A_i[j] > u A_n[j]: inversion,
 * one uniform a member. A_i[j] does not decrease in i, so that i is the number of states with A_i[j] <= u A_n[j],
 * counted with every lane in step. The table has every second state; the one between, to the same bits, is computed for
 * the pair that the count ends at. Of many states every fourth is counted first, then the three between by bisection.
 *
 * Where factors were divided by powers of two, the state holds A_i[j] 2^-depth_i and the comparison moves its right
 * side by the difference of the depths, which is exact. In the normalised form A_i[j] carries the product q_1 .. q_i,
 * and the same inversion is done by steps, lane by lane: expert i is passed over while U < q_i A_{i-1}[j], with U
 * divided by q_i each time. */
#ifndef PM_ROWS_SAMPLE_H
#define PM_ROWS_SAMPLE_H

#include "philox.h"
#include "tilt.h"

/* Uniforms for draws 0..count-1 of every lane, four draws to a counter. */
static void uniforms(uint64_t seed, uint64_t row, int count, uint32_t purpose, vreal *out) {
  const element_counter at = counter_of(seed, row, LANES, purpose);
  for (int first = 0; first < count; first += 4) {
    vword c[4];
    element_words(&at, (uint32_t)first / 4, c);
    for (int t = 0; t < 4 && first + t < count; ++t)
#if PM_REAL_BITS == 32
      out[first + t] = __builtin_convertvector((vint)(c[t] >> 8), vreal) * splat(0x1p-24f); /* pm_uniform_f32 */
#else
      for (int l = 0; l < LANES; ++l) out[first + t][l] = pm_uniform_f64(c[t][l], c[t][l + LANES]);
#endif
  }
}

/* U = u A, below A even where a subnormal product rounds up to it. */
PM_ALWAYS_INLINE vreal level_of(vreal u, vreal mass) {
  const vreal level = u * mass;
  return select_((vmask)(level < mass), level, splat(0));
}

/* The size of S: the smallest j whose cumulative mass exceeds u Z. */
PM_ALWAYS_INLINE vint draw_size(const block *k, const vreal *end, uint64_t seed, uint64_t row) {
  vint size = splat_bits(k->a);
  if (k->a == k->b) return size;
  vreal u, mass = splat(0);
  uniforms(seed, row, 1, PM_DRAW_SIZE, &u);
  const vreal level = u * k->total;
  vmask open = ~(vmask){0};
  for (int j = k->a; j <= k->b; ++j) {
    const vreal step = k->sizes[j] * end[j];
    size = int_select_(open & (vmask)(step > splat(0)), splat_bits(j), size);
    mass += step;
    open &= ~(vmask)(mass > level);
  }
  return size;
}

/* The uniforms by the member that they choose: `draws`[j - 1] for the one that leaves j - 1 to be chosen. They are
 * counted from the last member to the first, so which one that is depends on the size. */
PM_ALWAYS_INLINE void align_draws(const block *k, vint size) {
  const int b = k->b;
  for (int j = 0; j < b; ++j) k->draws[j] = k->top[b - 1 - j];
  for (int s = k->a > 1 ? k->a : 1; s < b; ++s)
    for (int j = 0; j < s; ++j) k->draws[j] = select_((vmask)(size == s), k->top[s - 1 - j], k->draws[j]);
}

/* Where the lanes stand on their way down the experts: j members are still to be chosen, among experts 1..n. */
typedef struct walk {
  vint left;    /* j */
  vreal level;  /* U = u A_n[j] */
  vreal depth;  /* powers of two taken out of A_n[j] */
  vint experts; /* n (normalised blocks) */
} walk;

/* Counts `step` where a state of this mass and depth is passed: where it is at most U, in the scale of the state. Those
 * behind the n-th expert exceed U; they are known by their depth where that would overflow. */
PM_ALWAYS_INLINE vint count_passed(vint count, bits step, vreal mass, vreal depth, const walk *at, int plain) {
  if (plain) return count_where_at_most(count, step, mass, at->level);
  const vreal room = at->depth - depth;
  return count_where_room(count, step, mass, scale_up(at->level, room), room);
}

/* A[j] of the lanes' states: 1 for j = 0 in plain blocks, whose table leaves it out. */
PM_ALWAYS_INLINE vreal mass_at(const vreal *table, vint state, int j, int plain) {
  return plain && j == 0 ? splat(1) : pick(table + j, state);
}

/* The lanes' members among the experts of one segment, last first, into `order`. `table` holds the states before expert
 * `begin` and after each of its `pairs` of experts. */
PM_ALWAYS_INLINE void choose_by_count(const block *k, const vreal *table, int64_t begin, int64_t pairs, walk *at,
                                      int plain) {
  const int64_t cells = k->b + 1, stride = pairs > 64 ? 4 : 1;
  const vreal *depth = k->depth + begin;
  for (int j = k->b; j > 0; --j) {
    const vreal *mass = table + j;
    /* The others have their next member before this segment. */
    const vmask here = (vmask)(at->left == j) & (vmask)count_passed((vint){0}, -1, mass[0], depth[0], at, plain);
    if (!any(here)) continue;
    vint passed = {0};
    for (int64_t n = stride; n < pairs; n += stride)
      passed = count_passed(passed, (bits)stride, mass[n * cells], depth[2 * n], at, plain);
    for (int64_t half = stride / 2; half > 0; half /= 2) {
      const vint middle = int_min_(passed + (bits)half, splat_bits((bits)pairs));
      const vreal taken = plain ? splat(0) : pick(depth, middle * 2);
      passed = count_passed(passed, (bits)half, pick(mass, middle * (bits)cells), taken, at, plain);
    }
    /* The member is one of this pair: the second, if the state between is passed as well. */
    passed = int_min_(passed, splat_bits((bits)pairs - 1)); /* of lanes that are not here */
    const vint first = passed * 2, state = passed * (bits)cells;
    const vreal w = pick(k->w + begin, first), q = plain ? splat(1) : pick(k->q + begin, first);
    const vreal before = mass_at(table, state, j, plain), below = mass_at(table, state, j - 1, plain);
    const vreal between = fma_(w, below, plain ? before : q * before);
    const vreal taken = plain ? splat(0) : pick(depth, first + 1);
    const vmask second = (vmask)count_passed((vint){0}, -1, between, taken, at, plain);
    const vint member = first - second;
    k->order[j - 1] = int_select_(here, member + (bits)begin, k->order[j - 1]);
    at->left += here;
    if (j > 1) {
      const vreal next = fma_(w, mass_at(table, state, j - 2, plain), plain ? below : q * below);
      at->level = select_(here, level_of(k->draws[j - 2], select_(second, next, below)), at->level);
      if (!plain) at->depth = select_(here, pick(depth, member), at->depth);
    }
  }
}

#define PM_MASS(i, j) table[((i) - begin) * cells + (j)][l] /* A_i[j] of lane l, i experts passed */

/* The same for one lane of a normalised block, expert by expert. */
static void choose_by_steps(const block *k, const vreal *table, int64_t begin, int l, walk *at) {
  const int64_t cells = k->b + 1;
  while (at->left[l] > 0) {
    const int64_t j = at->left[l];
    real level = at->level[l];
    int64_t i;
    for (i = at->experts[l] - 1; i >= begin; --i) {
      const real q = k->q[i][l], mass = PM_MASS(i, j);
      if (!(level < q * mass)) {
        if (k->w[i][l] * PM_MASS(i, j - 1) > 0) break;
        level = q * mass; /* an expert that cannot enter is passed over, whatever rounding said */
      }
      if (q == 1 && level < mass) continue;
      level = q > 0 ? level / q : 0;
      if (!(level < mass)) level = mass * (1 - PM_REAL_HALF_ULP);
    }
    at->level[l] = level;
    at->experts[l] = (bits)(i < begin ? begin : i);
    if (i < begin) return;
    k->order[j - 1][l] = (bits)i;
    at->left[l] = (bits)(j - 1);
    if (j > 1) {
      const real mass = PM_MASS(i, j - 1), next = k->draws[j - 2][l] * mass;
      at->level[l] = next < mass ? next : 0;
    }
  }
}
#undef PM_MASS

/* The table that draws are made from. */
PM_ALWAYS_INLINE states drawn_from(const block *k, int plain) { return plain || k->by_powers ? ALTERNATES : SINGLES; }

/* Draws S into `order`: [b] ascending, slots past |S| at E; 0, 1, 2, ... for poisoned rows. The rows' draws are counted
 * from `first`. Needs the last segment's table; overwrites `top`, and with several segments the table. */
PM_ALWAYS_INLINE void draw(block *k, const pm_job *job, uint64_t first, vmask wanted, int plain) {
  const int b = k->b;
  const states table = drawn_from(k, plain);
  const vreal *end = prefix_end(k, table);
  const vmask drawable = ~k->poison & (vmask)(k->total > splat(0));
  const vint size = int_select_(drawable, draw_size(k, end, job->seed, first), splat_bits(b));
  uniforms(job->seed, first, b, PM_DRAW_ITEM, k->top);
  align_draws(k, size);
  walk at = {.left = size & drawable & wanted, .experts = splat_bits((bits)k->E)};
  vreal mass = end[b], u = k->draws[b > 0 ? b - 1 : 0];
  for (int s = k->a > 1 ? k->a : 1; s < b; ++s) {
    mass = select_((vmask)(size == s), end[s], mass);
    u = select_((vmask)(size == s), k->draws[s - 1], u);
  }
  at.level = level_of(u, mass);
  at.depth = plain ? splat(0) : k->depth[k->E];
  for (int j = 0; j < b; ++j) k->order[j] = int_select_((vmask)(size > j), splat_bits(j), splat_bits((bits)k->E));
  for (int64_t s = k->segments - 1; s >= 0; --s) {
    const int64_t begin = s * k->segment, stop = s + 1 == k->segments ? k->E : begin + k->segment;
    prefix_segment(k, s, plain, table);
    if (table == ALTERNATES)
      choose_by_count(k, k->table, begin, states_of(stop - begin, ALTERNATES), &at, plain);
    else
      for (int l = 0; l < LANES; ++l) choose_by_steps(k, k->table, begin, l, &at);
  }
}

PM_ALWAYS_INLINE void sample_body(const pm_job *job, block *k, int64_t row, int64_t rows, vmask wanted, int plain) {
  (void)rows;
  for (int64_t n = 0; n < job->samples; ++n) {
    if (n == 0)
      prefix_all(k, plain, drawn_from(k, plain));
    else if (k->segments > 1)
      compute_segment(k, k->segments - 1, plain, drawn_from(k, plain));
    const int64_t number = n * job->sample_stride + row;
    draw(k, job, (uint64_t)(job->shape.first_row + number), wanted, plain);
    store_indices(k->order, lanes_of(wanted), number, k->b, job->out_indices);
  }
}

PM_ROW_KERNEL(sample, SINGLES, 1)

#endif
