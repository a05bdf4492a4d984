// Exponentials and reductions that every op shares.
#pragma once

#include <type_traits>
#include <utility>

#include "device.h"

namespace rlhf_fast::RLHF_UNIT {

template <class To, class From>
HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast: sizes differ");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// f(k) for k = 0 .. kCount - 1 as constants: unrolled by the compiler's front end, where a pragma comes too late for SIMD.
template <class F, int... k>
HOST_DEVICE void for_constants(const F& f, std::integer_sequence<int, k...>) {
  (f(std::integral_constant<int, k>{}), ...);
}
template <int kCount, class F>
HOST_DEVICE void for_constants(const F& f) {
  for_constants(f, std::make_integer_sequence<int, kCount>{});
}

// The unsigned integers that are the bits of V.
template <class V> struct BitsOf { using type = std::conditional_t<sizeof(V) == 4, uint32_t, uint64_t>; };

#if !defined(RLHF_DEVICE_CODE)

// 64 bytes of numbers: one register, or a few, of every instruction set. A loop over them adds in an order of its own
// making, the same for all sets, where a SIMD reduction leaves order and the final sum to the compiler.
template <class A> using Lanes __attribute__((vector_size(64))) = A;
template <class A> using LaneIndex = Lanes<std::conditional_t<sizeof(A) == 4, int32_t, int64_t>>;
template <class A> constexpr int kLanes = 64 / sizeof(A);
template <> struct BitsOf<Lanes<float>> { using type = Lanes<uint32_t>; };
template <> struct BitsOf<Lanes<double>> { using type = Lanes<uint64_t>; };

#endif

// ---------------------------------------------------------------------------------------------------------------------
// Arithmetic for one token or for eight. A step that is a template over V, and chooses between values and not between ways
// (?: and &, never if and &&), runs with V = double for one token and with V = Lanes<double> for eight side by side: SIMD on every
// instruction set, whatever the compiler's vectoriser makes of the loop. `at` says where: an index, or a Run of lanes.

HOST_DEVICE double load_at(const float* x, int64_t at) { return x[at]; }
HOST_DEVICE double load_at(const double* x, int64_t at) { return x[at]; }
template <class A>
HOST_DEVICE void store_at(A* x, int64_t at, double value) { x[at] = static_cast<A>(value); }

HOST_DEVICE double index_at(int64_t at) { return static_cast<double>(at); }
HOST_DEVICE bool is_at(int64_t at, int64_t index) { return index == at; }  // whether `at` has it

#if !defined(RLHF_DEVICE_CODE)

constexpr int kTokens = kLanes<double>;  // side by side
template <class A> struct HalfLanes { using type = Lanes<double>; };
template <> struct HalfLanes<float> { using type = float __attribute__((vector_size(32))); };

struct Run {
  int64_t first;
  int count;  // of tokens; lanes beyond hold 0
};

template <class A>
HOST_DEVICE Lanes<double> load_at(const A* x, Run at) {
  typename HalfLanes<A>::type narrow{};
  memcpy(&narrow, x + at.first, at.count == kTokens ? sizeof(narrow) : at.count * sizeof(A));
  return __builtin_convertvector(narrow, Lanes<double>);
}
template <class A>
HOST_DEVICE void store_at(A* x, Run at, Lanes<double> value) {
  const auto narrow = __builtin_convertvector(value, typename HalfLanes<A>::type);
  memcpy(x + at.first, &narrow, at.count == kTokens ? sizeof(narrow) : at.count * sizeof(A));
}
HOST_DEVICE bool is_at(Run at, int64_t index) { return index >= at.first && index < at.first + at.count; }
HOST_DEVICE Lanes<double> index_at(Run at) { return static_cast<double>(at.first) + Lanes<double>{0, 1, 2, 3, 4, 5, 6, 7}; }

#endif

template <class V>
HOST_DEVICE V all(double x) {  // x in every lane
  return x - V{};
}

// ---------------------------------------------------------------------------------------------------------------------
// Logits of 16 bits, to float and back. On the CPU these are ours, without branches or calls, so that loops over them become SIMD.

template <class T, class F, class U>
HOST_DEVICE F from_bits16(U bits) {  // exact
  if constexpr (std::is_same_v<T, BFloat16>) {
    return bit_cast<F>(bits << 16);
  } else {
    constexpr uint32_t kBias = 112u << 23;  // the difference of the exponents' biases
    const U magnitude = (bits & 0x7fffu) << 13, moved = magnitude + kBias;
    // A subnormal half m 2^-24 goes by way of 2^-14 + m 2^-24: a float subnormal would slow the processor down.
    const U subnormal = bit_cast<U>(bit_cast<F>(moved + (1u << 23)) - 6.103515625e-5f);
    const U normal = magnitude >= (31u << 23) ? moved + kBias : moved;  // inf and NaN move twice
    return bit_cast<F>((magnitude < (1u << 23) ? subnormal : normal) | ((bits & 0x8000u) << 16));
  }
}

// What stands above the 16 bits does not matter: for a bfloat16 it falls out by itself.
template <class T, class F, class U>
HOST_DEVICE F from_low_bits16(U bits) {
  return from_bits16<T, F>(std::is_same_v<T, BFloat16> ? bits : bits & 0xffffu);
}

template <class T, class F, class U = typename BitsOf<F>::type>
HOST_DEVICE U to_bits16(F value) {  // to nearest, ties to even
  const U bits = bit_cast<U>(value), magnitude = bits & 0x7fffffffu;
  const U zero{};
  if constexpr (std::is_same_v<T, BFloat16>) {
    const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return magnitude > 0x7f800000u ? zero + 0x7fc0u : rounded;
  } else {
    const U normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    // Adding 1/2 leaves a subnormal half in the low bits.
    const U subnormal = bit_cast<U>(bit_cast<F>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
    U rounded = magnitude < (113u << 23) ? subnormal : normal;
    rounded = magnitude >= 0x477ff000u ? zero + 0x7c00u : rounded;  // 65520 and more
    rounded = magnitude > 0x7f800000u ? zero + 0x7e00u : rounded;
    return rounded | ((bits >> 16) & 0x8000u);
  }
}

template <class T, class A>
HOST_DEVICE T narrow(A value) {
  if constexpr (sizeof(T) == 2) {
#if defined(__CUDA_ARCH__)
    return static_cast<T>(value);
#else
    return bit_cast<T>(static_cast<uint16_t>(to_bits16<T>(static_cast<float>(value))));
#endif
  } else {
    return static_cast<T>(value);
  }
}

#if !defined(RLHF_DEVICE_CODE)

// For a loop over a row, of what it will read or write soon: the processor's own prefetching ends with each page of 4 KiB and
// starts anew in the next. Beyond the row the address may be anything.
constexpr intptr_t kPage = 4096;
HOST_DEVICE void prefetch_ahead_of(const void* at, intptr_t ahead = kPage) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<intptr_t>(at) + ahead));
}

