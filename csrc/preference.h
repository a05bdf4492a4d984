// Losses on pairs of replies, averaged over the pairs.
//
// reward_pair_loss (Bradley-Terry; Ouyang et al. 2022, arXiv 2203.02155, eq. 1, with TRL's margin and centering):
//   l = softplus(-(chosen - rejected - margin)) + center_coef (chosen + rejected)^2
// dpo_loss, of h = (chosen - ref_chosen) - (rejected - ref_rejected), summed log-probs, and z = beta h:
//   sigmoid  softplus(-z) + e z               e the label smoothing; the same as -(1 - e) log sigma(z) - e log sigma(-z)
//   robust   softplus(-z) - e / (1 - 2e) z    the same divided by 1 - 2e, with the sign of its second term turned
//   hinge    max(0, 1 - z)
//   ipo      (h - 1 / (2 beta))^2
//
// Differences are taken in double: a reply's summed log-prob is in the thousands, where the steps of float32 pass 1e-4.
// Forward keeps each pair's slope, so that backward is a multiplication: 8 bytes a pair against an exponential.
#pragma once

#include "loops.h"

namespace rlhf_fast::RLHF_UNIT {

struct PairToken {
  double loss, slope;  // slope: d loss / d h
};

// ---------------------------------------------------------------------------------------------------------------------
// What the two share: terms whose first is the loss, followed by sums for the statistics, a minimum and a maximum.

struct PairTerms {
  enum { kLoss, kCorrect, kGap, kChosen, kRejected, kLowest, kHighest, kEnd };
  static constexpr int kTerms = kEnd;
  static constexpr int kStats = kEnd - 1;
  HOST_DEVICE static constexpr Fold fold(int k) { return k == kLowest ? Fold::kMin : k == kHighest ? Fold::kMax : Fold::kSum; }
};

HOST_DEVICE double half_right(double gap) { return (gap > 0 ? 0.5 : 0.0) + (gap >= 0 ? 0.5 : 0.0); }  // 1, 1/2 at a tie, 0

template <class R, class A>
struct PairFinish {
  const double* partial;
  A *loss, *stats;
  Rows rows;  // one: the pairs
  // The order is that of PAIR_STATS and DPO_STATS in ops/preference.py.
  template <class Team>
  HOST_DEVICE void operator()(const Team& team) const {
    if (team.rank != 0) return;
    const Terms<R> total = row_terms<R>(partial, rows, 0);
    const int64_t pairs = rows.tokens;
    const double scale = pairs > 0 ? 1.0 / static_cast<double>(pairs) : 0.0;
    *loss = static_cast<A>(total.at[R::kLoss] * scale);
    for (int k = R::kCorrect; k < R::kLowest; ++k) stats[k - 1] = static_cast<A>(total.at[k] * scale);
    for (int k = R::kLowest; k < R::kEnd; ++k) stats[k - 1] = static_cast<A>(pairs > 0 ? total.at[k] : 0.0);
  }
};

template <class A, class R>
void reduce_pairs(const Tensor& like, const R& terms, const Tensor& loss, const Tensor& stats) {
  const Rows rows = padded_rows(1, like.size(0));
  const Tensor partial = partial_terms(like, rows, R::kTerms);
  reduce_rows(like, rows, Mask{}, terms, out<double>(partial));
  run_team(like, PairFinish<R, A>{in<double>(partial), out<A>(loss), out<A>(stats), rows});
}

template <class A>
A* out_if(bool needed, const Tensor& t) { return needed ? out<A>(t) : nullptr; }

inline Tensor empty_if(bool needed, const Tensor& like, int64_t n) { return empty(like, {needed ? n : 0}); }

inline void check_slopes(const char* op, const Tensor& grad, const Tensor& slopes) {
  CHECK_VALUE(grad.dim() == 0 && slopes.dim() == 1 && slopes.scalar_type() == ScalarType::Double && slopes.is_contiguous(), op,
              ": `slopes` is not what the forward pass returned");
  check_same_device(op, "slopes", slopes, "grad", grad);
}

// ---------------------------------------------------------------------------------------------------------------------
// reward_pair_loss

HOST_DEVICE PairToken pair_step(double gap, double sum, double center_coef) {
  return {softplus(-gap) + center_coef * sum * sum, -sigmoid(-gap)};  // the centering's own slope goes with the sum
}

template <bool kMargin, class A>
struct RewardPairTerms : PairTerms {
  const A *chosen, *rejected, *margin;  // [B]
  double* slopes;                       // [B]
  double center_coef;

