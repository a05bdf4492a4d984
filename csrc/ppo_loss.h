// The clipped PPO losses (Schulman et al. 2017, arXiv 1707.06347, eq. 7) with their statistics, and their near relatives.
//
// Policy, per token, with d = clamp(logprob - old_logprob, +-log_ratio_clip), r = exp(d), A the advantage:
//   ppo     l = max(-A r, -A clamp(r, 1 - clip_low, 1 + clip_high));   where A < 0, with a dual clip c (Ye et al. 2019): l = min(l, -A c)
//   cispo   l = -A c logprob,  c = clamp(r, 1 - clip_low, 1 + clip_high) a constant (MiniMax-M1 2025, arXiv 2506.13585)
// At sequence level (GSPO: Zheng et al. 2025, arXiv 2507.18071, in its token form, GSPO-token) d is clamped from the mean of
// logprob - old_logprob over the row, by the mask's weights, and d r / d logprob = r at every token of it.
// Value, per token, with v_c = clamp(v, v_old - clip, v_old + clip):
//   l = max((v - R)^2, (v_c - R)^2) / 2
// Loss = sum_b u_b sum_t w_bt l_bt, the weights u of the rows as `aggregate` says.
//
// Forward is two launches (tokens -> chunks of rows, chunks -> loss, statistics and u), at sequence level three (the means of
// the rows before that); backward is one. Nothing is read on the host. Forward leaves the slope w dl/dx of each token, x being
// logprob or v, so that backward has one multiplication a token to do, without mask or exp. A slope of 0 passes nothing on,
// whatever arrives. Slopes by the other arguments take a launch more in forward, where their gradient is asked for.
// Bytes a token in float32: forward 12 + mask read, 4 written; backward 4 read, 4 written. That is 24 + mask in all, where a
// backward pass that started over would make it 28 + 2 masks.
#pragma once

#include "loops.h"

namespace rlhf_fast::RLHF_UNIT {

// A number from the host or from a device tensor of one element, read where it is used.
struct Normalizer {
  const void* data = nullptr;
  ScalarType type = ScalarType::Double;
  double value = std::numeric_limits<double>::quiet_NaN();  // NaN: none given

  HOST_DEVICE double get(double otherwise) const {
    if (data == nullptr) return value != value ? otherwise : value;
    switch (type) {
      case ScalarType::Float: return *static_cast<const float*>(data);
      case ScalarType::Double: return *static_cast<const double*>(data);
      case ScalarType::Long: return static_cast<double>(*static_cast<const int64_t*>(data));
      default: return *static_cast<const int32_t*>(data);
    }
  }
};

inline Normalizer normalizer_view(const char* op, const OptionalTensor& tensor, double value, const Tensor& like) {
  Normalizer n;
  n.value = value;
  if (!tensor.has_value()) return n;
  CHECK_VALUE(tensor->numel() == 1, op, ": `normalizer` must hold one number, got shape ", shape_of(*tensor));
  check_same_device(op, "normalizer", *tensor, "mask", like);
  n.type = tensor->scalar_type();
  CHECK_TYPE(n.type == ScalarType::Float || n.type == ScalarType::Double || n.type == ScalarType::Long || n.type == ScalarType::Int, op,
             ": `normalizer` must be float32, float64, int64 or int32, got ", torch::headeronly::toString(n.type));
  n.data = tensor->const_data_ptr();
  return n;
}

enum Aggregate : int { kTokenMean = 0, kTokenSum = 1, kSeqMeanTokenSum = 2, kSeqMeanTokenMean = 3, kSeqMeanTokenSumNorm = 4 };

// What is left of a variance below this share of the mean square is the rounding of both.
HOST_DEVICE double beyond_rounding(double variance, double mean_square) {
  constexpr double kNoise = 1.0 / (int64_t{1} << 40);
  return variance > kNoise * mean_square ? variance : 0.0;
}

// Every loss reduction starts with these two terms.
constexpr int kWeight = 0, kLoss = 1;

// What a reduction R leaves of a row is an R::Summary: R's terms and how they fold, and the statistics that they become. It knows
// neither where the terms came from nor the loss's dtype, so that all losses of a form share the code that finishes them.

// How many of S's last terms are aggregated like the loss; they stand behind its statistics.
template <class S, class = void> constexpr int kAlsoAggregated = 0;
template <class S> constexpr int kAlsoAggregated<S, std::void_t<decltype(S::kAggregated)>> = S::kAggregated;

template <class S>
struct LossTotals {
  static constexpr int kSums = 1 + kAlsoAggregated<S>;
  Terms<S> terms;
  double sequences, longest;
  double sums[kSums];  // the loss, and what is aggregated like it
};
template <class S>
HOST_DEVICE void merge(LossTotals<S>& into, const LossTotals<S>& other) {
  merge(into.terms, other.terms);
  into.sequences += other.sequences;
  into.longest = fold_in(Fold::kMax, into.longest, other.longest);
  for (int k = 0; k < LossTotals<S>::kSums; ++k) into.sums[k] += other.sums[k];
}

// A sum over the rows of squares around a mean, which the totals give: S::spread(a row's terms, the totals).
struct Spread {
  double sum;
};
HOST_DEVICE void merge(Spread& into, const Spread& other) { into.sum += other.sum; }

template <class S>
struct LossFinish {
  const double* partial;  // [pieces, K]
  Reals loss, stats;      // [], [S::kStats + kAlsoAggregated<S>]
  double* row_weight;     // [rows]: d loss / d (sum_t w l) of the row
  Rows rows;
  int aggregate;
  Normalizer normalizer;

