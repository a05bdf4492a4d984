// Generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438, eq. 16), backwards over the tokens of a row:
//
//   delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}        returns_t = A_t + V_t
//   A_T = 0, V_T = bootstrap (0 by default)
//
// A token off the mask (weight m = 0) is passed over, in one of the two ways peers do it:
//   carry   A and V_{t+1} reach the next kept token unchanged (verl, NeMo-RL, AReaL); m mixes the old and the new state
//   decay   its reward and value count as 0 and A decays through it (OpenRLHF)
// Outputs are 0 there. With returns_lam the returns use a second recursion of their own lambda (VAPO, arXiv 2504.05118).
//
// The CPU walks each row. On CUDA one token is an affine map of the state (V_{t+1}, A_{t+1}), maps compose, and a block
// scans them: a thread takes a few tokens, a warp scans its threads, warps follow each other from the right. Where a token
// stands in its row decides all of that, so that padding or packing does not change the bits.
// Bytes a token in float32: 8 + mask read, 8 written, the minimum; packed rows are written twice, first with zeros.
#pragma once

#include "loops.h"

namespace rlhf_fast::RLHF_UNIT {

struct GaeOptions {
  double gamma, lam, returns_lam;
  const double *lam_rows, *returns_lam_rows;  // a value a row, or null
  bool decay;

  HOST_DEVICE GaeOptions of_row(int64_t row) const {
    GaeOptions o = *this;
    if (lam_rows) o.lam = lam_rows[row];
    if (returns_lam_rows) o.returns_lam = returns_lam_rows[row];
    return o;
  }
};

struct GaeState {
  double next_value, advantage, returns_advantage;
};

// The state before token t, from the state after it. Reward and value of a token without weight are not looked at: they may
// be anything, NaN included.
HOST_DEVICE GaeState gae_step(const GaeState& s, double reward, double value, double m, const GaeOptions& o) {
  if (m == 0 && !o.decay) return s;
  if (o.decay) {
    reward = m == 0 ? 0.0 : m * reward;
    value = m == 0 ? 0.0 : m * value;
  }
  const double delta = reward + o.gamma * s.next_value - value;
  const GaeState next{value, delta + o.gamma * o.lam * s.advantage, delta + o.gamma * o.returns_lam * s.returns_advantage};
  if (o.decay || m == 1) return next;
  return {m * next.next_value + (1 - m) * s.next_value, m * next.advantage + (1 - m) * s.advantage,
          m * next.returns_advantage + (1 - m) * s.returns_advantage};
}

template <class A>
struct GaeArrays {
  const A *rewards, *values;  // [B, T] or [N]
  Mask mask;
  const A* bootstrap;  // [rows] or null
  A *advantages, *returns;

