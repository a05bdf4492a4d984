// The Python module: importing it loads the library, which registers the ops. What it offers itself: build_info(), the plan of
// on_chip.h, and calls of the kernels past torch's dispatcher.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("Os")  // pybind11's code, not the kernels': 16 KB of the wheel
#endif

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <pybind11/pybind11.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/headeronly/util/Exception.h>

#include "build_config.h"
#include "direct.h"
#include "on_chip.h"

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

py::dict on_chip_plan(int64_t vocab, int64_t element_bytes, int capability) {
  const rlhf_fast::OnChipPlan plan = rlhf_fast::on_chip_plan(vocab, element_bytes, capability);
  static constexpr const char* kNames[] = {"warp", "block", "cluster", "stream"};
  py::dict sizes;
  sizes["name"] = kNames[plan.kind];
  sizes["blocks"] = plan.blocks;
  sizes["threads"] = plan.threads;
  sizes["row_bytes"] = plan.row_bytes;
  sizes["resident"] = plan.resident;
  return sizes;
}

constexpr size_t kMaxArguments = 32;
// Elements of all tensors of a call on the CPU that is over before another thread could be let in.
constexpr int64_t kShortCall = 8192;

// The arguments of one call, as a boxed kernel takes them. Handles not yet handed over are freed.
class Arguments {
 public:
  ~Arguments() {
    for (size_t i = 0; i < size_; ++i)
      if (handles_[i]) aoti_torch_delete_tensor_object(handles_[i]);
  }
  void add(StableIValue value) { values_[size_] = value, handles_[size_++] = nullptr; }
  void add_tensor(AtenTensorHandle handle) { values_[size_] = torch::stable::detail::from(handle), handles_[size_++] = handle; }
  void box_optional(size_t i) { values_[i] = torch::stable::detail::from(new StableIValue(values_[i])); }
  StableIValue* hand_over() {
    handles_.fill(nullptr);
    return values_.data();
  }
  void count(int64_t elements) { elements_ += elements; }
  int64_t elements() const { return elements_; }

 private:
  std::array<StableIValue, kMaxArguments> values_;
  std::array<AtenTensorHandle, kMaxArguments> handles_{};
  size_t size_ = 0;
  int64_t elements_ = 0;
};

// One op, called with plain dense tensors of one device. `signature` has a letter for each argument: T tensor, O optional
// tensor, F float, I int, B bool. Of the outputs the first `visible` are handed out.
class DirectCall {
 public:
  DirectCall(const std::string& op, std::string signature, size_t outputs, size_t visible, py::object to_handle, py::object from_handles,
             py::object is_neg, py::tuple plain_types)
      : signature_(std::move(signature)), outputs_(outputs), visible_(visible), to_handle_(std::move(to_handle)),
        from_handles_(std::move(from_handles)), is_neg_(std::move(is_neg)), plain_types_(std::move(plain_types)) {
    if (signature_.size() > kMaxArguments || outputs_ > kMaxArguments) throw py::value_error(op + ": too many arguments");
    if (visible_ > outputs_) throw py::value_error(op + ": it has fewer outputs than are to be visible");
    for (auto device : {rlhf_fast::DirectDevice::kCpu, rlhf_fast::DirectDevice::kCuda}) {
      const auto& kernels = rlhf_fast::kernel_table(device).kernels;
      const auto found = kernels.find(op);
      kernels_[static_cast<int>(device)] = found == kernels.end() ? nullptr : found->second;
    }
  }

  // NotImplemented where only the dispatcher knows what to do: tensor subclasses, other devices or layouts, lazy negation.
  py::object operator()(PyObject* const* args, size_t count) const {
    if (count != signature_.size()) return not_implemented();
    Arguments stack;
    rlhf_fast::BoxedKernel kernel = nullptr;
    for (size_t i = 0; i < count; ++i) {
      PyObject* arg = args[i];
      switch (signature_[i]) {
        case 'F': stack.add(torch::stable::detail::from(PyFloat_AsDouble(arg))); break;
        case 'I': stack.add(torch::stable::detail::from(static_cast<int64_t>(PyLong_AsLongLong(arg)))); break;
        case 'B': stack.add(torch::stable::detail::from(arg == Py_True)); break;
        case 'O':
          if (arg == Py_None) {
            stack.add(torch::stable::detail::from(nullptr));
            break;
          }
          [[fallthrough]];
        default:
          if (!add_plain_tensor(arg, stack, kernel)) return not_implemented();
      }
    }
    if (PyErr_Occurred()) throw py::error_already_set();
    if (kernel == nullptr) return not_implemented();
    for (size_t i = 0; i < count; ++i)
      if (signature_[i] == 'O' && args[i] != Py_None) stack.box_optional(i);
    StableIValue* values = stack.hand_over();
    {
      std::optional<py::gil_scoped_release> nogil;
      if (kernel != kernels_[0] || stack.elements() > kShortCall) nogil.emplace();
      kernel(values, count, outputs_);
    }
    if (outputs_ == 0) return py::none();
    for (size_t i = visible_; i < outputs_; ++i) aoti_torch_delete_tensor_object(torch::stable::detail::to<AtenTensorHandle>(values[i]));
    py::list capsules(visible_);
    for (size_t i = 0; i < visible_; ++i)
      PyList_SET_ITEM(capsules.ptr(), i, PyCapsule_New(torch::stable::detail::to<AtenTensorHandle>(values[i]), nullptr, nullptr));
    const py::list tensors = py::reinterpret_steal<py::list>(PyObject_CallOneArg(from_handles_.ptr(), capsules.ptr()));
    if (!tensors) throw py::error_already_set();
    if (outputs_ == 1) return tensors[0];
    return py::reinterpret_steal<py::object>(PyList_AsTuple(tensors.ptr()));
  }

