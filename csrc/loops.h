// The two shapes that every O(tokens) op has, written once for both devices.
//
//   for_each(rows, mask, f)      f(row, i, weight) for each token i of each row
//   reduce_rows(rows, mask, r)   per row, K numbers folded over its tokens
//
// Rows are those of a padded [B, T] tensor or of a packed [N] one. Both go through a row in chunks, so that nobody divides by
// the length and one long packed row still keeps every core busy.
//
// f and r are small structs of pointers and options whose HOST_DEVICE members hold the op's arithmetic. All of it is done in
// double: these ops move few bytes, and a correctly rounded result costs next to nothing (6 % for GAE on a CPU). One that has
// a member of_row(row) is replaced by what that returns before it meets the row: the place for what a row's tokens share.
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
template <class V>
HOST_DEVICE constexpr V fold_in(Fold fold, V a, V b) {
  return fold == Fold::kSum ? a + b : fold == Fold::kMin ? (b < a ? b : a) : (b > a ? b : a);
}

template <class R>
struct Terms {
  double at[R::kTerms];
  HOST_DEVICE static Terms start() {
    Terms terms;
    for_constants<R::kTerms>([&](auto k) ALWAYS_INLINE { terms.at[k] = fold_start(R::fold(k)); });
    return terms;
  }
};

template <class R>
HOST_DEVICE void merge(Terms<R>& into, const Terms<R>& other) {
  for_constants<R::kTerms>([&](auto k) ALWAYS_INLINE { into.at[k] = fold_in(R::fold(k), into.at[k], other.at[k]); });
}

// Chunks are counted from the start of a row and folded in their order, so that the bits depend on the row alone.
constexpr int64_t kChunk = 2048;

HOST_DEVICE int64_t chunks_of(int64_t length) { return length > 0 ? (length + kChunk - 1) / kChunk : 1; }

// The part of a row that one block, or one turn of a CPU thread, works on: a chunk, or nothing.
struct Piece {
  int64_t row, begin, end;
};

// Rows of a padded [B, T] tensor, or of a packed [N] one: row b is [offsets[b], offsets[b + 1]). Offsets from a CUDA tensor
// cannot be checked on the host, so they are bounded here.
//
// Nor does the host know how many chunks a packed row has. Its pieces are numbered from begin / kChunk + row, which leaves room
// for all of them whatever the lengths; tokens / kChunk + rows pieces are enough for every row, and some are empty.
struct Rows {
  int64_t rows, length, tokens;  // length: T, unless packed
  const void* offsets;           // [rows + 1], or null
  bool long_offsets;

  HOST_DEVICE int64_t offset(int64_t b) const {
    const int64_t at = long_offsets ? static_cast<const int64_t*>(offsets)[b] : static_cast<const int32_t*>(offsets)[b];
    return at < 0 ? 0 : at > tokens ? tokens : at;
  }
  HOST_DEVICE int64_t begin(int64_t row) const { return offsets ? offset(row) : row * length; }
  HOST_DEVICE int64_t end(int64_t row) const { return offsets ? offset(row + 1) : (row + 1) * length; }

  int64_t pieces() const { return rows == 0 ? 0 : offsets ? tokens / kChunk + rows : rows * chunks_of(length); }
  HOST_DEVICE int64_t chunks(int64_t row) const { return chunks_of(end(row) - begin(row)); }
  HOST_DEVICE int64_t first_piece(int64_t row) const { return offsets ? begin(row) / kChunk + row : row * chunks_of(length); }

  HOST_DEVICE Piece piece(int64_t at) const {
    int64_t row = quotient_of_rows(at, chunks_of(length));
    if (offsets) {  // the last row that starts no later
      row = 0;
      for (int64_t last = rows - 1; row < last;) {
        const int64_t middle = row + (last - row + 1) / 2;
        if (first_piece(middle) <= at) row = middle;
        else last = middle - 1;
      }
    }
    const int64_t chunk = at - first_piece(row), stop = end(row);
    const int64_t first = begin(row) + (chunk > 0 ? chunk : 0) * kChunk;  // below 0: offsets that do not start at 0
    if (chunk < 0 || first >= stop) return {row, stop, stop};
    return {row, first, stop < first + kChunk ? stop : first + kChunk};
  }
};

