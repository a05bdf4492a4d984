// Log-probabilities over a kept set of tokens, for training on replies that were sampled with top-k or top-p: the sampler drew
// from a distribution normalised over the tokens it kept, and so must the policy be here.
//
//   logprob = z_y - log sum_{k in set} exp(z_k)     entropy likewise; z as in logprob.h
//
// A set is a row of K <= 512 ids. Negative ids are padding, an id given twice counts once. A label outside its set has
// probability 0: log-prob -inf, and its row no gradient.
//
// Bytes, for rows of V logits of e bytes: forward reads K logits and K ids; backward reads them again and writes e V.
#pragma once

#include <vector>

#include "logprob.h"

namespace rlhf_fast::RLHF_UNIT {

constexpr int kMaxKept = 512;
constexpr int kPadding = -1, kOutside = -2;  // what stands for an id that is none, and for one beyond the vocabulary

struct KeptIds {  // [rows, count]
  const void* ids;
  bool is_long;
  int count;
  int64_t vocab;

  HOST_DEVICE int64_t raw(int64_t row, int k) const {
    return is_long ? static_cast<const int64_t*>(ids)[row * count + k] : static_cast<const int32_t*>(ids)[row * count + k];
  }
  HOST_DEVICE int at(int64_t row, int k) const {
    const int64_t id = raw(row, k);
    return id < 0 ? kPadding : id < vocab ? static_cast<int>(id) : kOutside;
  }
  HOST_DEVICE bool ascend(int64_t row) const {  // up to the padding: nothing is there twice
    for (int k = 1; k < count; ++k) {
      const int previous = at(row, k - 1), id = at(row, k);
      if (id != kPadding && !(0 <= previous && previous < id)) return false;
    }
    return true;
  }
};

// A row is worked on by kSharers threads, each of which has the ids at places lane, lane + kSharers, ...; on the CPU by one with all.
template <int kSharers>
constexpr int kOwnIds = kMaxKept / kSharers;

// f(u) for u from `first` to the last of a thread's ids; unrolled where they are to stay in registers.
template <int kSharers, class F>
HOST_DEVICE void for_own(int first, int count, const F& f) {
  if constexpr (kSharers == 1) {
    for (int u = first; u < count; ++u) f(u);
  } else {
    UNROLL
    for (int u = 0; u < kOwnIds<kSharers>; ++u) f(u);
  }
}

template <int kSharers>
struct OwnIds {
  int at[kOwnIds<kSharers>];

  HOST_DEVICE void load(const KeptIds& ids, int64_t row, int lane) {
    for_own<kSharers>(0, ids.count, [&](int u) {
      const int k = lane + u * kSharers;
      at[u] = k < ids.count ? ids.at(row, k) : kPadding;
    });
  }

