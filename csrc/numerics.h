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

#if defined(__CUDA_ARCH__)
// 2^x in one instruction of the special-function unit, to 2 ulp; below 2^-126 it gives 0.
__device__ inline float exp2_nonpositive(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}
#endif

// exp(x) for x <= 0, to 1e-7 relative; 0 below -87.3 and at -inf, NaN at NaN. Range reduction and the degree-5 polynomial
// after Cephes' expf (Moshier).
HOST_DEVICE float exp_nonpositive(float x) {
#if defined(__CUDA_ARCH__)
  return exp2_nonpositive(x * static_cast<float>(kLog2E));  // its error grows with |x|, where the result no longer counts
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

#if !defined(__CUDA_ARCH__)
HOST_DEVICE float exp2_nonpositive(float x) { return exp_nonpositive(x * 0.69314718055994530942f); }
#endif
HOST_DEVICE double exp2_nonpositive(double x) { return exp2(x); }

// exp(x) in double for any x, within 1 ulp: Taylor to degree 13 on |r| <= ln2/2 (truncation 4e-18), scaled in two steps so
// that results near both ends of the range stay right.
HOST_DEVICE double exp_any(double x) {
  constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52
  double clamped = x < -746.0 ? -746.0 : x;
  clamped = clamped > 710.0 ? 710.0 : clamped;
  const double shifted = clamped * kLog2E + kShift;
  const double n = shifted - kShift;
  double r = clamped - n * 6.93147180369123816490e-01;
  r = r - n * 1.90821492927058770002e-10;
  double p = 1.6059043836821613e-10;
  p = p * r + 2.0876756987868099e-09;
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
  const uint64_t exponent = bit_cast<uint64_t>(shifted) - bit_cast<uint64_t>(kShift);
  const uint64_t half = static_cast<uint64_t>(static_cast<int64_t>(exponent) >> 1);
  return p * bit_cast<double>((half + 1023u) << 52) * bit_cast<double>((exponent - half + 1023u) << 52);
}

// log(1 + exp(x)) without overflow; and its derivative, the logistic function.
HOST_DEVICE double softplus(double x) { return (x > 0 ? x : 0.0) + log1p(exp(x > 0 ? -x : x)); }
HOST_DEVICE double sigmoid(double x) { return x >= 0 ? 1.0 / (1.0 + exp(-x)) : exp(x) / (1.0 + exp(x)); }

// The derivative of clamp(x, low, high) as torch defines it: 1 on the closed interval.
HOST_DEVICE double clamp_slope(double x, double low, double high) { return (x >= low) & (x <= high) ? 1.0 : 0.0; }
HOST_DEVICE double clamp(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

// The share of the gradient that max(a, b) sends to a. torch.max and torch.min split ties in halves.
HOST_DEVICE double max_share(double a, double b) { return a > b ? 1.0 : a < b ? 0.0 : 0.5; }

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
// 16-byte loads too. Packs with a granule that reaches out of the row are gathered element by element.
template <class T>
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

  // Packs pack, pack + stride, ...: all loads are on their way before the first is waited for. `fill` stands beyond the row.
  template <int kCount>
  __device__ void load(int pack, int stride, T fill, Granule (&packs)[kCount]) const {
    const char* at = reinterpret_cast<const char*>(row + origin) - shift + int64_t(pack) * sizeof(Granule);
    const int step = stride * static_cast<int>(sizeof(Granule));
    auto whole = [&](int u) { return pack + u * stride >= first && pack + u * stride < last; };
    UNROLL
    for (int u = 0; u < kCount; ++u)
      if (whole(u)) packs[u] = stream_load(at + u * step);
    if (shift != 0) {
      UNROLL
      for (int u = 0; u < kCount; ++u)  // one after the other: they are near, and registers are few
        if (whole(u)) packs[u] = realign<T>(packs[u], stream_load(at + u * step + sizeof(Granule)), shift);
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