// Logits as a loop takes them: one lane each, or two of 16 bits in one, so that all lanes are 32 bits wide.
template <class T>
struct LogitLanes {
  using A = accumulate_t<T>;
  using F = Lanes<A>;
  using U = Lanes<uint32_t>;
  using Index = LaneIndex<A>;
  static constexpr bool kPaired = sizeof(T) == 2;
  static constexpr int kParts = kPaired ? 2 : 1, kCount = kLanes<A> * kParts;

  F part[kParts];  // the even ones and the odd ones, or all of them

  static HOST_DEVICE LogitLanes load(const T* x) {
    LogitLanes lanes;
    if constexpr (kPaired) {
      U words;
      memcpy(&words, x, 64);
      lanes.part[0] = from_low_bits16<T, F>(words);
      lanes.part[1] = from_bits16<T, F>(words >> 16);
    } else {
      memcpy(&lanes.part[0], x, 64);
    }
    return lanes;
  }
  HOST_DEVICE void store(T* x) const {
    if constexpr (kPaired) {
      const U words = to_bits16<T>(part[0]) | (to_bits16<T>(part[1]) << 16);
      memcpy(x, &words, 64);
    } else {
      memcpy(x, &part[0], 64);
    }
  }
};

// One logit a lane whatever its width, for loops over logits of two types; LogitLanes moves fewer bits about.
template <class T>
HOST_DEVICE Lanes<accumulate_t<T>> load_lanes(const T* x) {
  if constexpr (sizeof(T) == 2) {
    uint16_t bits __attribute__((vector_size(32)));
    memcpy(&bits, x, sizeof(bits));
    return from_bits16<T, Lanes<float>>(__builtin_convertvector(bits, Lanes<uint32_t>));
  } else {
    Lanes<T> lanes;
    memcpy(&lanes, x, sizeof(lanes));
    return lanes;
  }
}
template <class T>
HOST_DEVICE void store_lanes(T* x, Lanes<accumulate_t<T>> lanes) {
  if constexpr (sizeof(T) == 2) {
    const auto bits = __builtin_convertvector(to_bits16<T>(lanes), uint16_t __attribute__((vector_size(32))));
    memcpy(static_cast<void*>(x), &bits, sizeof(bits));
  } else {
    memcpy(x, &lanes, sizeof(lanes));
  }
}

