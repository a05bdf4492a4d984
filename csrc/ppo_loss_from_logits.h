// The PPO policy loss with entropy bonus and KL penalty straight from logits, its gradient written where the logits are read.
//
//   L = aggregate( policy(logprob) - entropy_coef H + kl_coef KL(logprob, ref_logprob) )     policy, KL, aggregate: ppo_loss.h, kl.h
//
// What stands before a token's loss in L, its scale, is the mask's weight times what the aggregate makes of its row: it is known
// before a logit is read. So the gradient of a row follows from the row alone (logprob.h: a by the log-prob, b by the entropy):
//   a = scale (d policy / d logprob + kl_coef d KL / d logprob)        b = -scale entropy_coef
// and three steps make the op; each is an op of its own, too, for who makes the logits tile by tile:
//
//   ppo_token_weights(labels, advantages, mask, cu_seqlens, ignore_index, aggregate, normalizer, normalizer_value)
//       -> weights, scale, advantages: float64, a value a token. Ignored labels weigh 0; one advantage a row is dealt out.
//   ppo_loss_rows(logits, labels, old_logprobs, advantages, ref_logprobs?, weights, scale, temperature?, <options>, need_gradient, plan)
//       -> logprobs, entropies (float64, a value a token, 0 where the weight is 0), gradient (of the logits; empty unless needed)
//   ppo_loss_rows_inplace(the same)     -> logprobs, entropies; the gradient is written over the logits
//   ppo_objective(logprobs, entropies, old_logprobs, advantages, ref_logprobs?, weights, cu_seqlens?, <options>, wide)
//       -> loss, stats, logprobs, entropies: float64 where `wide`, else float32
//
// Rows may be flat, [n, V] beside [n], or [B, T, V] beside [B, T]; what stands beside the logits is float64, so that a float32
// log-prob is rounded once, for the caller, and not before the ratio is taken.
//
// At sequence level a ratio needs every log-prob of its sequence: there ppo_loss_from_logits reads the logits twice, for the
// log-probs and, once the objective is known, for the gradient.
//
// Bytes, for rows of V logits of e bytes: reads e V and writes e V with a gradient; reads e V without. On a GPU a row that is not
// held on chip (on_chip.h) is read twice, as is every row at sequence level. `plan`: -1, or a plan of on_chip.h by its code. By
// bench/machine_code.py a held row takes 11.7 instructions an element of bf16 logits on sm_90 to read and about 14 to write its
// gradient; at an H200's bandwidth a multiprocessor has 27 issue slots an element, so that memory should bound it, if barely. No
// GPU has been measured.
#pragma once

#include "kl.h"
#include "logprob.h"
#include "ppo_loss.h"

