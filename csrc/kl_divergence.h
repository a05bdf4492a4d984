// Exact KL(policy || reference) over the vocabulary, from the logits x and y of both, in one pass.
//
//   p = softmax(x / tau)    q = softmax(y / tau)    KL = sum_j p_j (log p_j - log q_j), in nats
//
// Forward: running maxima m of x and n of y with s = sum exp((x - m) / tau), r = sum exp((y - n) / tau) and
// w = sum exp((x - m) / tau) d, where d_j = (x_j - m) - (y_j - n); then KL = w / (s tau) - log s + log r
// Backward: dKL/dx_j = p_j (d_j - D) / tau^2 with D = w / s, the mean of d under p: r falls out.
//
// D is what is left of d. What rounding takes is small where p is large: |x - m| / tau <= -log p, and |y - n| / tau <= -log q, which
// is large there only if KL is. The logits' own size falls out first.
// The gradient, a difference from the mean, is off by 2^-23 max(1, KL) at most, by measurement.
//
// A token that the policy can give and the reference cannot, x > -inf beside y = -inf, makes KL +inf whatever else is in the row;
// its row gets no gradient, for no finite step changes that. Where x = -inf nothing is added.
//
// Bytes, for rows of V logits of e and f bytes: forward reads (e + f) V; backward reads (e + f) V and writes e V. The minimum.
#pragma once

#include "logprob.h"

namespace rlhf_fast::RLHF_UNIT {

// They start finite: nothing seen yet needs no case of its own.
template <class A>
struct KlTops {
  A max = std::numeric_limits<A>::lowest(), ref_max = max;
};

template <class A>
HOST_DEVICE KlTops<A> larger(const KlTops<A>& a, const KlTops<A>& b) {
  return {b.max > a.max ? b.max : a.max, b.ref_max > a.ref_max ? b.ref_max : a.ref_max};
}

// Part of a row: `sum`, `ref_sum` and `dot` relative to the maxima. S is the type of the sums.
template <class A, class S>
struct KlSums {
  KlTops<A> tops{};
  S sum = 0, ref_sum = 0, dot = 0;
  bool cut = false;  // the reference lacks a token of the policy

  HOST_DEVICE void move(const KlTops<A>& to, S to_log2) {
    const S moved = static_cast<S>(tops.max) - to.max, ref_moved = static_cast<S>(tops.ref_max) - to.ref_max;
    const S factor = exp2_nonpositive(moved * to_log2);
    dot = factor > 0 ? factor * (dot + (moved - ref_moved) * sum) : S(0);
    sum *= factor;
    ref_sum *= exp2_nonpositive(ref_moved * to_log2);
    tops = to;
  }
};

template <class A>
struct KlStats {  // kept for the backward pass, [rows, 4]
  KlTops<A> tops;
  A inverse_sum;  // p = exp((x - max) / tau) inverse_sum
  A mean;         // D, or +inf for a row without a gradient
};

template <class A>
struct KlRow {
  KlStats<A> stats{};
  double kl = 0;
};

template <class A, class S>
HOST_DEVICE KlRow<A> finish_kl(const KlSums<A, S>& s, double slope) {
  // The largest logit alone adds 1 to its sum: less is a row of -inf. A NaN comes here in a sum.
  const bool valid = s.sum >= S(0.5) && s.ref_sum >= S(0.5);
  const double infinity = std::numeric_limits<double>::infinity(), nan = std::numeric_limits<double>::quiet_NaN();
  const double mean = static_cast<double>(s.dot) / s.sum;
  double kl = slope * mean - log(static_cast<double>(s.sum)) + log(static_cast<double>(s.ref_sum));
  kl = !valid ? nan : s.cut ? infinity : kl < 0 ? 0.0 : kl;
  const double inverse_sum = kl == kl ? 1 / static_cast<double>(s.sum) : nan;
  return {{s.tops, static_cast<A>(inverse_sum), static_cast<A>(s.cut ? infinity : mean)}, kl};
}

// dL/dx of one row: c 2^((x - max) to_log2) (d - D). The sum is a factor and no part of the exponent, whose rounding d may enlarge.
template <class A>
struct KlGradient {
  KlTops<A> tops;
  A to_log2, mean, coefficient;

