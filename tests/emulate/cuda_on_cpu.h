// Runs CUDA kernels on the CPU, so that machines without a GPU execute the real kernel source: one fiber a CUDA thread, the
// threads of a block switched at its barriers. A block is run in one of three orders between barriers, forward, reverse or
// shuffled (CUDA_ON_CPU_ORDER), so that a missing barrier gives a wrong result in at least one of them.
//
// It has what the kernels use: threadIdx, blockIdx, __shared__ (function-local), __syncthreads, __shfl_down_sync and
// __shfl_xor_sync over full warps. It cannot see races between blocks, the memory model, register or shared-memory limits, or speed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
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
  unsigned x = 0;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

constexpr unsigned kWarpSize = 32;
constexpr size_t kStackBytes = 256 << 10;

enum class Waits { kNo, kForBlock, kForWarp, kDone };

struct Fiber {
  ucontext_t context;
  Waits waits = Waits::kNo;
  char mail[8];  // what this thread offers in a shuffle
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_bytes = 0;
inline unsigned current = 0;
inline std::function<void()> body;

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
  leave_for(scheduler_stack, scheduler_stack_bytes, reason == Waits::kDone ? nullptr : &fake);
  swapcontext(&fiber.context, &scheduler);
  arrived(fake, nullptr, nullptr);
}

inline void enter_fiber() {
  arrived(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  body();
  yield(Waits::kDone);
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

inline void run_block(unsigned threads) {
  static std::mt19937 random(0);
  const char* order = std::getenv("CUDA_ON_CPU_ORDER");
  const bool reverse = order && !std::strcmp(order, "reverse"), shuffled = order && !std::strcmp(order, "shuffled");
  std::vector<unsigned> turn(threads);
  for (unsigned i = 0; i < threads; ++i) {
    turn[i] = reverse ? threads - 1 - i : i;
    Fiber& fiber = fibers[i];
    fiber.waits = Waits::kNo;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter_fiber, 0);
  }
  for (unsigned done = 0; done < threads;) {
    bool ran = false;
    if (shuffled) std::shuffle(turn.begin(), turn.end(), random);
    for (unsigned i : turn) {
      if (fibers[i].waits != Waits::kNo) continue;
      ran = true;
      current = i;
      threadIdx.x = i;
      void* fake = nullptr;
      leave_for(fibers[i].stack.get(), kStackBytes, &fake);
      swapcontext(&scheduler, &fibers[i].context);
      arrived(fake, nullptr, nullptr);
      done += fibers[i].waits == Waits::kDone;
    }
    for (unsigned warp = 0; warp < threads; warp += kWarpSize) open_barrier(Waits::kForWarp, warp, std::min(warp + kWarpSize, threads));
    open_barrier(Waits::kForBlock, 0, threads);
    if (!ran && done < threads) throw std::runtime_error("deadlock: threads of one block wait at different barriers");
  }
}

template <class T>
T shuffle(T value, unsigned from) {
  static_assert(sizeof(T) <= sizeof(Fiber::mail), "shuffle: at most 8 bytes");
  std::memcpy(fibers[current].mail, &value, sizeof(T));
  yield(Waits::kForWarp);
  T received;
  std::memcpy(&received, fibers[from].mail, sizeof(T));
  yield(Waits::kForWarp);
  return received;
}

template <class Kernel, class... Args>
void run_grid(Kernel kernel, int64_t blocks, int threads, Args... args) {
  if (fibers.size() < static_cast<size_t>(threads)) fibers.resize(threads);
  blockDim.x = threads;
  gridDim.x = static_cast<unsigned>(blocks);
  body = [&] { kernel(args...); };
  for (int64_t block = 0; block < blocks; ++block) {
    blockIdx.x = static_cast<unsigned>(block);
    run_block(threads);
  }
}

}  // namespace cuda_on_cpu

using cuda_on_cpu::blockDim;
using cuda_on_cpu::blockIdx;
using cuda_on_cpu::gridDim;
using cuda_on_cpu::threadIdx;

inline void __syncthreads() { cuda_on_cpu::yield(cuda_on_cpu::Waits::kForBlock); }

template <class T>
T __shfl_down_sync(unsigned, T value, int delta) {
  const unsigned lane = cuda_on_cpu::current % cuda_on_cpu::kWarpSize, from = lane + delta;
  return cuda_on_cpu::shuffle(value, from < cuda_on_cpu::kWarpSize ? cuda_on_cpu::current + delta : cuda_on_cpu::current);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_on_cpu::shuffle(value, cuda_on_cpu::current ^ static_cast<unsigned>(mask));
}