namespace rlhf_fast::RLHF_UNIT {

// ---------------------------------------------------------------------------------------------------------------------
// 1. Weights

struct WeightTerms {
  using Summary = WeightTerms;
  static constexpr int kTerms = 2, kStats = 0;
  HOST_DEVICE static constexpr Fold fold(int) { return Fold::kSum; }
  const void* labels;
  bool long_labels;
  int64_t ignore_index;
  double* weights;  // a value a token
  HOST_DEVICE void terms(int64_t, int64_t i, double weight, double* t) const {
    weights[i] = t[kWeight] = LogprobCall::label(labels, long_labels, i) == ignore_index ? 0.0 : weight;
    t[kLoss] = 0;
  }
  HOST_DEVICE static double spread(const Terms<WeightTerms>&, const Terms<WeightTerms>&) { return 0; }
  HOST_DEVICE static void write_stats(const Terms<WeightTerms>&, double, const Reals&) {}
};

struct ScaleTokens {
  const double *weights, *row_weight, *advantages;
  bool row_advantage;
  double *scale, *token_advantages;
  HOST_DEVICE void operator()(int64_t row, int64_t i, double) const {
    scale[i] = weights[i] != 0 ? weights[i] * row_weight[row] : 0.0;
    token_advantages[i] = advantages[row_advantage ? row : i];
  }
};

struct TokenWeights {
  Tensor weights, scale, advantages;
};

inline void check_doubles(const char* op, const char* name, const Tensor& t, const Tensor& labels) {
  check_like(op, name, t, "labels", labels);
  CHECK_TYPE(t.scalar_type() == ScalarType::Double, op, ": `", name, "` must be float64 here, got ",
             torch::headeronly::toString(t.scalar_type()));
}

inline TokenWeights token_weights(const char* op, const Tensor& labels_, const Tensor& advantages_, const OptionalTensor& mask_,
                                  const OptionalTensor& offsets, int64_t ignore_index, int64_t aggregate, const OptionalTensor& normalizer,
                                  double normalizer_value) {
  CHECK_TYPE(labels_.scalar_type() == ScalarType::Long || labels_.scalar_type() == ScalarType::Int, op,
             ": `labels` must be int64 or int32, got ", torch::headeronly::toString(labels_.scalar_type()));
  const Tensor labels = dense(labels_), advantages = dense(advantages_);
  const Rows rows = rows_view(op, labels, offsets);
  const bool row_advantage = advantages.dim() == 2 && advantages.size(0) == rows.rows && advantages.size(1) == 1;
  if (!row_advantage) check_like(op, "advantages", advantages, "labels", labels);
  check_same_device(op, "advantages", advantages, "labels", labels);
  CHECK_TYPE(advantages.scalar_type() == ScalarType::Double, op, ": `advantages` must be float64 here");
  const OptionalTensor mask = contiguous_mask(op, mask_, "labels", labels);
  auto tokens = [&] { return empty_tokens(advantages, labels.sizes(), rows); };
  TokenWeights w{tokens(), tokens(), tokens()};
  const WeightTerms terms{labels.const_data_ptr(), labels.scalar_type() == ScalarType::Long, ignore_index, out<double>(w.weights)};
  const LossOutputs o = aggregate_loss(op, w.weights, rows, mask_view(op, mask), terms, aggregate, normalizer, normalizer_value);
  for_each(labels, rows, Mask{}, ScaleTokens{in<double>(w.weights), in<double>(o.row_weight), in<double>(advantages), row_advantage,
                                             out<double>(w.scale), out<double>(w.advantages)});
  return w;
}

inline std::tuple<Tensor, Tensor, Tensor> ppo_token_weights(Tensor labels, Tensor advantages, OptionalTensor mask, OptionalTensor cu_seqlens,
                                                            int64_t ignore_index, int64_t aggregate, OptionalTensor normalizer,
                                                            double normalizer_value) {
  const char* op = "ppo_token_weights";
  const TokenWeights w = token_weights(op, labels, advantages, mask, contiguous_offsets(op, cu_seqlens, "labels", labels), ignore_index,
                                       aggregate, normalizer, normalizer_value);
  return {w.weights, w.scale, w.advantages};
}

// ---------------------------------------------------------------------------------------------------------------------
// 2. Rows of logits

struct ObjectiveOptions {
  PolicyOptions policy;
  KlOptions kl;
  double entropy_coef, kl_coef;
};

inline ObjectiveOptions objective_options(const char* op, double clip_low, double clip_high, double dual_clip, double log_ratio_clip,
                                          int64_t form, double entropy_coef, double kl_coef, int64_t kl_estimator, bool straight_through,
                                          bool has_reference) {
  const double none = std::numeric_limits<double>::infinity();
  CHECK_VALUE(form == kPpo || form == kCispo, op, ": unknown `loss_type` code ", form);
  CHECK_VALUE(has_reference || kl_coef == 0, op, ": `kl_coef` is ", kl_coef, " and needs `ref_logprobs`");
  return {{clip_low, clip_high, dual_clip, log_ratio_clip, form == kCispo}, kl_options(op, kl_estimator, straight_through, none, none),
          entropy_coef, kl_coef};
}

// What a token has beside its logits.
struct TokenInputs {
  const double *old_logprobs, *advantages, *ref_logprobs;  // a value a token; the last may be null
  ObjectiveOptions options;

  HOST_DEVICE KlToken<double> kl(int64_t i, double logprob) const {
    return ref_logprobs ? kl_step(logprob, static_cast<double>(ref_logprobs[i]), options.kl) : KlToken<double>{0, 0};
  }
  // d loss / d logprob of a token of weight 1.
  HOST_DEVICE double by_logprob(int64_t i, double logprob, double by_policy) const {
    return options.kl_coef != 0 ? by_policy + options.kl_coef * kl(i, logprob).slope : by_policy;
  }
  HOST_DEVICE double by_logprob(int64_t i, double logprob) const {
    const PolicyRatio<double> r = policy_ratio<double>(logprob - old_logprobs[i], options.policy);
    return by_logprob(i, logprob, policy_step(r, logprob, advantages[i], options.policy).by_logprob);
  }
};

template <class A>
struct RowSlopes {  // what the gradient of a row needs; no gradient where both are 0
  RowStats<A> stats;
  A a, b;
};

template <class A>
struct RowResult {
  double logprob, entropy;
  RowSlopes<A> slopes;
};

// What becomes of each row, once it is reduced.
template <class A>
struct RowPass {
  TokenInputs token;
  const double *weights, *scale;   // a value a row
  double *logprobs, *entropies;    // a value a row
  RowStats<A>* stats;              // a value a row, or null

  HOST_DEVICE bool skips(int64_t row, int64_t label, const LogprobOptions& options) const {
    return weights[row] == 0 || label == options.ignore_index;
  }

  // `value`: capped() of the label's logit; NaN where the label is outside the vocabulary.
  template <bool kCapped>
  HOST_DEVICE RowResult<A> finish(int64_t row, const SoftmaxSums& sums, A value, const LogprobOptions& options) const {
    const RowStats<double> wide = finish_row<double>(sums);
    // With the slope unrounded: a log-prob of -20 would carry 20 times its rounding into the ratio.
    const double below = kCapped ? value - wide.max : (value - wide.max) * (options.logit_scale / options.tau<A>(row));
    const double logprob = below - wide.log_sum;
    return {logprob,
            wide.entropy,
            {{static_cast<A>(wide.max), static_cast<A>(wide.log_sum), static_cast<A>(wide.entropy)},
             static_cast<A>(scale[row] * token.by_logprob(row, logprob)),
             static_cast<A>(-scale[row] * token.options.entropy_coef)}};
  }

