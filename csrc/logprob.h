// Token log-probabilities and their entropy, from logits, in one pass.
//
//   z_j = logit_scale x_j / tau                          or, with a soft cap c,  z_j = c tanh(logit_scale x_j / c) / tau
//   p_j = exp(z_j) / sum_k exp(z_k)
//   logprob = log p_y        entropy H = -sum_j p_j log p_j
//
// Forward: a running maximum m with s = sum exp(z - m) and w = sum (z - m) exp(z - m), rescaled when m grows (Milakov and
// Gimelshein 2018, arXiv 1805.02867), gives log p_y = (z_y - m) - log s and H = log s - w / s. No [rows, V] temporary.
// Backward, from (m, log s, H) a row and upstream a for the log-prob, b for the entropy:
//   dL/dz_j = a (1[j = y] - p_j) - b p_j (log p_j + H)
//
// Bytes, for rows of V logits of e bytes: forward reads e V; backward reads e V and writes e V, in place or not. The minimum.
//
// A row is reduced in an order that V alone decides: the same bits whatever batch it stands in, padded or packed.
//
// The logits may also come as slices of the vocabulary, by tiles or on several devices. Then (m, s, w) of each slice and the
// label's logit are a row's statistics, [rows, 4] in double; logprob_slice_statistics makes them, or adds a slice to those of
// the ones before it, logprob_slices_combine turns them into what gather_logprobs returns, and logprob_slice_backward gives the
// gradient of a slice from the m, log s and H of the whole.
#pragma once

#include "loops.h"
#include "on_chip.h"

namespace rlhf_fast::RLHF_UNIT {

// What a call says about every row, and where its rows lie: rows of V logits with stride 1, in up to two batch dimensions.
struct LogitRows {
  int64_t rows = 1, inner = 1, vocab = 0;
  int64_t outer_stride = 0, inner_stride = 0;
  int64_t start = 0, whole = 0;  // of a slice of the vocabulary: the id of its first logit, the size of the whole or -1: not known
  HOST_DEVICE bool knows(int64_t label) const { return whole < 0 || (label >= 0 && label < whole); }
  HOST_DEVICE int64_t offset(int64_t row) const {
    const int64_t outer = quotient_of_rows(row, inner);
    return outer * outer_stride + (row - outer * inner) * inner_stride;
  }
};

inline LogitRows logit_rows(const Tensor& logits) {
  const int64_t batch_dims = logits.dim() - 1;
  LogitRows rows;
  rows.vocab = rows.whole = logits.size(batch_dims);
  for (int64_t d = 0; d < batch_dims; ++d) rows.rows *= logits.size(d);
  check_row_count(rows.rows);
  if (batch_dims >= 1) {
    rows.inner = logits.size(batch_dims - 1) > 0 ? logits.size(batch_dims - 1) : 1;
    rows.inner_stride = logits.stride(batch_dims - 1);
  }
  if (batch_dims == 2) rows.outer_stride = logits.stride(0);
  return rows;
}

template <class A>
struct LogitMap {  // x -> z, for one row
  A slope;         // dz/dx at 0: logit_scale / tau
  A cap;           // c / tau, or 0 for no cap
  A inner;         // logit_scale / c
};

struct LogprobOptions {
  const void* temperature;  // a value a row, of the type A, or null
  double temperature_value, softcap, logit_scale;
  int64_t ignore_index;
  Mask mask;  // a weight a row

  template <class A>
  HOST_DEVICE double tau(int64_t row) const {
    return temperature ? static_cast<double>(static_cast<const A*>(temperature)[row]) : temperature_value;
  }
  template <class A>
  HOST_DEVICE LogitMap<A> map(int64_t row) const {
    const double tau = this->tau<A>(row), slope = logit_scale / tau;
    if (softcap == 0) return {static_cast<A>(slope), A(0), A(0)};
    return {static_cast<A>(slope), static_cast<A>(softcap / tau), static_cast<A>(logit_scale / softcap)};
  }
};

template <class A>
struct RowStats {  // kept for the backward pass, [rows, 3]
  A max;           // of x without a cap, of z with one
  A log_sum;       // log sum exp(z - z_max)
  A entropy;
};

// tanh without a call or a branch: Cephes' tanhf below .625, the exponential form above. F is float or Lanes<float>.
template <class F>
HOST_DEVICE F tanh_polynomial(F x) {
  const F square = x * x;
  F p = square * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * square - 5.37397155531e-2f;
  p = p * square + 1.33314422036e-1f;
  p = p * square - 3.33332819422e-1f;
  const F small = p * square * x + x;
  const F magnitude = x < 0 ? -x : x, zero{};
  const F power = magnitude * static_cast<float>(-2 * kLog2E);
  const F e = exp2_bounded(power < -126.0f ? zero - 126.0f : power);
  const F ratio = (1.0f - e) / (1.0f + e);
  return magnitude < 0.625f ? small : x < 0 ? -ratio : ratio;
}

HOST_DEVICE float tanh_smooth(float x) {
#if defined(__CUDA_ARCH__)
  return tanhf(x);
#else
  return tanh_polynomial(x);
#endif
}
HOST_DEVICE double tanh_smooth(double x) { return tanh(x); }

#if !defined(RLHF_DEVICE_CODE)
HOST_DEVICE Lanes<float> tanh_smooth(Lanes<float> x) { return tanh_polynomial(x); }
HOST_DEVICE Lanes<double> tanh_smooth(Lanes<double> x) {
  for (int l = 0; l < kLanes<double>; ++l) x[l] = tanh(x[l]);
  return x;
}
#endif

// Without a cap the map stays linear and the maximum is subtracted from x itself: exact where logits are large.
template <bool kCapped, class F, class A>
HOST_DEVICE F capped(F x, const LogitMap<A>& map) {
  if constexpr (kCapped) return map.cap * tanh_smooth(x * map.inner);
  return x;
}

template <bool kCapped, class A>
HOST_DEVICE A below_max(A value, A max, const LogitMap<A>& map) {  // z - z_max, from what capped() returned
  if constexpr (kCapped) return value - max;
  return (value - max) * map.slope;
}

// (max, sum, dot) of part of a row. `max` is the largest value; `sum` and `dot` are taken relative to it.
struct SoftmaxSums {
  double max, sum, dot;
};

constexpr double kMinusInfinity = -std::numeric_limits<double>::infinity();

HOST_DEVICE void rescale(SoftmaxSums& s, double to, double slope) {
  if (s.max == to || s.max == kMinusInfinity) {  // nothing summed yet, or a NaN that must stay
    s.max = to;
    return;
  }
  const double delta = (s.max - to) * slope;
  const double factor = exp(delta);
  s.dot = factor > 0 ? factor * (s.dot + delta * s.sum) : factor * s.sum;
  s.sum *= factor;
  s.max = to;
}

HOST_DEVICE void merge(SoftmaxSums& into, SoftmaxSums other, double slope) {
  const double max = into.max > other.max ? into.max : other.max;
  rescale(into, max, slope);
  rescale(other, max, slope);
  into.sum += other.sum;
  into.dot += other.dot;
}

constexpr SoftmaxSums kNothingSummed{kMinusInfinity, 0, 0};

template <class A>
HOST_DEVICE RowStats<A> finish_row(const SoftmaxSums& s) {
  const double log_sum = log(s.sum);
  const double entropy = log_sum - s.dot / s.sum;
  return {static_cast<A>(s.max), static_cast<A>(log_sum), static_cast<A>(entropy < 0 ? 0.0 : entropy)};
}

// What one row gives out, or zero where nothing is asked of it. `value` is capped() of the label's logit.
template <class A>
HOST_DEVICE void write_row(double value, const RowStats<A>& stats, double slope, double weight, bool ignored, A* logprob, A* entropy) {
  if (ignored || weight == 0) {
    *logprob = 0;
    if (entropy) *entropy = 0;
    return;
  }
  const double below = (value - stats.max) * slope;
  *logprob = static_cast<A>(weight * (below - static_cast<double>(stats.log_sum)));
  if (entropy) *entropy = static_cast<A>(weight * stats.entropy);
}

// A label outside the vocabulary gives NaN: the CPU refuses it before this is reached, a CUDA kernel cannot.
template <bool kCapped, class T, class A>
HOST_DEVICE void write_row(const T* x, const RowStats<A>& stats, const LogitMap<A>& map, int64_t label, int64_t vocab, double weight,
                           bool ignored, A* logprob, A* entropy) {
  const bool valid = !ignored && weight != 0 && label >= 0 && label < vocab;
  const A value = valid ? capped<kCapped>(static_cast<A>(x[label]), map) : std::numeric_limits<A>::quiet_NaN();
  write_row(static_cast<double>(value), stats, kCapped ? 1.0 : static_cast<double>(map.slope), weight, ignored, logprob, entropy);
}

// f(is_capped, has_entropy), as constants. What the entropy needs of capped logits is made in any case: next to a tanh it costs little.
template <class F>
void for_form(bool capped, bool entropy, F&& f) {
  if (capped) f(std::true_type{}, std::true_type{});
  else if (entropy) f(std::false_type{}, std::true_type{});
  else f(std::false_type{}, std::false_type{});
}

struct RowStatistics {  // of the slices of a row so far, [rows, 4]
  SoftmaxSums sums;
  double target;        // capped() of the label's logit; kUnseen until its slice has been
};

constexpr double kUnseen = std::numeric_limits<double>::infinity();  // of such a logit the log-prob is NaN anyway

HOST_DEVICE RowStatistics no_statistics() { return {kNothingSummed, kUnseen}; }

template <bool kCapped, class T, class A>
HOST_DEVICE void take_target(RowStatistics& into, const T* x, const LogitMap<A>& map, int64_t place, int64_t vocab) {
  if (place >= 0 && place < vocab) into.target = capped<kCapped>(static_cast<A>(x[place]), map);
}

template <bool kCapped, class F, class A>
HOST_DEVICE auto map_slope(F value, const LogitMap<A>& map) {  // dz/dx
  if constexpr (kCapped) {
    const F t = value / map.cap;
    return map.slope * (A(1) - t * t);
  } else {
    return map.slope;
  }
}

// dL/dx of the logits of one row, with u = log2 p = (x - max) to_log2 - log2_sum:
//   (a [j = y] - p (a + b (log p + H))) dz/dx = (a [j = y] - 2^u (constant + linear u)) dz/dx
// Below this power of two a probability is 0.
template <class A> constexpr A kLowestExponent = std::numeric_limits<A>::min_exponent - 1;

template <bool kCapped, bool kEntropy, class A>
struct RowGradient {
  LogitMap<A> map;
  A max, to_log2, log2_sum, constant, linear;