  template <class Team>
  HOST_DEVICE void operator()(const Team& team) const {
    constexpr int kSums = LossTotals<S>::kSums;
    LossTotals<S> mine{Terms<S>::start(), 0.0, 0.0, {}};
    for (int64_t row = team.rank; row < rows.rows; row += team.size) {
      const Terms<S> t = row_terms<S>(partial, rows, row);
      const bool empty = t.at[kWeight] == 0;
      LossTotals<S> next{t, empty ? 0.0 : 1.0, static_cast<double>(rows.end(row) - rows.begin(row)), {}};
      for (int k = 0; k < kSums; ++k) {
        const double sum = t.at[k == 0 ? kLoss : S::kTerms - kSums + k];
        next.sums[k] = aggregate == kSeqMeanTokenMean && !empty ? sum / t.at[kWeight] : sum;
      }
      merge(mine, next);
    }
    const LossTotals<S> total = team.merge_all(mine);
    const double otherwise = aggregate == kTokenMean ? total.terms.at[kWeight] : aggregate == kTokenSum ? 1.0 : total.sequences;
    const double divisor = normalizer.get(otherwise) * (aggregate == kSeqMeanTokenSumNorm ? total.longest : 1.0);
    const double scale = divisor != 0 ? 1.0 / divisor : 0.0;  // no token, no loss
    Spread spread{0.0};
    for (int64_t row = team.rank; row < rows.rows; row += team.size) {
      const Terms<S> t = row_terms<S>(partial, rows, row);
      const double weight = t.at[kWeight];
      row_weight[row] = weight == 0 ? 0.0 : aggregate == kSeqMeanTokenMean ? scale / weight : scale;
      if (weight != 0) merge(spread, Spread{S::spread(t, total.terms)});
    }
    spread = team.merge_all(spread);
    if (team.rank == 0) {
      for (int k = 0; k < kSums; ++k) {
        const double mean = divisor != 0 ? total.sums[k] / divisor : 0.0;
        k == 0 ? loss.put(0, mean) : stats.put(S::kStats + k - 1, mean);
      }
      S::write_stats(total.terms, spread.sum, stats);
    }
  }
};

struct LossOutputs {
  Tensor loss, stats, row_weight;
};

// The forward pass of a loss: R's per-token terms, aggregated.
template <class R>
LossOutputs aggregate_loss(const char* op, const Tensor& like, const Rows& rows, const Mask& mask, const R& r, int64_t aggregate,
                           const OptionalTensor& normalizer, double normalizer_value) {
  CHECK_VALUE(aggregate >= kTokenMean && aggregate <= kSeqMeanTokenSumNorm, op, ": unknown `aggregate` code ", aggregate);
  using S = typename R::Summary;
  LossOutputs o{empty(like, {}), empty(like, {S::kStats + kAlsoAggregated<S>}), empty(like, {rows.rows}, ScalarType::Double)};
  const Tensor partial = partial_terms(like, rows, R::kTerms);
  reduce_rows(like, rows, mask, r, out<double>(partial));
  run_team(like, LossFinish<S>{in<double>(partial), reals(o.loss), reals(o.stats), out<double>(o.row_weight), rows,
                               static_cast<int>(aggregate), normalizer_view(op, normalizer, normalizer_value, like)});
  return o;
}

// The slopes of an argument whose gradient may not be asked for: then empty.
inline Tensor empty_slopes(const Tensor& like, const Rows& rows, bool needed) {
  return needed ? empty_tokens(like, rows) : empty(like, {0});
}

template <class A>
struct LossBackward {
  const A* grad;             // []
  const A* slope;            // a value a token
  const double* row_weight;  // [rows]
  A* grad_input;             // like slope
  double share = 0;