  HOST_DEVICE void write(int64_t row, const RowResult<A>& result) const {
    logprobs[row] = result.logprob;
    entropies[row] = result.entropy;
    if (stats) stats[row] = result.slopes.stats;
  }
};

// A row's outputs and where its gradient goes.
struct RowOutputs {
  Tensor logprobs, entropies;
  OptionalTensor stats, gradient;
  LogitRows target_rows;
};

struct RowCall {
  LogprobCall logits;
  Tensor old_logprobs, advantages;
  OptionalTensor ref_logprobs;
  Tensor weights, scale;
  ObjectiveOptions options;

  TokenInputs token() const {
    return {in<double>(old_logprobs), in<double>(advantages), ref_logprobs ? in<double>(*ref_logprobs) : nullptr, options};
  }
  template <class A>
  RowPass<A> pass(const RowOutputs& o) const {
    return {token(), in<double>(weights), in<double>(scale), out<double>(o.logprobs), out<double>(o.entropies),
            o.stats ? reinterpret_cast<RowStats<A>*>(out<A>(*o.stats)) : nullptr};
  }
};

inline RowCall row_call(const char* op, const Tensor& logits, const Tensor& labels, const Tensor& old_logprobs, const Tensor& advantages,
                        const OptionalTensor& ref_logprobs, const Tensor& weights, const Tensor& scale, const OptionalTensor& temperature,
                        double temperature_value, double softcap, double logit_scale, int64_t ignore_index, const ObjectiveOptions& options) {
  RowCall call{logprob_call(op, logits, labels, temperature, weights, temperature_value, softcap, logit_scale, ignore_index),
               dense(old_logprobs), dense(advantages), ref_logprobs, dense(weights), dense(scale), options};
  check_doubles(op, "old_logprobs", old_logprobs, labels);
  check_doubles(op, "advantages", advantages, labels);
  check_doubles(op, "weights", weights, labels);
  check_doubles(op, "scale", scale, labels);
  if (!ref_logprobs.has_value()) return call;
  check_doubles(op, "ref_logprobs", *ref_logprobs, labels);
  call.ref_logprobs = dense(*ref_logprobs);
  return call;
}

inline RowOutputs row_outputs(const RowCall& call) {
  const Tensor& like = call.weights;
  return {empty(like, like.sizes()), empty(like, like.sizes()), {}, {}, {}};
}

#if !defined(RLHF_DEVICE_CODE)

inline void run_rows(const char* op, const RowCall& call, const RowOutputs& o, int64_t /*plan*/) {
  const LogprobCall& rows = call.logits;
  check_rows(op, rows);
  const void* labels = rows.labels.const_data_ptr();
  for_logits(rows.logits.scalar_type(), op, "logits", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const T* logits = in<T>(rows.logits);
    T* target = o.gradient ? out<T>(*o.gradient) : nullptr;
    const RowPass<A> pass = call.pass<A>(o);
    auto run = [&](auto is_capped) {
      constexpr bool kCapped = decltype(is_capped)::value;
      parallel_for(rows.rows.rows, rows.rows.vocab, [&](int64_t row) {
        const T* x = logits + rows.rows.offset(row);
        T* dx = target ? target + o.target_rows.offset(row) : nullptr;
        RowResult<A> result{};
        const int64_t label = LogprobCall::label(labels, rows.long_labels, row);
        const LogitMap<A> map = rows.options.map<A>(row);
        if (!pass.skips(row, label, rows.options))
          result = pass.template finish<kCapped>(row, softmax_sums<kCapped, true>(x, rows.rows.vocab, map),
                                                 capped<kCapped>(static_cast<A>(x[label]), map), rows.options);
        pass.write(row, result);
        const RowSlopes<A>& slopes = result.slopes;
        if (dx == nullptr) return;
        if (slopes.a == 0 && slopes.b == 0) {
          memset(static_cast<void*>(dx), 0, sizeof(T) * rows.rows.vocab);
          return;
        }
        auto write = [&](auto has_entropy) {
          const RowGradient<kCapped, decltype(has_entropy)::value, A> gradient(map, slopes.stats, slopes.a, slopes.b);
          row_gradient_with_label(x, dx, rows.rows.vocab, label, gradient, slopes.a);
        };
        slopes.b != 0 ? write(std::true_type{}) : write(std::false_type{});
      });
    };
    rows.options.softcap != 0 ? run(std::true_type{}) : run(std::false_type{});
  });
}

#else

// The leader's copy, to every thread; after it no thread is still before it.
template <int kThreads, class State>
__device__ State from_leader(const State& state) {
  constexpr int kWords = sizeof(State) / sizeof(uint32_t);
  uint32_t words[kWords];
  memcpy(words, &state, sizeof(State));
  if constexpr (kThreads == kWarp) {
    UNROLL
    for (int i = 0; i < kWords; ++i) words[i] = __shfl_sync(kAllLanes, words[i], 0);
  } else {
    __shared__ uint32_t leader[kWords];
    if (threadIdx.x == 0) memcpy(leader, words, sizeof(State));
    __syncthreads();
    memcpy(words, leader, sizeof(State));
  }
  State copy;
  memcpy(&copy, words, sizeof(State));
  return copy;
}