inline Rows padded_rows(int64_t rows, int64_t length) { return {rows, length, rows * length, nullptr, false}; }

// The offsets of packed `x` in one piece of memory; none where `x` is padded. `x`: [B, T], or [N] beside `cu_seqlens`.
inline OptionalTensor contiguous_offsets(const char* op, const OptionalTensor& cu_seqlens, const char* x_name, const Tensor& x) {
  const bool packed = cu_seqlens.has_value();
  CHECK_VALUE(x.dim() == (packed ? 1 : 2), op, ": `", x_name, "` must be ", packed ? "[N] beside `cu_seqlens`" : "[B, T]", ", got shape ",
              shape_of(x));
  if (!packed) return cu_seqlens;
  CHECK_VALUE(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 1, op, ": `cu_seqlens` must be [sequences + 1], got shape ",
              shape_of(*cu_seqlens));
  CHECK_TYPE(cu_seqlens->scalar_type() == ScalarType::Int || cu_seqlens->scalar_type() == ScalarType::Long, op,
             ": `cu_seqlens` must be int32 or int64, got ", torch::headeronly::toString(cu_seqlens->scalar_type()));
  check_same_device(op, "cu_seqlens", *cu_seqlens, x_name, x);
  return dense(*cu_seqlens);
}

// Borrows from `offsets`, which must outlive it. On the CPU they are checked.
inline Rows rows_view([[maybe_unused]] const char* op, const Tensor& x, const OptionalTensor& offsets) {
  if (!offsets.has_value()) return padded_rows(x.size(0), x.size(1));
  const Rows rows{offsets->size(0) - 1, 0, x.numel(), offsets->const_data_ptr(), offsets->scalar_type() == ScalarType::Long};
#if !defined(RLHF_DEVICE_CODE)
  auto raw = [&](int64_t b) {
    return rows.long_offsets ? static_cast<const int64_t*>(rows.offsets)[b] : static_cast<const int32_t*>(rows.offsets)[b];
  };
  CHECK_VALUE(raw(0) == 0, op, ": `cu_seqlens` must start at 0, got ", raw(0));
  for (int64_t b = 0; b < rows.rows; ++b)
    CHECK_VALUE(raw(b + 1) >= raw(b), op, ": `cu_seqlens` must not decrease, got ", raw(b), " then ", raw(b + 1), " at position ", b + 1);
  CHECK_VALUE(raw(rows.rows) == rows.tokens, op, ": `cu_seqlens` must end at N = ", rows.tokens, ", got ", raw(rows.rows));
#endif
  return rows;
}

// An output of a value a token. Checked offsets claim every token; on CUDA one that no sequence claims keeps this zero.
inline Tensor empty_tokens(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, [[maybe_unused]] const Rows& rows) {
#if defined(RLHF_DEVICE_CODE)
  if (rows.offsets) return torch::stable::new_zeros(like, sizes);
#endif
  return empty(like, sizes);
}
inline Tensor empty_tokens(const Tensor& like, const Rows& rows) { return empty_tokens(like, like.sizes(), rows); }

inline Tensor partial_terms(const Tensor& like, const Rows& rows, int64_t terms) {
  return empty(like, {rows.pieces(), terms}, ScalarType::Double);
}

template <class R>
HOST_DEVICE Terms<R> row_terms(const double* partial, const Rows& rows, int64_t row) {  // partial: [pieces, K]
  Terms<R> total = Terms<R>::start();
  const double* next_terms = partial + rows.first_piece(row) * R::kTerms;
  for (int64_t c = rows.chunks(row); c > 0; --c, next_terms += R::kTerms) {
    Terms<R> next;
    for (int k = 0; k < R::kTerms; ++k) next.at[k] = next_terms[k];
    merge(total, next);
  }
  return total;
}

template <class F>
HOST_DEVICE auto in_row(const F& f, int64_t row, int) -> decltype(f.of_row(row)) {
  return f.of_row(row);
}
template <class F>
HOST_DEVICE const F& in_row(const F& f, int64_t, long) {
  return f;
}