// Folds the lanes in halves; op takes Lanes.
template <class A, class Op>
HOST_DEVICE A fold_lanes(Lanes<A> lanes, Op&& op) {
  LaneIndex<A> own;
  for (int l = 0; l < kLanes<A>; ++l) own[l] = l;
  UNROLL
  for (int half = kLanes<A> / 2; half > 0; half /= 2) lanes = op(lanes, __builtin_shuffle(lanes, own ^ half));
  return lanes[0];
}

// A sum of many small terms beside a large one. Lanes of float lose what is below half a unit of their last place, time and
// again, so terms are gathered in `few`, and every few of them are added with what the sum lost before (Kahan 1965).
template <class A>
class WideSum {
 public:
  HOST_DEVICE void take(Lanes<A>& few) {
    const Lanes<A> term = few - lost_, sum = sum_ + term;
    lost_ = (sum - sum_) - term;
    sum_ = sum;
    few = Lanes<A>{};
  }
  HOST_DEVICE double total() const {
    Lanes<double> total{};
    for (int half = 0; half < kLanes<A> / kTokens; ++half) total += wide(sum_, half) - wide(lost_, half);
    return fold_lanes<double>(total, [](Lanes<double> a, Lanes<double> b) { return a + b; });
  }

 private:
  static HOST_DEVICE Lanes<double> wide(const Lanes<A>& lanes, int half) {
    A values[kLanes<A>];
    memcpy(values, &lanes, sizeof(values));
    return load_at(values, Run{half * kTokens, kTokens});
  }

  Lanes<A> sum_{}, lost_{};
};

#endif

// ---------------------------------------------------------------------------------------------------------------------
// exp. Ours rather than std::exp on the CPU because these have no branches and no calls, so that loops over them become
// SIMD without -ffast-math (which would fold away the inf and NaN rules).

constexpr double kLog2E = 1.4426950408889634074;

// 2^y for y <= 0, to 1e-7 relative; anything at most 1e-37 below -126, NaN at NaN and at -inf: the caller selects. Adding
// kShift leaves round(y) in the low mantissa bits; the polynomial is the minimax one of 2^f on [-1/2, 1/2].
template <class F>
HOST_DEVICE F exp2_polynomial(F y) {
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23
  const F shifted = y + kShift;
  const F f = y - (shifted - kShift);
  F p = f * 1.535335575e-04f + 1.339887445e-03f;
  p = p * f + 9.618437376e-03f;
  p = p * f + 5.550332471e-02f;
  p = p * f + 2.402264791e-01f;
  p = p * f + 6.931472029e-01f;
  p = p * f + 1.0f;
  // Unsigned: a NaN brings any bits here, and leaves through p.
  return bit_cast<F>(bit_cast<typename BitsOf<F>::type>(p) + (bit_cast<typename BitsOf<F>::type>(shifted) << 23));
}

HOST_DEVICE float exp2_bounded(float y) {
#if defined(__CUDA_ARCH__)
  float result;  // one instruction of the special-function unit, to 2 ulp; below -126 it gives 0
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(y));
  return result;
#else
  return exp2_polynomial(y);
#endif
}
HOST_DEVICE double exp2_bounded(double y) { return exp2(y); }