  HOST_DEVICE LossBackward of_row(int64_t row) const { return {grad, slope, row_weight, grad_input, *grad * row_weight[row]}; }
  HOST_DEVICE void operator()(int64_t, int64_t i, double) const {
    grad_input[i] = static_cast<A>(slope[i] != 0 ? share * slope[i] : 0.0);
  }
};

// The backward pass of every loss here, for one of its arguments.
inline Tensor ppo_loss_backward(Tensor grad, Tensor slope_, Tensor row_weight, OptionalTensor cu_seqlens) {
  const char* op = "ppo_loss_backward";
  const OptionalTensor offsets = contiguous_offsets(op, cu_seqlens, "slope", slope_);
  const Tensor slope = dense(slope_);
  const Rows rows = rows_view(op, slope, offsets);
  CHECK_VALUE(grad.numel() == 1 && grad.scalar_type() == slope.scalar_type() && row_weight.numel() == rows.rows, op,
              ": the tensors given to the backward pass do not belong together");
  Tensor grad_input = empty_tokens(slope, rows);
  for_real(slope.scalar_type(), op, "slope", [&](auto zero) {
    using A = decltype(zero);
    for_each(slope, rows, Mask{}, LossBackward<A>{in<A>(grad), in<A>(slope), in<double>(row_weight), out<A>(grad_input)});
  });
  return grad_input;
}

// ---------------------------------------------------------------------------------------------------------------------
// Policy

enum PolicyForm : int { kPpo = 0, kCispo = 1 };

struct PolicyOptions {
  double clip_low, clip_high, dual_clip, log_ratio_clip;  // infinity for no dual clip, no log-ratio clip
  bool cispo;
};

template <class V>
struct PolicyRatio {
  V log, ratio, bounded;  // bounded: the clipped ratio
  V by_logprob;           // d ratio / d logprob
};

// `raw` is the difference of log-probs of one token, or the mean of a sequence's.
template <class A, class V>
HOST_DEVICE PolicyRatio<V> policy_ratio(V raw, const PolicyOptions& o) {
  const V log_ratio = clamp(raw, -o.log_ratio_clip, o.log_ratio_clip);
  const V ratio = exp_for<A>(log_ratio);
  return {log_ratio, ratio, clamp(ratio, 1.0 - o.clip_low, 1.0 + o.clip_high), ratio * clamp_slope(raw, -o.log_ratio_clip, o.log_ratio_clip)};
}

template <class V>
struct PolicyToken {
  V loss;
  V clipped, dual_clipped;     // 0 or 1
  V by_logprob, by_advantage;  // partial derivatives
};

// Where the clipped branch is not larger, it is equal to the other with an equal slope, or smaller: the slope is -A either way.
template <class V>
HOST_DEVICE PolicyToken<V> ppo_step(const PolicyRatio<V>& r, V advantage, const PolicyOptions& o) {
  const V zero = all<V>(0.0), one = all<V>(1.0);
  const V free_loss = -advantage * r.ratio, clipped_loss = -advantage * r.bounded;
  const V surrogate = free_loss > clipped_loss ? free_loss : clipped_loss;
  const V ceiling = advantage < 0 ? -advantage * o.dual_clip : all<V>(std::numeric_limits<double>::infinity());
  const V kept_share = max_share(ceiling, surrogate), free_share = max_share(free_loss, clipped_loss);
  const V by_ratio = clipped_loss > free_loss ? zero : -advantage;
  const V by_ceiling = kept_share < 1 ? (1.0 - kept_share) * o.dual_clip : zero;
  return {surrogate > ceiling ? ceiling : surrogate, clipped_loss > free_loss ? one : zero, surrogate > ceiling ? one : zero,
          kept_share * by_ratio * r.by_logprob, -kept_share * (free_share * r.ratio + (1.0 - free_share) * r.bounded) - by_ceiling};
}

template <class V>
HOST_DEVICE PolicyToken<V> cispo_step(const PolicyRatio<V>& r, V logprob, V advantage) {
  const V zero = all<V>(0.0), one = all<V>(1.0);
  return {-advantage * r.bounded * logprob, r.bounded != r.ratio ? one : zero, zero, -advantage * r.bounded, -r.bounded * logprob};
}

template <class V>
HOST_DEVICE PolicyToken<V> policy_step(const PolicyRatio<V>& r, V logprob, V advantage, const PolicyOptions& o) {
  return o.cispo ? cispo_step(r, logprob, advantage) : ppo_step(r, advantage, o);
}

// The mean of logprob - old_logprob of a row, from the partial sums of the launch before.
template <class A>
struct LogRatioSum {  // -> sum w, sum w (logprob - old_logprob)
  static constexpr int kTerms = 2;
  HOST_DEVICE static constexpr Fold fold(int) { return Fold::kSum; }
  static constexpr bool kSimd = true;
  const A *logprobs, *old_logprobs;
  template <class V, class At>
  HOST_DEVICE void terms(int64_t, At i, V weight, V* t) const {
    t[0] = weight;
    t[1] = weight * (weight != 0 ? load_at(logprobs, i) - load_at(old_logprobs, i) : all<V>(0.0));
  }
};

template <class A, bool kSequence>
struct PolicyInputs {
  const A *logprobs, *old_logprobs;  // a value a token
  const A* advantages;               // a value a token, or a row
  bool advantage_a_row;
  PolicyOptions options;
  const double* partial;  // at sequence level: LogRatioSum's, by the pieces of `rows`
  Rows rows;
  PolicyRatio<double> row_ratio;
  double row_advantage;

