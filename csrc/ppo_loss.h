// The clipped PPO losses (Schulman et al. 2017, arXiv 1707.06347, eq. 7) with their statistics.
//
// Policy, per token, with d = clamp(logprob - old_logprob, +-log_ratio_clip), r = exp(d), A the advantage:
//   l = max(-A r, -A clamp(r, 1 - clip_low, 1 + clip_high));   where A < 0, with a dual clip c (Ye et al. 2019): l = min(l, -A c)
// Value, per token, with v_c = clamp(v, v_old - clip, v_old + clip):
//   l = max((v - R)^2, (v_c - R)^2) / 2
// Loss = sum_b u_b sum_t w_bt l_bt, the weights u of the rows as `aggregate` says.
//
// Forward is two launches (tokens -> chunks of rows, chunks -> loss, statistics and u), backward one; nothing is read on the
// host. Bytes a token in float32: forward 12 + mask read, nothing written; backward 12 + mask read, 4 written a gradient.
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

// A variance is a mean square less a squared mean. What is left below this share of the mean square is their rounding.
HOST_DEVICE double variance_or_zero(double mean_square, double mean) {
  constexpr double kNoise = 1.0 / (int64_t{1} << 40);
  const double variance = mean_square - mean * mean;
  return variance > kNoise * mean_square ? variance : 0.0;
}

// Every loss reduction starts with these two terms.
constexpr int kWeight = 0, kLoss = 1;

template <class R>
struct LossTotals {
  Terms<R> terms;
  double sequences, loss;
};
template <class R>
HOST_DEVICE void merge(LossTotals<R>& into, const LossTotals<R>& other) {
  merge(into.terms, other.terms);
  into.sequences += other.sequences;
  into.loss += other.loss;
}

template <class R, class A>
struct LossFinish {
  const double* partial;  // [rows * chunks, K]
  A *loss, *stats;        // [], [R::kStats]
  double* row_weight;     // [rows]: d loss / d (sum_t w l) of the row
  int64_t rows, length, chunks;
  int aggregate;
  Normalizer normalizer;

  template <class Team>
  HOST_DEVICE void operator()(const Team& team) const {
    LossTotals<R> mine{Terms<R>::start(), 0.0, 0.0};
    for (int64_t row = team.rank; row < rows; row += team.size) {
      const Terms<R> t = row_terms<R>(partial, row, chunks);
      const bool empty = t.at[kWeight] == 0;
      const double row_loss = aggregate == kSeqMeanTokenMean && !empty ? t.at[kLoss] / t.at[kWeight] : t.at[kLoss];
      merge(mine, LossTotals<R>{t, empty ? 0.0 : 1.0, row_loss});
    }
    const LossTotals<R> total = team.merge_all(mine);
    const double otherwise = aggregate == kTokenMean ? total.terms.at[kWeight] : aggregate == kTokenSum ? 1.0 : total.sequences;
    const double divisor = normalizer.get(otherwise) * (aggregate == kSeqMeanTokenSumNorm ? static_cast<double>(length) : 1.0);
    const double scale = divisor != 0 ? 1.0 / divisor : 0.0;  // no token, no loss
    if (team.rank == 0) {
      *loss = static_cast<A>(divisor != 0 ? total.loss / divisor : 0.0);
      R::write_stats(total.terms, stats);
    }
    for (int64_t row = team.rank; row < rows; row += team.size) {
      const double weight = row_terms<R>(partial, row, chunks).at[kWeight];
      row_weight[row] = weight == 0 ? 0.0 : aggregate == kSeqMeanTokenMean ? scale / weight : scale;
    }
  }
};

struct LossOutputs {
  Tensor loss, stats, row_weight;
};

// The forward pass of a loss: R's per-token terms over [B, T], aggregated.
template <class R, class A>
LossOutputs aggregate_loss(const char* op, const Tensor& like, const OptionalTensor& mask, const R& r, int64_t aggregate,
                           const OptionalTensor& normalizer, double normalizer_value) {
  CHECK_VALUE(aggregate >= kTokenMean && aggregate <= kSeqMeanTokenSumNorm, op, ": unknown `aggregate` code ", aggregate);
  const int64_t rows = like.size(0), length = like.size(1);
  LossOutputs o{empty(like, {}), empty(like, {R::kStats}),
                empty(like, {rows}, ScalarType::Double)};
  const Tensor partial = partial_terms(like, rows, length, R::kTerms);
  reduce_rows(like, rows, length, mask_view(op, mask), r, out<double>(partial));
  run_team(like, LossFinish<R, A>{in<double>(partial), out<A>(o.loss), out<A>(o.stats), out<double>(o.row_weight), rows, length,
                                  chunks_of(length), static_cast<int>(aggregate), normalizer_view(op, normalizer, normalizer_value, like)});
  return o;
}

