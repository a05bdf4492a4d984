// How a translation unit is compiled, and the few things that differ between the ways:
//
//   ops_cpu.cpp                g++    host code: the CPU loops
//   ops_cuda.cu                nvcc   RLHF_DEVICE_CODE: the CUDA kernels and their launchers
//   tests/emulate/emulate.cpp  g++    RLHF_DEVICE_CODE: the same kernels and launchers, run on the CPU, one fiber a thread
//
// No other header looks at the compiler. RLHF_DEVICE_CODE is ours rather than __CUDACC__ so that the emulator can set it.
// Each unit has a namespace of its own, so that one name can stand for an op on every device.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <tuple>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define HOST_DEVICE __host__ __device__ __forceinline__
// From libtorch_cuda. Weak, because the library must load beside a torch that has no CUDA; bound only because the
// extension is linked with libtorch.so (see setup.py).
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#else
#define HOST_DEVICE inline __attribute__((always_inline))
#endif

// Stands after the parameters of a lambda in a function with CPU_CLONES: one that is not inlined is code for the oldest processor.
#if defined(__GNUC__) && !defined(__CUDACC__)
#define ALWAYS_INLINE __attribute__((always_inline))
#else
#define ALWAYS_INLINE
#endif

#if defined(__x86_64__) && defined(__GNUC__) && !defined(RLHF_DEVICE_CODE) && !defined(__CUDACC__)
// One binary for every x86-64: the loader picks the clone. "arch=haswell" would test the CPU model, not its features.
#define CPU_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CPU_CLONES
#endif

#if !defined(RLHF_DEVICE_CODE)
#define RLHF_UNIT cpu
#elif defined(__CUDACC__)
#define RLHF_UNIT cuda
#else
#define RLHF_UNIT emulated
#endif

#if defined(__CUDACC__)
#define UNROLL _Pragma("unroll")
#define ROLL _Pragma("unroll 1")
#else
#define UNROLL _Pragma("GCC unroll 16")
#define ROLL _Pragma("GCC unroll 1")
#endif

namespace rlhf_fast::RLHF_UNIT {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// ---------------------------------------------------------------------------------------------------------------------
// Refusing bad input. Every C++ exception reaches Python as a RuntimeError with a source path in front; the marker lets
// ops/_common.py find the text again and raise it as ValueError or TypeError.

#define CHECK_VALUE(condition, ...) STD_TORCH_CHECK(condition, "[rlhf_fast:ValueError] ", __VA_ARGS__, "[end]")
#define CHECK_TYPE(condition, ...) STD_TORCH_CHECK(condition, "[rlhf_fast:TypeError] ", __VA_ARGS__, "[end]")

inline std::string shape_of(const Tensor& t) {
  std::string text = "[";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + "]";
}

inline const char* device_of(const Tensor& t) { return t.is_cuda() ? "cuda" : t.is_cpu() ? "cpu" : "another device"; }

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != b.size(d)) return false;
  return true;
}

inline void check_same_device(const char* op, const char* name, const Tensor& t, const char* like_name, const Tensor& like) {
  CHECK_VALUE(t.is_cuda() == like.is_cuda() && t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index(), op,
              ": `", name, "` is on ", device_of(t), " and `", like_name, "` on ", device_of(like), "; they must be on one device");
}

// Same shape and device, dtype free.
inline void check_like(const char* op, const char* name, const Tensor& t, const char* like_name, const Tensor& like) {
  CHECK_VALUE(same_shape(t, like), op, ": `", name, "` has shape ", shape_of(t), " but must have the shape of `", like_name, "`, ",
              shape_of(like));
  check_same_device(op, name, t, like_name, like);
}