#if !defined(RLHF_DEVICE_CODE)
HOST_DEVICE Lanes<float> exp2_bounded(Lanes<float> y) { return exp2_polynomial(y); }
HOST_DEVICE Lanes<double> exp2_bounded(Lanes<double> y) {
  for (int l = 0; l < kLanes<double>; ++l) y[l] = exp2(y[l]);
  return y;
}
#endif

// 2^y and exp(x) for y, x <= 0: 0 where the result would be no normal number and at -inf, NaN at NaN. Of exp the error grows
// with |x|, where the result no longer counts.
HOST_DEVICE float exp2_nonpositive(float y) {
#if defined(__CUDA_ARCH__)
  return exp2_bounded(y);  // which gives 0 there by itself
#else
  return y < -126.0f ? 0.0f : exp2_bounded(y);
#endif
}
HOST_DEVICE float exp_nonpositive(float x) { return exp2_nonpositive(x * static_cast<float>(kLog2E)); }
HOST_DEVICE double exp2_nonpositive(double y) { return exp2(y); }
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

// log(1 + exp(x)) without overflow, and its derivative, the logistic function, within 2.5 ulp; no branch and no call here either.
// With e = exp(-|x|) and f = e, or above sqrt(2) - 1 f = (e - 1) / 2 with log 2 added at the end: log(1 + f) = 2 atanh(s),
// s = f / (2 + f), |s| <= 0.172, where eleven terms of the series leave 3e-17; put together so that f itself enters unrounded.
HOST_DEVICE double softplus(double x) {
  const double e = exp_any(x > 0 ? -x : x);
  const bool halve = e > 0.41421356237309505;
  const double f = halve ? 0.5 * e - 0.5 : e;
  const double s = f / (2.0 + f), square = s * s, half_f2 = 0.5 * f * f;
  double p = 2.0 / 21;
  p = p * square + 2.0 / 19;
  p = p * square + 2.0 / 17;
  p = p * square + 2.0 / 15;
  p = p * square + 2.0 / 13;
  p = p * square + 2.0 / 11;
  p = p * square + 2.0 / 9;
  p = p * square + 2.0 / 7;
  p = p * square + 2.0 / 5;
  p = p * square + 2.0 / 3;
  const double log1p_f = f - (half_f2 - s * (half_f2 + square * p));
  return (x > 0 ? x : 0.0) + (log1p_f + (halve ? 0.69314718055994531 : 0.0));
}
HOST_DEVICE double sigmoid(double x) {
  const double e = exp_any(x > 0 ? -x : x);
  return (x > 0 ? 1.0 : e) / (1.0 + e);
}

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

// Memory moves in granules: 16 bytes at a multiple of 16, the widest load there is.
struct alignas(16) Granule {
  uint32_t word[4];
};

template <class T> constexpr int kPack = sizeof(Granule) / sizeof(T);  // elements in 16 bytes

// The places where the hardware is named, each with its meaning in C++. Streaming accesses are of data that one kernel
// reads or writes once: their lines leave the caches first.
#if defined(__CUDA_ARCH__)
__device__ inline Granule stream_load(const void* at) {
  const uint4 q = __ldcs(static_cast<const uint4*>(at));
  return {{q.x, q.y, q.z, q.w}};
}
__device__ inline void stream_store(void* at, const Granule& g) {
  __stcs(static_cast<uint4*>(at), make_uint4(g.word[0], g.word[1], g.word[2], g.word[3]));
}
__device__ inline void store(void* at, const Granule& g) {  // as one: an assignment may be taken apart
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(at)), "r"(g.word[0]), "r"(g.word[1]), "r"(g.word[2]), "r"(g.word[3])
               : "memory");
}
__device__ inline Granule load(const void* at) {
  const uint4 q = *static_cast<const uint4*>(at);
  return {{q.x, q.y, q.z, q.w}};
}
__device__ inline uint32_t funnel_shift(uint32_t low, uint32_t high, uint32_t bits) { return __funnelshift_r(low, high, bits); }