  HOST_DEVICE RowGradient(const LogitMap<A>& map, const RowStats<A>& stats, A a, A b)
      : map(map),
        max(stats.max),
        to_log2(kCapped ? static_cast<A>(kLog2E) : static_cast<A>(map.slope * kLog2E)),
        log2_sum(static_cast<A>(stats.log_sum * kLog2E)),
        constant(a + b * stats.entropy),
        linear(static_cast<A>(b / kLog2E)) {}

  template <class F>  // A, or Lanes<A>
  HOST_DEVICE F operator()(F x, A label_share) const {  // label_share: a at the label, 0 elsewhere
    const F value = capped<kCapped>(x, map);
    const F u = (value - max) * to_log2 - log2_sum, zero{};
    F pull = exp2_bounded(u);
    if constexpr (kEntropy) pull *= constant + linear * u;
    else pull *= constant;
    return (label_share - (u < kLowestExponent<A> ? zero : pull)) * map_slope<kCapped>(value, map);  // a NaN stays
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Checks and views, shared by both devices.

// One value a row of `logits`: the shape without the vocabulary.
inline void check_per_row(const char* op, const char* name, const Tensor& t, const Tensor& logits) {
  bool match = t.dim() == logits.dim() - 1;
  for (int64_t d = 0; match && d < t.dim(); ++d) match = t.size(d) == logits.size(d);
  CHECK_VALUE(match, op, ": `", name, "` has shape ", shape_of(t),
              " but must have the shape of `logits` without its last dimension; `logits` is ", shape_of(logits));
  check_same_device(op, name, t, "logits", logits);
}

// Rows with stride 1: as they are, or in a copy. [V], [n, V] or [b, n, V].
inline Tensor readable_rows(const Tensor& logits) {
  const int64_t last = logits.dim() - 1;
  return logits.size(last) <= 1 || logits.stride(last) == 1 ? logits : dense(logits);
}

struct LogprobCall {
  Tensor logits, labels;
  OptionalTensor temperature, mask;
  LogitRows rows;
  LogprobOptions options;
  bool long_labels;

  HOST_DEVICE static int64_t label(const void* labels, bool is_long, int64_t row) {
    return is_long ? static_cast<const int64_t*>(labels)[row] : static_cast<const int32_t*>(labels)[row];
  }
};

inline OptionalTensor dense_temperature(const char* op, const OptionalTensor& temperature, ScalarType type) {
  if (!temperature.has_value()) return temperature;
  CHECK_TYPE(temperature->scalar_type() == type, op, ": `temperature` must be ", torch::headeronly::toString(type), " here, got ",
             torch::headeronly::toString(temperature->scalar_type()));
  return dense(*temperature);
}

inline OptionalTensor dense_temperature(const char* op, const OptionalTensor& temperature, const Tensor& labels, ScalarType type) {
  if (temperature.has_value()) check_like(op, "temperature", *temperature, "labels", labels);
  return dense_temperature(op, temperature, type);
}

inline void check_label_type(const char* op, const Tensor& labels) {
  CHECK_TYPE(labels.scalar_type() == ScalarType::Long || labels.scalar_type() == ScalarType::Int, op,
             ": `labels` must be int64 or int32, got ", torch::headeronly::toString(labels.scalar_type()));
}

struct VocabSlice {  // what the logits are of the vocabulary
  int64_t start, whole;
};

inline LogprobCall logprob_call(const char* op, const Tensor& logits_, const Tensor& labels, const OptionalTensor& temperature,
                                const OptionalTensor& mask, double temperature_value, double softcap, double logit_scale,
                                int64_t ignore_index, std::optional<VocabSlice> slice_ = {}) {
  CHECK_VALUE(logits_.dim() >= 1 && logits_.dim() <= 3, op, ": `logits` must have 1 to 3 dimensions here, got ", shape_of(logits_));
  check_per_row(op, "labels", labels, logits_);
  check_label_type(op, labels);
  const int64_t vocab = logits_.size(logits_.dim() - 1);
  const VocabSlice slice = slice_.value_or(VocabSlice{0, vocab});
  CHECK_VALUE(slice.whole != 0 || labels.numel() == 0, op, ": `logits` must not have an empty vocabulary, got shape ", shape_of(logits_));
  CHECK_VALUE(slice.start >= 0 && (slice.whole < 0 || slice.start + vocab <= slice.whole), op, ": a slice of ", vocab, " logits from ", slice.start,
              " on must lie in the vocabulary of ", slice.whole);

  LogprobCall call{readable_rows(logits_), dense(labels)};
  call.long_labels = labels.scalar_type() == ScalarType::Long;
  call.rows = logit_rows(call.logits);
  call.rows.start = slice.start;
  call.rows.whole = slice.whole;

  call.temperature = dense_temperature(op, temperature, labels, accumulate_type(call.logits));
  call.mask = contiguous_mask(op, mask, "labels", labels);
  call.options = {call.temperature.has_value() ? call.temperature->const_data_ptr() : nullptr, temperature_value, softcap, logit_scale,
                  ignore_index, mask_view(op, call.mask)};
  return call;
}

struct LogprobOutputs {
  Tensor logprobs, entropy, stats;  // the shape of the labels, the same or empty, [rows, 3]
};

inline LogprobOutputs logprob_outputs(const Tensor& labels, ScalarType type, bool with_entropy) {
  Tensor logprobs = empty(labels, labels.sizes(), type);
  Tensor entropy = with_entropy ? empty(labels, labels.sizes(), type) : empty(labels, {0}, type);
  Tensor stats = empty(labels, {labels.numel(), 3}, type);
  return {logprobs, entropy, stats};
}
inline LogprobOutputs logprob_outputs(const LogprobCall& call, bool with_entropy) {
  return logprob_outputs(call.labels, accumulate_type(call.logits), with_entropy);
}

// Where the gradient goes: a new contiguous tensor, or over the logits. `rows` describes the target.
inline Tensor gradient_target(const char* op, const LogprobCall& call, const Tensor& logits, bool inplace, LogitRows& rows,
                              const char* argument = "inplace_backward") {
  rows = call.rows;
  if (!inplace) {
    Tensor target = empty(logits, logits.sizes());
    rows.inner_stride = rows.vocab;
    rows.outer_stride = rows.vocab * rows.inner;
    return target;
  }
  const bool one_row = rows.rows <= 1;
  const bool apart = one_row || (rows.inner_stride >= rows.vocab && (rows.rows <= rows.inner || rows.outer_stride >= rows.inner_stride * rows.inner)) ||
                     (rows.outer_stride >= rows.vocab && rows.inner_stride >= rows.outer_stride * (rows.rows / rows.inner)) ;
  CHECK_VALUE(rows.vocab <= 1 || logits.stride(logits.dim() - 1) == 1, op,
              ": `", argument, "` needs logits whose last stride is 1, got ", logits.stride(logits.dim() - 1));
  CHECK_VALUE(apart, op, ": `", argument, "` needs rows that do not share memory; these `logits` are expanded or overlap");
  return logits;
}

struct UpstreamGradients {  // contiguous, of the accumulate type; either may be absent
  OptionalTensor logprobs, entropy;
  template <class A> HOST_DEVICE static A read(const A* g, int64_t row) { return g ? g[row] : A(0); }
};

inline UpstreamGradients upstream(const char* op, const OptionalTensor& grad_logprobs, const OptionalTensor& grad_entropy, const LogprobCall& call) {
  UpstreamGradients up;
  auto take = [&](const OptionalTensor& g, const char* name, OptionalTensor& into) {
    if (!g.has_value()) return;
    check_like(op, name, *g, "labels", call.labels);
    CHECK_TYPE(g->scalar_type() == accumulate_type(call.logits), op, ": `", name, "` has the wrong dtype");
    into = dense(*g);
  };
  take(grad_logprobs, "grad_logprobs", up.logprobs);
  take(grad_entropy, "grad_entropy", up.entropy);
  return up;
}

inline void check_stats(const char* op, const Tensor& stats, const LogprobCall& call) {
  CHECK_VALUE(stats.dim() == 2 && stats.size(0) == call.rows.rows && stats.size(1) == 3 && stats.is_contiguous() &&
                  stats.scalar_type() == accumulate_type(call.logits),
              op, ": `row_stats` is not what the forward pass returned");
}

// ---------------------------------------------------------------------------------------------------------------------
#if !defined(RLHF_DEVICE_CODE)

constexpr int64_t kBlock = 2048;  // logits between two looks at the running maximum

// A row, or part of one, some lanes at a time: body(first, lanes, seen) with the position of the first lane. What is left at
// the end comes as full lanes that reach back over `seen` logits already given; loaded at once, lest an in-place body has
// written over them. A row shorter than the lanes stands at their end, first < 0.
template <class T, class Body>
HOST_DEVICE void for_lanes(const T* x, int64_t n, Body&& body) {
  using L = LogitLanes<T>;
  const int64_t left = n % L::kCount;
  alignas(64) T row[L::kCount] = {};
  if (n < L::kCount) memcpy(static_cast<void*>(row + (L::kCount - n)), x, sizeof(T) * n);
  const L last = L::load(n < L::kCount ? row : x + n - L::kCount);
  for (int64_t j = 0; j + L::kCount <= n; j += L::kCount) {
    prefetch_ahead_of(x + j);
    body(j, L::load(x + j), std::integral_constant<int, 0>{});
  }
  if (left) body(n - L::kCount, last, static_cast<int>(L::kCount - left));  // once for both: the body is long
}

// `value` in the lanes of one part whose logits are new, `otherwise` in those already seen.
template <class T, int kPart, class F, class Seen>
HOST_DEVICE F where_new(F value, F otherwise, Seen seen) {
  if constexpr (std::is_same_v<Seen, int>) {
    using L = LogitLanes<T>;
    typename L::Index position;
    for (int l = 0; l < kLanes<typename L::A>; ++l) position[l] = l * L::kParts + kPart;
    return position >= seen ? value : otherwise;
  }
  return value;
}

template <class T>
HOST_DEVICE accumulate_t<T> block_max(const T* x, int64_t n) {
  using A = accumulate_t<T>;
  using F = Lanes<A>;
  const F lowest = F{} - std::numeric_limits<A>::infinity();
  F max = lowest;
  for_lanes(x, n, [&](int64_t, const LogitLanes<T>& lanes, auto seen) ALWAYS_INLINE {
    for_constants<LogitLanes<T>::kParts>([&](auto part) ALWAYS_INLINE {
      const F value = where_new<T, part>(lanes.part[part], lowest, seen);
      max = value > max ? value : max;
    });
  });
  return fold_lanes<A>(max, [](F a, F b) { return a > b ? a : b; });
}

// 2^-100 is next to nothing in a sum of at least 1, however long the row. Far from the subnormal numbers, with which some processors
// take a hundred times as long: a row of which half is masked with -inf took ten times as long.
constexpr float kNegligibleExponent = -100;

// One read of a block: its sums relative to `reference`, a value of capped(), and its own maximum.
template <bool kCapped, bool kEntropy, class T>
HOST_DEVICE SoftmaxSums block_sums(const T* x, int64_t n, const LogitMap<accumulate_t<T>>& map, accumulate_t<T> reference) {
  using A = accumulate_t<T>;
  using F = Lanes<A>;
  const A to_log2 = kCapped ? static_cast<A>(kLog2E) : static_cast<A>(map.slope * kLog2E);
  const F negligible = F{} + kNegligibleExponent / to_log2;
  const F lowest = F{} - std::numeric_limits<A>::infinity();
  constexpr int kFew = 8 / LogitLanes<T>::kParts;
  F max = lowest, few{}, few_dots{};
  WideSum<A> sum, dot;
  int turn = 0;
  for_lanes(x, n, [&](int64_t, const LogitLanes<T>& lanes, auto seen) ALWAYS_INLINE {
    for_constants<LogitLanes<T>::kParts>([&](auto part) ALWAYS_INLINE {
      const F value = where_new<T, part>(capped<kCapped>(lanes.part[part], map), lowest, seen);
      max = value > max ? value : max;
      const F distance = value - reference;
      const F below = negligible > distance ? negligible : distance;  // a NaN passes
      const F e = exp2_bounded(below * to_log2);
      few += e;
      if constexpr (kEntropy) few_dots += below * e;
    });
    if (++turn % kFew) return;
    sum.take(few);
    if constexpr (kEntropy) dot.take(few_dots);
  });
  sum.take(few);
  dot.take(few_dots);
  const double slope = kCapped ? 1.0 : static_cast<double>(map.slope);
  return {static_cast<double>(fold_lanes<A>(max, [](F a, F b) { return a > b ? a : b; })), sum.total(), kEntropy ? slope * dot.total() : 0.0};
}

// How far, in nats, a block may rise above its reference: the rounding of an exponent, and of the difference that the entropy
// is in the end, grows with the distance.
constexpr double kHeadroom = 1.0;

// The maximum so far is the reference of the next block, so that it is read once; the first block, and one that rises above the
// headroom, is read again out of L1. A slice of a row goes on from the sums of those before it.
template <bool kCapped, bool kEntropy, class T>
CPU_CLONES SoftmaxSums softmax_sums(const T* x, int64_t vocab, LogitMap<accumulate_t<T>> map, const SoftmaxSums* before = nullptr) {
  using A = accumulate_t<T>;
  SoftmaxSums total = before ? *before : kNothingSummed;
  const double slope = kCapped ? 1.0 : static_cast<double>(map.slope);
  double reference = total.max;
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t n = vocab - start < kBlock ? vocab - start : kBlock;
    SoftmaxSums block{std::numeric_limits<double>::infinity(), 0, 0};
    bool empty = false;
    for (bool again = !(reference > kMinusInfinity);; again = true) {  // block_sums stands in the code once: it is long
      if (again) reference = capped<kCapped>(block_max(x + start, n), map);
      if ((empty = reference == kMinusInfinity)) break;
      block = block_sums<kCapped, kEntropy>(x + start, n, map, static_cast<A>(reference));
      if (again || (block.max - reference) * slope <= kHeadroom) break;
    }
    if (empty) {  // a row of -inf so far, or NaN, which a maximum does not see
      for (int64_t j = 0; j < n; ++j)
        if (x[start + j] != x[start + j]) total.sum = std::numeric_limits<double>::quiet_NaN();
      continue;
    }
    const double top = block.max;
    block.max = reference;
    merge(total, block, slope);
    if (top > total.max) rescale(total, top, slope);
    reference = total.max;
  }
  return total;
}

template <class Gradient, class T>
CPU_CLONES void row_gradient(const T* x, T* dx, int64_t vocab, Gradient gradient) {
  for_lanes(x, vocab, [&](int64_t first, LogitLanes<T> lanes, auto) ALWAYS_INLINE {
    prefetch_ahead_of(dx + first);
    for_constants<LogitLanes<T>::kParts>([&](auto part) ALWAYS_INLINE { lanes.part[part] = gradient(lanes.part[part], accumulate_t<T>(0)); });
    if (first >= 0) return lanes.store(dx + first);
    T row[LogitLanes<T>::kCount];
    lanes.store(row);
    memcpy(static_cast<void*>(dx), row - first, sizeof(T) * vocab);
  });
}

// `place`: of the label, which may lie outside a slice.
template <class Gradient, class T, class A>
void row_gradient_with_label(const T* x, T* dx, int64_t vocab, int64_t place, const Gradient& gradient, A a) {
  const bool has_label = place >= 0 && place < vocab;
  const A at_label = has_label ? static_cast<A>(x[place]) : A(0);  // before an in-place write
  row_gradient(x, dx, vocab, gradient);
  if (has_label) dx[place] = narrow<T>(gradient(at_label, a));
}

// Refused here, on one thread: an exception thrown inside parallel_for would lose its text.
inline void check_temperature(const char* op, const OptionalTensor& temperature) {
  if (!temperature.has_value()) return;
  for_real(temperature->scalar_type(), op, "temperature", [&](auto zero) {
    const auto* tau = in<decltype(zero)>(*temperature);
    for (int64_t row = 0; row < temperature->numel(); ++row)
      CHECK_VALUE(tau[row] > 0 && tau[row] < std::numeric_limits<double>::infinity(), op, ": `temperature` holds ", tau[row],
                  " at flat position ", row, "; it must be finite and above 0");
  });
}

inline void check_rows(const char* op, const LogprobCall& call) {
  const void* labels = call.labels.const_data_ptr();
  for (int64_t row = 0; row < call.rows.rows; ++row) {
    const int64_t label = LogprobCall::label(labels, call.long_labels, row);
    if (label == call.options.ignore_index || call.options.mask[row] == 0) continue;
    CHECK_VALUE(call.rows.knows(label), op, ": `labels` holds ", label, " at flat position ", row, "; a label must be in [0, ",
                call.rows.whole, "), or ignore_index = ", call.options.ignore_index, ", or masked");
  }
  check_temperature(op, call.temperature);
}

inline std::tuple<Tensor, Tensor, Tensor> gather_logprobs(Tensor logits, Tensor labels_, OptionalTensor temperature, OptionalTensor mask,
                                                              double temperature_value, double softcap, double logit_scale,
                                                              int64_t ignore_index, bool with_entropy, bool /*inplace_backward*/) {
  const char* op = "gather_logprobs";
  const LogprobCall call = logprob_call(op, logits, labels_, temperature, mask, temperature_value, softcap, logit_scale, ignore_index);
  check_rows(op, call);
  const LogprobOutputs o = logprob_outputs(call, with_entropy);
  const void* labels = call.labels.const_data_ptr();
  for_logits(logits.scalar_type(), op, "logits", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const T* x = in<T>(call.logits);
    A* logprob_out = out<A>(o.logprobs);
    A* entropy_out = with_entropy ? out<A>(o.entropy) : nullptr;
    auto* stats_out = reinterpret_cast<RowStats<A>*>(out<A>(o.stats));
    auto run = [&](auto is_capped, auto has_entropy) {
      constexpr bool kCapped = decltype(is_capped)::value;
      constexpr bool kEntropy = decltype(has_entropy)::value;
      parallel_for(call.rows.rows, call.rows.vocab, [&](int64_t row) {
        const int64_t label = LogprobCall::label(labels, call.long_labels, row);
        const double weight = call.options.mask[row];
        const bool ignored = label == ignore_index;
        const LogitMap<A> map = call.options.map<A>(row);
        const T* logits_row = x + call.rows.offset(row);
        RowStats<A> row_stats{};
        if (!ignored && weight != 0) row_stats = finish_row<A>(softmax_sums<kCapped, kEntropy>(logits_row, call.rows.vocab, map));
        stats_out[row] = row_stats;
        write_row<kCapped>(logits_row, row_stats, map, label, call.rows.vocab, weight, ignored, logprob_out + row,
                           entropy_out ? entropy_out + row : nullptr);
      });
    };
    for_form(call.options.softcap != 0, with_entropy, run);
  });
  return {o.logprobs, o.entropy, o.stats};
}

// statistics: [rows, 4], written afresh or added to.
inline void slice_statistics(const char* op, const LogprobCall& call, bool with_entropy, bool fresh, const Tensor& statistics) {
  check_rows(op, call);
  const void* labels = call.labels.const_data_ptr();
  auto* rows_out = reinterpret_cast<RowStatistics*>(out<double>(statistics));
  for_logits(call.logits.scalar_type(), op, "logits", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const T* x = in<T>(call.logits);
    auto run = [&](auto is_capped, auto has_entropy) {
      constexpr bool kCapped = decltype(is_capped)::value;
      parallel_for(call.rows.rows, call.rows.vocab, [&](int64_t row) {
        RowStatistics total = fresh ? no_statistics() : rows_out[row];
        const int64_t label = LogprobCall::label(labels, call.long_labels, row);
        if (label != call.options.ignore_index && call.options.mask[row] != 0) {
          const LogitMap<A> map = call.options.map<A>(row);
          const T* logits_row = x + call.rows.offset(row);
          total.sums = softmax_sums<kCapped, decltype(has_entropy)::value>(logits_row, call.rows.vocab, map, &total.sums);
          take_target<kCapped>(total, logits_row, map, label - call.rows.start, call.rows.vocab);
        }
        rows_out[row] = total;
      });
    };
    for_form(call.options.softcap != 0, with_entropy, run);
  });
}

