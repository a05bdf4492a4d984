// Advantages of several replies to one prompt against each other: GRPO, Dr. GRPO, RLOO.
//
//   A_i = k (r_i - mean) / (std + eps)     mean over the group; std of the group or of the batch, unbiased, or no division
//   k = 1, or G / (G - 1) to leave i out of its own baseline: r_i - sum_{j != i} r_j / (G - 1) = G / (G - 1) (r_i - mean)
//
// With s = 1 / (std + eps), upstream g and D = sum_j g_j (r_j - mean_j) over what the std is taken of, n rewards around `center`:
//   dL/dr_i = k s (g_i - mean of g) - k s^2 D (r_i - center) / (std (n - 1)),   the second term 0 where std is 0, as torch has it
//
// Sums are taken of d = r - (the first reward): equal rewards give exactly 0, and in one pass. As sum d^2 - (sum d)^2 / n is at
// least 1 / (n + 1) of sum d^2, the difference costs at most that factor of a double's precision.
#pragma once

#include "loops.h"

namespace rlhf_fast::RLHF_UNIT {

enum GroupScale : int { kGroupStd = 0, kNoScale = 1, kBatchStd = 2 };

struct GroupOptions {
  int64_t size;
  int scale;
  double stretch, eps;  // stretch: the k above

  HOST_DEVICE double factor(double std) const {
    const double divisor = std + eps;
    return scale == kNoScale ? stretch : divisor == 0 ? 0.0 : stretch / divisor;
  }
  // k s^2 D / (std (n - 1)), with k s = factor(std)
  HOST_DEVICE double pull(double std, double dot, int64_t n) const {
    return scale == kNoScale || std == 0 ? 0.0 : factor(std) * dot / ((std + eps) * std * static_cast<double>(n - 1));
  }
};

struct Moments {  // of a group, or of the batch
  double mean, std;  // mean: relative to the first reward
  double factor;     // k s, of a group
};

// What is done to a group is a reduction, R::terms as in loops.h, then R::state of its total, then R::write of each reward.

template <class A>
struct MomentsOf {
  static constexpr int kTerms = 2;
  HOST_DEVICE static constexpr Fold fold(int) { return Fold::kSum; }

  const A* rewards;
  Moments* states;  // [rows]
  int64_t size;     // rewards a row

  HOST_DEVICE double from_first(int64_t row, int64_t i) const { return static_cast<double>(rewards[i]) - rewards[row * size]; }

  HOST_DEVICE void terms(int64_t row, int64_t i, double, double* t) const {
    const double d = from_first(row, i);
    t[0] = d;
    t[1] = d * d;
  }
  HOST_DEVICE Moments state(int64_t, const Terms<MomentsOf>& t) const {
    const double mean = t.at[0] / static_cast<double>(size);
    const double variance = (t.at[1] - t.at[0] * mean) / static_cast<double>(size - 1);
    return {mean, variance < 0 ? 0.0 : sqrt(variance), 0.0};
  }
};

template <class A>
struct GroupForward {
  static constexpr int kTerms = MomentsOf<A>::kTerms;
  HOST_DEVICE static constexpr Fold fold(int k) { return MomentsOf<A>::fold(k); }

  MomentsOf<A> moments;
  Moments* states;       // [groups]
  const Moments* batch;  // read where the scale is the batch's
  A* advantages;
  GroupOptions options;

  HOST_DEVICE void terms(int64_t row, int64_t i, double weight, double* t) const { moments.terms(row, i, weight, t); }
  HOST_DEVICE Moments state(int64_t row, const Terms<GroupForward>& t) const {
    Moments m = moments.state(row, {{t.at[0], t.at[1]}});
    m.factor = options.factor(options.scale == kBatchStd ? batch->std : m.std);
    return m;
  }
  HOST_DEVICE void write(int64_t row, int64_t i, const Moments& m) const {
    advantages[i] = static_cast<A>(m.factor * (moments.from_first(row, i) - m.mean));
  }
};

struct GroupUpstream {
  double mean, pull;  // mean of g, and the factor of r_i - center
};

template <class A>
struct GroupBackward {  // -> sum g, sum g (r - mean)
  static constexpr int kTerms = 2;
  HOST_DEVICE static constexpr Fold fold(int) { return Fold::kSum; }

  const A *grad, *rewards;
  const Moments *moments, *batch;
  const double* batch_dot;
  GroupUpstream* states;
  A* grad_rewards;
  int64_t batch_size;
  GroupOptions options;