  HOST_DEVICE PolicyInputs of_row(int64_t row) const {
    PolicyInputs p = *this;
    if constexpr (kSequence) {
      const Terms<LogRatioSum<A>> sums = row_terms<LogRatioSum<A>>(partial, rows, row);
      p.row_ratio = policy_ratio<A>(sums.at[0] != 0 ? sums.at[1] / sums.at[0] : 0.0, options);
    }
    if (advantage_a_row) p.row_advantage = advantages[row];
    return p;
  }
  // What stands off the mask counts as 0 throughout, so that its terms are 0 once weighted.
  template <class V, class At>
  HOST_DEVICE PolicyRatio<V> ratio(At i, V weight) const {
    if constexpr (kSequence) return {all<V>(row_ratio.log), all<V>(row_ratio.ratio), all<V>(row_ratio.bounded), all<V>(row_ratio.by_logprob)};
    else return policy_ratio<A>(weight != 0 ? load_at(logprobs, i) - load_at(old_logprobs, i) : all<V>(0.0), options);
  }
  template <class V, class At>
  HOST_DEVICE PolicyToken<V> step(const PolicyRatio<V>& r, At i, V weight) const {
    V advantage = all<V>(row_advantage);
    if (!advantage_a_row) advantage = load_at(advantages, i);
    advantage = weight != 0 ? advantage : all<V>(0.0);
    return policy_step(r, options.cispo && weight != 0 ? load_at(logprobs, i) : all<V>(0.0), advantage, options);
  }
};

template <bool kSequence>
struct PolicySummary {
  enum { kClipped = 2, kDualClipped, kHalfSquare, kNegLogRatio, kRatio, kRatioSquare, kRatioMin, kRatioMax, kEnd };
  static constexpr int kTerms = kEnd;
  static constexpr int kStats = 9;
  HOST_DEVICE static constexpr Fold fold(int k) { return k == kRatioMin ? Fold::kMin : k == kRatioMax ? Fold::kMax : Fold::kSum; }