inline Tensor gather_logprobs_backward_into(bool inplace, const OptionalTensor& grad_logprobs, const OptionalTensor& grad_entropy,
                                            const Tensor& logits, const LogprobCall& call, const Tensor& stats,
                                            const char* op = "gather_logprobs") {
  check_stats(op, stats, call);
  check_rows(op, call);
  const UpstreamGradients up = upstream(op, grad_logprobs, grad_entropy, call);
  LogitRows target_rows;
  Tensor target = gradient_target(op, call, logits, inplace, target_rows);
  const void* labels = call.labels.const_data_ptr();
  for_logits(logits.scalar_type(), op, "logits", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const T* x = in<T>(call.logits);
    T* dx = out<T>(target);
    const A* da = up.logprobs ? in<A>(*up.logprobs) : nullptr;
    const A* db = up.entropy ? in<A>(*up.entropy) : nullptr;
    const auto* stats_in = reinterpret_cast<const RowStats<A>*>(in<A>(stats));
    auto run = [&](auto is_capped, auto has_entropy) {
      using Gradient = RowGradient<decltype(is_capped)::value, decltype(has_entropy)::value, A>;
      parallel_for(call.rows.rows, call.rows.vocab, [&](int64_t row) {
        const int64_t label = LogprobCall::label(labels, call.long_labels, row);
        const double weight = call.options.mask[row];
        T* target_row = dx + target_rows.offset(row);
        const A a = static_cast<A>(weight * UpstreamGradients::read(da, row));
        const A b = static_cast<A>(weight * UpstreamGradients::read(db, row));
        if (label == call.options.ignore_index || weight == 0 || (a == 0 && b == 0)) {
          memset(static_cast<void*>(target_row), 0, sizeof(T) * call.rows.vocab);
          return;
        }
        const Gradient gradient(call.options.map<A>(row), stats_in[row], a, b);
        row_gradient_with_label(x + call.rows.offset(row), target_row, call.rows.vocab, label - call.rows.start, gradient, a);
      });
    };
    const bool has_entropy = up.entropy.has_value();
    for_form(call.options.softcap != 0, has_entropy, run);
  });
  return target;
}