template <class T>
struct RowsToPass {
  using A = accumulate_t<T>;
  const T* logits;
  T* target;  // or null
  const void* labels;
  bool long_labels;
  LogitRows rows, target_rows;
  LogprobOptions options;
  RowPass<A> pass;

  __device__ int64_t label(int64_t row) const { return LogprobCall::label(labels, long_labels, row); }
  __device__ bool skips(int64_t row) const { return pass.skips(row, label(row), options); }
  __device__ const T* source(int64_t row) const { return logits + rows.offset(row); }
  __device__ T* gradient(int64_t row) const { return target + target_rows.offset(row); }
  template <bool kCapped>
  __device__ A label_value(int64_t row) const {
    const int64_t at = label(row);
    return rows.knows(at) ? capped<kCapped>(static_cast<A>(source(row)[at]), options.map<A>(row)) : std::numeric_limits<A>::quiet_NaN();
  }
};

template <class T>
constexpr int kStreamThreads = sizeof(T) == 8 ? 512 : 768;  // all that 128 and 80 registers each leave room for
template <int kThreads, bool kCapped, class T>
constexpr int kRowBlocks = kThreads == kWarp ? kBlocks<kWarp, kCapped, T> : 1;

// A row by a warp or a block, read twice where a gradient is asked for. The block is all that a multiprocessor runs: few rows are
// under way, and the second read may find them in L2.
template <int kThreads, bool kCapped, class T>
__global__ void __launch_bounds__(kThreads == kWarp ? kWarp * kRowsPerBlock : kThreads, kRowBlocks<kThreads, kCapped, T>)
    ppo_loss_rows_kernel(RowsToPass<T> r) {
  using A = accumulate_t<T>;
  const int64_t row = kThreads == kWarp ? blockIdx.x * int64_t(kRowsPerBlock) + threadIdx.x / kWarp : int64_t(blockIdx.x);
  if (row >= r.rows.rows) return;
  const bool leader = threadIdx.x % kThreads == 0, skipped = r.skips(row);
  const LogitMap<A> map = r.options.template map<A>(row);
  const T* x = r.source(row);
  RowResult<A> result{};
  if (!skipped) {
    const SoftmaxSums sums = read_row<kThreads, kCapped, true, true>(x, r.rows.vocab, map);
    if (leader) result = r.pass.template finish<kCapped>(row, sums, r.template label_value<kCapped>(row), r.options);
  }
  if (leader) r.pass.write(row, result);
  if (r.target == nullptr) return;
  const RowSlopes<A> slopes = skipped ? RowSlopes<A>{} : from_leader<kThreads>(result.slopes);
  const TargetRow<kThreads, T> to(r.gradient(row), r.rows.vocab, 0, RowReader<T>(x, r.rows.vocab).packs());
  if (slopes.a == 0 && slopes.b == 0) return to.zeros();
  const RowGradient<kCapped, true, A> gradient(map, slopes.stats, slopes.a, slopes.b);
  to.template write<kInFlight<kCapped, T>>(x, r.label(row), gradient, slopes.a);
}

constexpr int kSumsGranules = (sizeof(SoftmaxSums) + sizeof(Granule) - 1) / sizeof(Granule);

// A row by `blocks` blocks of a cluster, each of which holds a slice of it in shared memory.
template <bool kCapped, class T>
__global__ void __launch_bounds__(kRowThreads, kByRegisters)
    ppo_loss_held_rows_kernel(RowsToPass<T> r, int blocks, int slice_packs) {
  using A = accumulate_t<T>;
  const int64_t row = blockIdx.x / blocks;
  const int rank = blockIdx.x % blocks;
  const bool leader = threadIdx.x == 0;
  const int64_t vocab = r.rows.vocab, slice = int64_t(slice_packs) * kPack<T>;
  const int64_t begin = rank * slice < vocab ? rank * slice : vocab, end = begin + slice < vocab ? begin + slice : vocab;
  T* dx = r.target ? r.gradient(row) : nullptr;
  if (r.skips(row)) {  // all blocks of the row
    if (leader && rank == 0) r.pass.write(row, {});
    if (dx) TargetRow<kRowThreads, T>(dx + begin, end - begin, 0, slice_packs).zeros();
    return;
  }
  const LogitMap<A> map = r.options.template map<A>(row);
  auto* const own_sums = reinterpret_cast<SoftmaxSums*>(block_memory());
  Granule* const held = block_memory() + kSumsGranules;

  const A value = leader ? r.template label_value<kCapped>(row) : A(0);  // before any block writes over it
  SoftmaxSums sums = read_packs<kRowThreads, kCapped, true>(RowReader<T>(r.source(row), end, begin), map,
                                                            [&](int pack, const Granule& g) { held[pack] = g; });
  if (blocks > 1) {
    if (leader) *own_sums = sums;
    cluster_arrive();
    cluster_wait();
    if (leader) {
      sums = kNothingSummed;
      for (int b = 0; b < blocks; ++b) merge(sums, *in_block(own_sums, b), kCapped ? 1.0 : static_cast<double>(map.slope));
    }
    cluster_arrive();
  }
  RowResult<A> result{};
  if (leader) result = r.pass.template finish<kCapped>(row, sums, value, r.options);
  if (leader && rank == 0) r.pass.write(row, result);
  if (dx) {
    const RowSlopes<A> slopes = from_leader<kRowThreads>(result.slopes);
    const TargetRow<kRowThreads, T> to(dx + begin, end - begin, 0, slice_packs);
    const RowGradient<kCapped, true, A> gradient(map, slopes.stats, slopes.a, slopes.b);
    if (slopes.a == 0 && slopes.b == 0) to.zeros();
    else to.template write<2, decltype(gradient), true>(reinterpret_cast<const T*>(held), r.label(row) - begin, gradient, slopes.a);
  }
  if (blocks > 1) cluster_wait();  // none leaves while another reads its sums
}