inline void check_tokens(const char* op, const char* name, const Tensor& t) {
  CHECK_VALUE(t.dim() == 2, op, ": `", name, "` must be [B, T], got shape ", shape_of(t));
}

// ---------------------------------------------------------------------------------------------------------------------
// Policy

struct PolicyOptions {
  double clip_low, clip_high, dual_clip, log_ratio_clip;  // infinity for no dual clip, no log-ratio clip
};

struct PolicyToken {
  double loss, log_ratio, ratio;
  double clipped, dual_clipped;             // 0 or 1
  double loss_by_ratio, loss_by_advantage;  // partial derivatives
  double ratio_by_logprob;
};

HOST_DEVICE PolicyToken policy_step(double logprob, double old_logprob, double advantage, const PolicyOptions& o) {
  PolicyToken t;
  const double raw = logprob - old_logprob;
  t.log_ratio = clamp(raw, -o.log_ratio_clip, o.log_ratio_clip);
  t.ratio = exp_any(t.log_ratio);
  t.ratio_by_logprob = t.ratio * clamp_slope(raw, -o.log_ratio_clip, o.log_ratio_clip);
  const double low = 1.0 - o.clip_low, high = 1.0 + o.clip_high;
  const double bounded = clamp(t.ratio, low, high);
  const double free_loss = -advantage * t.ratio, clipped_loss = -advantage * bounded;
  const double free_share = max_share(free_loss, clipped_loss);
  const double clipped_share = 1.0 - free_share;
  const double clipped_surrogate = free_loss > clipped_loss ? free_loss : clipped_loss;
  t.clipped = clipped_loss > free_loss ? 1.0 : 0.0;
  const double bound_loss = -advantage * o.dual_clip;  // infinite or NaN without a dual clip, and then not looked at
  // & and not &&: a branch would keep the loop from becoming SIMD.
  const bool dual = (advantage < 0) & (o.dual_clip < std::numeric_limits<double>::infinity());
  const bool bound = dual & (clipped_surrogate > bound_loss);
  const double kept_share = dual ? 1.0 - max_share(clipped_surrogate, bound_loss) : 1.0;
  t.dual_clipped = bound ? 1.0 : 0.0;
  t.loss = bound ? bound_loss : clipped_surrogate;
  t.loss_by_ratio = kept_share * -advantage * (free_share + clipped_share * clamp_slope(t.ratio, low, high));
  t.loss_by_advantage = -kept_share * (free_share * t.ratio + clipped_share * bounded) - (dual ? (1.0 - kept_share) * o.dual_clip : 0.0);
  return t;
}

template <class A>
struct PolicyTerms {
  enum { kClipped = 2, kDualClipped, kHalfSquare, kNegLogRatio, kRatio, kRatioSquare, kRatioMin, kRatioMax, kEnd };
  static constexpr int kTerms = kEnd;
  static constexpr int kStats = 9;
  HOST_DEVICE static constexpr Fold fold(int k) { return k == kRatioMin ? Fold::kMin : k == kRatioMax ? Fold::kMax : Fold::kSum; }

  const A *logprobs, *old_logprobs, *advantages;  // [B, T]
  PolicyOptions options;

  HOST_DEVICE void terms(int64_t, int64_t i, double weight, double* t) const {
    const PolicyToken token = policy_step(logprobs[i], old_logprobs[i], advantages[i], options);
    const bool on = weight != 0;
    t[kWeight] = weight;
    t[kLoss] = on ? weight * token.loss : 0.0;
    t[kClipped] = on ? weight * token.clipped : 0.0;
    t[kDualClipped] = on ? weight * token.dual_clipped : 0.0;
    t[kHalfSquare] = on ? weight * 0.5 * token.log_ratio * token.log_ratio : 0.0;
    t[kNegLogRatio] = on ? -weight * token.log_ratio : 0.0;
    t[kRatio] = on ? weight * token.ratio : 0.0;
    t[kRatioSquare] = on ? weight * (token.ratio - 1.0) * (token.ratio - 1.0) : 0.0;  // around 1, where ratios live
    t[kRatioMin] = on ? token.ratio : std::numeric_limits<double>::infinity();
    t[kRatioMax] = on ? token.ratio : -std::numeric_limits<double>::infinity();
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
    stats[7] = static_cast<A>(any ? variance_or_zero(total.at[kRatioSquare] / n, off_one) : 0.0);
    stats[8] = static_cast<A>(n);
  }
};

