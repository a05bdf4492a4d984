// Mean and whitening over the tokens that a mask keeps. What stands off the mask, NaN included, is never read into a sum.
//
//   mean = sum w x / sum w        var = sum w (x - mean)^2 / (sum w - 1)   (Bessel's correction; / sum w where unbiased is off)
//   whitened = (x - mean) / sqrt(var + eps)   (+ mean where shift_mean is off), 0 where w = 0
#pragma once

#include "loops.h"

namespace rlhf_fast::RLHF_UNIT {

template <class A>
struct WeightedSum {  // -> sum w, sum w x
  static constexpr int kTerms = 2;
  static constexpr bool kSimd = true;
  HOST_DEVICE static constexpr Fold fold(int) { return Fold::kSum; }
  const A* x;
  template <class V, class At>
  HOST_DEVICE void terms(int64_t, At i, V weight, V* t) const {
    t[0] = weight;
    t[1] = weight != 0 ? weight * load_at(x, i) : all<V>(0.0);
  }
};

HOST_DEVICE double ratio_or_zero(double numerator, double denominator) { return denominator != 0 ? numerator / denominator : 0.0; }

// ---------------------------------------------------------------------------------------------------------------------
// masked_mean: x [rows, length] or packed [N] -> mean [rows], and the sum of weights of each row for the backward pass.

template <class A>
struct MeanFinish {
  const double* partial;
  A* mean;
  double* weight_sum;
  Rows rows;
  template <class Team>
  HOST_DEVICE void operator()(const Team& team) const {
    for (int64_t row = team.rank; row < rows.rows; row += team.size) {
      const Terms<WeightedSum<A>> t = row_terms<WeightedSum<A>>(partial, rows, row);
      mean[row] = static_cast<A>(ratio_or_zero(t.at[1], t.at[0]));
      weight_sum[row] = t.at[0];
    }
  }
};

template <class A>
struct MeanBackward {
  const A* grad;             // [rows]
  const double* weight_sum;  // [rows]
  A* grad_x;                 // like x
  HOST_DEVICE void operator()(int64_t row, int64_t i, double weight) const {
    grad_x[i] = static_cast<A>(weight != 0 ? grad[row] * ratio_or_zero(weight, weight_sum[row]) : 0.0);
  }
};

inline std::tuple<Tensor, Tensor> masked_mean(Tensor x_, Tensor mask_, OptionalTensor cu_seqlens) {
  const char* op = "masked_mean";
  const OptionalTensor offsets = contiguous_offsets(op, cu_seqlens, "x", x_);
  const Tensor x = dense(x_);
  const OptionalTensor mask = contiguous_mask(op, mask_, "x", x_);
  const Rows rows = rows_view(op, x, offsets);
  Tensor mean = empty(x, {rows.rows});
  Tensor weight_sum = empty(x, {rows.rows}, ScalarType::Double);
  for_real(x.scalar_type(), op, "x", [&](auto zero) {
    using A = decltype(zero);
    const Tensor partial = partial_terms(x, rows, WeightedSum<A>::kTerms);
    reduce_rows(x, rows, mask_view(op, mask), WeightedSum<A>{in<A>(x)}, out<double>(partial));
    run_team(x, MeanFinish<A>{in<double>(partial), out<A>(mean), out<double>(weight_sum), rows});
  });
  return {mean, weight_sum};
}

inline Tensor masked_mean_backward(Tensor grad_, Tensor mask_, Tensor weight_sum, OptionalTensor cu_seqlens) {
  const char* op = "masked_mean";
  const OptionalTensor offsets = contiguous_offsets(op, cu_seqlens, "mask", mask_);
  const Tensor grad = dense(grad_), mask = dense(mask_);
  const Rows rows = rows_view(op, mask, offsets);
  CHECK_VALUE(grad_.dim() == 1 && grad_.size(0) == rows.rows && weight_sum.numel() == rows.rows, op,
              ": the shapes given to the backward pass do not belong together");
  Tensor grad_x = empty_tokens(grad, mask.sizes(), rows);
  for_real(grad.scalar_type(), op, "grad", [&](auto zero) {
    using A = decltype(zero);
    for_each(grad, rows, mask_view(op, mask), MeanBackward<A>{in<A>(grad), in<double>(weight_sum), out<A>(grad_x)});
  });
  return grad_x;
}

// ---------------------------------------------------------------------------------------------------------------------
// masked_whiten: x [N] -> whitened [N], and what the backward pass needs. Two passes: the variance is taken around the mean,
// not as a difference of squares, which loses everything when the mean is large.

struct Whitening {
  double weight_sum, mean, divisor, scale;  // divisor: of the variance; scale: 1 / sqrt(var + eps)
};

template <class A>
struct SquaredDeviation {
  static constexpr int kTerms = 1;
  static constexpr bool kSimd = true;
  HOST_DEVICE static constexpr Fold fold(int) { return Fold::kSum; }
  const A* x;
  const Whitening* w;
  template <class V, class At>
  HOST_DEVICE void terms(int64_t, At i, V weight, V* t) const {
    const V deviation = load_at(x, i) - w->mean;
    t[0] = weight != 0 ? weight * deviation * deviation : all<V>(0.0);
  }
};

template <class A>
struct WhitenMean {
  const double* partial;
  Whitening* w;
  Rows rows;
  bool unbiased;
  template <class Team>
  HOST_DEVICE void operator()(const Team& team) const {
    if (team.rank != 0) return;
    const Terms<WeightedSum<A>> t = row_terms<WeightedSum<A>>(partial, rows, 0);
    const double n = t.at[0];
    *w = {n, ratio_or_zero(t.at[1], n), unbiased && n > 1 ? n - 1 : n, 0.0};  // one token has no unbiased variance: 0 / n is 0
  }
};

template <class A>
struct WhitenScale {
  const double* partial;
  Whitening* w;
  Rows rows;
  double eps;
  template <class Team>
  HOST_DEVICE void operator()(const Team& team) const {
    if (team.rank != 0) return;
    const double squares = row_terms<SquaredDeviation<A>>(partial, rows, 0).at[0];
    w->scale = w->weight_sum != 0 ? 1.0 / sqrt(squares / w->divisor + eps) : 0.0;
  }
};

template <class A>
struct WhitenForward {
  const A* x;
  const Whitening* w;
  A* whitened;
  bool shift_mean;