// Same shape, device and dtype: kernels read all such arguments as the type of the first.
inline void check_twin(const char* op, const char* name, const Tensor& t, const char* like_name, const Tensor& like) {
  check_like(op, name, t, like_name, like);
  CHECK_TYPE(t.scalar_type() == like.scalar_type(), op, ": `", name, "` is ", torch::headeronly::toString(t.scalar_type()),
             " but must have the dtype of `", like_name, "`, ", torch::headeronly::toString(like.scalar_type()));
}

// ---------------------------------------------------------------------------------------------------------------------
// dtype dispatch: f is called with a value of the C++ type.

template <class F>
void for_real(ScalarType type, const char* op, const char* name, F&& f) {
  switch (type) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    default: CHECK_TYPE(false, op, ": `", name, "` must be float32 or float64, got ", torch::headeronly::toString(type));
  }
}

template <class F>
void for_logits(ScalarType type, const char* op, const char* name, F&& f) {
  switch (type) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(BFloat16{});
    case ScalarType::Half: return f(Half{});
    case ScalarType::Double: return f(double{});
    default:
      CHECK_TYPE(false, op, ": `", name, "` must be float32, bfloat16, float16 or float64, got ", torch::headeronly::toString(type));
  }
}

// The type that arithmetic and outputs use: double for double, float for everything else.
template <class T> struct Accumulate { using type = float; };
template <> struct Accumulate<double> { using type = double; };
template <class T> using accumulate_t = typename Accumulate<T>::type;

inline ScalarType accumulate_type(const Tensor& t) {
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class T> const T* in(const Tensor& t) { return static_cast<const T*>(t.const_data_ptr()); }
template <class T> T* out(const Tensor& t) { return static_cast<T*>(t.mutable_data_ptr()); }

// a / b of numbers of rows or of a row's pieces. A GPU has them in 32 bits, which divide in a tenth of the instructions: a grid has
// fewer than 2^31 blocks, and rows of logits are counted before.
HOST_DEVICE int64_t quotient_of_rows(int64_t a, int64_t b) {
#if defined(RLHF_DEVICE_CODE)
  return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
#else
  return a / b;
#endif
}
inline void check_row_count([[maybe_unused]] int64_t rows) {
#if defined(RLHF_DEVICE_CODE)
  CHECK_VALUE(rows <= std::numeric_limits<uint32_t>::max(), "rlhf_fast: a CUDA tensor of logits may have at most 2^32 - 1 rows, got ", rows);
#endif
}

// An output of float32 or float64 for code that does not know which: what is done once a row or a loss is compiled once.
struct Reals {
  void* data;
  bool is_double;
  HOST_DEVICE void put(int64_t i, double x) const {
    if (is_double) static_cast<double*>(data)[i] = x;
    else static_cast<float*>(data)[i] = static_cast<float>(x);
  }
};
inline Reals reals(const Tensor& t) { return {t.mutable_data_ptr(), t.scalar_type() == ScalarType::Double}; }

// Asks for huge pages under a large output. Linux hands out zeroed pages of 4 KiB at the first write, which for an output of many
// megabytes takes longer than computing it; as NumPy does, with its threshold. Where the kernel gives none (THP "never"),
// nothing changes. RLHF_FAST_HUGE_PAGES=0 turns it off.
inline void advise_huge_pages([[maybe_unused]] const Tensor& made, [[maybe_unused]] int64_t elements) {
#if defined(__linux__) && !defined(RLHF_DEVICE_CODE)
  constexpr size_t kLarge = size_t{4} << 20;
  if (elements < static_cast<int64_t>(kLarge / 8)) return;
  static const bool wanted = [] {
    const char* given = std::getenv("RLHF_FAST_HUGE_PAGES");
    return given == nullptr || given[0] != '0';
  }();
  const size_t bytes = made.numel() == 0 ? 0 : static_cast<size_t>(elements) * made.element_size();
  if (!wanted || bytes < kLarge) return;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)), data = reinterpret_cast<uintptr_t>(made.mutable_data_ptr());
  const uintptr_t first = (data + page - 1) / page * page, last = (data + bytes) / page * page;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: an error leaves small pages