template <class T>
__device__ uint32_t larger_halves(uint32_t a, uint32_t b) {  // of two pairs of 16-bit floats; a number before a NaN
  uint32_t larger;
  if constexpr (std::is_same_v<T, BFloat16>) asm("max.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  else asm("max.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
  return larger;
}
#else
__device__ inline Granule stream_load(const void* at) { return *static_cast<const Granule*>(at); }
__device__ inline Granule load(const void* at) { return *static_cast<const Granule*>(at); }
__device__ inline void stream_store(void* at, const Granule& g) { *static_cast<Granule*>(at) = g; }
__device__ inline void store(void* at, const Granule& g) { *static_cast<Granule*>(at) = g; }
__device__ inline uint32_t funnel_shift(uint32_t low, uint32_t high, uint32_t bits) {
  return static_cast<uint32_t>(((static_cast<uint64_t>(high) << 32) | low) >> bits);
}

template <class T>
__device__ uint32_t larger_halves(uint32_t a, uint32_t b) {
  T x[2], y[2];
  memcpy(x, &a, sizeof(a));
  memcpy(y, &b, sizeof(b));
  for (int i = 0; i < 2; ++i) x[i] = static_cast<float>(y[i]) > static_cast<float>(x[i]) || x[i] != x[i] ? y[i] : x[i];
  memcpy(&a, x, sizeof(a));
  return a;
}
#endif

// Blocks that run together, a cluster. A thread arrives, and waits until all threads of the cluster have arrived: what each did
// before, in the shared memory of any block, is seen by all.
#if defined(__CUDACC__)
__device__ inline Granule* block_memory() {  // what the launch gave the block beyond what the kernel declares
  extern __shared__ Granule memory_of_this_block[];
  return memory_of_this_block;
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ inline void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ inline void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
template <class T>
__device__ T* in_block(T* at, int rank) {  // the same place of the shared memory of the cluster's block `rank`
  uint64_t there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(at), "r"(rank));
  return reinterpret_cast<T*>(there);
}
#else  // a cluster of one block
__device__ inline void cluster_arrive() {}
__device__ inline void cluster_wait() { __syncthreads(); }
template <class T>
__device__ T* in_block(T* at, int) { return at; }
#endif
#else
__device__ inline Granule* block_memory() { return reinterpret_cast<Granule*>(cuda_on_cpu::block_memory()); }
using cuda_on_cpu::cluster_arrive;
using cuda_on_cpu::cluster_wait;
using cuda_on_cpu::in_block;
#endif

// Element i of a granule, as the type of the arithmetic. i must be a constant after unrolling.
template <class T>
__device__ accumulate_t<T> element(const Granule& g, int i) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return bit_cast<float>(i % 2 ? g.word[i / 2] & 0xffff0000u : g.word[i / 2] << 16);
  } else if constexpr (sizeof(T) == 2) {
    return static_cast<float>(bit_cast<T>(static_cast<uint16_t>(g.word[i / 2] >> (i % 2 * 16))));
  } else {
    T x[kPack<T>];
    memcpy(x, &g, sizeof(g));
    return x[i];
  }
}

template <class T>
__device__ Granule granule_of(const T (&x)[kPack<T>]) {
  Granule g;
  memcpy(&g, x, sizeof(g));
  return g;
}

// The 16 bytes that start `shift` bytes into (low, high): selects and shifts that are the same over a whole row.
template <class T>
__device__ Granule realign(const Granule& low, const Granule& high, uint32_t shift) {
  uint32_t w[8] = {low.word[0],  low.word[1],  low.word[2],  low.word[3],
                   high.word[0], high.word[1], high.word[2], high.word[3]};
  UNROLL
  for (int i = 0; i < 6; ++i) w[i] = shift & 8 ? w[i + 2] : w[i];
  if constexpr (sizeof(T) <= 4) {
    UNROLL
    for (int i = 0; i < 5; ++i) w[i] = shift & 4 ? w[i + 1] : w[i];
  }
  if constexpr (sizeof(T) == 2) {
    UNROLL
    for (int i = 0; i < 4; ++i) w[i] = funnel_shift(w[i], w[i + 1], shift % 4 * 8);
  }
  return {{w[0], w[1], w[2], w[3]}};
}

