// Exponentials and reductions that every op shares.
#pragma once

#include <type_traits>

#include "device.h"

namespace rlhf_fast::RLHF_UNIT {

template <class To, class From>
HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast: sizes differ");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic for one token or for eight. A step that is a template over V, and chooses between values and not between ways
// (?: and &, never if and &&), runs with V = double for one token and with V = Lanes for eight side by side: SIMD on every
// instruction set, whatever the compiler's vectoriser makes of the loop. `at` says where: an index, or a Run of lanes.

template <class V> struct BitsOf { using type = uint64_t; };

HOST_DEVICE double load_at(const float* x, int64_t at) { return x[at]; }
HOST_DEVICE double load_at(const double* x, int64_t at) { return x[at]; }
template <class A>
HOST_DEVICE void store_at(A* x, int64_t at, double value) { x[at] = static_cast<A>(value); }

HOST_DEVICE double index_at(int64_t at) { return static_cast<double>(at); }

#if !defined(RLHF_DEVICE_CODE)

constexpr int kLanes = 8;  // fixed, so that every instruction set adds in the same order
using Lanes = double __attribute__((vector_size(kLanes * sizeof(double))));
template <> struct BitsOf<Lanes> { using type = uint64_t __attribute__((vector_size(kLanes * sizeof(uint64_t)))); };
template <class A> struct LanesOf { using type = Lanes; };
template <> struct LanesOf<float> { using type = float __attribute__((vector_size(kLanes * sizeof(float)))); };

struct Run {
  int64_t first;
  int count;  // of tokens; lanes beyond hold 0
};

template <class A>
HOST_DEVICE Lanes load_at(const A* x, Run at) {
  typename LanesOf<A>::type narrow{};
  memcpy(&narrow, x + at.first, at.count == kLanes ? sizeof(narrow) : at.count * sizeof(A));
  return __builtin_convertvector(narrow, Lanes);
}
template <class A>
HOST_DEVICE void store_at(A* x, Run at, Lanes value) {
  const auto narrow = __builtin_convertvector(value, typename LanesOf<A>::type);
  memcpy(x + at.first, &narrow, at.count == kLanes ? sizeof(narrow) : at.count * sizeof(A));
}
HOST_DEVICE Lanes index_at(Run at) { return static_cast<double>(at.first) + Lanes{0, 1, 2, 3, 4, 5, 6, 7}; }

#endif

template <class V>
HOST_DEVICE V all(double x) {  // x in every lane
  return x - V{};
}

// Rounding to the type of the logits. BFloat16's own constructor tests for NaN with a branch, which keeps loops scalar.
template <class T, class A>
HOST_DEVICE T narrow(A value) {
  if constexpr (std::is_same_v<T, BFloat16>) {
#if defined(__CUDA_ARCH__)
    return static_cast<T>(value);
#else
    const uint32_t bits = bit_cast<uint32_t>(static_cast<float>(value));
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return bit_cast<T>(static_cast<uint16_t>(value != value ? 0x7fc0u : rounded));
#endif
  } else {
    return static_cast<T>(value);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// exp. Ours rather than std::exp on the CPU because these have no branches and no calls, so that loops over them become
// SIMD without -ffast-math (which would fold away the inf and NaN rules).

constexpr double kLog2E = 1.4426950408889634074;

// exp(x) for x <= 0, to 1e-7 relative; 0 below -87.3 and at -inf, NaN at NaN. Range reduction and the degree-5 polynomial
// after Cephes' expf (Moshier).
HOST_DEVICE float exp_nonpositive(float x) {
#if defined(__CUDA_ARCH__)
  return __expf(x);  // one ex2 of the special-function unit; its error grows with |x|, where the result no longer counts
#else
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x log2 e) in the low mantissa bits
  const float clamped = x < -87.33654f ? -87.33654f : x;
  const float shifted = clamped * static_cast<float>(kLog2E) + kShift;
  const float n = shifted - kShift;
  float r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  // Unsigned: a NaN brings any bits here, and leaves through p.
  const uint32_t exponent = bit_cast<uint32_t>(shifted) - bit_cast<uint32_t>(kShift);
  const float result = p * bit_cast<float>((exponent + 127u) << 23);
  return x < -87.33654f ? 0.0f : result;
#endif
}

HOST_DEVICE double exp_nonpositive(double x) { return exp(x); }

// exp(x) in double for any x, within 1 ulp: Taylor to degree 13 on |r| <= ln2/2 (truncation 4e-18), scaled in two steps so
// that results near both ends of the range stay right.
template <class V>
HOST_DEVICE V exp_any(V x) {
  constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52
  using Bits = typename BitsOf<V>::type;
  V clamped = x < -746.0 ? all<V>(-746.0) : x;
  clamped = clamped > 710.0 ? all<V>(710.0) : clamped;
  const V shifted = clamped * kLog2E + kShift;
  const V n = shifted - kShift;
  V r = clamped - n * 6.93147180369123816490e-01;
  r = r - n * 1.90821492927058770002e-10;
  V p = 1.6059043836821613e-10 * r + 2.0876756987868099e-09;
  p = p * r + 2.5052108385441719e-08;
  p = p * r + 2.7557319223985891e-07;
  p = p * r + 2.7557319223985893e-06;
  p = p * r + 2.4801587301587302e-05;
  p = p * r + 1.9841269841269841e-04;
  p = p * r + 1.3888888888888889e-03;
  p = p * r + 8.3333333333333333e-03;
  p = p * r + 4.1666666666666667e-02;
  p = p * r + 1.6666666666666667e-01;
  p = p * r + 5.0000000000000000e-01;
  p = p * r * r + r + 1.0;
  const Bits exponent = bit_cast<Bits>(shifted) - bit_cast<uint64_t>(kShift);
  const Bits half = ((exponent + 2048u) >> 1) - 1024u;  // exponent / 2, rounded down, negative ones too
  return p * bit_cast<V>((half + 1023u) << 52) * bit_cast<V>((exponent - half + 1023u) << 52);
}

// exp(x) in double to 6e-11 relative, half the work of exp_any: for what is rounded to float32 in the end. exp(0) is 1; what
// float32 cannot hold stops at exp(-708) and exp(709). A minimax polynomial on |r| <= ln2/2, its first two terms exact.
template <class V>
HOST_DEVICE V exp_to_float(V x) {
  constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52
  V clamped = x < -708.0 ? all<V>(-708.0) : x;
  clamped = clamped > 709.0 ? all<V>(709.0) : clamped;
  const V shifted = clamped * kLog2E + kShift;
  const V r = clamped - (shifted - kShift) * 0.69314718055994530942;
  V p = 1.9790341666749795e-04 * r + 1.3944659745998796e-03;
  p = p * r + 8.3334970751827020e-03;
  p = p * r + 4.1666294945667250e-02;
  p = p * r + 1.6666665868931330e-01;
  p = p * r + 5.0000000676825610e-01;
  p = p * r * r + r + 1.0;
  return p * bit_cast<V>((bit_cast<typename BitsOf<V>::type>(shifted) - bit_cast<uint64_t>(kShift) + 1023u) << 52);
}

template <class A, class V>
HOST_DEVICE V exp_for(V x) {
  if constexpr (std::is_same_v<A, double>) return exp_any(x);
  else return exp_to_float(x);
}

// log(1 + exp(x)) without overflow; and its derivative, the logistic function.
HOST_DEVICE double softplus(double x) { return (x > 0 ? x : 0.0) + log1p(exp(x > 0 ? -x : x)); }
HOST_DEVICE double sigmoid(double x) { return x >= 0 ? 1.0 / (1.0 + exp(-x)) : exp(x) / (1.0 + exp(x)); }

template <class V, class B>
HOST_DEVICE V clamp(V x, B low, B high) {
  const V least = low - V{}, most = high - V{};
  return x < least ? least : x > most ? most : x;
}
// The derivative of clamp(x, low, high) as torch defines it: 1 on the closed interval.
template <class V, class B>
HOST_DEVICE V clamp_slope(V x, B low, B high) { return clamp(x, low, high) == x ? all<V>(1.0) : all<V>(0.0); }

// The share of the gradient that max(a, b) sends to a. torch.max and torch.min split ties in halves.
template <class V>
HOST_DEVICE V max_share(V a, V b) { return a > b ? all<V>(1.0) : a < b ? all<V>(0.0) : all<V>(0.5); }

// ---------------------------------------------------------------------------------------------------------------------
// Memory access of the kernels.

#if defined(RLHF_DEVICE_CODE)

// 16 bytes at a time where the row's address allows it, element by element (out of L1) where it does not. Either way an
// element goes to the same thread, so that alignment does not change the bits.
template <class T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

HOST_DEVICE bool is_aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class T>
__device__ Pack<T> load_pack(const T* x, int64_t first, int64_t n, bool aligned, T fill) {
  if (aligned && first + Pack<T>::kSize <= n) return *reinterpret_cast<const Pack<T>*>(x + first);
  Pack<T> pack;
  UNROLL
  for (int i = 0; i < Pack<T>::kSize; ++i) pack.at[i] = first + i < n ? x[first + i] : fill;
  return pack;
}

template <class T>
__device__ void store_pack(T* x, int64_t first, int64_t n, bool aligned, const Pack<T>& pack) {
  if (aligned && first + Pack<T>::kSize <= n) {
    *reinterpret_cast<Pack<T>*>(x + first) = pack;
    return;
  }
  UNROLL
  for (int i = 0; i < Pack<T>::kSize; ++i)
    if (first + i < n) x[first + i] = pack.at[i];
}

#endif

// ---------------------------------------------------------------------------------------------------------------------
// Reductions of a state, a struct of doubles with merge(state&, const state&), over the threads of a block. The tree is
// fixed by the block size alone: no atomics, the same bits every time.

#if defined(RLHF_DEVICE_CODE)

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class State>
__device__ State shuffle_down(const State& state, int delta) {
  static_assert(sizeof(State) % sizeof(double) == 0, "shuffle_down: the state must consist of doubles");
  constexpr int kWords = sizeof(State) / sizeof(double);
  double words[kWords];
  memcpy(words, &state, sizeof(State));
  UNROLL
  for (int i = 0; i < kWords; ++i) words[i] = __shfl_down_sync(kAllLanes, words[i], delta);
  State moved;
  memcpy(&moved, words, sizeof(State));
  return moved;
}

// The merged state is returned to thread 0 of each warp (kThreads == 32) or of the block.
template <int kThreads, class State>
__device__ State block_merge(State state) {
  UNROLL
  for (int delta = kWarp / 2; delta > 0; delta /= 2) {
    const State other = shuffle_down(state, delta);
    merge(state, other);
  }
  if constexpr (kThreads > kWarp) {
    __shared__ State warps[kThreads / kWarp];
    __syncthreads();  // a block may come here twice: nobody may still be reading the last round
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = state;
    __syncthreads();
    if (threadIdx.x == 0)
      for (int w = 1; w < kThreads / kWarp; ++w) merge(state, warps[w]);
  }
  return state;
}

#endif

}  // namespace rlhf_fast::RLHF_UNIT