#endif
}

// An uninitialised contiguous tensor on the device of `like`. Straight through the C shim: torch::stable::new_empty goes
// through the dispatcher, a microsecond each, and a small op makes three.
inline Tensor empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType type) {
  constexpr size_t kMaxDims = 64;
  CHECK_VALUE(sizes.size() <= kMaxDims, "rlhf_fast: tensors of more than ", kMaxDims, " dimensions are not supported");
  int64_t strides[kMaxDims];
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 0 ? sizes[d] : 1;
  }
  int32_t code = aoti_torch_dtype_float32();
  if (type == ScalarType::Double) code = aoti_torch_dtype_float64();
  if (type == ScalarType::BFloat16) code = aoti_torch_dtype_bfloat16();
  if (type == ScalarType::Half) code = aoti_torch_dtype_float16();
  if (type == ScalarType::Long) code = aoti_torch_dtype_int64();
  int32_t device = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides, code, device,
                                                  like.get_device_index(), &handle));
  Tensor made(handle);
  advise_huge_pages(made, stride);
  return made;
}
inline Tensor empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes) { return empty(like, sizes, like.scalar_type()); }

inline Tensor dense(const Tensor& t) {
  if (t.is_contiguous()) return t;
#if !defined(RLHF_DEVICE_CODE)
  // One number expanded, as the gradient of a sum or a mean: torch's copy takes longer than many an op.
  constexpr int64_t kFew = 32768;
  bool expanded = t.numel() <= kFew && (t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::Double);
  for (int64_t d = 0; d < t.dim(); ++d) expanded = expanded && t.stride(d) == 0;
  if (expanded) {
    Tensor made = empty(t, t.sizes());
    for_real(t.scalar_type(), "", "", [&](auto zero) {
      std::fill_n(out<decltype(zero)>(made), t.numel(), *in<decltype(zero)>(t));
    });
    return made;
  }
#endif
  return torch::stable::contiguous(t);
}

// ---------------------------------------------------------------------------------------------------------------------
// Masks. One weight a token, of any dtype a caller may hold it in: read as it is, so that no conversion kernel runs.
// bool and integer masks count as 0 or 1, floating-point masks are weights.

struct Mask {
  enum Kind : int { kNone, kByte, kShort, kInt, kLong, kHalf, kBFloat16, kFloat, kDouble };
  const void* data = nullptr;
  int kind = kNone;

  template <class T> HOST_DEVICE T at(int64_t i) const { return static_cast<const T*>(data)[i]; }

  HOST_DEVICE double operator[](int64_t i) const {
    switch (kind) {
      case kByte: return at<uint8_t>(i) != 0;
      case kShort: return at<int16_t>(i) != 0;
      case kInt: return at<int32_t>(i) != 0;
      case kLong: return at<int64_t>(i) != 0;
      case kHalf: return static_cast<float>(static_cast<const Half*>(data)[i]);
      case kBFloat16: return static_cast<float>(static_cast<const BFloat16*>(data)[i]);
      case kFloat: return at<float>(i);
      case kDouble: return at<double>(i);
      default: return 1.0;
    }
  }
};

// The returned view borrows from `mask`, which must be contiguous and outlive it.
inline Mask mask_view(const char* op, const OptionalTensor& mask) {
  if (!mask.has_value()) return {};
  Mask view;
  view.data = mask->const_data_ptr();
  switch (mask->scalar_type()) {
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char: view.kind = Mask::kByte; break;
    case ScalarType::Short: view.kind = Mask::kShort; break;
    case ScalarType::Int: view.kind = Mask::kInt; break;
    case ScalarType::Long: view.kind = Mask::kLong; break;
    case ScalarType::Half: view.kind = Mask::kHalf; break;
    case ScalarType::BFloat16: view.kind = Mask::kBFloat16; break;
    case ScalarType::Float: view.kind = Mask::kFloat; break;
    case ScalarType::Double: view.kind = Mask::kDouble; break;
    default:
      CHECK_TYPE(false, op, ": `mask` must be bool, integer or floating point, got ", torch::headeronly::toString(mask->scalar_type()));
  }
  return view;
}