  // sum_t w (r - mean)^2: from squares around 1, where the ratios of tokens live; a sequence has one ratio.
  HOST_DEVICE static double spread(const Terms<PolicySummary>& row, const Terms<PolicySummary>& total) {
    const double n = row.at[kWeight], mean = total.at[kRatio] / total.at[kWeight], off_one = mean - 1.0;
    if constexpr (kSequence) return n * (row.at[kRatioMin] - mean) * (row.at[kRatioMin] - mean);
    else return row.at[kRatioSquare] - 2.0 * off_one * (row.at[kRatio] - n) + n * off_one * off_one;
  }

  // The order is ops/ppo_loss.py's POLICY_STATS.
  HOST_DEVICE static void write_stats(const Terms<PolicySummary>& total, double spread, const Reals& stats) {
    const double n = total.at[kWeight];
    const bool any = n != 0;
    const double mean = any ? total.at[kRatio] / n : 0.0, variance = any ? spread / n : 0.0;
    stats.put(0, any ? total.at[kClipped] / n : 0.0);
    stats.put(1, any ? total.at[kDualClipped] / n : 0.0);
    stats.put(2, any ? total.at[kHalfSquare] / n : 0.0);
    stats.put(3, any ? total.at[kNegLogRatio] / n : 0.0);
    stats.put(4, mean);
    stats.put(5, any ? total.at[kRatioMin] : 0.0);
    stats.put(6, any ? total.at[kRatioMax] : 0.0);
    stats.put(7, beyond_rounding(variance, variance + mean * mean));
    stats.put(8, n);
  }
};

template <class A, bool kSequence>
struct PolicyTerms {
  using Summary = PolicySummary<kSequence>;
  static constexpr int kTerms = Summary::kTerms;
  static constexpr bool kSimd = true;
  HOST_DEVICE static constexpr Fold fold(int k) { return Summary::fold(k); }

  PolicyInputs<A, kSequence> inputs;
  A* slope;  // a value a token

  HOST_DEVICE PolicyTerms of_row(int64_t row) const { return {inputs.of_row(row), slope}; }