  // An id that stands at an earlier place becomes padding. Without an order all pairs are compared, 131,000 at most.
  HOST_DEVICE void drop_repeated(const KeptIds& ids, int64_t row, int lane) {
    if (ids.ascend(row)) return;
    for (int j = 0; j + 1 < ids.count; ++j) {
      const int earlier = ids.at(row, j);
      for_own<kSharers>(j + 1, ids.count, [&](int u) {
        at[u] = (at[u] == earlier) & (lane + u * kSharers > j) ? kPadding : at[u];
      });
    }
  }
};

struct KeptSums {
  SoftmaxSums sums;
  double slope;
  double ids, labels, outside;  // how many ids, how many of them the label, how many beyond the vocabulary
};

HOST_DEVICE void merge(KeptSums& into, const KeptSums& other) {
  merge(into.sums, other.sums, into.slope);
  into.ids += other.ids;
  into.labels += other.labels;
  into.outside += other.outside;
}

template <bool kCapped, int kSharers, class T, class A>
HOST_DEVICE KeptSums kept_sums(const T* x, const OwnIds<kSharers>& own, int count, int64_t label, const LogitMap<A>& map) {
  constexpr A kNone = -std::numeric_limits<A>::infinity();
  A values[kOwnIds<kSharers>], e[kOwnIds<kSharers>];
  KeptSums total{{kMinusInfinity, 0, 0}, kCapped ? 1.0 : static_cast<double>(map.slope), 0, 0, 0};
  A max = kNone;
  bool nan = false;
  for_own<kSharers>(0, count, [&](int u) {
    const int id = own.at[u];
    values[u] = id >= 0 ? capped<kCapped>(static_cast<A>(x[id]), map) : kNone;
    max = values[u] > max ? values[u] : max;
    nan = nan | (values[u] != values[u]);
    total.ids += id >= 0 ? 1.0 : 0.0;
    total.labels += id == label ? 1.0 : 0.0;
    total.outside += id == kOutside ? 1.0 : 0.0;
  });
  total.sums.max = max;
  if (nan) total.sums.sum = std::numeric_limits<double>::quiet_NaN();
  if (!(max > kNone)) return total;
  for_own<kSharers>(0, count, [&](int u) {
    values[u] = below_max<kCapped>(values[u], max, map);
    e[u] = exp_nonpositive(values[u]);
  });
  for_own<kSharers>(0, count, [&](int u) {
    total.sums.sum += e[u];
    total.sums.dot += e[u] > 0 ? static_cast<double>(values[u]) * e[u] : 0.0;
  });
  return total;
}

// What the forward pass leaves where the label is not in the set: no log-sum of 512 numbers is infinite otherwise.
template <class A>
HOST_DEVICE bool label_not_kept(const RowStats<A>& stats) {
  return stats.log_sum == std::numeric_limits<A>::infinity();
}

template <bool kCapped, class T, class A>
HOST_DEVICE RowStats<A> write_kept_row(const T* x, const KeptSums& s, const LogitMap<A>& map, int64_t label, int64_t vocab, double weight,
                                       A* logprob, A* entropy) {
  const bool refused = s.ids == 0 || s.outside > 0 || label < 0 || label >= vocab;  // by the CPU; a CUDA kernel can only say NaN
  const bool undefined = !(s.sums.sum > 0);                                         // all kept logits -inf, or one +inf or NaN
  const A nan = std::numeric_limits<A>::quiet_NaN(), infinity = std::numeric_limits<A>::infinity();
  RowStats<A> stats = refused || undefined ? RowStats<A>{nan, nan, nan} : finish_row<A>(s.sums);
  if (s.labels > 0 && !refused && !undefined) {
    write_row<kCapped>(x, stats, map, label, vocab, weight, false, logprob, entropy);
    return stats;
  }
  *logprob = static_cast<A>(refused || undefined ? nan : weight * -infinity);
  if (entropy) *entropy = static_cast<A>(weight * stats.entropy);
  if (s.labels == 0 && !refused) stats.log_sum = infinity;
  return stats;
}

// ---------------------------------------------------------------------------------------------------------------------
// Checks, shared by both devices.

struct KeptCall {
  LogprobCall call;
  Tensor kept;
  KeptIds ids;
};

inline KeptCall kept_call(const char* op, const Tensor& logits, const Tensor& labels, const Tensor& kept, const OptionalTensor& temperature,
                          const OptionalTensor& mask, double temperature_value, double softcap, double logit_scale, int64_t ignore_index) {
  const LogprobCall call = logprob_call(op, logits, labels, temperature, mask, temperature_value, softcap, logit_scale, ignore_index);
  bool match = kept.dim() == labels.dim() + 1;
  for (int64_t d = 0; match && d < labels.dim(); ++d) match = kept.size(d) == labels.size(d);
  CHECK_VALUE(match, op, ": `kept` has shape ", shape_of(kept), " but must have that of `labels` and one dimension more; `labels` is ",
              shape_of(labels));
  CHECK_TYPE(kept.scalar_type() == ScalarType::Long || kept.scalar_type() == ScalarType::Int, op, ": `kept` must be int64 or int32, got ",
             torch::headeronly::toString(kept.scalar_type()));
  const int64_t count = kept.size(labels.dim());
  CHECK_VALUE(count <= kMaxKept, op, ": `kept` holds ", count, " ids a row; at most ", kMaxKept, " are supported");
  check_same_device(op, "kept", kept, "logits", logits);
  CHECK_VALUE(call.rows.vocab <= std::numeric_limits<int>::max(), op, ": `kept` needs a vocabulary below 2^31, got ", call.rows.vocab);
  const Tensor ids = dense(kept);
  return {call, ids, {ids.const_data_ptr(), ids.scalar_type() == ScalarType::Long, static_cast<int>(count), call.rows.vocab}};
}

// ---------------------------------------------------------------------------------------------------------------------
#if !defined(RLHF_DEVICE_CODE)

// A row on the CPU; returns whether its set can be used.
template <bool kCapped, class T, class A>
CPU_CLONES bool kept_row(const T* x, const KeptIds& ids, int64_t row, int64_t label, double weight, LogitMap<A> map, A* logprob, A* entropy,
                         RowStats<A>* stats) {
  OwnIds<1> own;
  own.load(ids, row, 0);
  own.drop_repeated(ids, row, 0);
  const KeptSums sums = kept_sums<kCapped>(x, own, ids.count, label, map);
  *stats = write_kept_row<kCapped>(x, sums, map, label, ids.vocab, weight, logprob, entropy);
  return sums.ids > 0 && sums.outside == 0;
}

// Every read comes before the first write: the two rows may be one.
template <bool kCapped, class T, class A>
CPU_CLONES void kept_row_gradient(const T* x, T* dx, const KeptIds& ids, int64_t row, int64_t label, LogitMap<A> map, RowStats<A> stats, A a,
                                  A b) {
  OwnIds<1> own;
  own.load(ids, row, 0);
  A g[kMaxKept];
  const RowGradient<kCapped, true, A> gradient(map, stats, a, b);
  for (int k = 0; k < ids.count; ++k) g[k] = own.at[k] >= 0 ? static_cast<A>(x[own.at[k]]) : A(0);
  for (int k = 0; k < ids.count; ++k) g[k] = gradient(g[k], own.at[k] == label ? a : A(0));
  memset(static_cast<void*>(dx), 0, sizeof(T) * ids.vocab);
  for (int k = 0; k < ids.count; ++k)
    if (own.at[k] >= 0) dx[own.at[k]] = narrow<T>(g[k]);
}

[[noreturn]] inline void refuse_kept_row(const char* op, const KeptIds& ids, int64_t row) {
  for (int k = 0; k < ids.count; ++k)
    CHECK_VALUE(ids.at(row, k) != kOutside, op, ": `kept` holds ", ids.raw(row, k), " at flat position ", row * ids.count + k,
                "; an id must be below ", ids.vocab, ", or negative for padding");
  CHECK_VALUE(false, op, ": `kept` must keep a token for each label, and at flat position ", row, " of `labels` it holds padding only");
}

inline std::tuple<Tensor, Tensor, Tensor> kept_logprobs(Tensor logits, Tensor labels_, Tensor kept, OptionalTensor temperature,
                                                        OptionalTensor mask, double temperature_value, double softcap, double logit_scale,
                                                        int64_t ignore_index, bool with_entropy, bool /*inplace_backward*/) {
  const char* op = "gather_logprobs";
  const KeptCall k = kept_call(op, logits, labels_, kept, temperature, mask, temperature_value, softcap, logit_scale, ignore_index);
  const LogprobCall& call = k.call;
  check_rows(op, call);
  const LogprobOutputs o = logprob_outputs(call, with_entropy);
  const void* labels = call.labels.const_data_ptr();
  std::vector<char> refused(call.rows.rows, 0);  // said after the loop: an exception inside parallel_for would lose its text
  for_logits(logits.scalar_type(), op, "logits", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    const T* x = in<T>(call.logits);
    A* logprob_out = out<A>(o.logprobs);
    A* entropy_out = with_entropy ? out<A>(o.entropy) : nullptr;
    auto* stats_out = reinterpret_cast<RowStats<A>*>(out<A>(o.stats));
    auto run = [&](auto is_capped) {
      constexpr bool kCapped = decltype(is_capped)::value;
      parallel_for(call.rows.rows, int64_t(k.ids.count) * 8, [&](int64_t row) {
        const int64_t label = LogprobCall::label(labels, call.long_labels, row);
        const double weight = call.options.mask[row];
        A* entropy = entropy_out ? entropy_out + row : nullptr;
        if (label == ignore_index || weight == 0) {
          stats_out[row] = {};
          logprob_out[row] = 0;
          if (entropy) *entropy = 0;
          return;
        }
        refused[row] = !kept_row<kCapped>(x + call.rows.offset(row), k.ids, row, label, weight, call.options.map<A>(row), logprob_out + row,
                                          entropy, stats_out + row);
      });
    };
    softcap != 0 ? run(std::true_type{}) : run(std::false_type{});
  });
  for (int64_t row = 0; row < call.rows.rows; ++row)
    if (refused[row]) refuse_kept_row(op, k.ids, row);
  return {o.logprobs, o.entropy, o.stats};
}