template <class A>
struct PolicyBackward {
  const A* grad;  // []
  const A *logprobs, *old_logprobs, *advantages;
  const double* row_weight;  // [B]
  A *grad_logprobs, *grad_advantages;  // [B, T] or null
  PolicyOptions options;
  HOST_DEVICE void operator()(int64_t row, int64_t i, double weight) const {
    const PolicyToken token = policy_step(logprobs[i], old_logprobs[i], advantages[i], options);
    const double share = *grad * weight * row_weight[row];
    const bool on = weight != 0;
    if (grad_logprobs) grad_logprobs[i] = static_cast<A>(on ? share * token.loss_by_ratio * token.ratio_by_logprob : 0.0);
    if (grad_advantages) grad_advantages[i] = static_cast<A>(on ? share * token.loss_by_advantage : 0.0);
  }
};

inline void check_policy(const char* op, const Tensor& logprobs, const Tensor& old_logprobs, const Tensor& advantages) {
  check_tokens(op, "logprobs", logprobs);
  check_twin(op, "old_logprobs", old_logprobs, "logprobs", logprobs);
  check_twin(op, "advantages", advantages, "logprobs", logprobs);
}

inline std::tuple<Tensor, Tensor, Tensor> ppo_policy_loss(Tensor logprobs_, Tensor old_logprobs_, Tensor advantages_, OptionalTensor mask_,
                                                          double clip_low, double clip_high, double dual_clip, double log_ratio_clip,
                                                          int64_t aggregate, OptionalTensor normalizer, double normalizer_value) {
  const char* op = "ppo_policy_loss";
  check_policy(op, logprobs_, old_logprobs_, advantages_);
  const Tensor logprobs = dense(logprobs_), old_logprobs = dense(old_logprobs_), advantages = dense(advantages_);
  const OptionalTensor mask = contiguous_mask(op, mask_, "logprobs", logprobs_);
  LossOutputs o;
  for_real(logprobs.scalar_type(), op, "logprobs", [&](auto zero) {
    using A = decltype(zero);
    const PolicyTerms<A> terms{in<A>(logprobs), in<A>(old_logprobs), in<A>(advantages), {clip_low, clip_high, dual_clip, log_ratio_clip}};
    o = aggregate_loss<PolicyTerms<A>, A>(op, logprobs, mask, terms, aggregate, normalizer, normalizer_value);
  });
  return {o.loss, o.stats, o.row_weight};
}