inline void run_rows(const char* op, const RowCall& call, const RowOutputs& o, int64_t wanted) {
  const LogprobCall& rows = call.logits;
  const int64_t count = rows.rows.rows, vocab = rows.rows.vocab;
  for_logits(rows.logits.scalar_type(), op, "logits", [&](auto zero) {
    using T = decltype(zero);
    OnChipPlan plan = on_chip_plan(vocab, sizeof(T), compute_capability(rows.logits), wanted);
    if (plan.kind == OnChipPlan::kWarp && rows.options.softcap != 0) plan = on_chip_plan(vocab, sizeof(T), compute_capability(rows.logits), 1);
    CHECK_VALUE(wanted < 0 || wanted == plan.code(), op, ": this GPU has no plan ", wanted, " for rows of ", vocab, " logits");
    const RowsToPass<T> r{in<T>(rows.logits), o.gradient ? out<T>(*o.gradient) : nullptr, rows.labels.const_data_ptr(), rows.long_labels,
                          rows.rows, o.target_rows, rows.options, call.pass<accumulate_t<T>>(o)};
    auto run = [&](auto is_capped) {
      constexpr bool kCapped = decltype(is_capped)::value;
      constexpr int kThreads = kStreamThreads<T>;
      if constexpr (sizeof(T) != 8) {  // all else is kStream
        if constexpr (kByWarps<kCapped, T>)
          if (plan.kind == OnChipPlan::kWarp)
            return launch(rows.logits, ppo_loss_rows_kernel<kWarp, kCapped, T>, ceil_div(count, kRowsPerBlock), kWarp * kRowsPerBlock, r);
        if (plan.kind != OnChipPlan::kStream)
          return launch(rows.logits, ppo_loss_held_rows_kernel<kCapped, T>,
                        ClusterGrid{count * plan.blocks, kRowThreads, plan.blocks, plan.row_bytes + kSumsGranules * int64_t(sizeof(Granule))}, r,
                        plan.blocks, static_cast<int>(plan.row_bytes / sizeof(Granule)));
      }
      launch(rows.logits, ppo_loss_rows_kernel<kThreads, kCapped, T>, count, kThreads, r);
    };
    rows.options.softcap != 0 ? run(std::true_type{}) : run(std::false_type{});
  });
}

#endif

// Where a gradient of `logits` goes, with everything refused that a write over them would be.
inline void want_gradient(const char* op, const RowCall& call, const Tensor& logits, bool inplace, RowOutputs& o) {
  o.gradient = gradient_target(op, call.logits, logits, inplace, o.target_rows, "inplace");
}

inline std::tuple<Tensor, Tensor, Tensor> ppo_loss_rows(
    Tensor logits, Tensor labels, Tensor old_logprobs, Tensor advantages, OptionalTensor ref_logprobs, Tensor weights, Tensor scale,
    OptionalTensor temperature, double temperature_value, double softcap, double logit_scale, int64_t ignore_index, double clip_low,
    double clip_high, double dual_clip, double log_ratio_clip, int64_t form, double entropy_coef, double kl_coef, int64_t kl_estimator,
    bool straight_through, bool need_gradient, int64_t plan) {
  const char* op = "ppo_loss_rows";
  const RowCall call = row_call(op, logits, labels, old_logprobs, advantages, ref_logprobs, weights, scale, temperature, temperature_value,
                                softcap, logit_scale, ignore_index,
                                objective_options(op, clip_low, clip_high, dual_clip, log_ratio_clip, form, entropy_coef, kl_coef,
                                                  kl_estimator, straight_through, ref_logprobs.has_value()));
  RowOutputs o = row_outputs(call);
  if (need_gradient) want_gradient(op, call, logits, false, o);
  run_rows(op, call, o, plan);
  return {o.logprobs, o.entropies, need_gradient ? *o.gradient : empty(logits, {0})};
}

inline std::tuple<Tensor, Tensor> ppo_loss_rows_inplace(
    Tensor logits, Tensor labels, Tensor old_logprobs, Tensor advantages, OptionalTensor ref_logprobs, Tensor weights, Tensor scale,
    OptionalTensor temperature, double temperature_value, double softcap, double logit_scale, int64_t ignore_index, double clip_low,
    double clip_high, double dual_clip, double log_ratio_clip, int64_t form, double entropy_coef, double kl_coef, int64_t kl_estimator,
    bool straight_through, int64_t plan) {
  const char* op = "ppo_loss_rows";
  const RowCall call = row_call(op, logits, labels, old_logprobs, advantages, ref_logprobs, weights, scale, temperature, temperature_value,
                                softcap, logit_scale, ignore_index,
                                objective_options(op, clip_low, clip_high, dual_clip, log_ratio_clip, form, entropy_coef, kl_coef,
                                                  kl_estimator, straight_through, ref_logprobs.has_value()));
  RowOutputs o = row_outputs(call);
  want_gradient(op, call, logits, true, o);
  run_rows(op, call, o, plan);
  return {o.logprobs, o.entropies};
}

