// The CUDA kernels and their launchers, compiled by g++ and registered for CPU tensors as torch.ops.rlhf_fast_emulated.
#define RLHF_DEVICE_CODE
#include "../../csrc/device.h"
#include "cuda_on_cpu.h"

namespace rlhf_fast::RLHF_UNIT {
template <class Kernel, class... Args>
void launch(const Tensor&, Kernel kernel, int64_t blocks, int threads, Args... args) {
  cuda_on_cpu::run_grid(kernel, blocks, threads, args...);
}
template <class Kernel, class... Args>
void launch(const Tensor&, Kernel kernel, const ClusterGrid& grid, Args... args) {
  cuda_on_cpu::run_clusters(kernel, grid.blocks, grid.threads, grid.cluster, grid.shared_bytes, args...);
}
inline int compute_capability(const Tensor&) { return 90; }  // the one with every plan of on_chip.h
}  // namespace rlhf_fast::RLHF_UNIT

#include "../../csrc/schemas.h"

STABLE_TORCH_LIBRARY(rlhf_fast_emulated, m) { RLHF_FAST_SCHEMAS(m); }
STABLE_TORCH_LIBRARY_IMPL(rlhf_fast_emulated, CPU, m) { RLHF_FAST_KERNELS(m, emulated); }
