// The CUDA kernels and their launchers, compiled by g++ and registered for CPU tensors as torch.ops.rlhf_fast_emulated.
#define RLHF_DEVICE_CODE
#include "../../csrc/device.h"
#include "cuda_on_cpu.h"

namespace rlhf_fast::RLHF_UNIT {
template <class Kernel, class... Args>
void launch(const Tensor&, Kernel kernel, int64_t blocks, int threads, Args... args) {
  cuda_on_cpu::run_grid(kernel, blocks, threads, args...);
}
}  // namespace rlhf_fast::RLHF_UNIT

#include "../../csrc/schemas.h"

STABLE_TORCH_LIBRARY(rlhf_fast_emulated, m) { RLHF_FAST_SCHEMAS(m); }
STABLE_TORCH_LIBRARY_IMPL(rlhf_fast_emulated, CPU, m) { RLHF_FAST_KERNELS(m, emulated); }
