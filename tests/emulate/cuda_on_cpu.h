// Runs CUDA kernels on the CPU, so that machines without a GPU execute the real kernel source: one fiber a CUDA thread, the
// threads of a block switched at its barriers. A block is run in one of three orders between barriers, forward, reverse or
// shuffled (CUDA_ON_CPU_ORDER), so that a missing barrier gives a wrong result in at least one of them.
//
// It has what kernels use: threadIdx, blockIdx, blockDim, gridDim, __shared__ (function-local), __syncthreads, __syncwarp, and
// over full warps __shfl_sync, __shfl_down_sync, __shfl_up_sync, __shfl_xor_sync, __ballot_sync, __any_sync and __all_sync; and
// what stands for dynamic shared memory and clusters, block_memory, cluster_arrive, cluster_wait and in_block. It cannot see
// races between blocks, the memory model, register or shared-memory limits, or speed.
//
// The blocks of a cluster take turns, in the same orders, at cluster_wait. What a kernel declares __shared__ they have in common
// here: only block_memory() is a block's own across a cluster_wait.
#pragma once

#if !defined(__x86_64__) && !defined(CUDA_ON_CPU_PORTABLE)
#define CUDA_ON_CPU_PORTABLE
#endif
#if defined(CUDA_ON_CPU_PORTABLE)
#include <ucontext.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)

namespace cuda_on_cpu {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

constexpr unsigned kWarpSize = 32;
constexpr size_t kStackBytes = 256 << 10;

// A place to go on from. A switch is a dozen instructions on x86-64: what the calling convention keeps goes on the stack, and
// the stack pointer changes. swapcontext, the portable way, makes a system call for the signal mask each time.
#if !defined(CUDA_ON_CPU_PORTABLE)

struct Place {
  void* stack_pointer;
};

extern "C" void cuda_on_cpu_switch(Place* from, Place* to);
__asm__(R"(
.pushsection .text
.local cuda_on_cpu_switch
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
.popsection
)");

inline void switch_places(Place& from, Place& to) { cuda_on_cpu_switch(&from, &to); }

inline void prepare(Place& place, char* stack, size_t bytes, void (*entry)()) {
  auto top = reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15};
  auto* words = reinterpret_cast<uintptr_t*>(top) - 8;  // six registers, the entry, and the return address it never uses
  std::fill(words, words + 8, uintptr_t{0});
  words[6] = reinterpret_cast<uintptr_t>(entry);
  place.stack_pointer = words;
}

#else

using Place = ucontext_t;

inline void switch_places(Place& from, Place& to) { swapcontext(&from, &to); }

inline void prepare(Place& place, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&place);
  place.uc_stack.ss_sp = stack;
  place.uc_stack.ss_size = bytes;
  place.uc_link = nullptr;
  makecontext(&place, entry, 0);
}

#endif

enum class Waits : uint8_t { kNo, kForBlock, kForWarp, kForCluster, kDone };

struct Fiber {
  Place place;
  Waits waits = Waits::kDone;
  unsigned shuffles = 0, arrivals = 0;
  char mail[2][8];  // what this thread offers in a shuffle; two boxes, so that a fast thread does not write over the last offer
  std::unique_ptr<char[]> memory{new char[kStackBytes + 4096]};
  char* stack = nullptr;
};

inline std::vector<Fiber> fibers;
inline Place scheduler;
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_bytes = 0;
inline unsigned current = 0;  // of all threads of the cluster
inline std::function<void()> body;
inline std::vector<std::unique_ptr<char[]>> block_memories;  // of the cluster, each of its own so that AddressSanitizer sees its end

// AddressSanitizer has to be told about every change of stack.
inline void leave_for([[maybe_unused]] const void* stack, [[maybe_unused]] size_t bytes, [[maybe_unused]] void** fake) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake, stack, bytes);
#endif
}
inline void arrived([[maybe_unused]] void* fake, [[maybe_unused]] const void** from, [[maybe_unused]] size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, from, bytes);
#endif
}

inline void yield(Waits reason) {
  Fiber& fiber = fibers[current];
  fiber.waits = reason;
  void* fake = nullptr;
  leave_for(scheduler_stack, scheduler_stack_bytes, &fake);
  switch_places(fiber.place, scheduler);
  arrived(fake, &scheduler_stack, &scheduler_stack_bytes);
}