inline Tensor kept_logprobs_backward_into(bool inplace, const OptionalTensor& grad_logprobs, const OptionalTensor& grad_entropy,
                                          const Tensor& logits, const KeptCall& k, const Tensor& stats) {
  const char* op = "gather_logprobs";
  const LogprobCall& call = k.call;
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
    auto run = [&](auto is_capped) {
      constexpr bool kCapped = decltype(is_capped)::value;
      parallel_for(call.rows.rows, call.rows.vocab, [&](int64_t row) {
        const int64_t label = LogprobCall::label(labels, call.long_labels, row);
        const double weight = call.options.mask[row];
        T* target_row = dx + target_rows.offset(row);
        const A a = static_cast<A>(weight * UpstreamGradients::read(da, row));
        const A b = static_cast<A>(weight * UpstreamGradients::read(db, row));
        if (label == call.options.ignore_index || weight == 0 || (a == 0 && b == 0) || label_not_kept(stats_in[row]))
          memset(static_cast<void*>(target_row), 0, sizeof(T) * call.rows.vocab);
        else
          kept_row_gradient<kCapped>(x + call.rows.offset(row), target_row, k.ids, row, label, call.options.map<A>(row), stats_in[row], a, b);
      });
    };
    call.options.softcap != 0 ? run(std::true_type{}) : run(std::false_type{});
  });
  return target;
}