  HOST_DEVICE void terms(int64_t, int64_t i, double, double* t) const {
    const double c = chosen[i], r = rejected[i];
    double lead = 0.0;
    if constexpr (kMargin) lead = margin[i];
    const PairToken token = pair_step(c - r - lead, c + r, center_coef);
    slopes[i] = token.slope;
    t[kLoss] = token.loss;
    t[kCorrect] = half_right(c - r);
    t[kGap] = c - r;
    t[kChosen] = c;
    t[kRejected] = r;
    t[kLowest] = c < r ? c : r;
    t[kHighest] = c > r ? c : r;
  }
};

template <class A>
struct RewardPairBackward {
  const A *grad, *chosen, *rejected;
  const double* slopes;
  A *grad_chosen, *grad_rejected, *grad_margin;  // grad_margin may be null
  double share, center_coef;
  HOST_DEVICE void operator()(int64_t, int64_t i, double) const {
    const double upstream = *grad * share, pull = upstream * slopes[i];
    const double center = upstream * 2.0 * center_coef * (static_cast<double>(chosen[i]) + rejected[i]);
    grad_chosen[i] = static_cast<A>(center + pull);
    grad_rejected[i] = static_cast<A>(center - pull);
    if (grad_margin) grad_margin[i] = static_cast<A>(-pull);
  }
};

inline std::tuple<Tensor, Tensor, Tensor> reward_pair_loss(Tensor chosen_, Tensor rejected_, OptionalTensor margin_, double center_coef) {
  const char* op = "reward_pair_loss";
  CHECK_VALUE(chosen_.dim() == 1, op, ": `chosen` must be [B], got shape ", shape_of(chosen_));
  check_twin(op, "rejected", rejected_, "chosen", chosen_);
  if (margin_.has_value()) check_twin(op, "margin", *margin_, "chosen", chosen_);
  const Tensor chosen = dense(chosen_), rejected = dense(rejected_);
  const OptionalTensor margin = margin_.has_value() ? OptionalTensor(dense(*margin_)) : margin_;
  Tensor loss = empty(chosen, {}), stats = empty(chosen, {PairTerms::kStats});
  Tensor slopes = empty(chosen, chosen.sizes(), ScalarType::Double);
  for_real(chosen.scalar_type(), op, "chosen", [&](auto zero) {
    using A = decltype(zero);
    auto run = [&](auto has_margin) {
      const RewardPairTerms<decltype(has_margin)::value, A> terms{{}, in<A>(chosen), in<A>(rejected), margin ? in<A>(*margin) : nullptr,
                                                                  out<double>(slopes), center_coef};
      reduce_pairs<A>(chosen, terms, loss, stats);
    };
    margin ? run(std::true_type{}) : run(std::false_type{});
  });
  return {loss, stats, slopes};
}

inline std::tuple<Tensor, Tensor, Tensor> reward_pair_loss_backward(Tensor grad, Tensor chosen_, Tensor rejected_, Tensor slopes,
                                                                    double center_coef, bool need_margin) {
  const char* op = "reward_pair_loss";
  check_slopes(op, grad, slopes);
  check_twin(op, "rejected", rejected_, "chosen", chosen_);
  CHECK_VALUE(same_shape(slopes, chosen_), op, ": `slopes` is not what the forward pass returned");
  const Tensor chosen = dense(chosen_), rejected = dense(rejected_);
  const int64_t pairs = chosen.size(0);
  Tensor grad_chosen = empty(chosen, {pairs}), grad_rejected = empty(chosen, {pairs}), grad_margin = empty_if(need_margin, chosen, pairs);
  for_real(chosen.scalar_type(), op, "chosen", [&](auto zero) {
    using A = decltype(zero);
    for_each(chosen, padded_rows(1, pairs), Mask{},
             RewardPairBackward<A>{in<A>(grad), in<A>(chosen), in<A>(rejected), in<double>(slopes), out<A>(grad_chosen),
                                   out<A>(grad_rejected), out_if<A>(need_margin, grad_margin), 1.0 / static_cast<double>(pairs), center_coef});
  });
  return {grad_chosen, grad_rejected, grad_margin};
}

// ---------------------------------------------------------------------------------------------------------------------
// dpo_loss

enum DpoLossType : int { kLogistic = 0, kHinge = 1, kIpo = 2 };  // "sigmoid" and "robust" differ in `tilt` alone

struct DpoOptions {
  double beta, tilt;
};

template <int kLossType>
HOST_DEVICE PairToken dpo_step(double h, const DpoOptions& o) {
  const double z = o.beta * h;
  if constexpr (kLossType == kLogistic) {
    const double tilted = o.tilt != 0 ? o.tilt * z : 0.0;  // z may be infinite
    return {softplus(-z) + tilted, o.beta * (o.tilt - sigmoid(-z))};
  } else if constexpr (kLossType == kHinge) {
    const double slack = 1.0 - z;
    return {slack <= 0 ? 0.0 : slack, slack <= 0 ? 0.0 : -o.beta};  // this way round a NaN stays
  } else {
    const double off = h - 0.5 / o.beta;
    return {off * off, 2.0 * off};
  }
}

template <int kLossType, class A>
struct DpoTerms : PairTerms {
  const A *chosen, *rejected, *ref_chosen, *ref_rejected;  // [B]
  double* slopes;                                          // [B]
  DpoOptions options;