  template <class V, class At>
  HOST_DEVICE void terms(int64_t, At i, V weight, V* t) const {
    const PolicyRatio<V> r = inputs.ratio(i, weight);
    const PolicyToken<V> token = inputs.step(r, i, weight);
    const V infinity = all<V>(std::numeric_limits<double>::infinity());
    t[kWeight] = weight;
    t[kLoss] = weight * token.loss;
    t[Summary::kClipped] = weight * token.clipped;
    t[Summary::kDualClipped] = weight * token.dual_clipped;
    t[Summary::kHalfSquare] = weight * 0.5 * r.log * r.log;
    t[Summary::kNegLogRatio] = -weight * r.log;
    t[Summary::kRatio] = weight * r.ratio;
    t[Summary::kRatioSquare] = weight * (r.ratio - 1.0) * (r.ratio - 1.0);
    t[Summary::kRatioMin] = weight != 0 ? r.ratio : infinity;
    t[Summary::kRatioMax] = weight != 0 ? r.ratio : -infinity;
    store_at(slope, i, weight != 0 ? weight * token.by_logprob : all<V>(0.0));
  }
};

// The slopes by the advantages: of each token's own, or of one that the tokens of a row share.
template <class A, bool kSequence>
struct AdvantageSlopes {
  PolicyInputs<A, kSequence> inputs;
  A* slope;
  HOST_DEVICE AdvantageSlopes of_row(int64_t row) const { return {inputs.of_row(row), slope}; }
  HOST_DEVICE void operator()(int64_t, int64_t i, double weight) const {
    store_at(slope, i, weight * inputs.step(inputs.ratio(i, weight), i, weight).by_advantage);
  }
};

template <class A, bool kSequence>
struct AdvantageSum {
  static constexpr int kTerms = 1;
  static constexpr bool kSimd = true;
  HOST_DEVICE static constexpr Fold fold(int) { return Fold::kSum; }
  PolicyInputs<A, kSequence> inputs;
  HOST_DEVICE AdvantageSum of_row(int64_t row) const { return {inputs.of_row(row)}; }
  template <class V, class At>
  HOST_DEVICE void terms(int64_t, At i, V weight, V* t) const {
    t[0] = weight * inputs.step(inputs.ratio(i, weight), i, weight).by_advantage;
  }
};

// The terms of a reduction that has one, and sums it.
struct OneSum {
  static constexpr int kTerms = 1;
  HOST_DEVICE static constexpr Fold fold(int) { return Fold::kSum; }
};

struct AdvantageSumFinish {
  const double* partial;
  Reals advantage_slope;  // [rows]
  Rows rows;
  template <class Team>
  HOST_DEVICE void operator()(const Team& team) const {
    for (int64_t row = team.rank; row < rows.rows; row += team.size) advantage_slope.put(row, row_terms<OneSum>(partial, rows, row).at[0]);
  }
};

template <class A, class Inputs>
Tensor log_ratio_sums(const Tensor& like, const Rows& rows, const Mask& weights, const Inputs& inputs) {
  Tensor sums = partial_terms(like, rows, LogRatioSum<A>::kTerms);
  reduce_rows(like, rows, weights, LogRatioSum<A>{inputs.logprobs, inputs.old_logprobs}, out<double>(sums));
  return sums;
}

// advantages: like logprobs, or [B, 1]. -> loss, stats, row_weight, and the slopes by logprobs and, where needed, by advantages.
inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> ppo_policy_loss(
    Tensor logprobs_, Tensor old_logprobs_, Tensor advantages_, OptionalTensor mask_, OptionalTensor cu_seqlens, double clip_low,
    double clip_high, double dual_clip, double log_ratio_clip, bool sequence_level, int64_t form, int64_t aggregate,
    OptionalTensor normalizer, double normalizer_value, bool need_advantages) {
  const char* op = "ppo_policy_loss";
  CHECK_VALUE(form == kPpo || form == kCispo, op, ": unknown `loss_type` code ", form);
  const OptionalTensor offsets = contiguous_offsets(op, cu_seqlens, "logprobs", logprobs_);
  check_twin(op, "old_logprobs", old_logprobs_, "logprobs", logprobs_);
  const Rows rows = rows_view(op, logprobs_, offsets);
  const bool advantage_a_row = advantages_.dim() == 2 && advantages_.size(0) == rows.rows && advantages_.size(1) == 1;
  if (!advantage_a_row) check_like(op, "advantages", advantages_, "logprobs", logprobs_);
  check_same_device(op, "advantages", advantages_, "logprobs", logprobs_);
  CHECK_TYPE(advantages_.scalar_type() == logprobs_.scalar_type(), op, ": `advantages` must have the dtype of `logprobs`");
  const Tensor logprobs = dense(logprobs_), old_logprobs = dense(old_logprobs_), advantages = dense(advantages_);
  const OptionalTensor mask = contiguous_mask(op, mask_, "logprobs", logprobs_);
  const Mask weights = mask_view(op, mask);
  Tensor slope = empty_tokens(logprobs, rows);
  Tensor advantage_slope = advantage_a_row && need_advantages ? empty(advantages, advantages.sizes()) : empty_slopes(logprobs, rows, need_advantages);
  LossOutputs o;
  auto run = [&](auto zero, auto sequence) {
    using A = decltype(zero);
    constexpr bool kSequence = decltype(sequence)::value;
    PolicyInputs<A, kSequence> inputs{in<A>(logprobs), in<A>(old_logprobs), in<A>(advantages), advantage_a_row,
                                      {clip_low, clip_high, dual_clip, log_ratio_clip, form == kCispo}, nullptr, rows, {}, 0.0};
    OptionalTensor sums;
    if constexpr (kSequence) inputs.partial = in<double>(sums.emplace(log_ratio_sums<A>(logprobs, rows, weights, inputs)));
    const PolicyTerms<A, kSequence> terms{inputs, out<A>(slope)};
    o = aggregate_loss(op, logprobs, rows, weights, terms, aggregate, normalizer, normalizer_value);
    if (!need_advantages) return;
    if (advantage_a_row) {
      using Sum = AdvantageSum<A, kSequence>;
      const Tensor partial = partial_terms(logprobs, rows, Sum::kTerms);
      reduce_rows(logprobs, rows, weights, Sum{inputs}, out<double>(partial));
      run_team(logprobs, AdvantageSumFinish{in<double>(partial), reals(advantage_slope), rows});
    } else {
      for_each(logprobs, rows, weights, AdvantageSlopes<A, kSequence>{inputs, out<A>(advantage_slope)});
    }
  };
  for_real(logprobs.scalar_type(), op, "logprobs", [&](auto zero) { sequence_level ? run(zero, std::true_type{}) : run(zero, std::false_type{}); });
  return {o.loss, o.stats, o.row_weight, slope, advantage_slope};
}

// ---------------------------------------------------------------------------------------------------------------------
// Value

template <class V>
struct ValueToken {
  V loss, clipped;
  V by_value, by_old_value, by_return;
};

template <class V>
HOST_DEVICE ValueToken<V> value_step(V value, V old_value, V target, double clip) {  // clip: infinity for none
  const V zero = all<V>(0.0), one = all<V>(1.0);
  const V low = old_value - clip, high = old_value + clip;
  const V bounded = clamp(value, low, high);
  const V free_error = value - target, bounded_error = bounded - target;
  const V free_square = free_error * free_error, bounded_square = bounded_error * bounded_error;
  const V free_share = max_share(free_square, bounded_square);
  const V through = (1.0 - free_share) * bounded_error, inside = clamp_slope(value, low, high);
  return {0.5 * (free_square > bounded_square ? free_square : bounded_square), bounded_square > free_square ? one : zero,
          free_share * free_error + through * inside, through * (1.0 - inside), -(free_share * free_error + through)};
}

struct ValueSummary {
  enum { kClipped = 2, kError, kValue, kReturn, kReturnSquare, kResidual, kEnd };
  static constexpr int kTerms = kEnd;
  static constexpr int kStats = 6;
  HOST_DEVICE static constexpr Fold fold(int) { return Fold::kSum; }