// ---------------------------------------------------------------------------------------------------------------------
#else

// Forward: a thread has four packs of 16 bytes in flight, takes their maximum, rescales its sums once and adds
// ex2((x - max) slope log2 e). It sums in the type of the arithmetic, a group of packs at a time; the row's maximum is found in
// that type, each thread rescales to it once, and from there on sums are double, in a fixed tree. Rows are not cut, so that
// fewer rows than a GPU has multiprocessors leave some idle.
//
// What to expect, by count and not by measurement. bench/machine_code.py finds these instructions an element of bf16 logits on
// sm_90: 6.9 forward, 8.9 with the entropy, 16.2 backward, to which a thread's start and end add about 400: 0.7 an element at
// V = 151936, 3 at V = 32000. A multiprocessor issues 128 a clock; its share of an H200's 4.3 TB/s is 9.3 elements a clock
// forward and 4.6 backward, 13.8 and 27 instructions each. Memory is the bound of all three, and the exponential unit, 16 a
// clock, is busy for 58 % forward. A row off 16-byte alignment adds 2.5 instructions an element and reads L1 twice, not memory.

// The largest of some packs, as the type of the arithmetic. A NaN is passed over; it comes back in the sum.
template <class T, int kCount>
__device__ accumulate_t<T> largest(const Granule (&packs)[kCount]) {
  using A = accumulate_t<T>;
  A top = -std::numeric_limits<A>::infinity();
  if constexpr (sizeof(T) == 2) {
    Granule pair{};  // two values in one register: half the instructions
    pair.word[0] = packs[0].word[0];
    UNROLL
    for (int w = 1; w < kCount * 4; ++w) pair.word[0] = larger_halves<T>(pair.word[0], packs[w / 4].word[w % 4]);
    UNROLL
    for (int i = 0; i < 2; ++i) top = element<T>(pair, i) > top ? element<T>(pair, i) : top;
  } else {
    UNROLL
    for (int i = 0; i < kCount * kPack<T>; ++i) {
      const A value = element<T>(packs[i / kPack<T>], i % kPack<T>);
      top = value > top ? value : top;
    }
  }
  return top;
}