  HOST_DEVICE void terms(int64_t, int64_t i, double, double* t) const {
    const DpoOptions o = options;  // read once: the write to slopes might change it, for all the compiler knows, and no SIMD
    const double chosen_ratio = static_cast<double>(chosen[i]) - ref_chosen[i];
    const double rejected_ratio = static_cast<double>(rejected[i]) - ref_rejected[i];
    const double h = chosen_ratio - rejected_ratio;
    const PairToken token = dpo_step<kLossType>(h, o);
    slopes[i] = token.slope;
    t[kLoss] = token.loss;
    t[kCorrect] = half_right(h);
    t[kGap] = o.beta * h;
    t[kChosen] = o.beta * chosen_ratio;
    t[kRejected] = o.beta * rejected_ratio;
    t[kLowest] = o.beta * h;
    t[kHighest] = o.beta * h;
  }
};

template <class A>
struct DpoBackward {  // any of the four may be null
  const A* grad;
  const double* slopes;
  A *grad_chosen, *grad_rejected, *grad_ref_chosen, *grad_ref_rejected;
  double share;
  HOST_DEVICE void operator()(int64_t, int64_t i, double) const {
    const A g = static_cast<A>(*grad * share * slopes[i]);
    if (grad_chosen) grad_chosen[i] = g;
    if (grad_rejected) grad_rejected[i] = -g;
    if (grad_ref_chosen) grad_ref_chosen[i] = -g;
    if (grad_ref_rejected) grad_ref_rejected[i] = g;
  }
};

inline std::tuple<Tensor, Tensor, Tensor> dpo_loss(Tensor chosen_, Tensor rejected_, Tensor ref_chosen_, Tensor ref_rejected_, double beta,
                                                   double tilt, int64_t loss_type) {
  const char* op = "dpo_loss";
  CHECK_VALUE(chosen_.dim() == 1, op, ": `chosen` must be [B], got shape ", shape_of(chosen_));
  check_twin(op, "rejected", rejected_, "chosen", chosen_);
  check_twin(op, "ref_chosen", ref_chosen_, "chosen", chosen_);
  check_twin(op, "ref_rejected", ref_rejected_, "chosen", chosen_);
  CHECK_VALUE(loss_type >= kLogistic && loss_type <= kIpo, op, ": unknown `loss_type` code ", loss_type);
  const Tensor chosen = dense(chosen_), rejected = dense(rejected_), ref_chosen = dense(ref_chosen_), ref_rejected = dense(ref_rejected_);
  Tensor loss = empty(chosen, {}), stats = empty(chosen, {PairTerms::kStats});
  Tensor slopes = empty(chosen, chosen.sizes(), ScalarType::Double);
  for_real(chosen.scalar_type(), op, "chosen", [&](auto zero) {
    using A = decltype(zero);
    auto run = [&](auto type) {
      const DpoTerms<decltype(type)::value, A> terms{{}, in<A>(chosen), in<A>(rejected), in<A>(ref_chosen), in<A>(ref_rejected),
                                                     out<double>(slopes), {beta, tilt}};
      reduce_pairs<A>(chosen, terms, loss, stats);
    };
    if (loss_type == kLogistic) run(std::integral_constant<int, kLogistic>{});
    else if (loss_type == kHinge) run(std::integral_constant<int, kHinge>{});
    else run(std::integral_constant<int, kIpo>{});
  });
  return {loss, stats, slopes};
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> dpo_loss_backward(Tensor grad, Tensor slopes, bool need_chosen, bool need_rejected,
                                                                    bool need_ref_chosen, bool need_ref_rejected) {
  const char* op = "dpo_loss";
  check_slopes(op, grad, slopes);
  const int64_t pairs = slopes.size(0);
  Tensor grad_chosen = empty_if(need_chosen, grad, pairs), grad_rejected = empty_if(need_rejected, grad, pairs);
  Tensor grad_ref_chosen = empty_if(need_ref_chosen, grad, pairs), grad_ref_rejected = empty_if(need_ref_rejected, grad, pairs);
  for_real(grad.scalar_type(), op, "grad", [&](auto zero) {
    using A = decltype(zero);
    for_each(slopes, padded_rows(1, pairs), Mask{},
             DpoBackward<A>{in<A>(grad), in<double>(slopes), out_if<A>(need_chosen, grad_chosen), out_if<A>(need_rejected, grad_rejected),
                            out_if<A>(need_ref_chosen, grad_ref_chosen), out_if<A>(need_ref_rejected, grad_ref_rejected),
                            1.0 / static_cast<double>(pairs)});
  });
  return {grad_chosen, grad_rejected, grad_ref_chosen, grad_ref_rejected};
}

}  // namespace rlhf_fast::RLHF_UNIT