  HOST_DEVICE GaeState start(int64_t row) const { return {bootstrap ? static_cast<double>(bootstrap[row]) : 0.0, 0.0, 0.0}; }
  HOST_DEVICE A advantage_of(const GaeState& s, double m) const { return static_cast<A>(m != 0 ? m * s.advantage : 0.0); }
  HOST_DEVICE A return_of(const GaeState& s, double value, double m) const {
    return static_cast<A>(m != 0 ? m * (s.returns_advantage + value) : 0.0);
  }
};

// d loss / d (rewards, values, bootstrap) of one row: the adjoint of gae_step, forwards over the tokens.
template <class A>
HOST_DEVICE void gae_row_backward(const A* grad_advantages, const A* grad_returns, const Mask& mask, A* grad_rewards, A* grad_values,
                                  A* grad_bootstrap, int64_t row, int64_t begin, int64_t end, const GaeOptions& o) {
  double by_value = 0, by_advantage = 0, by_returns = 0;  // of the state before the token
  for (int64_t t = begin; t < end; ++t) {
    const double m = mask[t];
    const double keep = o.decay ? 0.0 : 1.0 - m;     // share of the state that passes the token by
    const double use = o.decay ? 1.0 : m;            // share that goes through delta
    if (m != 0) {
      by_advantage += m * grad_advantages[t];
      by_returns += m * grad_returns[t];
    }
    const double by_delta = by_advantage + by_returns;
    grad_rewards[t] = static_cast<A>(m * by_delta);
    grad_values[t] = static_cast<A>(m != 0 ? m * (by_value - by_delta) + m * grad_returns[t] : 0.0);
    by_value = keep * by_value + use * o.gamma * by_delta;
    by_advantage *= keep + use * o.gamma * o.lam;
    by_returns *= keep + use * o.gamma * o.returns_lam;
  }
  if (grad_bootstrap) grad_bootstrap[row] = static_cast<A>(by_value);
}

// ---------------------------------------------------------------------------------------------------------------------

struct GaeCall {
  Tensor rewards, values;
  OptionalTensor mask, bootstrap, lam, returns_lam, offsets;
  Rows rows;
  GaeOptions options;
};

inline GaeCall gae_call(Tensor rewards, Tensor values, OptionalTensor mask, OptionalTensor bootstrap, OptionalTensor lam_rows,
                        OptionalTensor returns_lam_rows, OptionalTensor cu_seqlens, double gamma, double lam, double returns_lam, bool decay) {
  const char* op = "gae";
  const OptionalTensor offsets = contiguous_offsets(op, cu_seqlens, "rewards", rewards);
  check_twin(op, "values", values, "rewards", rewards);
  GaeCall call{dense(rewards), dense(values), contiguous_mask(op, mask, "rewards", rewards)};
  call.offsets = offsets;
  call.rows = rows_view(op, rewards, offsets);
  const int64_t rows = call.rows.rows;
  auto take_rows = [&](const OptionalTensor& t, const char* name, ScalarType type, OptionalTensor& into) {
    if (!t.has_value()) return;
    CHECK_VALUE(t->dim() == 1 && t->size(0) == rows, op, ": `", name, "` must hold one value a sequence, [", rows, "], got shape ", shape_of(*t));
    check_same_device(op, name, *t, "rewards", rewards);
    CHECK_TYPE(t->scalar_type() == type, op, ": `", name, "` must be ", torch::headeronly::toString(type), " here, got ",
               torch::headeronly::toString(t->scalar_type()));
    into = dense(*t);
  };
  take_rows(bootstrap, "bootstrap", rewards.scalar_type(), call.bootstrap);
  take_rows(lam_rows, "lam", ScalarType::Double, call.lam);
  take_rows(returns_lam_rows, "returns_lam", ScalarType::Double, call.returns_lam);
  call.options = {gamma, lam, returns_lam, call.lam ? in<double>(*call.lam) : nullptr, call.returns_lam ? in<double>(*call.returns_lam) : nullptr, decay};
  return call;
}

template <class A>
GaeArrays<A> gae_arrays(const GaeCall& call, const Tensor& advantages, const Tensor& returns) {
  return {in<A>(call.rewards), in<A>(call.values), mask_view("gae", call.mask), call.bootstrap ? in<A>(*call.bootstrap) : nullptr,
          out<A>(advantages), out<A>(returns)};
}

#if !defined(RLHF_DEVICE_CODE)

// The recursion A_t = factor_t A_{t+1} + term_t over a block of tokens. A step waits for the one before, so four runs of tokens
// go side by side, each from 0; then what stands right of a run comes in through the product of the run's factors.
constexpr int kRun = 64, kRuns = 4;
constexpr int64_t kGaeBlock = kRun * kRuns;

struct GaeFactors {
  double constant;
  double powers[kRun];  // constant^64 ... constant^1
  HOST_DEVICE explicit GaeFactors(double c) : constant(c) {
    for (double product = c, *at = powers + kRun; at != powers; product *= c) *--at = product;
  }
};

// factor: one a token where kVaries, else unused. Writes A over the terms and returns the first.
template <bool kVaries>
HOST_DEVICE double scan_block(double* term, const double* factor, const GaeFactors& factors, int64_t n, double after) {
  alignas(64) double products[kGaeBlock];
  auto step = [&](int64_t t, double& advantage, double& product) ALWAYS_INLINE {
    const double f = kVaries ? factor[t] : factors.constant;
    advantage = f * advantage + term[t];
    term[t] = advantage;
    if (kVaries) products[t] = product *= f;
  };
  if (n == kGaeBlock) {
    double a[kRuns] = {0, 0, 0, 0}, p[kRuns] = {1, 1, 1, 1};
    for (int j = kRun - 1; j >= 0; --j)
      for_constants<kRuns>([&](auto r) ALWAYS_INLINE { step(r * kRun + j, a[r], p[r]); });
  } else {
    for (int64_t run = 0; run < n; run += kRun) {
      double a = 0, p = 1;
      for (int64_t t = (run + kRun < n ? run + kRun : n) - 1; t >= run; --t) step(t, a, p);
    }
  }
  for (int64_t run = (n - 1) / kRun * kRun; run >= 0; run -= kRun) {
    const int64_t length = n - run < kRun ? n - run : kRun;
    const double* product = kVaries ? products + run : factors.powers + (kRun - length);
    double* a = term + run;
#pragma omp simd
    for (int64_t t = 0; t < length; ++t) a[t] += product[t] * after;
    after = a[0];
  }
  return after;
}

inline void check_lambdas(const char* name, const OptionalTensor& lam) {
  if (!lam.has_value()) return;
  const double* rows = in<double>(*lam);
  for (int64_t b = 0; b < lam->size(0); ++b)
    CHECK_VALUE(rows[b] >= 0 && rows[b] <= 1, "gae: `", name, "` holds ", rows[b], " at position ", b, "; it must be in [0, 1]");
}

// Up to kGaeBlock tokens from `first` on; `state` is that right of them before, and left of them after. The same numbers as
// gae_step token by token, but for the order of the sums.
template <class A>
HOST_DEVICE void gae_block(const GaeArrays<A>& arrays, int64_t first, int64_t n, const GaeOptions& o, const GaeFactors& by_lam,
                           const GaeFactors* by_returns_lam, GaeState& state) {
  alignas(64) double weight[kGaeBlock], held[kGaeBlock + 1], advantage[kGaeBlock], returns[kGaeBlock], factor[kGaeBlock];
  const A *rewards = arrays.rewards + first, *values = arrays.values + first;
  A *advantages_out = arrays.advantages + first, *returns_out = arrays.returns + first;
  constexpr int64_t kLine = 64 / sizeof(A);
  for (int64_t t = 0; t < n; t += kLine)  // what comes next lies to the left
    for (const A* numbers : {rewards, values, static_cast<const A*>(advantages_out), static_cast<const A*>(returns_out)})
      prefetch_ahead_of(numbers + t, -kPage);
  bool all = true, none = false, binary = true;
  if (arrays.mask.kind != Mask::kNone) {
    weights_of(arrays.mask, first, n, weight);
    int64_t ones = 0, zeros = 0;
#pragma omp simd reduction(+ : ones, zeros)
    for (int64_t t = 0; t < n; ++t) {
      ones += weight[t] == 1;
      zeros += weight[t] == 0;
    }
    all = ones == n;
    none = zeros == n;
    binary = ones + zeros == n;
  }
  if (none && !o.decay) {
    for (int64_t t = 0; t < n; ++t) advantages_out[t] = returns_out[t] = 0;
    return;
  }

  // held[t]: V_{t+1} as token t sees it, in held[t + 1] while it is made.
  held[n] = state.next_value;
  if (all) {
#pragma omp simd
    for (int64_t t = 0; t < n; ++t) held[t] = values[t];
  } else if (o.decay) {
#pragma omp simd
    for (int64_t t = 0; t < n; ++t) held[t] = weight[t] != 0 ? weight[t] * values[t] : 0.0;
  } else if (binary) {
    // By bits: a branch would be mispredicted at every gap.
    alignas(64) uint64_t passed[kGaeBlock], taken[kGaeBlock];
#pragma omp simd
    for (int64_t t = 0; t < n; ++t) {
      passed[t] = weight[t] != 0 ? 0 : ~uint64_t(0);
      taken[t] = bit_cast<uint64_t>(static_cast<double>(values[t])) & ~passed[t];
    }
    uint64_t value = bit_cast<uint64_t>(state.next_value);
    for (int64_t t = n - 1; t >= 0; --t) held[t] = bit_cast<double>(value = taken[t] | (value & passed[t]));
  } else {
    double value = state.next_value;
    for (int64_t t = n - 1; t >= 0; --t) {
      const double m = weight[t];
      held[t] = value = m == 0 ? value : m == 1 ? static_cast<double>(values[t]) : m * values[t] + (1 - m) * value;
    }
  }
  state.next_value = held[0];

  const bool varies = !all && !o.decay;  // factors then differ from token to token
  if (all) {
#pragma omp simd
    for (int64_t t = 0; t < n; ++t) advantage[t] = rewards[t] + o.gamma * held[t + 1] - values[t];
  } else if (o.decay) {
#pragma omp simd
    for (int64_t t = 0; t < n; ++t)
      advantage[t] = (weight[t] != 0 ? weight[t] * rewards[t] : 0.0) + o.gamma * held[t + 1] - held[t];
  } else {
#pragma omp simd
    for (int64_t t = 0; t < n; ++t)
      advantage[t] = weight[t] != 0 ? weight[t] * (rewards[t] + o.gamma * held[t + 1] - values[t]) : 0.0;
  }
  auto scan = [&](double* terms, const GaeFactors& factors, double after) ALWAYS_INLINE {
    if (!varies) return scan_block<false>(terms, nullptr, factors, n, after);
    for (int64_t t = 0; t < n; ++t) factor[t] = weight[t] * factors.constant + (1 - weight[t]);
    return scan_block<true>(terms, factor, factors, n, after);
  };
  const double* for_returns = advantage;
  if (by_returns_lam) {
    memcpy(returns, advantage, sizeof(double) * n);
    state.returns_advantage = scan(returns, *by_returns_lam, state.returns_advantage);
    for_returns = returns;
  }
  state.advantage = scan(advantage, by_lam, state.advantage);

  if (all) {
#pragma omp simd
    for (int64_t t = 0; t < n; ++t) {
      advantages_out[t] = static_cast<A>(advantage[t]);
      returns_out[t] = static_cast<A>(for_returns[t] + values[t]);
    }
  } else {
#pragma omp simd
    for (int64_t t = 0; t < n; ++t) {
      const double m = weight[t];
      advantages_out[t] = static_cast<A>(m != 0 ? m * advantage[t] : 0.0);
      returns_out[t] = static_cast<A>(m != 0 ? m * (for_returns[t] + values[t]) : 0.0);
    }
  }
}

// Blocks are counted from the start of the row, so that padding on its right changes no bit.
template <class A>
CPU_CLONES void gae_row(const GaeArrays<A>& a, int64_t row, int64_t begin, int64_t end, const GaeOptions& o) {
  const GaeFactors by_lam(o.gamma * o.lam), by_returns_lam(o.gamma * o.returns_lam);
  GaeState state = a.start(row);
  for (int64_t first = begin + (end - begin - 1) / kGaeBlock * kGaeBlock; begin < end && first >= begin; first -= kGaeBlock)
    gae_block(a, first, end - first < kGaeBlock ? end - first : kGaeBlock, o, by_lam, o.lam == o.returns_lam ? nullptr : &by_returns_lam, state);
}

template <class F>
void for_gae_rows(const GaeCall& call, const F& f) {
  const Rows& rows = call.rows;
  const int64_t each = rows.rows > 0 ? rows.tokens / rows.rows : 0;
  parallel_for(rows.rows, each, [&](int64_t row) { f(row, rows.begin(row), rows.end(row), call.options.of_row(row)); });
}

#else

constexpr int kGaeThreads = 256;

// The effect of a run of tokens on the state to their right. With one lambda for advantages and returns, the second of the
// lambda maps would be the first.
template <int kLambdas>
struct GaeMap {
  struct Lambda {
    double by_itself, by_value, plus;  // A' = by_itself A + by_value V + plus
  };
  double value_by_value, value;  // V' = value_by_value V + value
  Lambda lambda[kLambdas];     // of the advantages, of the returns