// One thread's share of a row. `scale` is the slope with log2 e in it, so that the exponential is one ex2; `dot` is in the
// units of the maximum, x without a cap. The maximum starts finite: nothing summed yet needs no case of its own.
template <class A>
struct ThreadSums {
  A max = std::numeric_limits<A>::lowest(), sum = 0, dot = 0;

  __device__ void rescale(A to, A scale) {
    const A delta = max - to, factor = exp2_nonpositive(delta * scale);
    dot = factor > 0 ? factor * (dot + delta * sum) : A(0);
    sum *= factor;
    max = to;
  }

  // inside(u): how many elements of pack u belong to the row. The fill beyond them is -inf, which a cap would make a logit.
  template <class T, bool kCapped, bool kEntropy, int kCount, class Inside>
  __device__ void add(const Granule (&packs)[kCount], const LogitMap<A>& map, A scale, const Inside& inside) {
    const A top = capped<kCapped>(largest<T>(packs), map);
    rescale(top > max ? top : max, scale);
    A group_sum = 0, group_dot = 0;
    UNROLL
    for (int u = 0; u < kCount; ++u) {
      const int left = kCapped ? inside(u) : kPack<T>;
      UNROLL
      for (int i = 0; i < kPack<T>; ++i) {
        A value = capped<kCapped>(element<T>(packs[u], i), map);
        if constexpr (kCapped) value = i < left ? value : -std::numeric_limits<A>::infinity();
        const A delta = value - max, e = exp2_nonpositive(delta * scale);
        group_sum += e;
        if constexpr (kEntropy)
          if (e > 0) group_dot += delta * e;  // never 0 * -inf
      }
    }
    sum += group_sum;
    dot += group_dot;
  }
};

struct RowTotals {
  double sum, dot;
};
HOST_DEVICE void merge(RowTotals& into, const RowTotals& other) {
  into.sum += other.sum;
  into.dot += other.dot;
}

constexpr int kRowsPerBlock = 4;       // of the one-warp-a-row form
constexpr int kRowThreads = 256;
// A warp a row is for the small vocabularies that are met: not for float64, which is for checks, nor for a soft cap, which only
// models of a large one have. Their rows of any length go to blocks.
template <bool kCapped, class T> constexpr bool kByWarps = !kCapped && sizeof(T) != 8;
// Blocks a multiprocessor holds at least: 64 registers a thread; 80 with a cap and in the one-warp form; for double 128.
template <int kThreads, bool kCapped, class T>
constexpr int kBlocks = sizeof(T) == 8 ? 2 : kThreads == kWarp ? 6 : kCapped ? 3 : 4;
template <bool kCapped, class T>
constexpr int kInFlight = sizeof(T) == 8 || kCapped ? 2 : 4;  // packs a thread

// A row of so many packs cut into even pieces, one a block: whole turns of its threads, enough of them to pay for its start.
struct RowPieces {
  static constexpr int64_t kMost = 16 * kRowThreads;
  int count, packs;
  explicit RowPieces(int64_t of_row)
      : count(of_row > kMost ? static_cast<int>(ceil_div(of_row, kMost)) : 1),
        packs(static_cast<int>(ceil_div(ceil_div(of_row, count), kRowThreads)) * kRowThreads) {}
};

