// The clipped PPO losses (Schulman et al. 2017, arXiv 1707.06347, eq. 7) with their statistics, and their near relatives.
//
// Policy, per token, with d = clamp(logprob - old_logprob, +-log_ratio_clip), r = exp(d), A the advantage:
//   ppo     l = max(-A r, -A clamp(r, 1 - clip_low, 1 + clip_high));   where A < 0, with a dual clip c (Ye et al. 2019): l = min(l, -A c)
//   cispo   l = -A c logprob,  c = clamp(r, 1 - clip_low, 1 + clip_high) a constant (MiniMax-M1 2025, arXiv 2506.13585, eq. 4)
// At sequence level (GSPO: Zheng et al. 2025, arXiv 2507.18071, in the token form of its eq. 14) d is clamped from the mean of
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

// Every loss reduction starts with these two terms.
constexpr int kWeight = 0, kLoss = 1;

template <class R>
struct LossTotals {
  Terms<R> terms;
  double sequences, loss, longest;
};
template <class R>
HOST_DEVICE void merge(LossTotals<R>& into, const LossTotals<R>& other) {
  merge(into.terms, other.terms);
  into.sequences += other.sequences;
  into.loss += other.loss;
  into.longest = fold_in(Fold::kMax, into.longest, other.longest);
}

template <class R, class A>
struct LossFinish {
  const double* partial;  // [pieces, K]
  A *loss, *stats;        // [], [R::kStats]
  double* row_weight;     // [rows]: d loss / d (sum_t w l) of the row
  Rows rows;
  int aggregate;
  Normalizer normalizer;

  template <class Team>
  HOST_DEVICE void operator()(const Team& team) const {
    LossTotals<R> mine{Terms<R>::start(), 0.0, 0.0, 0.0};
    for (int64_t row = team.rank; row < rows.rows; row += team.size) {
      const Terms<R> t = row_terms<R>(partial, rows, row);
      const bool empty = t.at[kWeight] == 0;
      const double row_loss = aggregate == kSeqMeanTokenMean && !empty ? t.at[kLoss] / t.at[kWeight] : t.at[kLoss];
      merge(mine, LossTotals<R>{t, empty ? 0.0 : 1.0, row_loss, static_cast<double>(rows.end(row) - rows.begin(row))});
    }
    const LossTotals<R> total = team.merge_all(mine);
    const double otherwise = aggregate == kTokenMean ? total.terms.at[kWeight] : aggregate == kTokenSum ? 1.0 : total.sequences;
    const double divisor = normalizer.get(otherwise) * (aggregate == kSeqMeanTokenSumNorm ? total.longest : 1.0);
    const double scale = divisor != 0 ? 1.0 / divisor : 0.0;  // no token, no loss
    if (team.rank == 0) {
      *loss = static_cast<A>(divisor != 0 ? total.loss / divisor : 0.0);
      R::write_stats(total.terms, stats);
    }
    for (int64_t row = team.rank; row < rows.rows; row += team.size) {
      const double weight = row_terms<R>(partial, rows, row).at[kWeight];
      row_weight[row] = weight == 0 ? 0.0 : aggregate == kSeqMeanTokenMean ? scale / weight : scale;
    }
  }
};

struct LossOutputs {
  Tensor loss, stats, row_weight;
};