// A fiber outlives its block: it goes round for the next one.
inline void enter_fiber() {
  arrived(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  for (;;) {
    body();
    yield(Waits::kDone);
  }
}

inline void want_fibers(unsigned threads) {
  if (fibers.size() >= threads) return;
  fibers.clear();
  fibers.resize(threads);
  for (unsigned i = 0; i < threads; ++i) {
    fibers[i].stack = fibers[i].memory.get() + i * 320 % 4096;  // page-aligned tops would all fall into the same cache lines
    prepare(fibers[i].place, fibers[i].stack, kStackBytes, enter_fiber);
  }
}

// Opens a barrier once every live thread of [first, last) stands at it.
inline void open_barrier(Waits kind, unsigned first, unsigned last) {
  unsigned waiting = 0, live = 0;
  for (unsigned i = first; i < last; ++i) {
    live += fibers[i].waits != Waits::kDone;
    waiting += fibers[i].waits == kind;
  }
  if (waiting == 0 || waiting < live) return;
  for (unsigned i = first; i < last; ++i)
    if (fibers[i].waits == kind) fibers[i].waits = Waits::kNo;
}

// Fisher-Yates on a multiplicative generator: std::shuffle costs more than the fibers it orders.
inline void shuffle_turns(std::vector<unsigned>& turn) {
  static uint64_t state = 1;
  for (unsigned i = static_cast<unsigned>(turn.size()); i > 1; --i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    std::swap(turn[i - 1], turn[(state >> 32) * i >> 32]);
  }
}

// The order of one round.
inline void take_turns(std::vector<unsigned>& turn, unsigned count, bool reverse, bool shuffled) {
  turn.resize(count);
  for (unsigned i = 0; i < count; ++i) turn[i] = reverse ? count - 1 - i : i;
  if (shuffled) shuffle_turns(turn);
}

// Until every thread of one block is done or waits for the cluster.
inline bool run_block(unsigned first, unsigned threads, bool reverse, bool shuffled) {
  static std::vector<unsigned> turn;
  take_turns(turn, threads, reverse, false);
  for (bool any = false;; any = true) {
    bool ran = false;
    if (shuffled) shuffle_turns(turn);
    for (unsigned i : turn) {
      Fiber& fiber = fibers[first + i];
      if (fiber.waits != Waits::kNo) continue;
      ran = true;
      current = first + i;
      threadIdx.x = i;
      void* fake = nullptr;
      leave_for(fiber.stack, kStackBytes, &fake);
      switch_places(scheduler, fiber.place);
      arrived(fake, nullptr, nullptr);
    }
    for (unsigned warp = 0; warp < threads; warp += kWarpSize)
      open_barrier(Waits::kForWarp, first + warp, first + std::min(warp + kWarpSize, threads));
    open_barrier(Waits::kForBlock, first, first + threads);
    if (!ran) return any;
  }
}

// Those go on whose arrival every live thread of the cluster has reached.
inline void open_cluster(unsigned threads) {
  unsigned reached = ~0u;
  for (unsigned i = 0; i < threads; ++i)
    if (fibers[i].waits != Waits::kDone) reached = std::min(reached, fibers[i].arrivals);
  for (unsigned i = 0; i < threads; ++i)
    if (fibers[i].waits == Waits::kForCluster && fibers[i].arrivals <= reached) fibers[i].waits = Waits::kNo;
}

inline void run_cluster(unsigned first_block, unsigned blocks, unsigned threads, bool reverse, bool shuffled) {
  for (unsigned i = 0; i < blocks * threads; ++i) {
    fibers[i].waits = Waits::kNo;
    fibers[i].shuffles = fibers[i].arrivals = 0;
  }
  static std::vector<unsigned> turn;
  for (;;) {
    bool ran = false;
    take_turns(turn, blocks, reverse, shuffled);
    for (unsigned block : turn) {
      blockIdx.x = first_block + block;
      ran |= run_block(block * threads, threads, reverse, shuffled);
    }
    if (std::all_of(fibers.begin(), fibers.begin() + blocks * threads, [](const Fiber& f) { return f.waits == Waits::kDone; })) return;
    open_cluster(blocks * threads);
    if (!ran) {
      fibers.clear();  // they stand in the middle of this kernel
      throw std::runtime_error("deadlock: threads of one block wait at different barriers");
    }
  }
}

// What thread `from` of this thread's warp offers; every thread of the warp takes part.
template <class T>
T shuffle(T value, unsigned from) {
  static_assert(sizeof(T) <= sizeof(Fiber::mail[0]), "shuffle: at most 8 bytes");
  const unsigned box = fibers[current].shuffles++ % 2;
  std::memcpy(fibers[current].mail[box], &value, sizeof(T));
  yield(Waits::kForWarp);
  T received;
  std::memcpy(&received, fibers[from].mail[box], sizeof(T));
  return received;
}

inline unsigned lane() { return current % kWarpSize; }
inline unsigned first_of_warp() { return current - lane(); }

inline unsigned ballot(bool predicate) {
  const unsigned box = fibers[current].shuffles % 2;
  shuffle(predicate, current);
  unsigned bits = 0;
  for (unsigned l = 0; l < kWarpSize && threadIdx.x - lane() + l < blockDim.x; ++l)
    bits |= unsigned{fibers[first_of_warp() + l].mail[box][0] != 0} << l;
  return bits;
}

inline char* block_memory() { return block_memories[current / blockDim.x].get(); }

inline void cluster_arrive() { ++fibers[current].arrivals; }
inline void cluster_wait() { yield(Waits::kForCluster); }

// The same place of the memory of the cluster's block `rank`.
template <class T>
T* in_block(T* at, int rank) {
  return reinterpret_cast<T*>(block_memories[rank].get() + (reinterpret_cast<char*>(at) - block_memory()));
}

// `cluster` blocks in a row run together, each with so many bytes of block_memory(). Blocks of a cluster have whole warps.
template <class Kernel, class... Args>
void run_clusters(Kernel kernel, int64_t blocks, int threads, int cluster, size_t bytes, Args... args) {
  want_fibers(threads * cluster);
  const char* order = std::getenv("CUDA_ON_CPU_ORDER");
  const bool reverse = order && !std::strcmp(order, "reverse"), shuffled = order && !std::strcmp(order, "shuffled");
  block_memories.clear();
  for (int i = 0; i < cluster; ++i) block_memories.emplace_back(new char[bytes]);
  blockDim.x = threads;
  gridDim.x = static_cast<unsigned>(blocks);
  body = [&] { kernel(args...); };
  for (int64_t block = 0; block < blocks; block += cluster)
    run_cluster(static_cast<unsigned>(block), cluster, threads, reverse, shuffled);
}

template <class Kernel, class... Args>
void run_grid(Kernel kernel, int64_t blocks, int threads, Args... args) {
  run_clusters(kernel, blocks, threads, 1, 0, args...);
}

}  // namespace cuda_on_cpu