// The sums of what a reader reads, by a warp (kThreads == 32) or a whole block; to thread 0 of it. keep(pack, granule): each pack,
// to the thread that has read it.
template <int kThreads, bool kCapped, bool kEntropy, class T, bool kAgain, class Keep>
__device__ SoftmaxSums read_packs(const RowReader<T, kAgain>& reader, const LogitMap<accumulate_t<T>>& map, const Keep& keep) {
  using A = accumulate_t<T>;
  constexpr int kUnroll = kInFlight<kCapped, T>;
  const A slope = kCapped ? A(1) : map.slope, scale = slope * static_cast<A>(kLog2E);
  const T fill = static_cast<T>(-std::numeric_limits<float>::infinity());
  const int count = reader.packs();
  ThreadSums<A> mine;
  for (int pack = threadIdx.x % kThreads; pack < count; pack += kThreads * kUnroll) {
    Granule packs[kUnroll];
    reader.load(pack, kThreads, fill, packs);
    UNROLL
    for (int u = 0; u < kUnroll; ++u)
      if (pack + u * kThreads < count) keep(pack + u * kThreads, packs[u]);
    mine.template add<T, kCapped, kEntropy>(packs, map, scale, [&](int u) { return reader.inside(pack + u * kThreads); });
  }
  const A max = block_max<kThreads>(mine.max);
  mine.rescale(max, scale);
  const RowTotals total = block_merge<kThreads>(RowTotals{static_cast<double>(mine.sum), static_cast<double>(mine.dot) * slope});
  return {total.sum == 0 ? kMinusInfinity : static_cast<double>(max), total.sum, total.dot};
}

template <int kThreads, bool kCapped, bool kEntropy, bool kAgain = false, class T>
__device__ SoftmaxSums read_row(const T* x, int64_t vocab, const LogitMap<accumulate_t<T>>& map) {
  return read_packs<kThreads, kCapped, kEntropy>(RowReader<T, kAgain>(x, vocab), map, [](int, const Granule&) {});
}

// One row by kThreads threads: a warp (several rows a block) or a whole block.
template <int kThreads, bool kCapped, bool kEntropy, class T>
__global__ void __launch_bounds__(kThreads == kWarp ? kWarp * kRowsPerBlock : kThreads, kBlocks<kThreads, kCapped, T>)
    gather_logprobs_kernel(const T* logits,                   // rows of V, as `rows` says
                           const void* labels, bool long_labels,  // [rows]
                           LogitRows rows, LogprobOptions options,
                           accumulate_t<T>* logprobs,          // [rows]
                           accumulate_t<T>* entropy,           // [rows] or null
                           RowStats<accumulate_t<T>>* stats) {  // [rows]
  using A = accumulate_t<T>;
  const int64_t row = kThreads == kWarp ? blockIdx.x * int64_t(kRowsPerBlock) + threadIdx.x / kWarp : int64_t(blockIdx.x);
  if (row >= rows.rows) return;  // whole warps leave together, and only where no block barrier follows
  const int64_t label = LogprobCall::label(labels, long_labels, row);
  const double weight = options.mask[row];
  const bool ignored = label == options.ignore_index;
  const LogitMap<A> map = options.map<A>(row);
  const T* x = logits + rows.offset(row);

  RowStats<A> row_stats{};
  if (!ignored && weight != 0) row_stats = finish_row<A>(read_row<kThreads, kCapped, kEntropy>(x, rows.vocab, map));
  if (threadIdx.x % kThreads != 0) return;
  stats[row] = row_stats;
  write_row<kCapped>(x, row_stats, map, label, rows.vocab, weight, ignored, logprobs + row, entropy ? entropy + row : nullptr);
}

// A slice of a row joins its statistics, or makes them; with what the entropy needs in any case, next to a matrix product.
template <int kThreads, bool kCapped, class T>
__global__ void __launch_bounds__(kThreads == kWarp ? kWarp * kRowsPerBlock : kThreads, kBlocks<kThreads, kCapped, T>)
    slice_statistics_kernel(const T* logits, const void* labels, bool long_labels, LogitRows rows, LogprobOptions options, bool fresh,
                            RowStatistics* statistics) {  // [rows]
  using A = accumulate_t<T>;
  const int64_t row = kThreads == kWarp ? blockIdx.x * int64_t(kRowsPerBlock) + threadIdx.x / kWarp : int64_t(blockIdx.x);
  if (row >= rows.rows) return;
  const int64_t label = LogprobCall::label(labels, long_labels, row);
  const bool asked = label != options.ignore_index && options.mask[row] != 0;
  const LogitMap<A> map = options.map<A>(row);
  const T* x = logits + rows.offset(row);
  SoftmaxSums sums = kNothingSummed;
  if (asked) sums = read_row<kThreads, kCapped, true>(x, rows.vocab, map);
  if (threadIdx.x % kThreads != 0 || !(asked || fresh)) return;
  RowStatistics total = fresh ? no_statistics() : statistics[row];
  if (asked) {
    merge(total.sums, sums, kCapped ? 1.0 : static_cast<double>(map.slope));
    take_target<kCapped>(total, x, map, label - rows.start, rows.vocab);
  }
  statistics[row] = total;
}

// The gradient of a row, written by a warp or by a block; cut into pieces of `piece_packs` packs, of 16 bytes or some times that.
// Packs are counted from the first 16-byte boundary of the target, so that they are stored whole wherever the row lies; what stands
// before and after them is written element by element by the first piece.
template <int kThreads, class T, int kElements = kPack<T>>
struct TargetRow {
  using A = accumulate_t<T>;
  T* dx;
  int64_t head, tail, edge;  // edge: this thread's element before or after the packs, fewer than there are lanes
  int pack, end;             // its first pack, and where the piece ends
  bool has_edge;

  __device__ TargetRow(T* dx, int64_t vocab, int piece, int piece_packs) : dx(dx) {
    const int64_t to_boundary = (sizeof(Granule) - reinterpret_cast<uintptr_t>(dx) % sizeof(Granule)) % sizeof(Granule) / sizeof(T);
    head = to_boundary < vocab ? to_boundary : vocab;
    const int packs_in_row = static_cast<int>((vocab - head) / kElements);
    tail = head + int64_t(packs_in_row) * kElements;
    const int lane = threadIdx.x % kThreads;
    edge = lane < head ? lane : tail + lane - head;
    has_edge = piece == 0 && edge < vocab;
    const int piece_end = (piece + 1) * piece_packs;
    end = piece_end < packs_in_row ? piece_end : packs_in_row;
    pack = piece * piece_packs + lane;
  }

  template <class Value>  // value(i): element i of the pack, in the type of the arithmetic
  __device__ void store(int p, const Value& value) const {
    T* at = dx + head + int64_t(p) * kElements;
    UNROLL
    for (int first = 0; first < kElements; first += kPack<T>) {
      T g[kPack<T>];
      UNROLL
      for (int i = 0; i < kPack<T>; ++i) g[i] = narrow<T>(value(first + i));
      stream_store(at + first, granule_of(g));
    }
  }

  __device__ void zeros() const {
    if (has_edge) dx[edge] = static_cast<T>(0.0f);
    for (int p = pack; p < end; p += kThreads) store(p, [](int) { return A(0); });
  }

  template <int kUnroll, class Gradient, bool kAgain = false>
  __device__ void write(const T* x, int64_t place, const Gradient& gradient, A a) const {
    if (has_edge) dx[edge] = narrow<T>(gradient(static_cast<A>(x[edge]), edge == place ? a : A(0)));
    const RowReader<T, kAgain> reader(x, tail, head);
    for (int p = pack; p < end; p += kThreads * kUnroll) {
      Granule packs[kUnroll];
      reader.load(p, kThreads, static_cast<T>(0.0f), packs);
      UNROLL
      for (int u = 0; u < kUnroll; ++u) {
        if (p + u * kThreads >= end) break;
        const int64_t first = head + (int64_t(p) + u * kThreads) * kPack<T>;
        const bool has_label = static_cast<uint64_t>(place) - static_cast<uint64_t>(first) < kPack<T>;
        const A at_label = has_label ? static_cast<A>(x[place]) : A(0);  // before an in-place write
        store(p + u * kThreads, [&](int i) { return gradient(element<T>(packs[u], i), A(0)); });
        if (has_label) dx[place] = narrow<T>(gradient(at_label, a));  // by the thread that has stored the pack: one place to pay for it
      }
    }
  }
};