  __device__ static GaeMap identity() {
    GaeMap map{1, 0, {}};
    UNROLL
    for (int l = 0; l < kLambdas; ++l) map.lambda[l] = {1, 0, 0};
    return map;
  }

  // The map of the token to the left and this one: gae_step, of a state that is still unknown.
  __device__ GaeMap before(double reward, double value_, double m, const GaeOptions& o) const {
    if (m == 0 && !o.decay) return *this;
    const double r = !o.decay ? reward : m == 0 ? 0.0 : m * reward, v = !o.decay ? value_ : m == 0 ? 0.0 : m * value_;
    const double delta = r + o.gamma * value - v;
    GaeMap next{0, v, {}};
    UNROLL
    for (int l = 0; l < kLambdas; ++l) {
      const double decay = o.gamma * (l == 0 ? o.lam : o.returns_lam);
      next.lambda[l] = {decay * lambda[l].by_itself, decay * lambda[l].by_value + o.gamma * value_by_value, decay * lambda[l].plus + delta};
    }
    if (o.decay || m == 1) return next;
    auto mix = [&](double& to, double from) { to = m * to + (1 - m) * from; };
    mix(next.value_by_value, value_by_value);
    mix(next.value, value);
    UNROLL
    for (int l = 0; l < kLambdas; ++l) {
      mix(next.lambda[l].by_itself, lambda[l].by_itself);
      mix(next.lambda[l].by_value, lambda[l].by_value);
      mix(next.lambda[l].plus, lambda[l].plus);
    }
    return next;
  }