  HOST_DEVICE double deviation(int64_t row, int64_t i) const {
    return static_cast<double>(rewards[i]) - rewards[row * options.size] - moments[row].mean;
  }
  HOST_DEVICE void terms(int64_t row, int64_t i, double, double* t) const {
    t[0] = grad[i];
    t[1] = grad[i] * deviation(row, i);
  }
  HOST_DEVICE GroupUpstream state(int64_t row, const Terms<GroupBackward>& t) const {
    const double mean = t.at[0] / static_cast<double>(options.size);
    if (options.scale == kBatchStd) return {mean, options.pull(batch->std, *batch_dot, batch_size)};
    return {mean, options.pull(moments[row].std, t.at[1], options.size)};
  }
  HOST_DEVICE void write(int64_t row, int64_t i, const GroupUpstream& up) const {
    const double around = options.scale == kBatchStd ? static_cast<double>(rewards[i]) - rewards[0] - batch->mean : deviation(row, i);
    const double through_std = up.pull != 0 ? up.pull * around : 0.0;
    grad_rewards[i] = static_cast<A>(moments[row].factor * (grad[i] - up.mean) - through_std);
  }
};

template <class A>
struct BatchDot {  // -> sum over the batch of g (r - its group's mean)
  static constexpr int kTerms = 1;
  HOST_DEVICE static constexpr Fold fold(int) { return Fold::kSum; }
  GroupBackward<A> group;
  double* states;  // [1]
  HOST_DEVICE void terms(int64_t, int64_t i, double, double* t) const {
    t[0] = group.grad[i] * group.deviation(i / group.options.size, i);
  }
  HOST_DEVICE double state(int64_t, const Terms<BatchDot>& t) const { return t.at[0]; }
};

// ---------------------------------------------------------------------------------------------------------------------
// Rows of any number and length, on either device.

template <class R>
struct StatesFinish {
  R r;
  const double* partial;
  Rows rows;
  template <class Team>
  HOST_DEVICE void operator()(const Team& team) const {
    for (int64_t row = team.rank; row < rows.rows; row += team.size) r.states[row] = r.state(row, row_terms<R>(partial, rows, row));
  }
};

template <class R>
struct StatesWrite {
  R r;
  HOST_DEVICE void operator()(int64_t row, int64_t i, double) const { r.write(row, i, r.states[row]); }
};

template <class R>
void reduce_states(const Tensor& on, const Rows& rows, const R& r) {
  const Tensor partial = partial_terms(on, rows, R::kTerms);
  reduce_rows(on, rows, Mask{}, r, out<double>(partial));
  run_team(on, StatesFinish<R>{r, in<double>(partial), rows});
}

// A row by one team, which keeps it in cache and its state in registers.
template <class R, class Team>
HOST_DEVICE void row_by_team(const R& r, const Team& team, int64_t row, int64_t length) {
  Terms<R> mine = Terms<R>::start();
  for (int64_t i = row * length + team.rank; i < (row + 1) * length; i += team.size) {
    Terms<R> next;
    r.terms(row, i, 1.0, next.at);
    merge(mine, next);
  }
  const auto state = r.state(row, team.merge_all(mine));
  if (team.rank == 0) r.states[row] = state;
  for (int64_t i = row * length + team.rank; i < (row + 1) * length; i += team.size) r.write(row, i, state);
}

#if !defined(RLHF_DEVICE_CODE)

template <class R>
CPU_CLONES void solo_row(const R& r, int64_t row, int64_t length) {
  row_by_team(r, SoloTeam{}, row, length);
}

template <class R>
void rows_by_team(const Tensor&, int64_t rows, int64_t length, const R& r) {
  parallel_for(rows, length, [&](int64_t row) { solo_row(r, row, length); });
}

#else

constexpr int kRowsOfBlock = 8;  // a warp each

struct WarpTeam {
  int rank, warp;
  static constexpr int size = kWarp;
  template <class State>
  __device__ State merge_all(const State& state) const {  // to every thread of the warp; the whole block must come here
    __shared__ State totals[kRowsOfBlock];
    const State merged = block_merge<kWarp>(state);
    if (rank == 0) totals[warp] = merged;
    __syncthreads();
    return totals[warp];
  }
};

template <class R>
__global__ void __launch_bounds__(kWarp * kRowsOfBlock, 2) rows_by_team_kernel(R r, int64_t rows, int64_t length) {
  const WarpTeam team{static_cast<int>(threadIdx.x % kWarp), static_cast<int>(threadIdx.x / kWarp)};
  // A warp without a row does the last one again, for the barrier's sake: the same values to the same places.
  const int64_t row = blockIdx.x * int64_t(kRowsOfBlock) + team.warp;
  row_by_team(r, team, row < rows ? row : rows - 1, length);
}

template <class R>
void rows_by_team(const Tensor& on, int64_t rows, int64_t length, const R& r) {
  launch(on, rows_by_team_kernel<R>, ceil_div(rows, kRowsOfBlock), kWarp * kRowsOfBlock, r, rows, length);
}

#endif

template <class R>
void for_groups(const Tensor& on, int64_t groups, int64_t size, const R& r) {
  if (groups == 0) return;
  if (size <= kChunk) return rows_by_team(on, groups, size, r);
  reduce_states(on, padded_rows(groups, size), r);
  for_each(on, padded_rows(groups, size), Mask{}, StatesWrite<R>{r});
}

// ---------------------------------------------------------------------------------------------------------------------

inline GroupOptions group_options(const char* op, const Tensor& rewards, int64_t size, int64_t scale, bool leave_one_out, double eps) {
  CHECK_VALUE(rewards.dim() == 1, op, ": `rewards` must be [B], got shape ", shape_of(rewards));
  CHECK_VALUE(size >= 2, op, ": `group_size` must be at least 2, got ", size);
  CHECK_VALUE(rewards.size(0) % size == 0, op, ": `rewards` must hold a multiple of `group_size`, ", size, ", got ", rewards.size(0), " values");
  CHECK_VALUE(scale >= kGroupStd && scale <= kBatchStd, op, ": unknown `scale` code ", scale);
  return {size, static_cast<int>(scale), leave_one_out ? static_cast<double>(size) / static_cast<double>(size - 1) : 1.0, eps};
}

constexpr int64_t kMoments = sizeof(Moments) / sizeof(double);

inline int64_t moment_rows(int64_t groups, int64_t scale) { return groups + (scale == kBatchStd ? 1 : 0); }

// -> advantages [B], and the moments of every group and, last and where its std is used, of the batch
inline std::tuple<Tensor, Tensor> group_advantages(Tensor rewards_, int64_t group_size, int64_t scale, bool leave_one_out, double eps) {
  const char* op = "group_advantages";
  const GroupOptions options = group_options(op, rewards_, group_size, scale, leave_one_out, eps);
  const Tensor rewards = dense(rewards_);
  const int64_t n = rewards.size(0), groups = n / group_size;
  Tensor advantages = empty(rewards, {n});
  Tensor moments = empty(rewards, {moment_rows(groups, scale), kMoments}, ScalarType::Double);
  auto* states = reinterpret_cast<Moments*>(out<double>(moments));
  for_real(rewards.scalar_type(), op, "rewards", [&](auto zero) {
    using A = decltype(zero);
    if (scale == kBatchStd) reduce_states(rewards, padded_rows(1, n), MomentsOf<A>{in<A>(rewards), states + groups, n});
    for_groups(rewards, groups, group_size,
               GroupForward<A>{{in<A>(rewards), states, group_size}, states, states + groups, out<A>(advantages), options});
  });
  return {advantages, moments};
}

inline Tensor group_advantages_backward(Tensor grad_, Tensor rewards_, Tensor moments, int64_t group_size, int64_t scale, bool leave_one_out,
                                        double eps) {
  const char* op = "group_advantages";
  const GroupOptions options = group_options(op, rewards_, group_size, scale, leave_one_out, eps);
  check_twin(op, "grad", grad_, "rewards", rewards_);
  const Tensor grad = dense(grad_), rewards = dense(rewards_);
  const int64_t n = rewards.size(0), groups = n / group_size;
  CHECK_VALUE(moments.dim() == 2 && moments.size(0) == moment_rows(groups, scale) && moments.size(1) == kMoments && moments.is_contiguous() &&
                  moments.scalar_type() == ScalarType::Double,
              op, ": `moments` is not what the forward pass returned");
  check_same_device(op, "moments", moments, "rewards", rewards);
  Tensor grad_rewards = empty(rewards, {n});
  const Tensor upstream = empty(rewards, {groups + 1, 2}, ScalarType::Double);  // of every group; last, the batch's dot product
  const auto* states = reinterpret_cast<const Moments*>(in<double>(moments));
  auto* ups = reinterpret_cast<GroupUpstream*>(out<double>(upstream));
  double* dot = out<double>(upstream) + 2 * groups;
  for_real(rewards.scalar_type(), op, "rewards", [&](auto zero) {
    using A = decltype(zero);
    const GroupBackward<A> group{in<A>(grad), in<A>(rewards), states, states + groups, dot, ups, out<A>(grad_rewards), n, options};
    if (scale == kBatchStd) reduce_states(rewards, padded_rows(1, n), BatchDot<A>{group, dot});
    for_groups(rewards, groups, group_size, group);
  });
  return grad_rewards;
}

}  // namespace rlhf_fast::RLHF_UNIT
