// The kernels by name, for calls from Python that do not need torch's dispatcher (module.cpp). A call through the dispatcher
// costs a small op more than its arithmetic does.
#pragma once

#include <string>
#include <unordered_map>

#include <torch/csrc/stable/library.h>

namespace rlhf_fast {

using BoxedKernel = void (*)(StableIValue* stack, uint64_t inputs, uint64_t outputs);

// Takes registrations in the way of StableLibrary, so that RLHF_FAST_KERNELS fills it too.
struct KernelTable {
  std::unordered_map<std::string, BoxedKernel> kernels;
  void impl(const char* name, BoxedKernel kernel) { kernels.emplace(name, kernel); }
};

enum class DirectDevice { kCpu, kCuda };

inline KernelTable& kernel_table(DirectDevice device) {
  static KernelTable tables[2];
  return tables[static_cast<int>(device)];
}

#define RLHF_FAST_DIRECT(device, unit)                                                             \
  static const bool direct_kernels_listed = [] {                                                   \
    auto& table = rlhf_fast::kernel_table(rlhf_fast::DirectDevice::device);                        \
    RLHF_FAST_KERNELS(table, unit);                                                                \
    return true;                                                                                   \
  }()

}  // namespace rlhf_fast