// A row of n elements at any address, in packs of 16 bytes counted from element `origin`. A pack that does not start at a
// multiple of 16 lies in two granules: both are loaded, the second as its neighbour's first, out of L1, and realigned in
// registers. So an element's pack, and with it the thread that gets it, depends on its index alone, and V = 50257 is read in
// 16-byte loads too. Packs with a granule that reaches out of the row are gathered element by element. kAgain: the row is going
// to be read a second time, its lines may stay in the caches; or it lies in shared memory.
template <class T, bool kAgain = false>
struct RowReader {
  const T* row;
  int64_t n, origin;
  uint32_t shift;   // bytes from the start of a granule to that of a pack
  int first, last;  // packs [first, last) are read as granules

  __device__ RowReader(const T* row, int64_t n, int64_t origin = 0) : row(row), n(n), origin(origin) {
    shift = reinterpret_cast<uintptr_t>(row + origin) % sizeof(Granule);
    first = shift > origin * sizeof(T);
    const int64_t bytes = (n - origin) * static_cast<int64_t>(sizeof(T)) + shift;
    last = static_cast<int>(bytes / static_cast<int64_t>(sizeof(Granule))) - (shift != 0);
  }

  __device__ int packs() const { return static_cast<int>((n - origin + kPack<T> - 1) / kPack<T>); }

  // How many elements of a pack lie in the row, at most kPack.
  __device__ int inside(int pack) const {
    const int64_t left = n - origin - int64_t(pack) * kPack<T>;
    return left < kPack<T> ? static_cast<int>(left) : kPack<T>;
  }

  __device__ Granule gather(int pack, T fill) const {
    const T* at = row + origin + int64_t(pack) * kPack<T>;
    const int left = inside(pack);
    T x[kPack<T>];
    UNROLL
    for (int i = 0; i < kPack<T>; ++i) x[i] = i < left ? at[i] : fill;
    return granule_of(x);
  }

  __device__ static Granule granule(const void* at) {
    if constexpr (kAgain) return rlhf_fast::RLHF_UNIT::load(at);
    else return stream_load(at);
  }

  // Packs pack, pack + stride, ...: all loads are on their way before the first is waited for. `fill` stands beyond the row.
  template <int kCount>
  __device__ void load(int pack, int stride, T fill, Granule (&packs)[kCount]) const {
    const char* at = reinterpret_cast<const char*>(row + origin) - shift + int64_t(pack) * sizeof(Granule);
    const int step = stride * static_cast<int>(sizeof(Granule));
    auto whole = [&](int u) { return pack + u * stride >= first && pack + u * stride < last; };
    UNROLL
    for (int u = 0; u < kCount; ++u)
      if (whole(u)) packs[u] = granule(at + u * step);
    if (shift != 0) {
      UNROLL
      for (int u = 0; u < kCount; ++u)  // one after the other: they are near, and registers are few
        if (whole(u)) packs[u] = realign<T>(packs[u], granule(at + u * step + sizeof(Granule)), shift);
    }
    if (whole(0) && whole(kCount - 1)) return;
    ROLL
    for (int u = 0; u < kCount; ++u) {  // a few threads of a row: one copy of the code will do
      if (whole(u)) continue;
      const Granule gathered = gather(pack + u * stride, fill);
      UNROLL
      for (int v = 0; v < kCount; ++v)
        if (v == u) packs[v] = gathered;
    }
  }
};

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// x becomes elements [at, at + kCount) of a row of n, the next lane of the warp having the next. Stored in granules wherever
// the row lies: the one that two lanes share by the left of them. All lanes come here together.
template <int kCount, class T>
__device__ void store_run(T* row, int64_t n, int64_t at, const T (&x)[kCount]) {
  const uint32_t past = reinterpret_cast<uintptr_t>(row + at) % sizeof(Granule) / sizeof(T);  // the same for all
  const int head = past == 0 ? 0 : kPack<T> - static_cast<int>(past);                         // elements before a granule
  const int left = n - at < 2 * kCount ? static_cast<int>(n - at) : 2 * kCount;               // elements to the row's end, or enough
  T run[kCount + kPack<T>] = {};
  UNROLL
  for (int i = 0; i < kCount; ++i) run[i] = x[i];
  if (head != 0) {
    UNROLL
    for (int i = 0; i < kPack<T> - 1; ++i) run[kCount + i] = __shfl_down_sync(kAllLanes, x[i], 1);
    UNROLL
    for (int by = kPack<T> / 2; by > 0; by /= 2)
      UNROLL
      for (int i = 0; i + by < kCount + kPack<T>; ++i) run[i] = head & by ? run[i + by] : run[i];
    const bool left_lane_stores = threadIdx.x % kWarp != 0 && head <= left;
    UNROLL
    for (int i = 0; i < kPack<T>; ++i)
      if (!left_lane_stores && i < head && i < left) row[at + i] = x[i];
  }
  const bool has_next = threadIdx.x % kWarp != kWarp - 1;
  UNROLL
  for (int first = 0; first < kCount; first += kPack<T>) {
    T* to = row + at + head + first;
    if ((head == 0 || first + kPack<T> < kCount || has_next) && head + first + kPack<T> <= left) {
      T pack[kPack<T>];
      UNROLL
      for (int i = 0; i < kPack<T>; ++i) pack[i] = run[first + i];
      store(to, granule_of(pack));
    } else {
      UNROLL
      for (int i = 0; i < kPack<T>; ++i)
        if (head + first + i < (left < kCount ? left : kCount)) to[i] = run[first + i];
    }
  }
}