using cuda_on_cpu::blockDim;
using cuda_on_cpu::blockIdx;
using cuda_on_cpu::gridDim;
using cuda_on_cpu::threadIdx;

inline void __syncthreads() { cuda_on_cpu::yield(cuda_on_cpu::Waits::kForBlock); }
inline void __syncwarp(unsigned = 0xffffffffu) { cuda_on_cpu::yield(cuda_on_cpu::Waits::kForWarp); }

template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return cuda_on_cpu::shuffle(value, cuda_on_cpu::first_of_warp() + static_cast<unsigned>(from) % cuda_on_cpu::kWarpSize);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int delta) {
  const unsigned from = cuda_on_cpu::lane() + delta;
  return cuda_on_cpu::shuffle(value, from < cuda_on_cpu::kWarpSize ? cuda_on_cpu::current + delta : cuda_on_cpu::current);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int delta) {
  return cuda_on_cpu::shuffle(value, static_cast<int>(cuda_on_cpu::lane()) >= delta ? cuda_on_cpu::current - delta : cuda_on_cpu::current);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_on_cpu::shuffle(value, cuda_on_cpu::first_of_warp() + (cuda_on_cpu::lane() ^ static_cast<unsigned>(mask)));
}
inline unsigned __ballot_sync(unsigned, int predicate) { return cuda_on_cpu::ballot(predicate != 0); }
inline int __any_sync(unsigned, int predicate) { return cuda_on_cpu::ballot(predicate != 0) != 0; }
inline int __all_sync(unsigned, int predicate) { return cuda_on_cpu::ballot(predicate == 0) == 0; }