  HOST_DEVICE KlGradient(const KlStats<A>& stats, double slope, double upstream)
      : tops(stats.tops),
        to_log2(static_cast<A>(slope * kLog2E)),
        mean(stats.mean),
        coefficient(static_cast<A>(upstream * slope * slope * stats.inverse_sum)) {}

  template <class F>  // A, or Lanes<A>
  HOST_DEVICE F operator()(F x, F y) const {
    const F below = x - tops.max, u = below * to_log2, zero{};
    const F pull = exp2_bounded(u) * ((below - (y - tops.ref_max)) - mean) * coefficient;
    return u < kLowestExponent<A> ? zero * coefficient : pull;  // a NaN stays, one of the whole row too
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Checks and views, shared by both devices.

struct KlCall {
  Tensor logits, ref_logits;
  OptionalTensor temperature, mask;
  LogitRows rows, ref_rows;
  LogprobOptions options;

  template <class A>
  HOST_DEVICE static double slope(const LogprobOptions& options, int64_t row) {  // NaN for a temperature that is none
    const double slope = 1 / options.tau<A>(row);
    return static_cast<A>(slope) > 0 ? slope : std::numeric_limits<double>::quiet_NaN();
  }
};

inline KlCall kl_call(const char* op, const Tensor& logits, const Tensor& ref_logits, const OptionalTensor& temperature,
                      const OptionalTensor& mask, double temperature_value) {
  CHECK_VALUE(logits.dim() >= 1 && logits.dim() <= 3, op, ": `logits` must have 1 to 3 dimensions here, got ", shape_of(logits));
  check_like(op, "ref_logits", ref_logits, "logits", logits);
  KlCall call{readable_rows(logits), readable_rows(ref_logits)};
  call.rows = logit_rows(call.logits);
  call.ref_rows = logit_rows(call.ref_logits);
  CHECK_VALUE(call.rows.vocab > 0 || call.rows.rows == 0, op, ": `logits` must not have an empty vocabulary, got shape ", shape_of(logits));
  if (temperature.has_value()) check_per_row(op, "temperature", *temperature, logits);
  call.temperature = dense_temperature(op, temperature, accumulate_type(logits));
  if (mask.has_value()) {
    check_per_row(op, "mask", *mask, logits);
    call.mask = dense(*mask);
  }
  call.options = {call.temperature.has_value() ? call.temperature->const_data_ptr() : nullptr, temperature_value, 0.0, 1.0, 0,
                  mask_view(op, call.mask)};
#if !defined(RLHF_DEVICE_CODE)
  check_temperature(op, call.temperature);
#endif
  return call;
}

// f is called with a value of each C++ type: one type, or float32 beside one of 16 bits.
template <class F>
void for_logits_pair(const char* op, const Tensor& logits, const Tensor& ref_logits, F&& f) {
  for_logits(ref_logits.scalar_type(), op, "ref_logits", [](auto) {});
  for_logits(logits.scalar_type(), op, "logits", [&](auto zero) {
    using T = decltype(zero);
    if (ref_logits.scalar_type() == logits.scalar_type()) return f(zero, zero);
    if constexpr (std::is_same_v<T, float>) {
      if (ref_logits.scalar_type() == ScalarType::BFloat16) return f(zero, BFloat16{});
      if (ref_logits.scalar_type() == ScalarType::Half) return f(zero, Half{});
    } else if constexpr (sizeof(T) == 2) {
      if (ref_logits.scalar_type() == ScalarType::Float) return f(zero, float{});
    }
    CHECK_TYPE(false, op, ": `ref_logits` is ", torch::headeronly::toString(ref_logits.scalar_type()), " and `logits` ",
               torch::headeronly::toString(logits.scalar_type()), "; they must have one dtype here, or one be float32 and one of 16 bits");
  });
}

struct KlOutputs {
  Tensor kl, stats;  // [...], [rows, 4]
};

inline KlOutputs kl_outputs(const KlCall& call) {
  int64_t sizes[2] = {};
  for (int64_t d = 0; d + 1 < call.logits.dim(); ++d) sizes[d] = call.logits.size(d);
  const ScalarType type = accumulate_type(call.logits);
  Tensor kl = empty(call.logits, {sizes, static_cast<size_t>(call.logits.dim() - 1)}, type);
  Tensor stats = empty(call.logits, {call.rows.rows, 4}, type);
  return {kl, stats};
}

struct KlBackwardCall {
  KlCall call;
  Tensor grad, target;
  LogitRows target_rows;
};

inline KlBackwardCall kl_backward_call(const char* op, const Tensor& grad, const Tensor& logits, const Tensor& ref_logits,
                                       const OptionalTensor& temperature, const OptionalTensor& mask, const Tensor& stats,
                                       double temperature_value) {
  KlCall call = kl_call(op, logits, ref_logits, temperature, mask, temperature_value);
  check_per_row(op, "grad", grad, logits);
  const ScalarType type = accumulate_type(logits);
  CHECK_TYPE(grad.scalar_type() == type, op, ": `grad` has the wrong dtype");
  CHECK_VALUE(stats.dim() == 2 && stats.size(0) == call.rows.rows && stats.size(1) == 4 && stats.is_contiguous() &&
                  stats.scalar_type() == type,
              op, ": `row_stats` is not what the forward pass returned");
  Tensor target = empty(logits, logits.sizes());
  return {call, dense(grad), target, logit_rows(target)};
}

// Whether a row has no gradient, before its logits are looked at.
template <class A>
HOST_DEVICE bool without_gradient(const KlStats<A>& stats, double upstream) {
  return upstream == 0 || (stats.mean == std::numeric_limits<A>::infinity() && stats.inverse_sum == stats.inverse_sum);
}

// ---------------------------------------------------------------------------------------------------------------------
#if !defined(RLHF_DEVICE_CODE)

// Both rows, some lanes at a time, in the way of for_lanes.
template <class T, class U, class Body>
HOST_DEVICE void for_pairs(const T* x, const U* y, int64_t n, Body&& body) {
  constexpr int kCount = kLanes<accumulate_t<T>>;
  const int64_t left = n % kCount;
  T row[kCount] = {};
  U ref_row[kCount] = {};
  if (n < kCount) {
    memcpy(static_cast<void*>(row + (kCount - n)), x, sizeof(T) * n);
    memcpy(static_cast<void*>(ref_row + (kCount - n)), y, sizeof(U) * n);
  }
  for (int64_t j = 0; j + kCount <= n; j += kCount) {
    prefetch_ahead_of(x + j);
    prefetch_ahead_of(y + j);
    body(j, load_lanes(x + j), load_lanes(y + j), std::integral_constant<int, 0>{});
  }
  if (left)
    body(n - kCount, load_lanes(n < kCount ? row : x + n - kCount), load_lanes(n < kCount ? ref_row : y + n - kCount),
         static_cast<int>(kCount - left));
}

template <class A>
HOST_DEVICE A largest_lane(Lanes<A> lanes) {
  return fold_lanes<A>(lanes, [](Lanes<A> a, Lanes<A> b) ALWAYS_INLINE { return a > b ? a : b; });
}

template <class T, class U, class A = accumulate_t<T>>
HOST_DEVICE KlTops<A> block_tops(const T* x, const U* y, int64_t n) {
  using F = Lanes<A>;
  F max = F{} - std::numeric_limits<A>::infinity(), ref_max = max;
  for_pairs(x, y, n, [&](int64_t, F a, F b, auto seen) ALWAYS_INLINE {
    a = where_new<A, 0>(a, max, seen);
    b = where_new<A, 0>(b, ref_max, seen);
    max = a > max ? a : max;
    ref_max = b > ref_max ? b : ref_max;
  });
  return {largest_lane<A>(max), largest_lane<A>(ref_max)};
}

// One read of a block: its sums relative to `above`, which may be exceeded by the headroom, and its own maxima.
template <class T, class U, class A = accumulate_t<T>>
HOST_DEVICE KlSums<A, double> kl_block(const T* x, const U* y, int64_t n, A to_log2, const KlTops<A>& above) {
  using F = Lanes<A>;
  constexpr int kFew = 4;  // equal terms beside a large one are rounded to one side each time, and KL magnifies that
  const A reference = above.max, ref_reference = above.ref_max;
  const F underflow = F{} + kLowestExponent<A> / to_log2, lowest = F{} - std::numeric_limits<A>::infinity(), zero{};
  F max = lowest, ref_max = lowest, highest = lowest, few{}, ref_few{}, few_dots{};
  WideSum<A> sum, ref_sum, dot;
  int turn = 0;
  for_pairs(x, y, n, [&](int64_t, F a, F b, auto seen) ALWAYS_INLINE {
    a = where_new<A, 0>(a, lowest, seen);
    b = where_new<A, 0>(b, lowest, seen);
    max = a > max ? a : max;
    ref_max = b > ref_max ? b : ref_max;
    const F below = a - reference, ref_below = b - ref_reference, difference = below - ref_below;
    const F e = exp2_bounded((underflow > below ? underflow : below) * to_log2);  // a NaN passes
    few += e;
    ref_few += exp2_bounded((underflow > ref_below ? underflow : ref_below) * to_log2);
    highest = difference > highest ? difference : highest;
    few_dots += e * (below < underflow ? zero : difference);
    if (++turn % kFew) return;
    sum.take(few);
    ref_sum.take(ref_few);
    dot.take(few_dots);
  });
  sum.take(few);
  ref_sum.take(ref_few);
  dot.take(few_dots);
  const bool cut = largest_lane<A>(highest) == std::numeric_limits<A>::infinity();
  return {{largest_lane<A>(max), largest_lane<A>(ref_max)}, sum.total(), ref_sum.total(), dot.total(), cut};
}

// As softmax_sums: a block is read once where neither row rises above what came before.
template <class T, class U, class A = accumulate_t<T>>
CPU_CLONES KlSums<A, double> kl_sums(const T* x, const U* y, int64_t vocab, double slope) {
  const double to_log2 = slope * kLog2E;
  KlSums<A, double> total, block;
  for (int64_t start = 0; start < vocab; start += kBlock) {
    const int64_t n = vocab - start < kBlock ? vocab - start : kBlock;
    auto rises = [&](A top, A over) ALWAYS_INLINE { return !((top - over) * slope <= kHeadroom); };
    KlTops<A> above = total.tops;
    for (bool again = start == 0;; again = true) {  // kl_block stands in the code once: it is long
      if (again) above = larger(above, block_tops(x + start, y + start, n));
      block = kl_block(x + start, y + start, n, static_cast<A>(to_log2), above);
      if (again || !(rises(block.tops.max, above.max) || rises(block.tops.ref_max, above.ref_max))) break;
    }
    total.move(above, to_log2);
    total.sum += block.sum;
    total.ref_sum += block.ref_sum;
    total.dot += block.dot;
    total.cut |= block.cut;
    total.move(larger(total.tops, block.tops), to_log2);
  }
  return total;
}

template <class T, class U>
CPU_CLONES void kl_row_gradient(const T* x, const U* y, T* dx, int64_t vocab, KlGradient<accumulate_t<T>> gradient) {
  using F = Lanes<accumulate_t<T>>;
  for_pairs(x, y, vocab, [&](int64_t first, F a, F b, auto) ALWAYS_INLINE {
    if (first >= 0) return store_lanes(dx + first, gradient(a, b));
    T row[kLanes<accumulate_t<T>>];
    store_lanes(row, gradient(a, b));
    memcpy(static_cast<void*>(dx), row - first, sizeof(T) * vocab);
  });
}

inline std::tuple<Tensor, Tensor> kl_divergence(Tensor logits, Tensor ref_logits, OptionalTensor temperature, OptionalTensor mask,
                                                double temperature_value) {
  const char* op = "kl_divergence";
  const KlCall call = kl_call(op, logits, ref_logits, temperature, mask, temperature_value);
  const KlOutputs o = kl_outputs(call);
  for_logits_pair(op, logits, ref_logits, [&](auto zero, auto ref_zero) {
    using T = decltype(zero);
    using U = decltype(ref_zero);
    using A = accumulate_t<T>;
    const T* x = in<T>(call.logits);
    const U* y = in<U>(call.ref_logits);
    A* kl_out = out<A>(o.kl);
    auto* stats_out = reinterpret_cast<KlStats<A>*>(out<A>(o.stats));
    parallel_for(call.rows.rows, 2 * call.rows.vocab, [&](int64_t row) {
      const double weight = call.options.mask[row];
      KlRow<A> result;
      if (weight != 0) {
        const double slope = KlCall::slope<A>(call.options, row);
        result = finish_kl(kl_sums(x + call.rows.offset(row), y + call.ref_rows.offset(row), call.rows.vocab, slope), slope);
      }
      kl_out[row] = static_cast<A>(weight == 0 ? 0.0 : weight * result.kl);
      stats_out[row] = result.stats;
    });
  });
  return {o.kl, o.stats};
}

inline Tensor kl_divergence_backward(Tensor grad, Tensor logits, Tensor ref_logits, OptionalTensor temperature, OptionalTensor mask,
                                     Tensor stats, double temperature_value) {
  const char* op = "kl_divergence";
  const KlBackwardCall b = kl_backward_call(op, grad, logits, ref_logits, temperature, mask, stats, temperature_value);
  const KlCall& call = b.call;
  for_logits_pair(op, logits, ref_logits, [&](auto zero, auto ref_zero) {
    using T = decltype(zero);
    using U = decltype(ref_zero);
    using A = accumulate_t<T>;
    const T* x = in<T>(call.logits);
    const U* y = in<U>(call.ref_logits);
    T* dx = out<T>(b.target);
    const A* upstream = in<A>(b.grad);
    const auto* stats_in = reinterpret_cast<const KlStats<A>*>(in<A>(stats));
    parallel_for(call.rows.rows, 2 * call.rows.vocab, [&](int64_t row) {
      const double weight = call.options.mask[row], up = weight == 0 ? 0.0 : weight * upstream[row];
      T* target_row = dx + b.target_rows.offset(row);
      if (without_gradient(stats_in[row], up)) {
        memset(static_cast<void*>(target_row), 0, sizeof(T) * call.rows.vocab);
        return;
      }
      const KlGradient<A> gradient(stats_in[row], KlCall::slope<A>(call.options, row), up);
      kl_row_gradient(x + call.rows.offset(row), y + call.ref_rows.offset(row), target_row, call.rows.vocab, gradient);
    });
  });
  return b.target;
}

// ---------------------------------------------------------------------------------------------------------------------
#else

// As gather_logprobs' kernels, with two rows side by side. A thread works on units of 16 bytes of the narrower logits and as many
// elements of the other, which are two loads where that is float32.

template <class T, class U> constexpr int kUnit = kPack<T> > kPack<U> ? kPack<T> : kPack<U>;
constexpr int kUnitsInFlight = 2;
// Blocks a multiprocessor holds at least. Forward over 16-bit logits a thread needs about 100 registers: two blocks, which
// have 32 and 48 KiB on their way.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kNarrowKlWarps = 5;  // six would spill there
#else
constexpr int kNarrowKlWarps = 7;
#endif
template <int kThreads, bool kForward, class T, class U>
constexpr int kKlBlocks = kThreads == kWarp ? (sizeof(T) == 2 ? kNarrowKlWarps : 6)
                          : sizeof(T) == 8  ? 1
                                            : (kForward && sizeof(T) + sizeof(U) < 8 ? 2 : 4);
template <class T, class U> constexpr bool kKlByWarps = kByWarps<false, T> && std::is_same_v<T, U>;  // two types meet at large vocabularies

// kUnitsInFlight units of one row.
template <int kElements, class T>
struct Units {
  static constexpr int kParts = kElements / kPack<T>;
  Granule packs[kParts][kUnitsInFlight];

  __device__ Units(const RowReader<T>& reader, int unit, int stride, T fill) {
    UNROLL
    for (int part = 0; part < kParts; ++part) reader.load(unit * kParts + part, stride * kParts, fill, packs[part]);
  }
  __device__ accumulate_t<T> operator()(int u, int i) const { return element<T>(packs[i / kPack<T>][u], i % kPack<T>); }
  __device__ accumulate_t<T> max() const {
    accumulate_t<T> top = largest<T>(packs[0]);
    if constexpr (kParts == 2) {
      const accumulate_t<T> other = largest<T>(packs[1]);
      top = other > top ? other : top;
    }
    return top;
  }
};

template <int kElements, class A, class X, class Y>
__device__ void add_units(KlSums<A, A>& mine, const X& x, const Y& y, A to_log2) {
  mine.move(larger(mine.tops, {x.max(), y.max()}), to_log2);
  UNROLL
  for (int u = 0; u < kUnitsInFlight; ++u) {
    A sum = 0, ref_sum = 0, dot = 0;
    UNROLL
    for (int i = 0; i < kElements; ++i) {
      const A below = x(u, i) - mine.tops.max, ref_below = y(u, i) - mine.tops.ref_max, difference = below - ref_below;
      const A e = exp2_nonpositive(below * to_log2);
      sum += e;
      ref_sum += exp2_nonpositive(ref_below * to_log2);
      mine.cut = mine.cut || difference == std::numeric_limits<A>::infinity();
      if (e > 0) dot += e * difference;  // never 0 * inf, nor what two -inf leave
    }
    mine.sum += sum;
    mine.ref_sum += ref_sum;
    mine.dot += dot;
  }
}

struct KlTotals {
  double sum, ref_sum, dot, cut;
};
HOST_DEVICE void merge(KlTotals& into, const KlTotals& other) {
  into.sum += other.sum;
  into.ref_sum += other.ref_sum;
  into.dot += other.dot;
  into.cut += other.cut;
}

// One row by kThreads threads: a warp (several rows a block) or a whole block.
template <int kThreads, class T, class U>
__global__ void __launch_bounds__(kThreads == kWarp ? kWarp * kRowsPerBlock : kThreads, kKlBlocks<kThreads, true, T, U>)
    kl_divergence_kernel(const T* logits, const U* ref_logits, LogitRows rows, LogitRows ref_rows, LogprobOptions options,
                         accumulate_t<T>* kl,               // [rows]
                         KlStats<accumulate_t<T>>* stats) {  // [rows]
  using A = accumulate_t<T>;
  constexpr int kElements = kUnit<T, U>;
  const int64_t row = kThreads == kWarp ? blockIdx.x * int64_t(kRowsPerBlock) + threadIdx.x / kWarp : int64_t(blockIdx.x);
  if (row >= rows.rows) return;
  const int lane = threadIdx.x % kThreads;
  const double weight = options.mask[row];
  KlRow<A> result;
  if (weight != 0) {
    const A to_log2 = static_cast<A>(KlCall::slope<A>(options, row) * kLog2E);
    const float fill = -std::numeric_limits<float>::infinity();
    const RowReader<T> reader(logits + rows.offset(row), rows.vocab);
    const RowReader<U> ref_reader(ref_logits + ref_rows.offset(row), rows.vocab);
    const int units_in_row = static_cast<int>((rows.vocab + kElements - 1) / kElements);
    KlSums<A, A> mine;
    for (int unit = lane; unit < units_in_row; unit += kThreads * kUnitsInFlight) {
      const Units<kElements, T> x(reader, unit, kThreads, static_cast<T>(fill));
      const Units<kElements, U> y(ref_reader, unit, kThreads, static_cast<U>(fill));
      add_units<kElements>(mine, x, y, to_log2);
    }
    mine.move({block_max<kThreads>(mine.tops.max), block_max<kThreads>(mine.tops.ref_max)}, to_log2);
    const KlTotals total = block_merge<kThreads>(KlTotals{static_cast<double>(mine.sum), static_cast<double>(mine.ref_sum),
                                                          static_cast<double>(mine.dot), mine.cut ? 1.0 : 0.0});
    result = finish_kl(KlSums<A, double>{mine.tops, total.sum, total.ref_sum, total.dot, total.cut != 0},
                       KlCall::slope<A>(options, row));
  }
  if (lane != 0) return;
  kl[row] = static_cast<A>(weight == 0 ? 0.0 : weight * result.kl);
  stats[row] = result.stats;
}

// A row by a warp, or cut into `pieces` blocks.
template <int kThreads, class T, class U>
__global__ void __launch_bounds__(kThreads == kWarp ? kWarp * kRowsPerBlock : kThreads, kKlBlocks<kThreads, false, T, U>)
    kl_divergence_backward_kernel(const T* logits, const U* ref_logits, T* target, LogitRows rows, LogitRows ref_rows,
                                  LogitRows target_rows, LogprobOptions options, const accumulate_t<T>* grad,
                                  const KlStats<accumulate_t<T>>* stats, int pieces, int piece_units) {
  using A = accumulate_t<T>;
  constexpr int kElements = kUnit<T, U>;
  const int64_t row = kThreads == kWarp ? blockIdx.x * int64_t(kRowsPerBlock) + threadIdx.x / kWarp : int64_t(blockIdx.x / pieces);
  if (row >= rows.rows) return;
  const double weight = options.mask[row], upstream = weight == 0 ? 0.0 : weight * grad[row];
  const TargetRow<kThreads, T, kElements> to(target + target_rows.offset(row), rows.vocab, kThreads == kWarp ? 0 : blockIdx.x % pieces,
                                             piece_units);
  if (without_gradient(stats[row], upstream)) return to.zeros();

  const T* x = logits + rows.offset(row);
  const U* y = ref_logits + ref_rows.offset(row);
  const KlGradient<A> gradient(stats[row], KlCall::slope<A>(options, row), upstream);
  if (to.has_edge) to.dx[to.edge] = narrow<T>(gradient(static_cast<A>(x[to.edge]), static_cast<A>(y[to.edge])));
  const RowReader<T> reader(x, to.tail, to.head);
  const RowReader<U> ref_reader(y, to.tail, to.head);
  for (int unit = to.pack; unit < to.end; unit += kThreads * kUnitsInFlight) {
    const Units<kElements, T> a(reader, unit, kThreads, static_cast<T>(0.0f));
    const Units<kElements, U> b(ref_reader, unit, kThreads, static_cast<U>(0.0f));
    UNROLL
    for (int u = 0; u < kUnitsInFlight; ++u) {
      if (unit + u * kThreads >= to.end) break;
      to.store(unit + u * kThreads, [&](int i) { return gradient(a(u, i), b(u, i)); });
    }
  }
}

inline std::tuple<Tensor, Tensor> kl_divergence(Tensor logits, Tensor ref_logits, OptionalTensor temperature, OptionalTensor mask,
                                                double temperature_value) {
  const char* op = "kl_divergence";
  const KlCall call = kl_call(op, logits, ref_logits, temperature, mask, temperature_value);
  const KlOutputs o = kl_outputs(call);
  for_logits_pair(op, logits, ref_logits, [&](auto zero, auto ref_zero) {
    using T = decltype(zero);
    using U = decltype(ref_zero);
    using A = accumulate_t<T>;
    auto start = [&](auto kernel, int64_t blocks, int threads) {
      launch(logits, kernel, blocks, threads, in<T>(call.logits), in<U>(call.ref_logits), call.rows, call.ref_rows, call.options,
             out<A>(o.kl), reinterpret_cast<KlStats<A>*>(out<A>(o.stats)));
    };
    if constexpr (kKlByWarps<T, U>)
      if (call.rows.vocab <= kWarpRowVocab)
        return start(kl_divergence_kernel<kWarp, T, U>, ceil_div(call.rows.rows, kRowsPerBlock), kWarp * kRowsPerBlock);
    start(kl_divergence_kernel<kRowThreads, T, U>, call.rows.rows, kRowThreads);
  });
  return {o.kl, o.stats};
}

inline Tensor kl_divergence_backward(Tensor grad, Tensor logits, Tensor ref_logits, OptionalTensor temperature, OptionalTensor mask,
                                     Tensor stats, double temperature_value) {
  const char* op = "kl_divergence";
  const KlBackwardCall b = kl_backward_call(op, grad, logits, ref_logits, temperature, mask, stats, temperature_value);
  const KlCall& call = b.call;
  for_logits_pair(op, logits, ref_logits, [&](auto zero, auto ref_zero) {
    using T = decltype(zero);
    using U = decltype(ref_zero);
    using A = accumulate_t<T>;
    auto start = [&](auto kernel, int64_t blocks, int threads, int pieces, int piece_units) {
      launch(logits, kernel, blocks, threads, in<T>(call.logits), in<U>(call.ref_logits), out<T>(b.target), call.rows, call.ref_rows,
             b.target_rows, call.options, in<A>(b.grad), reinterpret_cast<const KlStats<A>*>(in<A>(stats)), pieces, piece_units);
    };
    const int units = static_cast<int>(ceil_div(call.rows.vocab, kUnit<T, U>));
    if constexpr (kKlByWarps<T, U>)
      if (call.rows.vocab <= kWarpRowVocab)
        return start(kl_divergence_backward_kernel<kWarp, T, U>, ceil_div(call.rows.rows, kRowsPerBlock), kWarp * kRowsPerBlock, 1, units);
    const RowPieces pieces(units);
    start(kl_divergence_backward_kernel<kRowThreads, T, U>, call.rows.rows * pieces.count, kRowThreads, pieces.count, pieces.packs);
  });
  return b.target;
}

#endif

}  // namespace rlhf_fast::RLHF_UNIT