  struct Tokens {
    const A* x;
    A* whitened;
    double mean, scale, shift;
    HOST_DEVICE void operator()(int64_t, int64_t i, double weight) const {
      whitened[i] = static_cast<A>(weight != 0 ? (x[i] - mean) * scale + shift : 0.0);
    }
  };
  HOST_DEVICE Tokens of_row(int64_t) const { return {x, whitened, w->mean, w->scale, shift_mean ? 0.0 : w->mean}; }
};

// dL/dx_j = g_j s + (w_j / n) (keep - s) sum g - w_j (x_j - mean) s^3 / divisor * sum g (x - mean),  s the scale, keep 0 or 1
template <class A>
struct WhitenUpstream {  // -> sum g, sum g (x - mean)
  static constexpr int kTerms = 2;
  static constexpr bool kSimd = true;
  HOST_DEVICE static constexpr Fold fold(int) { return Fold::kSum; }
  const A *grad, *x;
  const Whitening* w;
  template <class V, class At>
  HOST_DEVICE void terms(int64_t, At i, V weight, V* t) const {
    const V zero = all<V>(0.0), g = load_at(grad, i);
    t[0] = weight != 0 ? g : zero;
    t[1] = weight != 0 ? g * (load_at(x, i) - w->mean) : zero;
  }
};

template <class A>
struct WhitenTotals {
  const double* partial;
  double* totals;  // [2]
  Rows rows;
  template <class Team>
  HOST_DEVICE void operator()(const Team& team) const {
    if (team.rank != 0) return;
    const Terms<WhitenUpstream<A>> t = row_terms<WhitenUpstream<A>>(partial, rows, 0);
    totals[0] = t.at[0];
    totals[1] = t.at[1];
  }
};

template <class A>
struct WhitenBackward {
  const A *grad, *x;
  const Whitening* w;
  const double* totals;
  A* grad_x;
  bool shift_mean;