 private:
  static py::object not_implemented() { return py::reinterpret_borrow<py::object>(Py_NotImplemented); }

  bool add_plain_tensor(PyObject* tensor, Arguments& stack, rlhf_fast::BoxedKernel& kernel) const {
    bool plain = false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(plain_types_.ptr()); ++i)
      plain = plain || reinterpret_cast<PyObject*>(Py_TYPE(tensor)) == PyTuple_GET_ITEM(plain_types_.ptr(), i);
    if (!plain) return false;
    const auto negative = py::reinterpret_steal<py::object>(PyObject_CallOneArg(is_neg_.ptr(), tensor));
    const auto capsule = py::reinterpret_steal<py::object>(PyObject_CallOneArg(to_handle_.ptr(), tensor));
    if (!negative || !capsule) throw py::error_already_set();
    auto* handle = static_cast<AtenTensorHandle>(PyCapsule_GetPointer(capsule.ptr(), nullptr));
    if (handle == nullptr) throw py::error_already_set();
    stack.add_tensor(handle);
    int32_t device = 0, layout = 0;
    int64_t elements = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handle, &device));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(handle, &layout));
    if (negative.ptr() != Py_False || layout != aoti_torch_layout_strided()) return false;
    void* data = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(handle, &elements));
    stack.count(elements);
    if (elements > 0 && (aoti_torch_get_data_ptr(handle, &data) != AOTI_TORCH_SUCCESS || data == nullptr)) return false;
    const bool cpu = device == aoti_torch_device_type_cpu(), cuda = device == aoti_torch_device_type_cuda();
    if (!cpu && !cuda) return false;
    const rlhf_fast::BoxedKernel own = kernels_[cpu ? 0 : 1];
    if (own == nullptr || (kernel != nullptr && kernel != own)) return false;
    kernel = own;
    return true;
  }

  std::string signature_;
  size_t outputs_, visible_;
  py::object to_handle_, from_handles_, is_neg_;
  py::tuple plain_types_;
  std::array<rlhf_fast::BoxedKernel, 2> kernels_{};
};

// As a plain function of Python's: a call of a pybind11 method takes a third of a microsecond longer.
PyObject* call_directly(PyObject* self, PyObject* const* args, Py_ssize_t count) {
  try {
    const auto* call = static_cast<const DirectCall*>(PyCapsule_GetPointer(self, nullptr));
    return (*call)(args, static_cast<size_t>(count)).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyMethodDef kCallDirectly = {"direct_call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call_directly)), METH_FASTCALL,
                             "An op called past torch's dispatcher; NotImplemented where that is not possible."};

py::object direct_call(const std::string& op, std::string signature, size_t outputs, size_t visible, py::object to_handle,
                       py::object from_handles, py::object is_neg, py::tuple plain_types) {
  auto call = std::make_unique<DirectCall>(op, std::move(signature), outputs, visible, std::move(to_handle), std::move(from_handles),
                                           std::move(is_neg), std::move(plain_types));
  const py::capsule self(call.release(), [](void* pointer) { delete static_cast<DirectCall*>(pointer); });
  return py::reinterpret_steal<py::object>(PyCFunction_New(&kCallDirectly, self.ptr()));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Kernels of rlhf_fast. Use them through rlhf_fast.ops.";
  m.def("build_info", &build_info, "How this library was built and which CPU instruction level it uses here.");
  m.def("on_chip_plan", &on_chip_plan, "How a CUDA kernel holds a row of logits that it needs twice (csrc/on_chip.h).");
  m.def("direct_call", &direct_call, "A function that calls an op past torch's dispatcher, or returns NotImplemented where it cannot.");
}
