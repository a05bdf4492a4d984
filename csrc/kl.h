// Per-token KL penalties, and the rewards that RLHF builds from them.
//
// With d = logprob - ref_logprob of the sampled token, clamped to +-log_ratio_clip (Schulman 2020, joschu.net/blog/kl-approx):
//   k1 = d        k2 = d^2 / 2        k3 = exp(-d) - 1 + d        abs = |d|
// each then clamped to +-output_clip. A "+" estimator has the value of its base and the gradient of an unclamped k2, whose
// expectation is the gradient of KL (the straight-through form of verl's kl_penalty).
//
// Bytes a token in float32: forward 4 + 4 + mask read, 4 written; the minimum.
#pragma once

#include "loops.h"

namespace rlhf_fast::RLHF_UNIT {

enum KlEstimator : int { kK1 = 0, kK2 = 1, kK3 = 2, kAbs = 3 };

struct KlOptions {
  int estimator;
  bool straight_through;
  double log_ratio_clip, output_clip;  // infinity for none
};

template <class V>
struct KlToken {
  V value, slope;  // slope: d value / d logprob = - d value / d ref_logprob
};

template <class V>
HOST_DEVICE KlToken<V> kl_step(V logprob, V ref_logprob, const KlOptions& o) {
  const V raw = logprob - ref_logprob, one = all<V>(1.0);
  const V d = clamp(raw, -o.log_ratio_clip, o.log_ratio_clip);
  V value = d, slope = one;
  if (o.estimator == kK2) {
    value = 0.5 * d * d;
    slope = d;
  } else if (o.estimator == kK3) {
    const V inverse_ratio = exp_any(-d);
    value = inverse_ratio - 1.0 + d;
    slope = 1.0 - inverse_ratio;
  } else if (o.estimator == kAbs) {
    value = d < 0 ? -d : d;
    slope = d < 0 ? -one : d > 0 ? one : all<V>(0.0);
  }
  slope = slope * clamp_slope(raw, -o.log_ratio_clip, o.log_ratio_clip) * clamp_slope(value, -o.output_clip, o.output_clip);
  return {clamp(value, -o.output_clip, o.output_clip), o.straight_through ? raw : slope};
}

inline KlOptions kl_options(const char* op, int64_t estimator, bool straight_through, double log_ratio_clip, double output_clip) {
  CHECK_VALUE(estimator >= kK1 && estimator <= kAbs, op, ": unknown `estimator` code ", estimator);
  CHECK_VALUE(log_ratio_clip > 0 && output_clip > 0, op, ": clips must be above 0");
  return {static_cast<int>(estimator), straight_through, log_ratio_clip, output_clip};
}

// ---------------------------------------------------------------------------------------------------------------------
// kl_penalty: any shape -> the same shape.

template <class A>
struct KlForward {
  static constexpr bool kSimd = true, kFullRuns = std::is_same_v<A, float>;
  const A *logprobs, *ref_logprobs;
  A* penalty;
  KlOptions options;
  template <class V, class At>
  HOST_DEVICE void operator()(int64_t, At i, V weight) const {
    const V value = weight * kl_step(load_at(logprobs, i), load_at(ref_logprobs, i), options).value;
    store_at(penalty, i, weight != 0 ? value : all<V>(0.0));
  }
};

template <class A>
struct KlBackward {
  static constexpr bool kSimd = true, kFullRuns = std::is_same_v<A, float>;
  const A *grad, *logprobs, *ref_logprobs;
  A* grad_logprobs;
  KlOptions options;
  template <class V, class At>
  HOST_DEVICE void operator()(int64_t, At i, V weight) const {
    const V slope = weight * load_at(grad, i) * kl_step(load_at(logprobs, i), load_at(ref_logprobs, i), options).slope;
    store_at(grad_logprobs, i, weight != 0 ? slope : all<V>(0.0));
  }
};

inline Tensor kl_penalty(Tensor logprobs_, Tensor ref_logprobs_, OptionalTensor mask_, int64_t estimator, bool straight_through,
                         double log_ratio_clip, double output_clip) {
  const char* op = "kl_penalty";
  check_twin(op, "ref_logprobs", ref_logprobs_, "logprobs", logprobs_);
  const KlOptions options = kl_options(op, estimator, straight_through, log_ratio_clip, output_clip);
  const Tensor logprobs = dense(logprobs_), ref_logprobs = dense(ref_logprobs_);
  const OptionalTensor mask = contiguous_mask(op, mask_, "logprobs", logprobs_);
  Tensor penalty = empty(logprobs, logprobs.sizes());
  for_real(logprobs.scalar_type(), op, "logprobs", [&](auto zero) {
    using A = decltype(zero);
    for_each(logprobs, padded_rows(1, logprobs.numel()), mask_view(op, mask),
             KlForward<A>{in<A>(logprobs), in<A>(ref_logprobs), out<A>(penalty), options});
  });
  return penalty;
}

inline Tensor kl_penalty_backward(Tensor grad_, Tensor logprobs_, Tensor ref_logprobs_, OptionalTensor mask_, int64_t estimator,
                                  bool straight_through, double log_ratio_clip, double output_clip) {
  const char* op = "kl_penalty";
  check_twin(op, "ref_logprobs", ref_logprobs_, "logprobs", logprobs_);
  check_twin(op, "grad", grad_, "logprobs", logprobs_);
  const KlOptions options = kl_options(op, estimator, straight_through, log_ratio_clip, output_clip);
  const Tensor grad = dense(grad_), logprobs = dense(logprobs_), ref_logprobs = dense(ref_logprobs_);
  const OptionalTensor mask = contiguous_mask(op, mask_, "logprobs", logprobs_);
  Tensor grad_logprobs = empty(logprobs, logprobs.sizes());
  for_real(logprobs.scalar_type(), op, "logprobs", [&](auto zero) {
    using A = decltype(zero);
    for_each(logprobs, padded_rows(1, logprobs.numel()), mask_view(op, mask),
             KlBackward<A>{in<A>(grad), in<A>(logprobs), in<A>(ref_logprobs), out<A>(grad_logprobs), options});
  });
  return grad_logprobs;
}

// ---------------------------------------------------------------------------------------------------------------------
// shape_rewards:  r[b, t] = - kl_coef * weight[b, t] * KL[b, t]  +  clamp(score[b], +-score_clip) at t = the row's last token

struct ShapeOptions {
  KlOptions kl;
  double kl_coef, score_clip;
};

// The last token with weight, or -1: a row without a token has nowhere to put its score.
struct LastToken {
  static constexpr int kTerms = 1;
  static constexpr bool kSimd = true;
  HOST_DEVICE static constexpr Fold fold(int) { return Fold::kMax; }
  template <class V, class At>
  HOST_DEVICE void terms(int64_t, At i, V weight, V* t) const { t[0] = weight != 0 ? index_at(i) : all<V>(-1.0); }
};

struct LastTokenFinish {
  const double* partial;
  int64_t* last;  // [rows]
  Rows rows;
  template <class Team>
  HOST_DEVICE void operator()(const Team& team) const {
    for (int64_t row = team.rank; row < rows.rows; row += team.size) {
      const double i = row_terms<LastToken>(partial, rows, row).at[0];
      last[row] = i < 0 ? -1 : static_cast<int64_t>(i);  // an empty row folds to -infinity
    }
  }
};

template <class A>
struct ShapeForward {
  static constexpr bool kSimd = true, kFullRuns = std::is_same_v<A, float>;
  const A *scores, *logprobs, *ref_logprobs;
  const int64_t* last;  // [rows]
  A* rewards;
  ShapeOptions options;
  template <class V, class At>
  HOST_DEVICE void operator()(int64_t row, At i, V weight) const {
    const V zero = all<V>(0.0);
    const V penalty = options.kl_coef * weight * kl_step(load_at(logprobs, i), load_at(ref_logprobs, i), options.kl).value;
    const V score = all<V>(clamp(static_cast<double>(scores[row]), -options.score_clip, options.score_clip));
    const V place = index_at(i), end = all<V>(static_cast<double>(last[row]));
    store_at(rewards, i, (place == end ? score : zero) - (weight != 0 ? penalty : zero));
  }
};

template <class A>
struct ShapeBackward {
  static constexpr bool kSimd = true, kFullRuns = std::is_same_v<A, float>;
  const A *grad, *scores, *logprobs, *ref_logprobs;
  const int64_t* last;
  A *grad_scores, *grad_logprobs;  // grad_scores starts at zero
  ShapeOptions options;
  template <class V, class At>
  HOST_DEVICE void operator()(int64_t row, At i, V weight) const {
    const V slope = -options.kl_coef * weight * load_at(grad, i) * kl_step(load_at(logprobs, i), load_at(ref_logprobs, i), options.kl).slope;
    store_at(grad_logprobs, i, weight != 0 ? slope : all<V>(0.0));
    if (is_at(i, last[row])) {
      const double through = clamp_slope(static_cast<double>(scores[row]), -options.score_clip, options.score_clip);
      grad_scores[row] = static_cast<A>(grad[last[row]] * through);
    }
  }
};

// The arguments as both passes need them: checked, dense, and what they borrow from kept alive.
struct ShapeCall {
  Tensor scores, logprobs, ref_logprobs;
  OptionalTensor mask, offsets;
  Rows rows;
  ShapeOptions options;
};

inline ShapeCall shape_call(const Tensor& scores, const Tensor& logprobs, const Tensor& ref_logprobs, const Tensor& mask,
                            const OptionalTensor& cu_seqlens, double kl_coef, int64_t estimator, bool straight_through, double score_clip) {
  const char* op = "shape_rewards";
  const double none = std::numeric_limits<double>::infinity();
  const OptionalTensor offsets = contiguous_offsets(op, cu_seqlens, "logprobs", logprobs);
  check_twin(op, "ref_logprobs", ref_logprobs, "logprobs", logprobs);
  const Rows rows = rows_view(op, logprobs, offsets);
  CHECK_VALUE(scores.dim() == 1 && scores.size(0) == rows.rows, op, ": `scores` must be [B] = [", rows.rows, "], got shape ", shape_of(scores));
  check_same_device(op, "scores", scores, "logprobs", logprobs);
  CHECK_TYPE(scores.scalar_type() == logprobs.scalar_type(), op, ": `scores` must have the dtype of `logprobs`");
  return {dense(scores), dense(logprobs), dense(ref_logprobs), contiguous_mask(op, mask, "logprobs", logprobs), offsets, rows,
          {kl_options(op, estimator, straight_through, none, none), kl_coef, score_clip}};
}

inline Tensor last_tokens(const ShapeCall& call) {
  const Tensor partial = partial_terms(call.logprobs, call.rows, LastToken::kTerms);
  Tensor last = empty(call.logprobs, {call.rows.rows}, ScalarType::Long);
  reduce_rows(call.logprobs, call.rows, mask_view("shape_rewards", call.mask), LastToken{}, out<double>(partial));
  run_team(call.logprobs, LastTokenFinish{in<double>(partial), out<int64_t>(last), call.rows});
  return last;
}

inline Tensor shape_rewards(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor mask, OptionalTensor cu_seqlens, double kl_coef,
                            int64_t estimator, bool straight_through, double score_clip) {
  const ShapeCall call = shape_call(scores, logprobs, ref_logprobs, mask, cu_seqlens, kl_coef, estimator, straight_through, score_clip);
  Tensor rewards = empty_tokens(call.logprobs, call.rows);
  for_real(logprobs.scalar_type(), "shape_rewards", "logprobs", [&](auto zero) {
    using A = decltype(zero);
    const Tensor last = last_tokens(call);
    for_each(call.logprobs, call.rows, mask_view("shape_rewards", call.mask),
             ShapeForward<A>{in<A>(call.scores), in<A>(call.logprobs), in<A>(call.ref_logprobs), in<int64_t>(last), out<A>(rewards), call.options});
  });
  return rewards;
}

inline std::tuple<Tensor, Tensor> shape_rewards_backward(Tensor grad_, Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor mask,
                                                         OptionalTensor cu_seqlens, double kl_coef, int64_t estimator, bool straight_through,
                                                         double score_clip) {
  const ShapeCall call = shape_call(scores, logprobs, ref_logprobs, mask, cu_seqlens, kl_coef, estimator, straight_through, score_clip);
  check_twin("shape_rewards", "grad", grad_, "logprobs", logprobs);
  const Tensor grad = dense(grad_);
  Tensor grad_scores = torch::stable::new_zeros(call.scores, call.scores.sizes());
  Tensor grad_logprobs = empty_tokens(call.logprobs, call.rows);
  for_real(logprobs.scalar_type(), "shape_rewards", "logprobs", [&](auto zero) {
    using A = decltype(zero);
    const Tensor last = last_tokens(call);
    for_each(call.logprobs, call.rows, mask_view("shape_rewards", call.mask),
             ShapeBackward<A>{in<A>(grad), in<A>(call.scores), in<A>(call.logprobs), in<A>(call.ref_logprobs), in<int64_t>(last),
                              out<A>(grad_scores), out<A>(grad_logprobs), call.options});
  });
  return {grad_scores, grad_logprobs};
}

}  // namespace rlhf_fast::RLHF_UNIT