// ---------------------------------------------------------------------------------------------------------------------
// A gradient that was made for an upstream of 1 is brought to the one that came: nothing is done where that is 1.

template <class A>
struct Rescale {
  A factor;
  template <class F>
  HOST_DEVICE F operator()(F gradient, A) const {
    const F zero{};
    return gradient != 0 ? gradient * factor : zero;  // 0 times inf is 0
  }
};

#if !defined(RLHF_DEVICE_CODE)

template <class T>
void scale_rows(const Tensor& gradient, const LogitRows& rows, const accumulate_t<T>* grad) {
  const Rescale<accumulate_t<T>> rescale{*grad};
  if (rescale.factor == 1) return;
  T* first = out<T>(gradient);
  parallel_for(rows.rows, rows.vocab, [&](int64_t row) {
    T* x = first + rows.offset(row);
    row_gradient(x, x, rows.vocab, rescale);
  });
}

#else

template <class T>
__global__ void __launch_bounds__(kRowThreads) ppo_scale_gradient_kernel(T* gradient, LogitRows rows, const accumulate_t<T>* grad, int pieces,
                                                                         int piece_packs) {
  const Rescale<accumulate_t<T>> rescale{*grad};
  if (rescale.factor == 1) return;
  T* x = gradient + rows.offset(blockIdx.x / pieces);
  const TargetRow<kRowThreads, T> to(x, rows.vocab, blockIdx.x % pieces, piece_packs);
  to.template write<kInFlight<false, T>>(x, -1, rescale, accumulate_t<T>(0));
}

template <class T>
void scale_rows(const Tensor& gradient, const LogitRows& rows, const accumulate_t<T>* grad) {
  const RowPieces pieces(ceil_div(rows.vocab, kPack<T>));
  launch(gradient, ppo_scale_gradient_kernel<T>, rows.rows * pieces.count, kRowThreads, out<T>(gradient), rows, grad, pieces.count, pieces.packs);
}

#endif

