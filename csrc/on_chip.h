// How a CUDA kernel that reads a row of logits twice holds it on chip in between: one host function of the vocabulary, the element
// and the GPU, which the launcher asks and rlhf_fast._C shows.
//
//   warp      up to 2048 logits: a warp a row, the second read out of L1 and L2
//   block     one block holds the row in its shared memory
//   cluster   2, 4 or 8 blocks hold a share each (compute capability 9.0 and later: distributed shared memory)
//   stream    the row is not held: it is read again, in hope of L2, as few rows are under way at a time
//
// Beyond a warp, V alone says how many threads a row has, whatever blocks they stand in; so its bits do not depend on the plan.
//
// What to expect of bf16 rows, by count and not by measurement, as shares of the time that one read and one write take:
// block and cluster move those bytes and no more. A multiprocessor reaches its share of memory bandwidth while others of its
// blocks load, reduce or store: with 3 slices resident or more about .85, with 2 about .7, with 1 about .5. So the plan is the
// least cluster with 3 slices to a multiprocessor, else that with the most. On sm_90 at V = 151936 that is 8 blocks of 128 threads
// with 38 KB each, 5 to a multiprocessor. stream moves a half more where its second read misses L2: at most .67 then.
#pragma once

#include <cstdint>

namespace rlhf_fast {

struct OnChipPlan {
  enum Kind : int { kWarp = 0, kBlock = 1, kCluster = 2, kStream = 3 };
  int kind;
  int blocks;          // a row
  int threads;         // of a block
  int64_t row_bytes;   // of dynamic shared memory for the row's share, a block
  int resident;        // blocks that a multiprocessor's shared memory and threads have room for
};

constexpr int64_t kWarpRowVocab = 2048;    // rows up to here are read by one warp
constexpr int64_t kShortRowVocab = 32768;  // up to here by 256 threads, beyond by 1024
constexpr int64_t kOnChipScratch = 1024;   // for the exchange between warps and blocks, before the row's share

struct SharedMemory {
  int64_t block, multiprocessor;  // bytes: the most that a block may ask for, and all there is
  int threads;                    // that a multiprocessor runs
};

// CUDA C++ Programming Guide, "Compute Capabilities".
inline SharedMemory shared_memory(int capability) {  // 90 for 9.0
  switch (capability) {
    case 80: case 87: return {163 << 10, 164 << 10, 2048};
    case 90: case 100: case 101: case 103: case 110: return {227 << 10, 228 << 10, capability == 90 || capability <= 103 ? 2048 : 1536};
    default: return {99 << 10, 100 << 10, 1536};
  }
}

// `wanted`: a plan by its kind and, for a cluster, its blocks (kind + 4 * blocks); -1 for the best.
inline OnChipPlan on_chip_plan(int64_t vocab, int64_t element_bytes, int capability, int64_t wanted = -1) {
  if (vocab <= kWarpRowVocab && wanted < 0) return {OnChipPlan::kWarp, 1, 32, 0, 0};
  const SharedMemory shared = shared_memory(capability);
  const int row_threads = vocab <= kShortRowVocab || element_bytes == 8 ? 256 : 1024;
  const int64_t pack = 16 / element_bytes, sweep_packs = row_threads;
  // Packs are dealt to the threads in turn; every block has room for whole turns.
  const int64_t turns = (vocab + pack * sweep_packs - 1) / (pack * sweep_packs);
  OnChipPlan best{OnChipPlan::kStream, 1, row_threads, 0, 0};
  for (int blocks = 1; blocks <= 8; blocks *= 2) {
    const int threads = row_threads / blocks;
    if (threads < 32 || (blocks > 1 && capability < 90)) break;
    const int64_t row_bytes = turns * threads * 16, bytes = row_bytes + kOnChipScratch;
    if (bytes > shared.block) continue;
    const int64_t by_memory = shared.multiprocessor / (bytes + 1024), by_threads = shared.threads / threads;
    const OnChipPlan plan{blocks == 1 ? OnChipPlan::kBlock : OnChipPlan::kCluster, blocks, threads, row_bytes,
                          static_cast<int>(by_memory < by_threads ? by_memory : by_threads)};
    if (wanted >= 0 ? wanted == plan.kind + 4 * (blocks > 1 ? blocks : 0) : best.resident < 3 && plan.resident > best.resident) best = plan;
  }
  return best;
}

}  // namespace rlhf_fast