// A row of n elements at any address becomes zeros, by a whole block.
template <int kThreads, class T>
__device__ void fill_zeros(T* row, int64_t n) {
  const int64_t past = reinterpret_cast<uintptr_t>(row) % sizeof(Granule) / sizeof(T);
  const int64_t to_granule = (kPack<T> - past) % kPack<T>, head = to_granule < n ? to_granule : n;
  const int64_t granules = (n - head) / kPack<T>, tail = head + granules * kPack<T>;
  for (int64_t i = threadIdx.x; i < granules; i += kThreads) stream_store(row + head + i * kPack<T>, Granule{});
  if (int64_t(threadIdx.x) < head) row[threadIdx.x] = static_cast<T>(0.0f);
  if (tail + threadIdx.x < n) row[tail + threadIdx.x] = static_cast<T>(0.0f);
}

#endif

// ---------------------------------------------------------------------------------------------------------------------
// Reductions over the threads of a block: of a state, a struct of doubles with merge(state&, const state&), and of a maximum.
// The tree is fixed by the block size alone: no atomics, the same bits every time.

#if defined(RLHF_DEVICE_CODE)

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
  const auto fold = [&](int delta) {
    const State other = shuffle_down(state, delta);
    merge(state, other);
  };
  if constexpr (sizeof(State) > 4 * sizeof(double)) {  // some hundred instructions a turn
    ROLL
    for (int delta = kWarp / 2; delta > 0; delta /= 2) fold(delta);
  } else {
    UNROLL
    for (int delta = kWarp / 2; delta > 0; delta /= 2) fold(delta);
  }
  if constexpr (kThreads > kWarp) {
    __shared__ State warps[kThreads / kWarp];
    __syncthreads();  // a block may come here twice: nobody may still be reading the last round
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = state;
    __syncthreads();
    if (threadIdx.x == 0) {
      ROLL
      for (int w = 1; w < kThreads / kWarp; ++w) merge(state, warps[w]);
    }
  }
  return state;
}

// The largest value, to every thread of the warp (kThreads == 32) or of the block. No value may be NaN.
template <int kThreads, class A>
__device__ A block_max(A value) {
  UNROLL
  for (int mask = kWarp / 2; mask > 0; mask /= 2) {
    const A other = __shfl_xor_sync(kAllLanes, value, mask);
    value = other > value ? other : value;
  }
  if constexpr (kThreads > kWarp) {
    __shared__ A warps[kThreads / kWarp];
    __syncthreads();
    if (threadIdx.x % kWarp == 0) warps[threadIdx.x / kWarp] = value;
    __syncthreads();
    UNROLL
    for (int w = 0; w < kThreads / kWarp; ++w) value = warps[w] > value ? warps[w] : value;
  }
  return value;
}

#endif

}  // namespace rlhf_fast::RLHF_UNIT