#if !defined(RLHF_DEVICE_CODE)

// Out of the loop, so that the switch over the mask's dtype does not stand between the loop and SIMD.
CPU_CLONES inline void weights_of(const Mask& mask, int64_t first, int64_t n, double* weights) {
  auto read = [&](auto zero, auto value) ALWAYS_INLINE {
    const auto* data = static_cast<const decltype(zero)*>(mask.data) + first;
    for (int64_t i = 0; i < n; ++i) weights[i] = value(data[i]);
  };
  const auto nonzero = [](auto x) ALWAYS_INLINE { return x != 0 ? 1.0 : 0.0; };
  switch (mask.kind) {
    case Mask::kNone:
      for (int64_t i = 0; i < n; ++i) weights[i] = 1.0;
      return;
    case Mask::kByte: return read(uint8_t{}, nonzero);
    case Mask::kShort: return read(int16_t{}, nonzero);
    case Mask::kInt: return read(int32_t{}, nonzero);
    case Mask::kLong: return read(int64_t{}, nonzero);
    case Mask::kFloat: return read(float{}, [](float x) ALWAYS_INLINE { return static_cast<double>(x); });
    case Mask::kDouble: return read(double{}, [](double x) ALWAYS_INLINE { return x; });
    default:
      for (int64_t i = 0; i < n; ++i) weights[i] = mask[first + i];
  }
}

// Whether a loop's body, or the terms of a sum, can be had of eight tokens at once: kSimd.
template <class R, class = void> constexpr bool is_simd = false;
template <class R> constexpr bool is_simd<R, std::void_t<decltype(R::kSimd)>> = R::kSimd;

// Tokens j on of a piece of n. The last ones go through the same code as the others, a copy being as long; a body with kFullRuns has
// the copy, and takes half the time: float32 alone, since copies are bytes of the wheel.
HOST_DEVICE Run run_at(int64_t begin, int64_t j, int64_t n) { return {begin + j, n - j < kTokens ? static_cast<int>(n - j) : kTokens}; }

template <class F>
CPU_CLONES void for_range(const F& shared, const Mask& mask, const Piece& piece) {
  const auto& f = in_row(shared, piece.row, 0);
  const int64_t n = piece.end - piece.begin;
  if constexpr (is_simd<F>) {
    double weights[kChunk + kTokens];
    weights_of(mask, piece.begin, n, weights);
    for (int l = 0; l < kTokens; ++l) weights[n + l] = 0;
    auto run = [&](int64_t j, Run at) ALWAYS_INLINE { f(piece.row, at, load_at(weights + j, Run{0, kTokens})); };
    int64_t j = 0;
    if constexpr (F::kFullRuns)
      for (; j + kTokens <= n; j += kTokens) run(j, Run{piece.begin + j, kTokens});
    for (; j < n; j += kTokens) run(j, run_at(piece.begin, j, n));
  } else if (mask.kind == Mask::kNone) {
#pragma omp simd
    for (int64_t i = piece.begin; i < piece.end; ++i) f(piece.row, i, 1.0);
  } else {
    double weights[kChunk];
    weights_of(mask, piece.begin, n, weights);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) f(piece.row, piece.begin + i, weights[i]);
  }
}

// body(number, piece) for every piece of every row.
template <class Body>
void for_pieces(const Rows& rows, const Body& body) {
  const int64_t pieces = rows.pieces();
  parallel_for(pieces, pieces > 0 ? rows.tokens / pieces : 0, [&](int64_t number) { body(number, rows.piece(number)); });
}

template <class F>
void for_each(const Tensor&, const Rows& rows, const Mask& mask, const F& f) {
  for_pieces(rows, [&](int64_t, const Piece& piece) { for_range(f, mask, piece); });
}

