// The Python module: importing it loads the library, which registers the ops. What it offers itself needs no torch.
#include <string>

#include <pybind11/pybind11.h>

#include "build_config.h"

namespace py = pybind11;

namespace {

// The clone of the CPU kernels that the loader has chosen on this machine (CPU_CLONES in device.h).
std::string cpu_level() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return "x86-64-v4";
  if (__builtin_cpu_supports("x86-64-v3")) return "x86-64-v3";
  return "x86-64";
#elif defined(__aarch64__)
  return "aarch64";
#else
  return "generic";
#endif
}

py::dict build_info() {
  py::dict info;
  info["version"] = RLHF_FAST_VERSION;
  info["compiler"] = RLHF_FAST_COMPILER;
  info["torch_built_with"] = RLHF_FAST_TORCH;
  info["torch_minimum"] = "2.10";
  info["cpu_level"] = cpu_level();
  info["cuda"] = RLHF_FAST_CUDA_VERSION[0] == '\0' ? py::object(py::none()) : py::cast(std::string(RLHF_FAST_CUDA_VERSION));
  info["cuda_architectures"] = py::str(RLHF_FAST_CUDA_ARCHITECTURES).attr("split")();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of rlhf_fast. Use them through rlhf_fast.ops.";
  m.def("build_info", &build_info, "How this library was built and which CPU instruction level it uses here.");
}
