// The two shapes that every O(tokens) op has, written once for both devices.
//
//   for_each(rows, length, mask, f)      f(row, i, weight) for each token, i = row * length + t
//   reduce_rows(rows, length, mask, r)   per row, K numbers folded over its tokens
//
// Both go through a row in chunks, so that nobody divides by the length and one long packed row still keeps every core busy.
//
// f and r are small structs of pointers and options whose HOST_DEVICE members hold the op's arithmetic. All of it is done in
// double: these ops move few bytes, and a correctly rounded result costs next to nothing (6 % for GAE on a CPU).
#pragma once

#include <type_traits>
#include <utility>

#include "numerics.h"

namespace rlhf_fast::RLHF_UNIT {

// How terms are folded. A reduction names one for each of its K terms.
enum class Fold { kSum, kMin, kMax };

HOST_DEVICE constexpr double fold_start(Fold fold) {
  return fold == Fold::kSum ? 0.0 : fold == Fold::kMin ? std::numeric_limits<double>::infinity() : -std::numeric_limits<double>::infinity();
}
HOST_DEVICE constexpr double fold_in(Fold fold, double a, double b) {
  return fold == Fold::kSum ? a + b : fold == Fold::kMin ? (b < a ? b : a) : (b > a ? b : a);
}

template <class R>
struct Terms {
  double at[R::kTerms];
  HOST_DEVICE static Terms start() {
    Terms terms;
    for_constants<R::kTerms>([&](auto k) { terms.at[k] = fold_start(R::fold(k)); });
    return terms;
  }
};

template <class R>
HOST_DEVICE void merge(Terms<R>& into, const Terms<R>& other) {
  for_constants<R::kTerms>([&](auto k) { into.at[k] = fold_in(R::fold(k), into.at[k], other.at[k]); });
}

// Chunks are counted from the start of a row and folded in their order, so that the bits depend on the row alone.
constexpr int64_t kChunk = 2048;

inline int64_t chunks_of(int64_t length) { return length > 0 ? ceil_div(length, kChunk) : 1; }

inline Tensor partial_terms(const Tensor& like, int64_t rows, int64_t length, int64_t terms) {
  return empty(like, {rows * chunks_of(length), terms}, ScalarType::Double);
}

template <class R>
HOST_DEVICE Terms<R> row_terms(const double* partial, int64_t row, int64_t chunks) {  // partial: [rows * chunks, K]
  Terms<R> total = Terms<R>::start();
  for (int64_t c = 0; c < chunks; ++c) {
    Terms<R> next;
    for (int k = 0; k < R::kTerms; ++k) next.at[k] = partial[(row * chunks + c) * R::kTerms + k];
    merge(total, next);
  }
  return total;
}

#if !defined(RLHF_DEVICE_CODE)

// Out of the loop, so that the switch over the mask's dtype does not stand between the loop and SIMD.
CPU_CLONES inline void weights_of(const Mask& mask, int64_t first, int64_t n, double* weights) {
  auto read = [&](auto zero, auto value) {
    const auto* data = static_cast<const decltype(zero)*>(mask.data) + first;
    for (int64_t i = 0; i < n; ++i) weights[i] = value(data[i]);
  };
  const auto nonzero = [](auto x) { return x != 0 ? 1.0 : 0.0; };
  switch (mask.kind) {
    case Mask::kNone:
      for (int64_t i = 0; i < n; ++i) weights[i] = 1.0;
      return;
    case Mask::kByte: return read(uint8_t{}, nonzero);
    case Mask::kShort: return read(int16_t{}, nonzero);
    case Mask::kInt: return read(int32_t{}, nonzero);
    case Mask::kLong: return read(int64_t{}, nonzero);
    case Mask::kFloat: return read(float{}, [](float x) { return static_cast<double>(x); });
    case Mask::kDouble: return read(double{}, [](double x) { return x; });
    default:
      for (int64_t i = 0; i < n; ++i) weights[i] = mask[first + i];
  }
}

template <class F>
CPU_CLONES void for_range(const F& f, const Mask& mask, int64_t row, int64_t begin, int64_t end) {
  double weights[kChunk];
  weights_of(mask, begin, end - begin, weights);
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) f(row, i, weights[i - begin]);
}

// body(row, begin, end) for every chunk of every row, chunks numbered by `piece`.
template <class Body>
void for_chunks(int64_t rows, int64_t length, const Body& body) {
  const int64_t chunks = chunks_of(length);
  parallel_for(rows * chunks, length < kChunk ? length : kChunk, [&](int64_t piece) {
    const int64_t row = piece / chunks, t = (piece % chunks) * kChunk;
    body(piece, row, row * length + t, row * length + (length < t + kChunk ? length : t + kChunk));
  });
}

template <class F>
void for_each(const Tensor&, int64_t rows, int64_t length, const Mask& mask, const F& f) {
  for_chunks(rows, length, [&](int64_t, int64_t row, int64_t begin, int64_t end) { for_range(f, mask, row, begin, end); });
}

constexpr int kStrip = 256;

// A function of its own: an array declared in the body of a SIMD loop is not kept in registers.
template <class R>
HOST_DEVICE void strip_terms(const R& r, int64_t row, int64_t i, double weight, double (&strip)[R::kTerms][kStrip], int j) {
  double terms[R::kTerms];
  r.terms(row, i, weight, terms);
  for_constants<R::kTerms>([&](auto k) { strip[k][j] = terms[k]; });
}