inline std::tuple<Tensor, Tensor> ppo_policy_loss_backward(Tensor grad, Tensor logprobs_, Tensor old_logprobs_, Tensor advantages_,
                                                           OptionalTensor mask_, Tensor row_weight, double clip_low, double clip_high,
                                                           double dual_clip, double log_ratio_clip, bool need_logprobs, bool need_advantages) {
  const char* op = "ppo_policy_loss";
  check_policy(op, logprobs_, old_logprobs_, advantages_);
  const Tensor logprobs = dense(logprobs_), old_logprobs = dense(old_logprobs_), advantages = dense(advantages_);
  const OptionalTensor mask = contiguous_mask(op, mask_, "logprobs", logprobs_);
  auto target = [&](bool needed) { return needed ? empty(logprobs, logprobs.sizes()) : empty(logprobs, {0}); };
  Tensor grad_logprobs = target(need_logprobs), grad_advantages = target(need_advantages);
  for_real(logprobs.scalar_type(), op, "logprobs", [&](auto zero) {
    using A = decltype(zero);
    const PolicyBackward<A> f{in<A>(grad), in<A>(logprobs), in<A>(old_logprobs), in<A>(advantages), in<double>(row_weight),
                              need_logprobs ? out<A>(grad_logprobs) : nullptr, need_advantages ? out<A>(grad_advantages) : nullptr,
                              {clip_low, clip_high, dual_clip, log_ratio_clip}};
    for_each(logprobs, logprobs.size(0), logprobs.size(1), mask_view(op, mask), f);
  });
  return {grad_logprobs, grad_advantages};
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

  const A *values, *old_values, *returns;  // [B, T]
  double clip;

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
  }

  // The order is ops/ppo_loss.py's VALUE_STATS. Explained variance is 1 - Var(R - v) / Var(R), 0 where the returns do not vary.
  HOST_DEVICE static void write_stats(const Terms<ValueTerms>& total, A* stats) {
    const double n = total.at[kWeight];
    const bool any = n != 0;
    const double scale = any ? 1.0 / n : 0.0;
    const double mean_return = total.at[kReturn] * scale, mean_residual = total.at[kResidual] * scale;
    const double return_variance = variance_or_zero(total.at[kReturnSquare] * scale, mean_return);
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
struct ValueBackward {
  const A* grad;
  const A *values, *old_values, *returns;
  const double* row_weight;
  A *grad_values, *grad_old_values, *grad_returns;  // [B, T] or null
  double clip;
  HOST_DEVICE void operator()(int64_t row, int64_t i, double weight) const {
    const ValueToken token = value_step(values[i], old_values[i], returns[i], clip);
    const double share = *grad * weight * row_weight[row];
    const bool on = weight != 0;
    if (grad_values) grad_values[i] = static_cast<A>(on ? share * token.by_value : 0.0);
    if (grad_old_values) grad_old_values[i] = static_cast<A>(on ? share * token.by_old_value : 0.0);
    if (grad_returns) grad_returns[i] = static_cast<A>(on ? share * token.by_return : 0.0);
  }
};

inline void check_value(const char* op, const Tensor& values, const Tensor& old_values, const Tensor& returns) {
  check_tokens(op, "values", values);
  check_twin(op, "old_values", old_values, "values", values);
  check_twin(op, "returns", returns, "values", values);
}

inline std::tuple<Tensor, Tensor, Tensor> ppo_value_loss(Tensor values_, Tensor old_values_, Tensor returns_, OptionalTensor mask_, double clip,
                                                         int64_t aggregate, OptionalTensor normalizer, double normalizer_value) {
  const char* op = "ppo_value_loss";
  check_value(op, values_, old_values_, returns_);
  const Tensor values = dense(values_), old_values = dense(old_values_), returns = dense(returns_);
  const OptionalTensor mask = contiguous_mask(op, mask_, "values", values_);
  LossOutputs o;
  for_real(values.scalar_type(), op, "values", [&](auto zero) {
    using A = decltype(zero);
    o = aggregate_loss<ValueTerms<A>, A>(op, values, mask, ValueTerms<A>{in<A>(values), in<A>(old_values), in<A>(returns), clip}, aggregate,
                                         normalizer, normalizer_value);
  });
  return {o.loss, o.stats, o.row_weight};
}

inline std::tuple<Tensor, Tensor, Tensor> ppo_value_loss_backward(Tensor grad, Tensor values_, Tensor old_values_, Tensor returns_,
                                                                  OptionalTensor mask_, Tensor row_weight, double clip, bool need_values,
                                                                  bool need_old_values, bool need_returns) {
  const char* op = "ppo_value_loss";
  check_value(op, values_, old_values_, returns_);
  const Tensor values = dense(values_), old_values = dense(old_values_), returns = dense(returns_);
  const OptionalTensor mask = contiguous_mask(op, mask_, "values", values_);
  auto target = [&](bool needed) { return needed ? empty(values, values.sizes()) : empty(values, {0}); };
  Tensor grad_values = target(need_values), grad_old_values = target(need_old_values), grad_returns = target(need_returns);
  for_real(values.scalar_type(), op, "values", [&](auto zero) {
    using A = decltype(zero);
    const ValueBackward<A> f{in<A>(grad), in<A>(values), in<A>(old_values), in<A>(returns), in<double>(row_weight),
                             need_values ? out<A>(grad_values) : nullptr, need_old_values ? out<A>(grad_old_values) : nullptr,
                             need_returns ? out<A>(grad_returns) : nullptr, clip};
    for_each(values, values.size(0), values.size(1), mask_view(op, mask), f);
  });
  return {grad_values, grad_old_values, grad_returns};
}

}  // namespace rlhf_fast::RLHF_UNIT