// ---------------------------------------------------------------------------------------------------------------------
#else

constexpr int kKeptRowsPerBlock = 4;  // a warp each

template <bool kCapped, class T>
__global__ void __launch_bounds__(kWarp * kKeptRowsPerBlock)
    kept_logprobs_kernel(const T* logits, const void* labels, bool long_labels, KeptIds ids, LogitRows rows, LogprobOptions options,
                         accumulate_t<T>* logprobs, accumulate_t<T>* entropy, RowStats<accumulate_t<T>>* stats) {
  using A = accumulate_t<T>;
  const int64_t row = blockIdx.x * int64_t(kKeptRowsPerBlock) + threadIdx.x / kWarp;
  if (row >= rows.rows) return;  // whole warps leave together, and no block barrier follows
  const int lane = threadIdx.x % kWarp;
  const int64_t label = LogprobCall::label(labels, long_labels, row);
  const double weight = options.mask[row];
  if (label == options.ignore_index || weight == 0) {
    if (lane != 0) return;
    stats[row] = {};
    logprobs[row] = 0;
    if (entropy) entropy[row] = 0;
    return;
  }
  const LogitMap<A> map = options.map<A>(row);
  const T* x = logits + rows.offset(row);
  OwnIds<kWarp> own;
  own.load(ids, row, lane);
  own.drop_repeated(ids, row, lane);
  const KeptSums total = block_merge<kWarp>(kept_sums<kCapped>(x, own, ids.count, label, map));
  if (lane != 0) return;
  stats[row] = write_kept_row<kCapped>(x, total, map, label, rows.vocab, weight, logprobs + row, entropy ? entropy + row : nullptr);
}

constexpr int kKeptGradientThreads = 256;

// A row by a block: the kept logits are read, then the row is filled with zeros, then the gradients go in. The two rows may be one.
template <bool kCapped, class T>
__global__ void __launch_bounds__(kKeptGradientThreads, 2)
    kept_logprobs_backward_kernel(const T* logits, T* target, const void* labels, bool long_labels, KeptIds ids, LogitRows rows,
                                  LogitRows target_rows, LogprobOptions options, const accumulate_t<T>* grad_logprobs,
                                  const accumulate_t<T>* grad_entropy, const RowStats<accumulate_t<T>>* stats) {
  using A = accumulate_t<T>;
  const int64_t row = blockIdx.x;
  const int64_t label = LogprobCall::label(labels, long_labels, row);
  const double weight = options.mask[row];
  const A a = static_cast<A>(weight * UpstreamGradients::read(grad_logprobs, row));
  const A b = static_cast<A>(weight * UpstreamGradients::read(grad_entropy, row));
  const RowStats<A> row_stats = stats[row];
  const bool zero = label == options.ignore_index || weight == 0 || (a == 0 && b == 0) || label_not_kept(row_stats);
  const T* x = logits + rows.offset(row);
  T* dx = target + target_rows.offset(row);
  OwnIds<kKeptGradientThreads> own;
  own.load(ids, row, threadIdx.x);
  constexpr int kOwn = kOwnIds<kKeptGradientThreads>;
  const RowGradient<kCapped, true, A> gradient(options.map<A>(row), row_stats, a, b);
  T g[kOwn];
  UNROLL
  for (int u = 0; u < kOwn; ++u) {
    if (zero || own.at[u] < 0) continue;
    g[u] = narrow<T>(gradient(static_cast<A>(x[own.at[u]]), own.at[u] == label ? a : A(0)));
  }
  __syncthreads();
  fill_zeros<kKeptGradientThreads>(dx, rows.vocab);
  __syncthreads();
  UNROLL
  for (int u = 0; u < kOwn; ++u)
    if (!zero && own.at[u] >= 0) dx[own.at[u]] = g[u];  // an id given twice is written twice, the same
}