// A row by a warp, or cut into `pieces` blocks.
template <int kThreads, bool kCapped, class T>
__global__ void __launch_bounds__(kThreads == kWarp ? kWarp * kRowsPerBlock : kThreads, kBlocks<kThreads, kCapped, T>)
    gather_logprobs_backward_kernel(const T* logits, T* target, const void* labels, bool long_labels, LogitRows rows, LogitRows target_rows,
                                    LogprobOptions options, const accumulate_t<T>* grad_logprobs, const accumulate_t<T>* grad_entropy,
                                    const RowStats<accumulate_t<T>>* stats, int pieces, int piece_packs) {
  using A = accumulate_t<T>;
  const int64_t row = kThreads == kWarp ? blockIdx.x * int64_t(kRowsPerBlock) + threadIdx.x / kWarp : int64_t(blockIdx.x / pieces);
  if (row >= rows.rows) return;
  const int64_t label = LogprobCall::label(labels, long_labels, row);
  const double weight = options.mask[row];
  // A label outside the vocabulary has no gradient: say so in its row rather than give half of one.
  const A a = rows.knows(label) ? static_cast<A>(weight * UpstreamGradients::read(grad_logprobs, row)) : std::numeric_limits<A>::quiet_NaN();
  const A b = static_cast<A>(weight * UpstreamGradients::read(grad_entropy, row));
  const TargetRow<kThreads, T> to(target + target_rows.offset(row), rows.vocab, kThreads == kWarp ? 0 : blockIdx.x % pieces, piece_packs);
  if (label == options.ignore_index || weight == 0 || (a == 0 && b == 0)) return to.zeros();
  const RowGradient<kCapped, true, A> gradient(options.map<A>(row), stats[row], a, b);
  to.template write<kInFlight<kCapped, T>>(logits + rows.offset(row), label - rows.start, gradient, a);
}

inline std::tuple<Tensor, Tensor, Tensor> gather_logprobs(Tensor logits, Tensor labels, OptionalTensor temperature, OptionalTensor mask,
                                                               double temperature_value, double softcap, double logit_scale,
                                                               int64_t ignore_index, bool with_entropy, bool /*inplace_backward*/) {
  const char* op = "gather_logprobs";
  const LogprobCall call = logprob_call(op, logits, labels, temperature, mask, temperature_value, softcap, logit_scale, ignore_index);
  const LogprobOutputs o = logprob_outputs(call, with_entropy);
  for_logits(logits.scalar_type(), op, "logits", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    A* entropy_out = with_entropy ? out<A>(o.entropy) : nullptr;
    auto* stats_out = reinterpret_cast<RowStats<A>*>(out<A>(o.stats));
    auto run = [&](auto is_capped, auto has_entropy) {
      constexpr bool kCapped = decltype(is_capped)::value;
      constexpr bool kEntropy = decltype(has_entropy)::value;
      auto start = [&](auto kernel, int64_t blocks, int threads) {
        launch(logits, kernel, blocks, threads, in<T>(call.logits), call.labels.const_data_ptr(), call.long_labels, call.rows,
               call.options, out<A>(o.logprobs), entropy_out, stats_out);
      };
      if constexpr (kByWarps<kCapped, T>)
        if (call.rows.vocab <= kWarpRowVocab)
          return start(gather_logprobs_kernel<kWarp, kCapped, kEntropy, T>, ceil_div(call.rows.rows, kRowsPerBlock), kWarp * kRowsPerBlock);
      start(gather_logprobs_kernel<kRowThreads, kCapped, kEntropy, T>, call.rows.rows, kRowThreads);
    };
    for_form(call.options.softcap != 0, with_entropy, run);
  });
  return {o.logprobs, o.entropy, o.stats};
}

inline void slice_statistics(const char* op, const LogprobCall& call, bool /*with_entropy*/, bool fresh, const Tensor& statistics) {
  for_logits(call.logits.scalar_type(), op, "logits", [&](auto zero) {
    using T = decltype(zero);
    auto run = [&](auto is_capped) {
      constexpr bool kCapped = decltype(is_capped)::value;
      auto start = [&](auto kernel, int64_t blocks, int threads) {
        launch(call.logits, kernel, blocks, threads, in<T>(call.logits), call.labels.const_data_ptr(), call.long_labels, call.rows,
               call.options, fresh, reinterpret_cast<RowStatistics*>(out<double>(statistics)));
      };
      if constexpr (kByWarps<kCapped, T>)
        if (call.rows.vocab <= kWarpRowVocab)
          return start(slice_statistics_kernel<kWarp, kCapped, T>, ceil_div(call.rows.rows, kRowsPerBlock), kWarp * kRowsPerBlock);
      start(slice_statistics_kernel<kRowThreads, kCapped, T>, call.rows.rows, kRowThreads);
    };
    call.options.softcap != 0 ? run(std::true_type{}) : run(std::false_type{});
  });
}

inline Tensor gather_logprobs_backward_into(bool inplace, const OptionalTensor& grad_logprobs, const OptionalTensor& grad_entropy,
                                            const Tensor& logits, const LogprobCall& call, const Tensor& stats,
                                            const char* op = "gather_logprobs") {
  check_stats(op, stats, call);
  const UpstreamGradients up = upstream(op, grad_logprobs, grad_entropy, call);
  LogitRows target_rows;
  Tensor target = gradient_target(op, call, logits, inplace, target_rows);
  for_logits(logits.scalar_type(), op, "logits", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    auto start = [&](auto kernel, int64_t blocks, int threads, int pieces, int piece_packs) {
      launch(logits, kernel, blocks, threads, in<T>(call.logits), out<T>(target), call.labels.const_data_ptr(), call.long_labels, call.rows,
             target_rows, call.options, up.logprobs ? in<A>(*up.logprobs) : nullptr, up.entropy ? in<A>(*up.entropy) : nullptr,
             reinterpret_cast<const RowStats<A>*>(in<A>(stats)), pieces, piece_packs);
    };
    auto run = [&](auto is_capped) {
      constexpr bool kCapped = decltype(is_capped)::value;
      const int packs = static_cast<int>(ceil_div(call.rows.vocab, kPack<T>));
      if constexpr (kByWarps<kCapped, T>)
        if (call.rows.vocab <= kWarpRowVocab)
          return start(gather_logprobs_backward_kernel<kWarp, kCapped, T>, ceil_div(call.rows.rows, kRowsPerBlock), kWarp * kRowsPerBlock, 1, packs);
      const RowPieces pieces(packs);
      start(gather_logprobs_backward_kernel<kRowThreads, kCapped, T>, call.rows.rows * pieces.count, kRowThreads, pieces.count, pieces.packs);
    };
    call.options.softcap != 0 ? run(std::true_type{}) : run(std::false_type{});
  });
  return target;
}

#endif

// The two backward ops differ in where they write and in what their schemas admit to.
inline Tensor gather_logprobs_backward(OptionalTensor grad_logprobs, OptionalTensor grad_entropy, Tensor logits, Tensor labels,
                                       OptionalTensor temperature, OptionalTensor mask, Tensor stats, double temperature_value,
                                       double softcap, double logit_scale, int64_t ignore_index) {
  const LogprobCall call =
      logprob_call("gather_logprobs", logits, labels, temperature, mask, temperature_value, softcap, logit_scale, ignore_index);
  return gather_logprobs_backward_into(false, grad_logprobs, grad_entropy, logits, call, stats);
}