template <class R>
CPU_CLONES void reduce_range(const R& r, const Mask& mask, int64_t row, int64_t begin, int64_t end, double* terms_out) {
  constexpr int kTerms = R::kTerms;
  constexpr int kLanes = 8;  // fixed, so that every instruction set adds in the same order
  double weights[kChunk], strip[kTerms][kStrip], lanes[kTerms][kLanes];
  weights_of(mask, begin, end - begin, weights);
  for (int k = 0; k < kTerms; ++k)
    for (int l = 0; l < kLanes; ++l) lanes[k][l] = fold_start(R::fold(k));
  for (int64_t first = begin; first < end; first += kStrip) {
    const int n = static_cast<int>(end - first < kStrip ? end - first : kStrip);
#pragma omp simd
    for (int j = 0; j < n; ++j) strip_terms(r, row, first + j, weights[first - begin + j], strip, j);
    for_constants<kTerms>([&](auto k) {
      constexpr Fold kFold = R::fold(k);
      int j = 0;
      for (; j + kLanes <= n; j += kLanes)
        for (int l = 0; l < kLanes; ++l) lanes[k][l] = fold_in(kFold, lanes[k][l], strip[k][j + l]);
      for (int l = 0; j < n; ++j, ++l) lanes[k][l] = fold_in(kFold, lanes[k][l], strip[k][j]);
    });
  }
  for (int k = 0; k < kTerms; ++k) {
    double total = lanes[k][0];
    for (int l = 1; l < kLanes; ++l) total = fold_in(R::fold(k), total, lanes[k][l]);
    terms_out[k] = total;
  }
}

template <class R>
void reduce_rows(const Tensor&, int64_t rows, int64_t length, const Mask& mask, const R& r, double* partial) {
  for_chunks(rows, length, [&](int64_t piece, int64_t row, int64_t begin, int64_t end) {
    reduce_range(r, mask, row, begin, end, partial + piece * R::kTerms);
  });
}

// finish(team): the work of one team that sees every row. On the CPU the team is one thread.
struct SoloTeam {
  static constexpr int rank = 0, size = 1;
  void sync() const {}
  template <class State> State merge_all(const State& state) const { return state; }
};

template <class Finish>
void run_team(const Tensor&, const Finish& finish) {
  finish(SoloTeam{});
}

#else

constexpr int kLoopThreads = 256;

template <class F>
__global__ void __launch_bounds__(kLoopThreads) for_each_kernel(F f, Mask mask, int64_t length, int64_t chunks) {
  const int64_t row = blockIdx.x / chunks, t = (blockIdx.x % chunks) * kChunk;
  const int64_t end = length < t + kChunk ? length : t + kChunk;
  for (int64_t i = row * length + t + threadIdx.x; i < row * length + end; i += kLoopThreads) f(row, i, mask[i]);
}

template <class F>
void for_each(const Tensor& on, int64_t rows, int64_t length, const Mask& mask, const F& f) {
  launch(on, for_each_kernel<F>, length > 0 ? rows * chunks_of(length) : 0, kLoopThreads, f, mask, length, chunks_of(length));
}

template <class R>
__global__ void __launch_bounds__(kLoopThreads) reduce_rows_kernel(R r, Mask mask, int64_t length, int64_t chunks, double* partial) {
  const int64_t row = blockIdx.x / chunks, t = (blockIdx.x % chunks) * kChunk;
  const int64_t end = length < t + kChunk ? length : t + kChunk;
  Terms<R> mine = Terms<R>::start();
  for (int64_t i = row * length + t + threadIdx.x; i < row * length + end; i += kLoopThreads) {
    Terms<R> next;
    r.terms(row, i, mask[i], next.at);
    merge(mine, next);
  }
  mine = block_merge<kLoopThreads>(mine);
  if (threadIdx.x == 0)
    for (int k = 0; k < R::kTerms; ++k) partial[int64_t(blockIdx.x) * R::kTerms + k] = mine.at[k];
}

template <class R>
void reduce_rows(const Tensor& on, int64_t rows, int64_t length, const Mask& mask, const R& r, double* partial) {
  launch(on, reduce_rows_kernel<R>, rows * chunks_of(length), kLoopThreads, r, mask, length, chunks_of(length), partial);
}

struct BlockTeam {
  int rank;
  static constexpr int size = kLoopThreads;
  __device__ void sync() const { __syncthreads(); }
  template <class State>
  __device__ State merge_all(const State& state) const {  // to every thread
    __shared__ State total;
    const State merged = block_merge<kLoopThreads>(state);
    if (threadIdx.x == 0) total = merged;
    __syncthreads();
    return total;
  }
};

template <class Finish>
__global__ void __launch_bounds__(kLoopThreads) team_kernel(Finish finish) {
  finish(BlockTeam{static_cast<int>(threadIdx.x)});
}

template <class Finish>
void run_team(const Tensor& on, const Finish& finish) {
  launch(on, team_kernel<Finish>, 1, kLoopThreads, finish);
}

#endif

}  // namespace rlhf_fast::RLHF_UNIT