  __device__ GaeState operator()(const GaeState& s) const {
    auto apply = [&](const Lambda& by, double advantage) { return by.by_itself * advantage + by.by_value * s.next_value + by.plus; };
    const double advantage = apply(lambda[0], s.advantage);
    return {value_by_value * s.next_value + value, advantage,
            kLambdas == 1 ? advantage : apply(lambda[kLambdas - 1], s.returns_advantage)};
  }
};

// left(right(state))
template <int kLambdas>
__device__ GaeMap<kLambdas> compose(const GaeMap<kLambdas>& left, const GaeMap<kLambdas>& right) {
  GaeMap<kLambdas> map{left.value_by_value * right.value_by_value, left.value_by_value * right.value + left.value, {}};
  UNROLL
  for (int i = 0; i < kLambdas; ++i) {
    const auto &l = left.lambda[i], &r = right.lambda[i];
    map.lambda[i] = {l.by_itself * r.by_itself, l.by_itself * r.by_value + l.by_value * right.value_by_value,
                     l.by_itself * r.plus + l.by_value * right.value + l.plus};
  }
  return map;
}

// The weights of `left` tokens from `at` on, 0 after them.
template <int kCount>
__device__ void read_weights(const Mask& mask, int64_t at, int left, double (&m)[kCount]) {
  auto each = [&](auto weight) {
    UNROLL
    for (int k = 0; k < kCount; ++k) m[k] = k < left ? weight(at + k) : 0.0;
  };
  if (mask.kind == Mask::kNone) return each([](int64_t) { return 1.0; });
  if (mask.kind == Mask::kByte) return each([&](int64_t i) { return mask.at<uint8_t>(i) != 0 ? 1.0 : 0.0; });
  if (mask.kind == Mask::kLong) return each([&](int64_t i) { return mask.at<int64_t>(i) != 0 ? 1.0 : 0.0; });
  each([](int64_t) { return 0.0; });
  ROLL
  for (int k = 0; k < left && k < kCount; ++k) {  // one copy of the switch
    const double weight = mask[at + k];
    UNROLL
    for (int j = 0; j < kCount; ++j) m[j] = j == k ? weight : m[j];
  }
}

// One block a row, in tiles from the right. By count (bench/machine_code.py, sm_90, float32): at most 149 instructions a token
// with every weight a fraction, less with weights of 0 and 1; 39 of them at most in double. A multiprocessor's share of an
// H200's bandwidth is 1.1 tokens a clock, or 117 instructions and 58 in double: near both bounds. Where a multiprocessor does 2
// double operations a clock (8.6, 8.9, 12.0) those are the bound.
template <int kThreads, int kLambdas, class A>
__global__ void __launch_bounds__(kThreads, kGaeThreads / kThreads * (kLambdas == 1 ? 2 : 1))
    gae_kernel(GaeArrays<A> a, Rows rows, GaeOptions options) {
  constexpr int kTokens = 2 * kPack<A>, kWarps = kThreads / kWarp;
  constexpr int64_t kTile = int64_t(kThreads) * kTokens;
  using Map = GaeMap<kLambdas>;
  __shared__ Map warp_maps[kWarps];
  __shared__ GaeState right_of_warp[kWarps], carried;  // carried: right of the tile; thread 0's alone
  const int64_t row = blockIdx.x, begin = rows.begin(row), length = rows.end(row) - begin;
  GaeOptions o = options.of_row(row);
  if constexpr (kLambdas == 1) o.returns_lam = o.lam;  // said again where the compiler sees it
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const RowReader<A> rewards(a.rewards + begin, length), values(a.values + begin, length);
  if (threadIdx.x == 0) carried = a.start(row);
  for (int tile = static_cast<int>((length + kTile - 1) / kTile) - 1; tile >= 0; --tile) {
    const int64_t first = tile * kTile + int64_t(threadIdx.x) * kTokens;
    const int left = length - first < kTokens ? static_cast<int>(length - first) : kTokens;  // tokens of this thread, if positive
    Granule r[2], v[2];
    rewards.load(static_cast<int>(first / kPack<A>), 1, A(0), r);
    values.load(static_cast<int>(first / kPack<A>), 1, A(0), v);
    auto reward = [&](int k) -> double { return element<A>(r[k / kPack<A>], k % kPack<A>); };
    auto value = [&](int k) -> double { return element<A>(v[k / kPack<A>], k % kPack<A>); };
    double m[kTokens];
    read_weights(a.mask, begin + first, left, m);
    Map map = Map::identity();
    UNROLL
    for (int k = kTokens - 1; k >= 0; --k)
      if (k < left) map = map.before(reward(k), value(k), m[k], o);
    UNROLL
    for (int delta = 1; delta < kWarp; delta *= 2) {  // map becomes that of this thread and all to its right in the warp
      const Map right = shuffle_down(map, delta);
      if (lane + delta < kWarp) map = compose(map, right);
    }
    Map to_the_right = shuffle_down(map, 1);
    if (lane == kWarp - 1) to_the_right = Map::identity();
    if (lane == 0) warp_maps[warp] = map;
    __syncthreads();
    if (threadIdx.x == 0) {
      GaeState state = carried;
      for (int w = kWarps - 1; w >= 0; --w) {
        right_of_warp[w] = state;
        state = warp_maps[w](state);
      }
      carried = state;
    }
    __syncthreads();
    GaeState state = to_the_right(right_of_warp[warp]);
    read_weights(a.mask, begin + first, left, m);  // again, out of L1: there are no registers to keep them
    A advantages[kTokens], returns[kTokens];
    UNROLL
    for (int k = kTokens - 1; k >= 0; --k) {
      if (k < left) state = gae_step(state, reward(k), value(k), m[k], o);
      advantages[k] = a.advantage_of(state, m[k]);
      returns[k] = a.return_of(state, value(k), m[k]);
    }
    store_run(a.advantages + begin, length, first, advantages);
    store_run(a.returns + begin, length, first, returns);
  }
}

// One thread a row: gradients through GAE are asked for in tests of other code, hardly in training, where advantages are constants.
template <class A>
__global__ void __launch_bounds__(kLoopThreads, 2) gae_backward_kernel(const A* grad_advantages, const A* grad_returns, Mask mask, A* grad_rewards,
                                                                    A* grad_values, A* grad_bootstrap, Rows rows, GaeOptions options) {
  const int64_t row = blockIdx.x * int64_t(kLoopThreads) + threadIdx.x;
  if (row < rows.rows)
    gae_row_backward(grad_advantages, grad_returns, mask, grad_rewards, grad_values, grad_bootstrap, row, rows.begin(row), rows.end(row),
                     options.of_row(row));
}

#endif

inline std::tuple<Tensor, Tensor> gae(Tensor rewards, Tensor values, OptionalTensor mask, OptionalTensor bootstrap, OptionalTensor lam_rows,
                                      OptionalTensor returns_lam_rows, OptionalTensor cu_seqlens, double gamma, double lam, double returns_lam,
                                      bool decay) {
  const GaeCall call = gae_call(rewards, values, mask, bootstrap, lam_rows, returns_lam_rows, cu_seqlens, gamma, lam, returns_lam, decay);
  Tensor advantages = empty_tokens(call.rewards, call.rows), returns = empty_tokens(call.rewards, call.rows);
#if !defined(RLHF_DEVICE_CODE)
  check_lambdas("lam", call.lam);
  check_lambdas("returns_lam", call.returns_lam);
#endif
  for_real(rewards.scalar_type(), "gae", "rewards", [&](auto zero) {
    using A = decltype(zero);
    const GaeArrays<A> arrays = gae_arrays<A>(call, advantages, returns);
#if !defined(RLHF_DEVICE_CODE)
    for_gae_rows(call, [&](int64_t row, int64_t begin, int64_t end, const GaeOptions& o) {
      gae_row(arrays, row, begin, end, o);
    });
#else
    const int64_t mean_length = call.rows.rows > 0 ? call.rows.tokens / call.rows.rows : 0;
    const GaeOptions& o = call.options;
    auto run = [&](auto lambdas) {
      constexpr int kLambdas = decltype(lambdas)::value;
      if constexpr (sizeof(A) != 8 && kLambdas == 1)  // the common case; float64 is for checks
        if (mean_length <= 256) return launch(call.rewards, gae_kernel<kWarp, kLambdas, A>, call.rows.rows, kWarp, arrays, call.rows, o);
      launch(call.rewards, gae_kernel<kGaeThreads, kLambdas, A>, call.rows.rows, kGaeThreads, arrays, call.rows, o);
    };
    const bool one_lambda = o.lam_rows == o.returns_lam_rows && (o.lam_rows || o.lam == o.returns_lam);
    one_lambda ? run(std::integral_constant<int, 1>{}) : run(std::integral_constant<int, 2>{});
#endif
  });
  return {advantages, returns};
}

inline std::tuple<Tensor, Tensor, Tensor> gae_backward(Tensor grad_advantages_, Tensor grad_returns_, Tensor rewards, Tensor values,
                                                       OptionalTensor mask, OptionalTensor bootstrap, OptionalTensor lam_rows,
                                                       OptionalTensor returns_lam_rows, OptionalTensor cu_seqlens, double gamma, double lam,
                                                       double returns_lam, bool decay) {
  const GaeCall call = gae_call(rewards, values, mask, bootstrap, lam_rows, returns_lam_rows, cu_seqlens, gamma, lam, returns_lam, decay);
  check_twin("gae", "grad_advantages", grad_advantages_, "rewards", rewards);
  check_twin("gae", "grad_returns", grad_returns_, "rewards", rewards);
  const Tensor grad_advantages = dense(grad_advantages_), grad_returns = dense(grad_returns_);
  Tensor grad_rewards = empty_tokens(call.rewards, call.rows), grad_values = empty_tokens(call.rewards, call.rows);
  Tensor grad_bootstrap = empty(call.rewards, {call.bootstrap ? call.rows.rows : 0});
  for_real(rewards.scalar_type(), "gae", "rewards", [&](auto zero) {
    using A = decltype(zero);
    const A *ga = in<A>(grad_advantages), *gr = in<A>(grad_returns);
    A *to_rewards = out<A>(grad_rewards), *to_values = out<A>(grad_values);
    A* to_bootstrap = call.bootstrap ? out<A>(grad_bootstrap) : nullptr;
    const Mask view = mask_view("gae", call.mask);
#if !defined(RLHF_DEVICE_CODE)
    for_gae_rows(call, [&](int64_t row, int64_t begin, int64_t end, const GaeOptions& o) {
      gae_row_backward(ga, gr, view, to_rewards, to_values, to_bootstrap, row, begin, end, o);
    });
#else
    launch(call.rewards, gae_backward_kernel<A>, ceil_div(call.rows.rows, kLoopThreads), kLoopThreads, ga, gr, view, to_rewards, to_values,
           to_bootstrap, call.rows, call.options);
#endif
  });
  return {grad_rewards, grad_values, grad_bootstrap};
}

}  // namespace rlhf_fast::RLHF_UNIT