inline void gather_logprobs_backward_inplace(OptionalTensor grad_logprobs, OptionalTensor grad_entropy, Tensor logits, Tensor labels,
                                             OptionalTensor temperature, OptionalTensor mask, Tensor stats, double temperature_value,
                                             double softcap, double logit_scale, int64_t ignore_index) {
  const LogprobCall call =
      logprob_call("gather_logprobs", logits, labels, temperature, mask, temperature_value, softcap, logit_scale, ignore_index);
  gather_logprobs_backward_into(true, grad_logprobs, grad_entropy, logits, call, stats);
}

// ---------------------------------------------------------------------------------------------------------------------
// Slices of the vocabulary: logits [..., v] are those of the ids from vocab_start on, of `vocab` in all or -1, not known; v may be 0,
// labels are ids of the whole.

inline Tensor logprob_slice_statistics(Tensor logits, Tensor labels, OptionalTensor temperature, OptionalTensor mask, double temperature_value,
                                       double softcap, double logit_scale, int64_t ignore_index, int64_t vocab_start, int64_t vocab,
                                       bool with_entropy) {
  const char* op = "logprob_slice_statistics";
  const LogprobCall call = logprob_call(op, logits, labels, temperature, mask, temperature_value, softcap, logit_scale, ignore_index,
                                        VocabSlice{vocab_start, vocab});
  Tensor statistics = empty(labels, {call.rows.rows, 4}, ScalarType::Double);
  slice_statistics(op, call, with_entropy, true, statistics);
  return statistics;
}

inline void logprob_slice_statistics_into(Tensor statistics, Tensor logits, Tensor labels, OptionalTensor temperature, OptionalTensor mask,
                                          double temperature_value, double softcap, double logit_scale, int64_t ignore_index,
                                          int64_t vocab_start, int64_t vocab, bool with_entropy) {
  const char* op = "logprob_slice_statistics_into";
  const LogprobCall call = logprob_call(op, logits, labels, temperature, mask, temperature_value, softcap, logit_scale, ignore_index,
                                        VocabSlice{vocab_start, vocab});
  CHECK_VALUE(statistics.dim() == 2 && statistics.size(0) == call.rows.rows && statistics.size(1) == 4 && statistics.is_contiguous() &&
                  statistics.scalar_type() == ScalarType::Double,
              op, ": `statistics` is not what logprob_slice_statistics returned");
  slice_statistics(op, call, with_entropy, false, statistics);
}

template <class A>
struct CombineSlices {
  const RowStatistics* partials;  // [slices, rows]
  int64_t slices, rows;
  const void* labels;
  bool long_labels;
  LogprobOptions options;
  A *logprobs, *entropy;  // [rows]; entropy or null
  RowStats<A>* stats;     // [rows]

  HOST_DEVICE void operator()(int64_t, int64_t row, double weight) const {
    const bool ignored = LogprobCall::label(labels, long_labels, row) == options.ignore_index;
    const double slope = options.softcap != 0 ? 1.0 : static_cast<double>(options.map<A>(row).slope);
    RowStatistics total = no_statistics();
    for (int64_t s = 0; s < slices; ++s) {
      const RowStatistics& slice = partials[s * rows + row];
      merge(total.sums, slice.sums, slope);
      total.target = slice.target != kUnseen ? slice.target : total.target;
    }
    const RowStats<A> row_stats = ignored || weight == 0 ? RowStats<A>{} : finish_row<A>(total.sums);
    const double value = total.target != kUnseen ? total.target : std::numeric_limits<double>::quiet_NaN();
    write_row(value, row_stats, slope, weight, ignored, logprobs + row, entropy ? entropy + row : nullptr);
    stats[row] = row_stats;  // a slice alone does not know that no other has the label
    if (total.target == kUnseen && !ignored && weight != 0) stats[row].max = std::numeric_limits<A>::quiet_NaN();
  }
};

// partials: [slices, rows, 4], merged in their order. Labels and temperatures are those that the statistics were made with. A
// label that no slice has gives NaN, and in its row of the gradient; on the CPU the statistics have refused it where they know V.
inline std::tuple<Tensor, Tensor, Tensor> logprob_slices_combine(Tensor partials_, Tensor labels_, OptionalTensor temperature_,
                                                                 OptionalTensor mask_, double temperature_value, double softcap,
                                                                 double logit_scale, int64_t ignore_index, bool with_entropy, bool wide) {
  const char* op = "logprob_slices_combine";
  const Tensor partials = dense(partials_), labels = dense(labels_);
  const ScalarType type = wide ? ScalarType::Double : ScalarType::Float;
  const int64_t rows = labels.numel();
  CHECK_VALUE(partials.dim() == 3 && partials.size(1) == rows && partials.size(2) == 4 && partials.scalar_type() == ScalarType::Double, op,
              ": `partials` must be [slices, ", rows, ", 4] in float64, got shape ", shape_of(partials));
  check_label_type(op, labels);
  const OptionalTensor temperature = dense_temperature(op, temperature_, labels, type);
  const OptionalTensor mask = contiguous_mask(op, mask_, "labels", labels);
  const LogprobOptions options{temperature.has_value() ? temperature->const_data_ptr() : nullptr, temperature_value, softcap, logit_scale,
                               ignore_index, mask_view(op, mask)};
  const LogprobOutputs o = logprob_outputs(labels, type, with_entropy);
  for_real(type, op, "partials", [&](auto zero) {
    using A = decltype(zero);
    const CombineSlices<A> combine{reinterpret_cast<const RowStatistics*>(in<double>(partials)), partials.size(0), rows,
                                   labels.const_data_ptr(), labels.scalar_type() == ScalarType::Long, options, out<A>(o.logprobs),
                                   with_entropy ? out<A>(o.entropy) : nullptr, reinterpret_cast<RowStats<A>*>(out<A>(o.stats))};
#if defined(RLHF_DEVICE_CODE)
    for_each(labels, padded_rows(1, rows), options.mask, combine);
#else  // no clones: what they make of a product and a sum is one rounding less than gather_logprobs has
    parallel_for(rows, combine.slices, [&](int64_t row) { combine(0, row, options.mask[row]); });
#endif
  });
  return {o.logprobs, o.entropy, o.stats};
}

inline Tensor logprob_slice_backward(OptionalTensor grad_logprobs, OptionalTensor grad_entropy, Tensor logits, Tensor labels,
                                     OptionalTensor temperature, OptionalTensor mask, Tensor stats, double temperature_value, double softcap,
                                     double logit_scale, int64_t ignore_index, int64_t vocab_start, int64_t vocab) {
  const char* op = "logprob_slice_backward";
  const LogprobCall call = logprob_call(op, logits, labels, temperature, mask, temperature_value, softcap, logit_scale, ignore_index,
                                        VocabSlice{vocab_start, vocab});
  return gather_logprobs_backward_into(false, grad_logprobs, grad_entropy, logits, call, stats, op);
}

inline void logprob_slice_backward_inplace(OptionalTensor grad_logprobs, OptionalTensor grad_entropy, Tensor logits, Tensor labels,
                                           OptionalTensor temperature, OptionalTensor mask, Tensor stats, double temperature_value,
                                           double softcap, double logit_scale, int64_t ignore_index, int64_t vocab_start, int64_t vocab) {
  const char* op = "logprob_slice_backward_inplace";
  const LogprobCall call = logprob_call(op, logits, labels, temperature, mask, temperature_value, softcap, logit_scale, ignore_index,
                                        VocabSlice{vocab_start, vocab});
  gather_logprobs_backward_into(true, grad_logprobs, grad_entropy, logits, call, stats, op);
}

}  // namespace rlhf_fast::RLHF_UNIT
