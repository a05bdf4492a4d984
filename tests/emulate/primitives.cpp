// What the emulator itself promises: each primitive against what CUDA defines, and the faults it is there to show. Exits 0
// where all hold; `racy` prints what a block sum without a barrier comes to, `racy-cluster` one over blocks, `stuck` waits at two
// barriers at once.
#include "cuda_on_cpu.h"

#include <cstdio>
#include <string>

namespace {

constexpr int kThreads = 96;

int failures = 0;
#define EXPECT(condition) \
  if (!(condition)) ++failures, std::printf("thread %u: %s\n", threadIdx.x, #condition)

__global__ void primitives() {
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const double mine = 100.0 * warp + lane;
  EXPECT(blockDim.x == kThreads && gridDim.x == 2 && blockIdx.x < 2);
  EXPECT(__shfl_sync(~0u, mine, 7) == 100.0 * warp + 7);
  EXPECT(__shfl_xor_sync(~0u, mine, 5) == 100.0 * warp + (lane ^ 5));
  EXPECT(__shfl_down_sync(~0u, mine, 3) == (lane + 3 < 32 ? mine + 3 : mine));
  EXPECT(__shfl_up_sync(~0u, mine, 3) == (lane >= 3 ? mine - 3 : mine));
  EXPECT(__ballot_sync(~0u, lane % 3 == warp % 3) == (warp % 3 == 0 ? 0x49249249u : warp % 3 == 1 ? 0x92492492u : 0x24924924u));
  EXPECT(__any_sync(~0u, lane == 31) && !__any_sync(~0u, 0));
  EXPECT(__all_sync(~0u, 1) && !__all_sync(~0u, lane != 0));
  __shared__ unsigned next[kThreads];
  next[threadIdx.x] = threadIdx.x;
  __syncwarp();
  EXPECT(next[warp * 32 + (lane + 1) % 32] == warp * 32 + (lane + 1) % 32);
  __syncthreads();
  EXPECT(next[(threadIdx.x + 32) % kThreads] == (threadIdx.x + 32) % kThreads);
  if (threadIdx.x >= 64) return;  // a warp that has left is waited for no more
  __syncthreads();
}

long total;
__global__ void racy() {
  __shared__ long slots[kThreads];
  slots[threadIdx.x] = threadIdx.x;
  if (threadIdx.x == 0) {
    total = 0;
    for (int i = 0; i < kThreads; ++i) total += slots[i];
  }
  __syncthreads();
  slots[threadIdx.x] = 0;
}

__global__ void stuck() {  // lane 0 waits for its block, the others of its warp for their warp
  if (threadIdx.x % 32 == 0) __syncthreads();
  else __syncwarp();
  if (threadIdx.x % 32 == 0) __syncwarp();
}

constexpr int kCluster = 4, kClusterThreads = 64;
__global__ void clusters() {
  auto* own = reinterpret_cast<unsigned*>(cuda_on_cpu::block_memory());
  const unsigned first = blockIdx.x / kCluster * kCluster, neighbour = threadIdx.x ^ 1;
  own[threadIdx.x] = 1000 * blockIdx.x + threadIdx.x;
  cuda_on_cpu::cluster_arrive();
  cuda_on_cpu::cluster_wait();
  for (int rank = 0; rank < kCluster; ++rank)
    EXPECT(cuda_on_cpu::in_block(own, rank)[neighbour] == 1000 * (first + rank) + neighbour);
  cuda_on_cpu::cluster_arrive();
  EXPECT(__shfl_xor_sync(~0u, threadIdx.x, 1) == neighbour);  // a block goes on until it waits
  __syncthreads();
  cuda_on_cpu::cluster_wait();
  own[threadIdx.x] = 0;
  if (blockIdx.x % 2 || threadIdx.x >= 32) return;  // who has left is waited for no more
  cuda_on_cpu::cluster_arrive();
  cuda_on_cpu::cluster_wait();
  EXPECT(*cuda_on_cpu::in_block(own, kCluster - 1) == 0);
}

__global__ void racy_cluster() {
  auto* own = reinterpret_cast<long*>(cuda_on_cpu::block_memory());
  *own = 0;
  cuda_on_cpu::cluster_arrive();
  cuda_on_cpu::cluster_wait();
  *own = blockIdx.x + 1;
  if (blockIdx.x || threadIdx.x) return;
  total = 0;
  for (int rank = 0; rank < kCluster; ++rank) total += *cuda_on_cpu::in_block(own, rank);
}

}  // namespace

int main(int count, char** arguments) {
  const std::string what = count > 1 ? arguments[1] : "primitives";
  if (what == "racy") {
    cuda_on_cpu::run_grid(racy, 1, kThreads);
    std::printf("%ld\n", total);
    return 0;
  }
  if (what == "racy-cluster") {
    cuda_on_cpu::run_clusters(racy_cluster, kCluster, kClusterThreads, kCluster, sizeof(long));
    std::printf("%ld\n", total);
    return 0;
  }
  if (what == "stuck") {
    try {
      cuda_on_cpu::run_grid(stuck, 1, kThreads);
    } catch (const std::runtime_error& error) {
      std::puts(error.what());
    }
  }
  cuda_on_cpu::run_grid(primitives, 2, kThreads);  // after a deadlock too
  cuda_on_cpu::run_clusters(clusters, 2 * kCluster, kClusterThreads, kCluster, kClusterThreads * sizeof(unsigned));
  return failures != 0;
}
