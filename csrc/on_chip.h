// How a CUDA kernel that needs a row of logits twice, to reduce it and to write its gradient, has it the second time: one host
// function of the vocabulary, the element's size and the GPU, which the launcher asks and rlhf_fast._C shows.
//
//   warp      up to 2048 logits without a soft cap: a warp a row, the second read out of L1
//   block     a block holds the row in its shared memory
//   cluster   2, 4 or 8 blocks hold a slice each and tell one another their sums (distributed shared memory: compute capability
//             9.0 and the tens and elevens; sm_120 has clusters of one block alone)
//   stream    the row is not held but read again, in hope of L2: one block to a multiprocessor, so that few rows are under way;
//             all rows of float64, which is for checks
//
// The order of a row's sums follows from V, the element's size and the plan, and so from the GPU, but never from the batch.
//
// What to expect, by count and not by measurement, as a share of the time that one read and one write of the logits take: block
// and cluster move those bytes and no more. A multiprocessor reaches its share of memory bandwidth while others of its blocks
// load, reduce or store: with 3 slices resident or more about .85, with 2 about .7, with 1 about .5. stream moves half as much
// again where its second read misses L2, .67 at most, and reads from L2 at close to the full share where it does not. So the plan
// is the least number of blocks with 3 slices to a multiprocessor, else that with the most, but none with a single one.
// For bf16 on sm_90: V = 32000 in a block of 64 KB, 3 to a multiprocessor; 50257 in 2 blocks of 50 KB, 3; 151936 in 4 of 76 KB, 3.
#pragma once

#include <cstdint>

namespace rlhf_fast {

struct OnChipPlan {
  enum Kind : int { kWarp, kBlock, kCluster, kStream };
  int kind;
  int blocks;         // a row
  int threads;        // of a block that work on a row
  int64_t row_bytes;  // of shared memory for a block's slice of the row
  int resident;       // rows, or slices of rows, that a multiprocessor has at a time

  int code() const { return kind == kStream ? 0 : kind == kWarp ? -1 : blocks; }  // as `wanted` asks for it
};

constexpr int64_t kWarpRowVocab = 2048;   // rows up to here are read by one warp
constexpr int64_t kBlockOverhead = 768;   // bytes of shared memory beside the slice: its sums, and what reductions exchange
constexpr int64_t kByRegisters = 3;       // blocks that hold slices fit a multiprocessor
constexpr int64_t kSystemOverhead = 1024;  // that every block pays to the system

struct SharedMemory {
  int64_t block, multiprocessor;  // bytes: the most that a block may ask for, and all there is
};

// CUDA C++ Programming Guide, "Compute Capabilities". `capability`: 90 for 9.0.
inline SharedMemory shared_memory(int capability) {
  switch (capability) {
    case 80: case 87: return {163 << 10, 164 << 10};
    case 90: case 100: case 101: case 103: case 110: return {227 << 10, 228 << 10};
    default: return {99 << 10, 100 << 10};
  }
}
inline bool has_clusters(int capability) { return capability >= 90 && capability < 120; }

// `wanted`: -1 for the best; 0 for stream, 1, 2, 4 or 8 for so many blocks, where the GPU can.
inline OnChipPlan on_chip_plan(int64_t vocab, int64_t element_bytes, int capability, int64_t wanted = -1) {
  if (element_bytes == 8) return {OnChipPlan::kStream, 1, 512, 0, 1};
  if (wanted < 0 && vocab <= kWarpRowVocab) return {OnChipPlan::kWarp, 1, 32, 0, 0};
  const SharedMemory shared = shared_memory(capability);
  const int64_t packs = (vocab * element_bytes + 15) / 16;
  OnChipPlan best{OnChipPlan::kStream, 1, 768, 0, 1};
  for (int blocks = 1; blocks <= 8 && (blocks == 1 || has_clusters(capability)); blocks *= 2) {
    const int64_t row_bytes = (packs + blocks - 1) / blocks * 16, bytes = row_bytes + kBlockOverhead;
    if (bytes > shared.block) continue;
    const int64_t by_memory = shared.multiprocessor / (bytes + kSystemOverhead);
    const int resident = static_cast<int>(by_memory < kByRegisters ? by_memory : kByRegisters);
    const bool better = wanted >= 0 ? wanted == blocks : best.resident < 3 && resident > best.resident;
    if (better) best = {blocks == 1 ? OnChipPlan::kBlock : OnChipPlan::kCluster, blocks, 256, row_bytes, resident};
  }
  return best;
}

}  // namespace rlhf_fast
