// Losses on pairs of replies.
//
// reward_pair_loss (Bradley-Terry; Ouyang et al. 2022, arXiv 2203.02155, eq. 1, with TRL's margin and centering):
//   l = softplus(-(chosen - rejected - margin)) + center_coef (chosen + rejected)^2, averaged over the pairs
#pragma once

#include "loops.h"

namespace rlhf_fast::RLHF_UNIT {

struct PairToken {
  double loss, by_chosen, by_rejected;
};

HOST_DEVICE PairToken pair_step(double chosen, double rejected, double margin, double center_coef) {
  const double gap = chosen - rejected - margin, sum = chosen + rejected;
  const double pull = -sigmoid(-gap), center = 2.0 * center_coef * sum;
  return {softplus(-gap) + center_coef * sum * sum, pull + center, -pull + center};
}

template <class A>
struct PairTerms {
  enum { kLoss, kCorrect, kGap, kChosen, kRejected, kLowest, kHighest, kEnd };
  static constexpr int kTerms = kEnd;
  static constexpr int kStats = 6;
  HOST_DEVICE static constexpr Fold fold(int k) { return k == kLowest ? Fold::kMin : k == kHighest ? Fold::kMax : Fold::kSum; }

  const A *chosen, *rejected, *margin;  // [B]; margin may be null
  double center_coef;

  HOST_DEVICE void terms(int64_t, int64_t i, double, double* t) const {
    const double c = chosen[i], r = rejected[i];
    t[kLoss] = pair_step(c, r, margin ? static_cast<double>(margin[i]) : 0.0, center_coef).loss;
    t[kCorrect] = c > r ? 1.0 : c == r ? 0.5 : 0.0;
    t[kGap] = c - r;
    t[kChosen] = c;
    t[kRejected] = r;
    t[kLowest] = c < r ? c : r;
    t[kHighest] = c > r ? c : r;
  }
};

template <class A>
struct PairFinish {
  const double* partial;
  A *loss, *stats;
  Rows rows;  // one: the pairs
  // The order is ops/preference.py's PAIR_STATS.
  template <class Team>
  HOST_DEVICE void operator()(const Team& team) const {
    if (team.rank != 0) return;
    const Terms<PairTerms<A>> total = row_terms<PairTerms<A>>(partial, rows, 0);
    const int64_t pairs = rows.tokens;
    const double scale = pairs > 0 ? 1.0 / static_cast<double>(pairs) : 0.0;
    *loss = static_cast<A>(total.at[PairTerms<A>::kLoss] * scale);
    for (int k = 0; k < 4; ++k) stats[k] = static_cast<A>(total.at[PairTerms<A>::kCorrect + k] * scale);
    stats[4] = static_cast<A>(pairs > 0 ? total.at[PairTerms<A>::kLowest] : 0.0);
    stats[5] = static_cast<A>(pairs > 0 ? total.at[PairTerms<A>::kHighest] : 0.0);
  }
};

template <class A>
struct PairBackward {
  const A* grad;
  const A *chosen, *rejected, *margin;
  A *grad_chosen, *grad_rejected, *grad_margin;  // grad_margin may be null
  int64_t pairs;
  double center_coef;
  HOST_DEVICE void operator()(int64_t, int64_t i, double) const {
    const double share = *grad / static_cast<double>(pairs), gap_margin = margin ? static_cast<double>(margin[i]) : 0.0;
    const PairToken token = pair_step(chosen[i], rejected[i], gap_margin, center_coef);
    grad_chosen[i] = static_cast<A>(share * token.by_chosen);
    grad_rejected[i] = static_cast<A>(share * token.by_rejected);
    if (grad_margin) grad_margin[i] = static_cast<A>(share * sigmoid(-(static_cast<double>(chosen[i]) - rejected[i] - gap_margin)));
  }
};

inline OptionalTensor check_pairs(const char* op, const Tensor& chosen, const Tensor& rejected, const OptionalTensor& margin) {
  CHECK_VALUE(chosen.dim() == 1, op, ": `chosen` must be [B], got shape ", shape_of(chosen));
  check_twin(op, "rejected", rejected, "chosen", chosen);
  if (!margin.has_value()) return margin;
  check_twin(op, "margin", *margin, "chosen", chosen);
  return dense(*margin);
}

inline std::tuple<Tensor, Tensor> reward_pair_loss(Tensor chosen_, Tensor rejected_, OptionalTensor margin_, double center_coef) {
  const char* op = "reward_pair_loss";
  const OptionalTensor margin = check_pairs(op, chosen_, rejected_, margin_);
  const Tensor chosen = dense(chosen_), rejected = dense(rejected_);
  const Rows rows = padded_rows(1, chosen.numel());
  Tensor loss = empty(chosen, {});
  Tensor stats = empty(chosen, {PairTerms<float>::kStats});
  for_real(chosen.scalar_type(), op, "chosen", [&](auto zero) {
    using A = decltype(zero);
    const Tensor partial = partial_terms(chosen, rows, PairTerms<A>::kTerms);
    const PairTerms<A> terms{in<A>(chosen), in<A>(rejected), margin ? in<A>(*margin) : nullptr, center_coef};
    reduce_rows(chosen, rows, Mask{}, terms, out<double>(partial));
    run_team(chosen, PairFinish<A>{in<double>(partial), out<A>(loss), out<A>(stats), rows});
  });
  return {loss, stats};
}

inline std::tuple<Tensor, Tensor, Tensor> reward_pair_loss_backward(Tensor grad, Tensor chosen_, Tensor rejected_, OptionalTensor margin_,
                                                                    double center_coef) {
  const char* op = "reward_pair_loss";
  const OptionalTensor margin = check_pairs(op, chosen_, rejected_, margin_);
  const Tensor chosen = dense(chosen_), rejected = dense(rejected_);
  Tensor grad_chosen = empty(chosen, chosen.sizes()), grad_rejected = empty(chosen, chosen.sizes());
  Tensor grad_margin = margin ? empty(chosen, chosen.sizes()) : empty(chosen, {0});
  for_real(chosen.scalar_type(), op, "chosen", [&](auto zero) {
    using A = decltype(zero);
    const PairBackward<A> f{in<A>(grad), in<A>(chosen), in<A>(rejected), margin ? in<A>(*margin) : nullptr, out<A>(grad_chosen),
                            out<A>(grad_rejected), margin ? out<A>(grad_margin) : nullptr, chosen.size(0), center_coef};
    for_each(chosen, padded_rows(1, chosen.numel()), Mask{}, f);
  });
  return {grad_chosen, grad_rejected, grad_margin};
}

}  // namespace rlhf_fast::RLHF_UNIT