// A function of its own: an array declared in the body of a loop is not kept in registers.
template <class R>
HOST_DEVICE void lane_terms(const R& r, int64_t row, Run at, const double* weight, Lanes<double> (&lanes)[R::kTerms]) {
  Lanes<double> terms[R::kTerms]{};
  if constexpr (is_simd<R>) {
    r.terms(row, at, load_at(weight, Run{0, kTokens}), terms);
  } else {
    for (int l = 0; l < kTokens; ++l) {
      double one[R::kTerms];
      for (int k = 0; k < R::kTerms; ++k) one[k] = fold_start(R::fold(k));
      if (l < at.count) r.terms(row, at.first + l, weight[l], one);
      for (int k = 0; k < R::kTerms; ++k) terms[k][l] = one[k];
    }
  }
  for_constants<R::kTerms>([&](auto k) ALWAYS_INLINE { lanes[k] = fold_in(R::fold(k), lanes[k], terms[k]); });
}

template <class R>
CPU_CLONES void reduce_range(const R& shared, const Mask& mask, const Piece& piece, double* terms_out) {
  const auto& r = in_row(shared, piece.row, 0);
  const int64_t n = piece.end - piece.begin;
  double weights[kChunk + kTokens];
  weights_of(mask, piece.begin, n, weights);
  for (int l = 0; l < kTokens; ++l) weights[n + l] = 0;
  Lanes<double> lanes[R::kTerms];
  for_constants<R::kTerms>([&](auto k) ALWAYS_INLINE { lanes[k] = all<Lanes<double>>(fold_start(R::fold(k))); });
  if constexpr (is_simd<R>) {
    for (int64_t j = 0; j < n; j += kTokens) lane_terms(r, piece.row, run_at(piece.begin, j, n), weights + j, lanes);
  } else {  // token by token, which is fast where their number is a constant
    int64_t j = 0;
    for (; j + kTokens <= n; j += kTokens) lane_terms(r, piece.row, Run{piece.begin + j, kTokens}, weights + j, lanes);
    if (j < n) lane_terms(r, piece.row, run_at(piece.begin, j, n), weights + j, lanes);
  }
  for (int k = 0; k < R::kTerms; ++k) {
    double total = lanes[k][0];
    for (int l = 1; l < kTokens; ++l) total = fold_in(R::fold(k), total, lanes[k][l]);
    terms_out[k] = total;
  }
}

template <class R>
void reduce_rows(const Tensor&, const Rows& rows, const Mask& mask, const R& r, double* partial) {
  for_pieces(rows, [&](int64_t number, const Piece& piece) { reduce_range(r, mask, piece, partial + number * R::kTerms); });
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
__global__ void __launch_bounds__(kLoopThreads) for_each_kernel(F shared, Mask mask, Rows rows) {
  const Piece piece = rows.piece(blockIdx.x);
  const auto& f = in_row(shared, piece.row, 0);
  ROLL
  for (int64_t i = piece.begin + threadIdx.x; i < piece.end; i += kLoopThreads) f(piece.row, i, mask[i]);
}

template <class F>
void for_each(const Tensor& on, const Rows& rows, const Mask& mask, const F& f) {
  launch(on, for_each_kernel<F>, rows.tokens > 0 ? rows.pieces() : 0, kLoopThreads, f, mask, rows);
}

template <class R>
__global__ void __launch_bounds__(kLoopThreads, 2) reduce_rows_kernel(R shared, Mask mask, Rows rows, double* partial) {
  const Piece piece = rows.piece(blockIdx.x);
  const auto& r = in_row(shared, piece.row, 0);
  Terms<R> mine = Terms<R>::start();
  ROLL
  for (int64_t i = piece.begin + threadIdx.x; i < piece.end; i += kLoopThreads) {
    Terms<R> next;
    r.terms(piece.row, i, mask[i], next.at);
    merge(mine, next);
  }
  mine = block_merge<kLoopThreads>(mine);
  if (threadIdx.x == 0)
    for (int k = 0; k < R::kTerms; ++k) partial[int64_t(blockIdx.x) * R::kTerms + k] = mine.at[k];
}

template <class R>
void reduce_rows(const Tensor& on, const Rows& rows, const Mask& mask, const R& r, double* partial) {
  launch(on, reduce_rows_kernel<R>, rows.pieces(), kLoopThreads, r, mask, rows, partial);
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