inline std::tuple<Tensor, Tensor, Tensor> kept_logprobs(Tensor logits, Tensor labels, Tensor kept, OptionalTensor temperature,
                                                        OptionalTensor mask, double temperature_value, double softcap, double logit_scale,
                                                        int64_t ignore_index, bool with_entropy, bool /*inplace_backward*/) {
  const char* op = "gather_logprobs";
  const KeptCall k = kept_call(op, logits, labels, kept, temperature, mask, temperature_value, softcap, logit_scale, ignore_index);
  const LogprobCall& call = k.call;
  const LogprobOutputs o = logprob_outputs(call, with_entropy);
  for_logits(logits.scalar_type(), op, "logits", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    auto start = [&](auto kernel) {
      launch(logits, kernel, ceil_div(call.rows.rows, kKeptRowsPerBlock), kWarp * kKeptRowsPerBlock, in<T>(call.logits),
             call.labels.const_data_ptr(), call.long_labels, k.ids, call.rows, call.options, out<A>(o.logprobs),
             with_entropy ? out<A>(o.entropy) : nullptr, reinterpret_cast<RowStats<A>*>(out<A>(o.stats)));
    };
    softcap != 0 ? start(kept_logprobs_kernel<true, T>) : start(kept_logprobs_kernel<false, T>);
  });
  return {o.logprobs, o.entropy, o.stats};
}

inline Tensor kept_logprobs_backward_into(bool inplace, const OptionalTensor& grad_logprobs, const OptionalTensor& grad_entropy,
                                          const Tensor& logits, const KeptCall& k, const Tensor& stats) {
  const char* op = "gather_logprobs";
  const LogprobCall& call = k.call;
  check_stats(op, stats, call);
  const UpstreamGradients up = upstream(op, grad_logprobs, grad_entropy, call);
  LogitRows target_rows;
  Tensor target = gradient_target(op, call, logits, inplace, target_rows);
  for_logits(logits.scalar_type(), op, "logits", [&](auto zero) {
    using T = decltype(zero);
    using A = accumulate_t<T>;
    auto start = [&](auto kernel) {
      launch(logits, kernel, call.rows.rows, kKeptGradientThreads, in<T>(call.logits), out<T>(target), call.labels.const_data_ptr(),
             call.long_labels, k.ids, call.rows, target_rows, call.options, up.logprobs ? in<A>(*up.logprobs) : nullptr,
             up.entropy ? in<A>(*up.entropy) : nullptr, reinterpret_cast<const RowStats<A>*>(in<A>(stats)));
    };
    call.options.softcap != 0 ? start(kept_logprobs_backward_kernel<true, T>) : start(kept_logprobs_backward_kernel<false, T>);
  });
  return target;
}

#endif

inline Tensor kept_logprobs_backward(OptionalTensor grad_logprobs, OptionalTensor grad_entropy, Tensor logits, Tensor labels, Tensor kept,
                                     OptionalTensor temperature, OptionalTensor mask, Tensor stats, double temperature_value, double softcap,
                                     double logit_scale, int64_t ignore_index) {
  const KeptCall k =
      kept_call("gather_logprobs", logits, labels, kept, temperature, mask, temperature_value, softcap, logit_scale, ignore_index);
  return kept_logprobs_backward_into(false, grad_logprobs, grad_entropy, logits, k, stats);
}

inline void kept_logprobs_backward_inplace(OptionalTensor grad_logprobs, OptionalTensor grad_entropy, Tensor logits, Tensor labels,
                                           Tensor kept, OptionalTensor temperature, OptionalTensor mask, Tensor stats,
                                           double temperature_value, double softcap, double logit_scale, int64_t ignore_index) {
  const KeptCall k =
      kept_call("gather_logprobs", logits, labels, kept, temperature, mask, temperature_value, softcap, logit_scale, ignore_index);
  kept_logprobs_backward_into(true, grad_logprobs, grad_entropy, logits, k, stats);
}

}  // namespace rlhf_fast::RLHF_UNIT