  HOST_DEVICE static double spread(const Terms<ValueSummary>&, const Terms<ValueSummary>&) { return 0.0; }

  // The order is ops/ppo_loss.py's VALUE_STATS. Explained variance is 1 - Var(R - v) / Var(R), 0 where the returns do not vary.
  HOST_DEVICE static void write_stats(const Terms<ValueSummary>& total, double, const Reals& stats) {
    const double n = total.at[kWeight];
    const bool any = n != 0;
    const double scale = any ? 1.0 / n : 0.0;
    const double mean_return = total.at[kReturn] * scale, mean_residual = total.at[kResidual] * scale;
    const double return_square = total.at[kReturnSquare] * scale;
    const double return_variance = beyond_rounding(return_square - mean_return * mean_return, return_square);
    const double residual_variance = total.at[kError] * scale - mean_residual * mean_residual;
    stats.put(0, total.at[kClipped] * scale);
    stats.put(1, total.at[kError] * scale);
    stats.put(2, total.at[kValue] * scale);
    stats.put(3, mean_return);
    stats.put(4, return_variance > 0 ? 1.0 - residual_variance / return_variance : 0.0);
    stats.put(5, n);
  }
};

template <class A>
struct ValueTerms {
  using Summary = ValueSummary;
  static constexpr int kTerms = Summary::kTerms;
  static constexpr bool kSimd = true;
  HOST_DEVICE static constexpr Fold fold(int k) { return Summary::fold(k); }