// The forward pass of a loss: R's per-token terms, aggregated.
template <class R, class A>
LossOutputs aggregate_loss(const char* op, const Tensor& like, const Rows& rows, const Mask& mask, const R& r, int64_t aggregate,
                           const OptionalTensor& normalizer, double normalizer_value) {
  CHECK_VALUE(aggregate >= kTokenMean && aggregate <= kSeqMeanTokenSumNorm, op, ": unknown `aggregate` code ", aggregate);
  LossOutputs o{empty(like, {}), empty(like, {R::kStats}), empty(like, {rows.rows}, ScalarType::Double)};
  const Tensor partial = partial_terms(like, rows, R::kTerms);
  reduce_rows(like, rows, mask, r, out<double>(partial));
  run_team(like, LossFinish<R, A>{in<double>(partial), out<A>(o.loss), out<A>(o.stats), out<double>(o.row_weight), rows,
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
};

struct PolicyRatio {
  double log, ratio, by_logprob;
};

// `raw` is the difference of log-probs of one token, or the mean of a sequence's.
template <class A>
HOST_DEVICE PolicyRatio policy_ratio(double raw, const PolicyOptions& o) {
  const double log_ratio = clamp(raw, -o.log_ratio_clip, o.log_ratio_clip);
  const double ratio = exp_for<A>(log_ratio);
  return {log_ratio, ratio, ratio * clamp_slope(raw, -o.log_ratio_clip, o.log_ratio_clip)};
}

struct PolicyToken {
  double loss;
  double clipped, dual_clipped;      // 0 or 1
  double by_logprob, by_advantage;   // partial derivatives
};

HOST_DEVICE PolicyToken ppo_step(const PolicyRatio& r, double advantage, const PolicyOptions& o) {
  const double low = 1.0 - o.clip_low, high = 1.0 + o.clip_high;
  const double bounded = clamp(r.ratio, low, high);
  const double free_loss = -advantage * r.ratio, clipped_loss = -advantage * bounded;
  const double free_share = max_share(free_loss, clipped_loss);
  const double clipped_share = 1.0 - free_share;
  const double clipped_surrogate = free_loss > clipped_loss ? free_loss : clipped_loss;
  const double bound_loss = -advantage * o.dual_clip;  // infinite or NaN without a dual clip, and then not looked at
  // & and not &&: a branch would keep the loop from becoming SIMD.
  const bool dual = (advantage < 0) & (o.dual_clip < std::numeric_limits<double>::infinity());
  const bool bound = dual & (clipped_surrogate > bound_loss);
  const double kept_share = dual ? 1.0 - max_share(clipped_surrogate, bound_loss) : 1.0;
  const double by_ratio = kept_share * -advantage * (free_share + clipped_share * clamp_slope(r.ratio, low, high));
  return {bound ? bound_loss : clipped_surrogate, clipped_loss > free_loss ? 1.0 : 0.0, bound ? 1.0 : 0.0, by_ratio * r.by_logprob,
          -kept_share * (free_share * r.ratio + clipped_share * bounded) - (dual ? (1.0 - kept_share) * o.dual_clip : 0.0)};
}

HOST_DEVICE PolicyToken cispo_step(const PolicyRatio& r, double logprob, double advantage, const PolicyOptions& o) {
  const double bounded = clamp(r.ratio, 1.0 - o.clip_low, 1.0 + o.clip_high);
  return {-advantage * bounded * logprob, bounded != r.ratio ? 1.0 : 0.0, 0.0, -advantage * bounded, -bounded * logprob};
}

// The mean of logprob - old_logprob of a row, from the partial sums of the launch before.
template <class A>
struct LogRatioSum {  // -> sum w, sum w (logprob - old_logprob)
  static constexpr int kTerms = 2;
  HOST_DEVICE static constexpr Fold fold(int) { return Fold::kSum; }
  const A *logprobs, *old_logprobs;
  HOST_DEVICE void terms(int64_t, int64_t i, double weight, double* t) const {
    t[0] = weight;
    t[1] = weight != 0 ? weight * (static_cast<double>(logprobs[i]) - old_logprobs[i]) : 0.0;
  }
};

template <class A, int kForm, bool kSequence, bool kRowAdvantage>
struct PolicyInputs {
  const A *logprobs, *old_logprobs;  // a value a token
  const A* advantages;               // a value a token, or a row
  PolicyOptions options;
  const double* partial;  // at sequence level: LogRatioSum's, by the pieces of `rows`
  Rows rows;
  PolicyRatio row_ratio;
  double row_advantage;

  HOST_DEVICE PolicyInputs of_row(int64_t row) const {
    PolicyInputs p = *this;
    if constexpr (kSequence) {
      const Terms<LogRatioSum<A>> sums = row_terms<LogRatioSum<A>>(partial, rows, row);
      p.row_ratio = policy_ratio<A>(sums.at[0] != 0 ? sums.at[1] / sums.at[0] : 0.0, options);
    }
    if constexpr (kRowAdvantage) p.row_advantage = advantages[row];
    return p;
  }
  HOST_DEVICE PolicyRatio ratio(int64_t i) const {
    if constexpr (kSequence) return row_ratio;
    else return policy_ratio<A>(static_cast<double>(logprobs[i]) - old_logprobs[i], options);
  }
  HOST_DEVICE PolicyToken step(const PolicyRatio& r, int64_t i) const {
    double advantage = row_advantage;
    if constexpr (!kRowAdvantage) advantage = advantages[i];
    if constexpr (kForm == kCispo) return cispo_step(r, logprobs[i], advantage, options);
    else return ppo_step(r, advantage, options);
  }
};

template <class A, int kForm, bool kSequence, bool kRowAdvantage>
struct PolicyTerms {
  enum { kClipped = 2, kDualClipped, kHalfSquare, kNegLogRatio, kRatio, kRatioSquare, kRatioMin, kRatioMax, kEnd };
  static constexpr int kTerms = kEnd;
  static constexpr int kStats = 9;
  HOST_DEVICE static constexpr Fold fold(int k) { return k == kRatioMin ? Fold::kMin : k == kRatioMax ? Fold::kMax : Fold::kSum; }

  PolicyInputs<A, kForm, kSequence, kRowAdvantage> inputs;
  A* slope;  // a value a token

  HOST_DEVICE PolicyTerms of_row(int64_t row) const { return {inputs.of_row(row), slope}; }

  HOST_DEVICE void terms(int64_t, int64_t i, double weight, double* t) const {
    const PolicyRatio r = inputs.ratio(i);
    const PolicyToken token = inputs.step(r, i);
    const bool on = weight != 0;
    t[kWeight] = weight;
    t[kLoss] = on ? weight * token.loss : 0.0;
    t[kClipped] = on ? weight * token.clipped : 0.0;
    t[kDualClipped] = on ? weight * token.dual_clipped : 0.0;
    t[kHalfSquare] = on ? weight * 0.5 * r.log * r.log : 0.0;
    t[kNegLogRatio] = on ? -weight * r.log : 0.0;
    t[kRatio] = on ? weight * r.ratio : 0.0;
    t[kRatioSquare] = on ? weight * (r.ratio - 1.0) * (r.ratio - 1.0) : 0.0;  // around 1, where ratios live
    t[kRatioMin] = on ? r.ratio : std::numeric_limits<double>::infinity();
    t[kRatioMax] = on ? r.ratio : -std::numeric_limits<double>::infinity();
    slope[i] = static_cast<A>(on ? weight * token.by_logprob : 0.0);
  }

  // The order is ops/ppo_loss.py's POLICY_STATS.
  HOST_DEVICE static void write_stats(const Terms<PolicyTerms>& total, A* stats) {
    const double n = total.at[kWeight];
    const bool any = n != 0;
    const double mean = any ? total.at[kRatio] / n : 0.0, off_one = mean - 1.0;
    stats[0] = static_cast<A>(any ? total.at[kClipped] / n : 0.0);
    stats[1] = static_cast<A>(any ? total.at[kDualClipped] / n : 0.0);
    stats[2] = static_cast<A>(any ? total.at[kHalfSquare] / n : 0.0);
    stats[3] = static_cast<A>(any ? total.at[kNegLogRatio] / n : 0.0);
    stats[4] = static_cast<A>(mean);
    stats[5] = static_cast<A>(any ? total.at[kRatioMin] : 0.0);
    stats[6] = static_cast<A>(any ? total.at[kRatioMax] : 0.0);
    const double variance = any ? total.at[kRatioSquare] / n - off_one * off_one : 0.0;
    stats[7] = static_cast<A>(variance > 0 ? variance : 0.0);
    stats[8] = static_cast<A>(n);
  }
};

// The slopes by the advantages: of each token's own, or of one that the tokens of a row share.
template <class A, int kForm, bool kSequence>
struct AdvantageSlopes {
  PolicyInputs<A, kForm, kSequence, false> inputs;
  A* slope;
  HOST_DEVICE AdvantageSlopes of_row(int64_t row) const { return {inputs.of_row(row), slope}; }
  HOST_DEVICE void operator()(int64_t, int64_t i, double weight) const {
    const double by_advantage = weight * inputs.step(inputs.ratio(i), i).by_advantage;
    slope[i] = static_cast<A>(weight != 0 ? by_advantage : 0.0);
  }
};

template <class A, int kForm, bool kSequence>
struct AdvantageSum {
  static constexpr int kTerms = 1;
  HOST_DEVICE static constexpr Fold fold(int) { return Fold::kSum; }
  PolicyInputs<A, kForm, kSequence, true> inputs;
  HOST_DEVICE AdvantageSum of_row(int64_t row) const { return {inputs.of_row(row)}; }
  HOST_DEVICE void terms(int64_t, int64_t i, double weight, double* t) const {
    const double by_advantage = weight * inputs.step(inputs.ratio(i), i).by_advantage;
    t[0] = weight != 0 ? by_advantage : 0.0;
  }
};

template <class R, class A>
struct AdvantageSumFinish {
  const double* partial;
  A* advantage_slope;  // [rows]
  Rows rows;
  template <class Team>
  HOST_DEVICE void operator()(const Team& team) const {
    for (int64_t row = team.rank; row < rows.rows; row += team.size)
      advantage_slope[row] = static_cast<A>(row_terms<R>(partial, rows, row).at[0]);
  }
};

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
  auto run = [&](auto zero, auto kind, auto sequence, auto row_advantage) {
    using A = decltype(zero);
    constexpr int kForm = decltype(kind)::value;
    constexpr bool kSequence = decltype(sequence)::value, kRowAdvantage = decltype(row_advantage)::value;
    PolicyInputs<A, kForm, kSequence, kRowAdvantage> inputs{in<A>(logprobs), in<A>(old_logprobs), in<A>(advantages),
                                                     {clip_low, clip_high, dual_clip, log_ratio_clip}, nullptr, rows, {}, 0.0};
    OptionalTensor sums;
    if constexpr (kSequence) {
      sums = partial_terms(logprobs, rows, LogRatioSum<A>::kTerms);
      reduce_rows(logprobs, rows, weights, LogRatioSum<A>{inputs.logprobs, inputs.old_logprobs}, out<double>(*sums));
      inputs.partial = in<double>(*sums);
    }
    using R = PolicyTerms<A, kForm, kSequence, kRowAdvantage>;
    o = aggregate_loss<R, A>(op, logprobs, rows, weights, R{inputs, out<A>(slope)}, aggregate, normalizer, normalizer_value);
    if (!need_advantages) return;
    if constexpr (kRowAdvantage) {
      using Sum = AdvantageSum<A, kForm, kSequence>;
      const Tensor partial = partial_terms(logprobs, rows, Sum::kTerms);
      reduce_rows(logprobs, rows, weights, Sum{inputs}, out<double>(partial));
      run_team(logprobs, AdvantageSumFinish<Sum, A>{in<double>(partial), out<A>(advantage_slope), rows});
    } else {
      for_each(logprobs, rows, weights, AdvantageSlopes<A, kForm, kSequence>{inputs, out<A>(advantage_slope)});
    }
  };
  for_real(logprobs.scalar_type(), op, "logprobs", [&](auto zero) {
    auto of_form = [&](auto kind) {
      auto at_level = [&](auto sequence) {
        advantage_a_row ? run(zero, kind, sequence, std::true_type{}) : run(zero, kind, sequence, std::false_type{});
      };
      sequence_level ? at_level(std::true_type{}) : at_level(std::false_type{});
    };
    form == kCispo ? of_form(std::integral_constant<int, kCispo>{}) : of_form(std::integral_constant<int, kPpo>{});
  });
  return {o.loss, o.stats, o.row_weight, slope, advantage_slope};
}

// ---------------------------------------------------------------------------------------------------------------------
// Value

struct ValueToken {
  double loss, clipped;
  double by_value, by_old_value, by_return;
};

HOST_DEVICE ValueToken value_step(double value, double old_value, double target, double clip) {  // clip: infinity for none
  const double low = old_value - clip, high = old_value + clip;
  const double bounded = clamp(value, low, high);
  const double free_error = value - target, bounded_error = bounded - target;
  const double free_square = free_error * free_error, bounded_square = bounded_error * bounded_error;
  const double free_share = max_share(free_square, bounded_square);
  const double through = (1.0 - free_share) * bounded_error, inside = clamp_slope(value, low, high);
  return {0.5 * (free_square > bounded_square ? free_square : bounded_square), bounded_square > free_square ? 1.0 : 0.0,
          free_share * free_error + through * inside, through * (1.0 - inside), -(free_share * free_error + through)};
}

template <class A>
struct ValueTerms {
  enum { kClipped = 2, kError, kValue, kReturn, kReturnSquare, kResidual, kEnd };
  static constexpr int kTerms = kEnd;
  static constexpr int kStats = 6;
  HOST_DEVICE static constexpr Fold fold(int) { return Fold::kSum; }

  const A *values, *old_values, *returns;  // a value a token
  double clip;
  A* slope;  // a value a token

  HOST_DEVICE void terms(int64_t, int64_t i, double weight, double* t) const {
    const ValueToken token = value_step(values[i], old_values[i], returns[i], clip);
    const bool on = weight != 0;
    const double residual = static_cast<double>(returns[i]) - values[i], target = returns[i];
    t[kWeight] = weight;
    t[kLoss] = on ? weight * token.loss : 0.0;
    t[kClipped] = on ? weight * token.clipped : 0.0;
    t[kError] = on ? weight * residual * residual : 0.0;
    t[kValue] = on ? weight * values[i] : 0.0;
    t[kReturn] = on ? weight * target : 0.0;
    t[kReturnSquare] = on ? weight * target * target : 0.0;
    t[kResidual] = on ? weight * residual : 0.0;
    slope[i] = static_cast<A>(on ? weight * token.by_value : 0.0);
  }

  // The order is ops/ppo_loss.py's VALUE_STATS. Explained variance is 1 - Var(R - v) / Var(R), 0 where the returns do not vary.
  HOST_DEVICE static void write_stats(const Terms<ValueTerms>& total, A* stats) {
    const double n = total.at[kWeight];
    const bool any = n != 0;
    const double scale = any ? 1.0 / n : 0.0;
    const double mean_return = total.at[kReturn] * scale, mean_residual = total.at[kResidual] * scale;
    const double return_variance = total.at[kReturnSquare] * scale - mean_return * mean_return;
    const double residual_variance = total.at[kError] * scale - mean_residual * mean_residual;
    stats[0] = static_cast<A>(total.at[kClipped] * scale);
    stats[1] = static_cast<A>(total.at[kError] * scale);
    stats[2] = static_cast<A>(total.at[kValue] * scale);
    stats[3] = static_cast<A>(mean_return);
    stats[4] = static_cast<A>(return_variance > 0 ? 1.0 - residual_variance / return_variance : 0.0);
    stats[5] = static_cast<A>(n);
  }
};

template <class A>
struct TargetSlopes {
  const A *values, *old_values, *returns;
  double clip;
  A *old_slope, *return_slope;  // a value a token, or null
  HOST_DEVICE void operator()(int64_t, int64_t i, double weight) const {
    const ValueToken token = value_step(values[i], old_values[i], returns[i], clip);
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
    o = aggregate_loss<ValueTerms<A>, A>(op, values, rows, weights, terms, aggregate, normalizer, normalizer_value);
    if (need_old_values || need_returns)
      for_each(values, rows, weights, TargetSlopes<A>{terms.values, terms.old_values, terms.returns, clip,
                                                      need_old_values ? out<A>(old_slope) : nullptr, need_returns ? out<A>(return_slope) : nullptr});
  });
  return {o.loss, o.stats, o.row_weight, slope, old_slope, return_slope};
}

}  // namespace rlhf_fast::RLHF_UNIT