  struct Tokens {
    const A *grad, *x;
    A* grad_x;
    double mean, scale, through_mean, through_scale;
    HOST_DEVICE void operator()(int64_t, int64_t i, double weight) const {
      const double gradient = grad[i] * scale + weight * (through_mean - (x[i] - mean) * through_scale);
      grad_x[i] = static_cast<A>(weight != 0 ? gradient : 0.0);
    }
  };
  HOST_DEVICE Tokens of_row(int64_t) const {
    const double s = w->scale, keep = shift_mean ? 0.0 : 1.0;
    return {grad, x, grad_x, w->mean, s, (keep - s) / w->weight_sum * totals[0], s * s * s / w->divisor * totals[1]};
  }
};

inline std::tuple<Tensor, Tensor> masked_whiten(Tensor x_, Tensor mask_, bool shift_mean, bool unbiased, double eps) {
  const char* op = "masked_whiten";
  const Tensor x = dense(x_);
  const OptionalTensor mask = contiguous_mask(op, mask_, "x", x_);
  const Rows rows = padded_rows(1, x.numel());
  Tensor whitened = empty(x, x.sizes());
  Tensor whitening = empty(x, {4}, ScalarType::Double);
  auto* w = reinterpret_cast<Whitening*>(out<double>(whitening));
  for_real(x.scalar_type(), op, "x", [&](auto zero) {
    using A = decltype(zero);
    const Mask view = mask_view(op, mask);
    const Tensor partial = partial_terms(x, rows, WeightedSum<A>::kTerms);
    reduce_rows(x, rows, view, WeightedSum<A>{in<A>(x)}, out<double>(partial));
    run_team(x, WhitenMean<A>{in<double>(partial), w, rows, unbiased});
    reduce_rows(x, rows, view, SquaredDeviation<A>{in<A>(x), w}, out<double>(partial));
    run_team(x, WhitenScale<A>{in<double>(partial), w, rows, eps});
    for_each(x, rows, view, WhitenForward<A>{in<A>(x), w, out<A>(whitened), shift_mean});
  });
  return {whitened, whitening};
}

inline Tensor masked_whiten_backward(Tensor grad_, Tensor x_, Tensor mask_, Tensor whitening, bool shift_mean) {
  const char* op = "masked_whiten";
  check_twin(op, "grad", grad_, "x", x_);
  const Tensor grad = dense(grad_), x = dense(x_);
  const OptionalTensor mask = contiguous_mask(op, mask_, "x", x_);
  const Rows rows = padded_rows(1, x.numel());
  Tensor grad_x = empty(x, x.sizes());
  const auto* w = reinterpret_cast<const Whitening*>(in<double>(whitening));
  for_real(x.scalar_type(), op, "x", [&](auto zero) {
    using A = decltype(zero);
    const Mask view = mask_view(op, mask);
    const Tensor partial = partial_terms(x, rows, WhitenUpstream<A>::kTerms);
    Tensor totals = empty(x, {2}, ScalarType::Double);
    reduce_rows(x, rows, view, WhitenUpstream<A>{in<A>(grad), in<A>(x), w}, out<double>(partial));
    run_team(x, WhitenTotals<A>{in<double>(partial), out<double>(totals), rows});
    for_each(x, rows, view, WhitenBackward<A>{in<A>(grad), in<A>(x), w, in<double>(totals), out<A>(grad_x), shift_mean});
  });
  return grad_x;
}

}  // namespace rlhf_fast::RLHF_UNIT