  const A *values, *old_values, *returns;  // a value a token
  double clip;
  A* slope;  // a value a token

  template <class V, class At>
  HOST_DEVICE void terms(int64_t, At i, V weight, V* t) const {
    const V zero = all<V>(0.0);
    const V value = weight != 0 ? load_at(values, i) : zero, old_value = weight != 0 ? load_at(old_values, i) : zero,
            target = weight != 0 ? load_at(returns, i) : zero;
    const ValueToken<V> token = value_step(value, old_value, target, clip);
    const V residual = target - value;
    t[kWeight] = weight;
    t[kLoss] = weight * token.loss;
    t[Summary::kClipped] = weight * token.clipped;
    t[Summary::kError] = weight * residual * residual;
    t[Summary::kValue] = weight * value;
    t[Summary::kReturn] = weight * target;
    t[Summary::kReturnSquare] = weight * target * target;
    t[Summary::kResidual] = weight * residual;
    store_at(slope, i, weight * token.by_value);
  }
};

template <class A>
struct TargetSlopes {
  const A *values, *old_values, *returns;
  double clip;
  A *old_slope, *return_slope;  // a value a token, or null
  HOST_DEVICE void operator()(int64_t, int64_t i, double weight) const {
    const ValueToken<double> token = value_step<double>(values[i], old_values[i], returns[i], clip);
    const bool on = weight != 0;
    if (old_slope) old_slope[i] = static_cast<A>(on ? weight * token.by_old_value : 0.0);
    if (return_slope) return_slope[i] = static_cast<A>(on ? weight * token.by_return : 0.0);
  }
};

// -> loss, stats, row_weight, and the slopes by values and, where needed, by old_values and by returns.
inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ppo_value_loss(
    Tensor values_, Tensor old_values_, Tensor returns_, OptionalTensor mask_, OptionalTensor cu_seqlens, double clip, int64_t aggregate,
    OptionalTensor normalizer, double normalizer_value, bool need_old_values, bool need_returns) {
  const char* op = "ppo_value_loss";
  const OptionalTensor offsets = contiguous_offsets(op, cu_seqlens, "values", values_);
  check_twin(op, "old_values", old_values_, "values", values_);
  check_twin(op, "returns", returns_, "values", values_);
  const Rows rows = rows_view(op, values_, offsets);
  const Tensor values = dense(values_), old_values = dense(old_values_), returns = dense(returns_);
  const OptionalTensor mask = contiguous_mask(op, mask_, "values", values_);
  const Mask weights = mask_view(op, mask);
  Tensor slope = empty_tokens(values, rows), old_slope = empty_slopes(values, rows, need_old_values),
         return_slope = empty_slopes(values, rows, need_returns);
  LossOutputs o;
  for_real(values.scalar_type(), op, "values", [&](auto zero) {
    using A = decltype(zero);
    const ValueTerms<A> terms{in<A>(values), in<A>(old_values), in<A>(returns), clip, out<A>(slope)};
    o = aggregate_loss(op, values, rows, weights, terms, aggregate, normalizer, normalizer_value);
    if (need_old_values || need_returns)
      for_each(values, rows, weights, TargetSlopes<A>{terms.values, terms.old_values, terms.returns, clip,
                                                      need_old_values ? out<A>(old_slope) : nullptr, need_returns ? out<A>(return_slope) : nullptr});
  });
  return {o.loss, o.stats, o.row_weight, slope, old_slope, return_slope};
}

}  // namespace rlhf_fast::RLHF_UNIT