inline OptionalTensor contiguous_mask(const char* op, const OptionalTensor& mask, const char* like_name, const Tensor& like) {
  if (!mask.has_value()) return mask;
  check_like(op, "mask", *mask, like_name, like);
  return dense(*mask);
}

// ---------------------------------------------------------------------------------------------------------------------
// Running things.

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct ClusterGrid {
  int64_t blocks;
  int threads, cluster;   // of a block; `cluster` blocks in a row run together and see each other's shared memory
  int64_t shared_bytes;   // of a block, beyond what the kernel itself declares
};

#if !defined(RLHF_DEVICE_CODE)

// f(i) for i in [0, n), split over threads in pieces of about 32k elements. f must not throw: the text would be lost.
template <class F>
void parallel_for(int64_t n, int64_t elements_each, F&& f) {
  if (n == 0) return;
  const int64_t grain = 1 + 32768 / (elements_each + 1);
  if (n <= grain) {
    for (int64_t i = 0; i < n; ++i) f(i);
    return;
  }
  torch::stable::parallel_for(0, n, grain, [&](int64_t lo, int64_t hi) {
    for (int64_t i = lo; i < hi; ++i) f(i);
  });
}

#elif defined(__CUDACC__)

inline void* current_stream(const Tensor& t) {
  CHECK_VALUE(aoti_torch_get_current_cuda_stream != nullptr, "rlhf_fast: the imported torch has no CUDA support");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return stream;
}

inline int compute_capability(const Tensor& on) {  // 90 for 9.0
  int major = 0, minor = 0;
  const int device = on.get_device_index();
  const bool known = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
                     cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess;
  STD_TORCH_CHECK(known, "rlhf_fast: CUDA does not say what GPU this is");
  return 10 * major + minor;
}

inline void check_launch(cudaError_t error) {
  STD_TORCH_CHECK(error != cudaErrorNoKernelImageForDevice,
                  "rlhf_fast: this build holds no code for this GPU; rebuild with TORCH_CUDA_ARCH_LIST set to its compute capability");
  STD_TORCH_CHECK(error != cudaErrorInsufficientDriver, "rlhf_fast: the NVIDIA driver is too old for CUDA ", CUDART_VERSION / 1000);
  STD_TORCH_CHECK(error == cudaSuccess, "rlhf_fast: ", cudaGetErrorString(error));
}

inline unsigned grid_size(int64_t blocks) {
  STD_TORCH_CHECK(blocks <= std::numeric_limits<int32_t>::max(), "rlhf_fast: ", blocks, " thread blocks are more than a grid holds");
  return static_cast<unsigned>(blocks);
}

// Launches on the current stream of `on`'s device. The stream comes first: without CUDA in torch, only asking for it says so.
template <class Kernel, class... Args>
void launch(const Tensor& on, Kernel kernel, int64_t blocks, int threads, Args... args) {
  if (blocks == 0) return;
  auto* const stream = static_cast<cudaStream_t>(current_stream(on));
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  kernel<<<dim3(grid_size(blocks)), dim3(threads), 0, stream>>>(args...);
  check_launch(cudaGetLastError());
}

template <class... Parameters, class... Args>
void launch(const Tensor& on, void (*kernel)(Parameters...), const ClusterGrid& grid, Args... args) {
  if (grid.blocks == 0) return;
  auto* const stream = static_cast<cudaStream_t>(current_stream(on));
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  check_launch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared_bytes)));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid_size(grid.blocks));
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1;
  check_launch(cudaLaunchKernelEx(&config, kernel, Parameters(args)...));
}

#endif

}  // namespace rlhf_fast::RLHF_UNIT