inline void ppo_scale_gradient(Tensor gradient, Tensor grad) {
  const char* op = "ppo_scale_gradient";
  CHECK_VALUE(grad.numel() == 1 && grad.scalar_type() == accumulate_type(gradient), op, ": `grad` must be one number of the loss's dtype");
  CHECK_VALUE(gradient.dim() >= 1 && gradient.dim() <= 3, op, ": `gradient` must have 1 to 3 dimensions, got ", shape_of(gradient));
  check_same_device(op, "grad", grad, "gradient", gradient);
  const LogitRows rows = logit_rows(gradient);
  if (rows.rows == 0 || rows.vocab == 0) return;
  CHECK_VALUE(rows.vocab == 1 || gradient.stride(gradient.dim() - 1) == 1, op, ": the last stride of `gradient` must be 1");
  for_logits(gradient.scalar_type(), op, "gradient", [&](auto zero) {
    using T = decltype(zero);
    scale_rows<T>(gradient, rows, in<accumulate_t<T>>(grad));
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// 3. Objective

template <bool kSequence>
struct ObjectiveSummary {
  using Policy = PolicySummary<kSequence>;
  enum { kPolicy = Policy::kTerms, kEntropy, kKl, kEnd };
  static constexpr int kTerms = kEnd, kStats = Policy::kStats, kAggregated = 3;  // the policy's part of the loss, entropy, KL
  HOST_DEVICE static constexpr Fold fold(int k) { return k < Policy::kTerms ? Policy::fold(k) : Fold::kSum; }

  HOST_DEVICE static Terms<Policy> of_policy(const Terms<ObjectiveSummary>& all) {
    Terms<Policy> terms;
    for (int k = 0; k < Policy::kTerms; ++k) terms.at[k] = all.at[k];
    return terms;
  }
  HOST_DEVICE static double spread(const Terms<ObjectiveSummary>& row, const Terms<ObjectiveSummary>& total) {
    return Policy::spread(of_policy(row), of_policy(total));
  }
  HOST_DEVICE static void write_stats(const Terms<ObjectiveSummary>& total, double spread, const Reals& stats) {
    Policy::write_stats(of_policy(total), spread, stats);
  }
};

template <bool kSequence>
struct ObjectiveTerms {
  using Summary = ObjectiveSummary<kSequence>;
  static constexpr int kTerms = Summary::kTerms;
  HOST_DEVICE static constexpr Fold fold(int k) { return Summary::fold(k); }

  PolicyTerms<double, kSequence> policy;
  TokenInputs token;
  const double *logprobs, *entropies;
  Reals logprobs_out, entropies_out;  // rounded, for the caller

  HOST_DEVICE ObjectiveTerms of_row(int64_t row) const { return {policy.of_row(row), token, logprobs, entropies, logprobs_out, entropies_out}; }

  HOST_DEVICE void terms(int64_t row, int64_t i, double weight, double* t) const {
    policy.terms(row, i, weight, t);
    t[Summary::kPolicy] = t[kLoss];
    t[Summary::kEntropy] = weight != 0 ? weight * entropies[i] : 0.0;
    t[Summary::kKl] = weight != 0 ? weight * token.kl(i, logprobs[i]).value : 0.0;
    if (token.options.entropy_coef != 0) t[kLoss] -= token.options.entropy_coef * t[Summary::kEntropy];
    if (token.options.kl_coef != 0) t[kLoss] += token.options.kl_coef * t[Summary::kKl];
    logprobs_out.put(i, logprobs[i]);
    entropies_out.put(i, entropies[i]);
  }
};

// At sequence level: d loss / d logprob and d loss / d entropy of a token of weight 1.
struct SequenceSlopes {
  PolicyInputs<double, true> inputs;
  TokenInputs token;
  const double* row_weight;
  Reals by_logprob, by_entropy;

  HOST_DEVICE SequenceSlopes of_row(int64_t row) const { return {inputs.of_row(row), token, row_weight + row, by_logprob, by_entropy}; }
  HOST_DEVICE void operator()(int64_t, int64_t i, double weight) const {
    const double by_policy = inputs.step(inputs.ratio(i, weight), i, weight).by_logprob;
    by_logprob.put(i, weight != 0 ? *row_weight * token.by_logprob(i, inputs.logprobs[i], by_policy) : 0.0);
    by_entropy.put(i, -*row_weight * token.options.entropy_coef);
  }
};

struct Objective {
  Tensor loss, stats, logprobs, entropies;
  OptionalTensor by_logprob, by_entropy;  // at sequence level, where asked for
};

inline Objective objective(const char* op, const Tensor& logprobs, const Tensor& entropies, const RowCall& call, const OptionalTensor& offsets,
                           bool sequence_level, int64_t aggregate, const OptionalTensor& normalizer, double normalizer_value, ScalarType type,
                           bool need_slopes) {
  const Rows rows = rows_view(op, logprobs, offsets);
  const Mask weights = mask_view(op, call.weights);
  auto tokens = [&](ScalarType of) {
    Tensor t = empty(logprobs, logprobs.sizes(), of);
    return rows.offsets ? empty_tokens(t, rows) : t;
  };
  Objective result;
  result.logprobs = tokens(type);
  result.entropies = tokens(type);
  const Tensor slope = empty(logprobs, logprobs.sizes());  // PolicyTerms leaves it; the gradient is made from the log-probs
  auto run = [&](auto sequence) {
    constexpr bool kSequence = decltype(sequence)::value;
    PolicyInputs<double, kSequence> inputs{in<double>(logprobs), in<double>(call.old_logprobs), in<double>(call.advantages), false,
                                           call.options.policy, nullptr, rows, {}, 0.0};
    OptionalTensor sums;
    if constexpr (kSequence) inputs.partial = in<double>(sums.emplace(log_ratio_sums<double>(logprobs, rows, weights, inputs)));
    const ObjectiveTerms<kSequence> terms{{inputs, out<double>(slope)}, call.token(), in<double>(logprobs), in<double>(entropies),
                                          reals(result.logprobs), reals(result.entropies)};
    const LossOutputs o = aggregate_loss(op, result.logprobs, rows, weights, terms, aggregate, normalizer, normalizer_value);
    result.loss = o.loss;
    result.stats = o.stats;
    if constexpr (kSequence) {
      if (!need_slopes) return;
      result.by_logprob = tokens(type);
      result.by_entropy = tokens(type);
      for_each(logprobs, rows, weights,
               SequenceSlopes{inputs, call.token(), in<double>(o.row_weight), reals(*result.by_logprob), reals(*result.by_entropy)});
    }
  };
  sequence_level ? run(std::true_type{}) : run(std::false_type{});
  return result;
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> ppo_objective(
    Tensor logprobs_, Tensor entropies_, Tensor old_logprobs, Tensor advantages, OptionalTensor ref_logprobs, Tensor weights,
    OptionalTensor cu_seqlens, double clip_low, double clip_high, double dual_clip, double log_ratio_clip, bool sequence_level, int64_t form,
    double entropy_coef, double kl_coef, int64_t kl_estimator, bool straight_through, int64_t aggregate, OptionalTensor normalizer,
    double normalizer_value, bool wide) {
  const char* op = "ppo_objective";
  const OptionalTensor offsets = contiguous_offsets(op, cu_seqlens, "logprobs", logprobs_);
  const Tensor logprobs = dense(logprobs_), entropies = dense(entropies_);
  check_doubles(op, "logprobs", logprobs, weights);
  check_doubles(op, "entropies", entropies, weights);
  check_doubles(op, "old_logprobs", old_logprobs, weights);
  check_doubles(op, "advantages", advantages, weights);
  check_doubles(op, "weights", weights, weights);
  RowCall call{{logprobs, weights}, dense(old_logprobs), dense(advantages), ref_logprobs, dense(weights), weights,
               objective_options(op, clip_low, clip_high, dual_clip, log_ratio_clip, form, entropy_coef, kl_coef, kl_estimator,
                                 straight_through, ref_logprobs.has_value())};
  if (ref_logprobs.has_value()) {
    check_doubles(op, "ref_logprobs", *ref_logprobs, weights);
    call.ref_logprobs = dense(*ref_logprobs);
  }
  const Objective o = objective(op, logprobs, entropies, call, offsets, sequence_level, aggregate, normalizer, normalizer_value,
                                wide ? ScalarType::Double : ScalarType::Float, false);
  return {o.loss, o.stats, o.logprobs, o.entropies};
}

// ---------------------------------------------------------------------------------------------------------------------
// All three

struct FusedOutputs {
  Objective objective;
  OptionalTensor gradient;
};

inline FusedOutputs loss_from_logits(bool inplace, bool need_gradient, const Tensor& logits, const Tensor& labels, const Tensor& old_logprobs,
                                     const Tensor& advantages, const OptionalTensor& mask, const OptionalTensor& cu_seqlens,
                                     const OptionalTensor& ref_logprobs, const OptionalTensor& temperature, const OptionalTensor& normalizer,
                                     double temperature_value, double softcap, double logit_scale, int64_t ignore_index, bool sequence_level,
                                     int64_t aggregate, double normalizer_value, const ObjectiveOptions& options, int64_t plan) {
  const char* op = "ppo_loss_from_logits";
  const OptionalTensor offsets = contiguous_offsets(op, cu_seqlens, "labels", labels);
  const TokenWeights w = token_weights(op, labels, advantages, mask, offsets, ignore_index, aggregate, normalizer, normalizer_value);
  const RowCall call = row_call(op, logits, labels, old_logprobs, w.advantages, ref_logprobs, w.weights, w.scale, temperature,
                                temperature_value, softcap, logit_scale, ignore_index, options);
  const ScalarType type = accumulate_type(logits);
  RowOutputs o = row_outputs(call);
  LogitRows target_rows;
  if (need_gradient && !sequence_level) want_gradient(op, call, logits, inplace, o);
  else if (need_gradient && inplace) gradient_target(op, call.logits, logits, true, target_rows, "inplace");
  if (sequence_level && need_gradient) o.stats = empty(w.weights, {call.logits.rows.rows, 3}, type);
  run_rows(op, call, o, plan);
  const Objective loss = objective(op, o.logprobs, o.entropies, call, offsets, sequence_level, aggregate, normalizer, normalizer_value, type,
                                   need_gradient);
  if (sequence_level && need_gradient)
    o.gradient = gather_logprobs_backward_into(inplace, loss.by_logprob, options.entropy_coef != 0 ? loss.by_entropy : OptionalTensor(),
                                               logits, call.logits, *o.stats);
  return {loss, o.gradient};
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ppo_loss_from_logits(
    Tensor logits, Tensor labels, Tensor old_logprobs, Tensor advantages, OptionalTensor mask, OptionalTensor cu_seqlens,
    OptionalTensor ref_logprobs, OptionalTensor temperature, OptionalTensor normalizer, double temperature_value, double softcap,
    double logit_scale, int64_t ignore_index, double clip_low, double clip_high, double dual_clip, double log_ratio_clip, bool sequence_level,
    int64_t form, int64_t aggregate, double normalizer_value, double entropy_coef, double kl_coef, int64_t kl_estimator,
    bool straight_through, bool need_gradient, int64_t plan) {
  const FusedOutputs o = loss_from_logits(
      false, need_gradient, logits, labels, old_logprobs, advantages, mask, cu_seqlens, ref_logprobs, temperature, normalizer,
      temperature_value, softcap, logit_scale, ignore_index, sequence_level, aggregate, normalizer_value,
      objective_options("ppo_loss_from_logits", clip_low, clip_high, dual_clip, log_ratio_clip, form, entropy_coef, kl_coef, kl_estimator,
                        straight_through, ref_logprobs.has_value()), plan);
  const Objective& l = o.objective;
  return {l.loss, l.stats, l.logprobs, l.entropies, o.gradient ? *o.gradient : empty(logits, {0})};
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> ppo_loss_from_logits_inplace(
    Tensor logits, Tensor labels, Tensor old_logprobs, Tensor advantages, OptionalTensor mask, OptionalTensor cu_seqlens,
    OptionalTensor ref_logprobs, OptionalTensor temperature, OptionalTensor normalizer, double temperature_value, double softcap,
    double logit_scale, int64_t ignore_index, double clip_low, double clip_high, double dual_clip, double log_ratio_clip, bool sequence_level,
    int64_t form, int64_t aggregate, double normalizer_value, double entropy_coef, double kl_coef, int64_t kl_estimator,
    bool straight_through, int64_t plan) {
  const FusedOutputs o = loss_from_logits(
      true, true, logits, labels, old_logprobs, advantages, mask, cu_seqlens, ref_logprobs, temperature, normalizer, temperature_value,
      softcap, logit_scale, ignore_index, sequence_level, aggregate, normalizer_value,
      objective_options("ppo_loss_from_logits", clip_low, clip_high, dual_clip, log_ratio_clip, form, entropy_coef, kl_coef, kl_estimator,
                        straight_through, ref_logprobs.has_value()), plan);
  const Objective& l = o.objective;
  return {l.loss, l.stats, l.logprobs, l.entropies};
}

}  // namespace rlhf_fast::RLHF_UNIT
