#include "bindings/tensor.h"

#include <atomic>
#include <cstring>

namespace py = pybind11;

namespace fastnn {
namespace {

const DLPackExchangeAPI* exchange_api = nullptr;
PyTypeObject* torch_tensor_type = nullptr;
PyTypeObject* torch_parameter_type = nullptr;
PyObject* torch_get_num_threads = nullptr;
PyObject* torch_out_of_memory = nullptr;
PyObject* torch_is_grad_enabled = nullptr;
PyObject* torch_modes = nullptr;

// A reference that is never given back.
PyObject* kept(py::handle object) { return py::reinterpret_borrow<py::object>(object).release().ptr(); }

bool is_true(py::handle value) {
  const int truth = PyObject_IsTrue(value.ptr());
  if (truth < 0) throw py::error_already_set();
  return truth == 1;
}

// What a function without arguments returns, as a truth value.
bool answer(PyObject* function) {
  const auto result = py::reinterpret_steal<py::object>(PyObject_CallNoArgs(function));
  if (!result) throw py::error_already_set();
  return is_true(result);
}

// Whether memory runs through the dimensions in `order`, innermost last.
bool runs_through(const DLTensor& view, const int* order, int count) {
  int64_t expected = 1;
  for (int i = count - 1; i >= 0; --i) {
    const int d = order[i];
    if (view.shape[d] != 1 && view.strides[d] != expected) return false;
    expected *= view.shape[d];
  }
  return true;
}

}  // namespace

void initialise_tensors(py::handle tensor_type, py::handle parameter_type, py::handle get_num_threads,
                        py::handle out_of_memory, py::handle is_grad_enabled, py::tuple modes) {
  if (!py::hasattr(tensor_type, "__dlpack_c_exchange_api__"))
    throw py::import_error("fastnn needs torch >= 2.10: this torch has no torch.Tensor.__dlpack_c_exchange_api__");
  const py::object capsule = tensor_type.attr("__dlpack_c_exchange_api__");
  auto* api = static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  if (!api) throw py::error_already_set();
  DLPackExchangeAPIHeader* header = &api->header;
  while (header && header->version.major != 1) header = header->prev_api;
  if (!header) throw py::import_error("fastnn needs a torch that offers version 1 of DLPack's C exchange API");
  exchange_api = reinterpret_cast<DLPackExchangeAPI*>(header);
  torch_tensor_type = reinterpret_cast<PyTypeObject*>(kept(tensor_type));
  torch_parameter_type = reinterpret_cast<PyTypeObject*>(kept(parameter_type));
  torch_get_num_threads = kept(get_num_threads);
  torch_out_of_memory = kept(out_of_memory);
  torch_is_grad_enabled = kept(is_grad_enabled);
  torch_modes = kept(modes);
}

py::handle quick_way(const py::args& tensors) {
  static PyObject* const kernel = PyUnicode_InternFromString("kernel");
  static PyObject* const record = PyUnicode_InternFromString("record");
  static PyObject* const requires_grad = PyUnicode_InternFromString("requires_grad");
  for (const py::handle mode : py::reinterpret_borrow<py::tuple>(torch_modes))
    if (answer(mode.ptr())) return py::none();
  Tensor first, other;
  bool differentiable = false;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const py::handle object = tensors[i];
    if (i > 0 && object.is_none()) continue;
    Tensor& tensor = i == 0 ? first : other;
    if (!Tensor::from_plain(object, &tensor)) return py::none();
    if (i == 0 ? !first.has_kernels() : other.dtype() != first.dtype() || !other.is_on_device_of(first))
      return py::none();
    differentiable = differentiable || is_true(object.attr(requires_grad));
  }
  return differentiable && answer(torch_is_grad_enabled) ? record : kernel;
}

Workspace allocate_workspace(size_t bytes, [[maybe_unused]] int device) {
  int64_t shape[] = {static_cast<int64_t>(bytes)}, strides[] = {1};
#ifdef FASTNN_CUDA_EMULATOR
  const DLDevice place{kCpu, 0};
#else
  const DLDevice place{kCuda, device};
#endif
  DLTensor prototype{nullptr, place, 1, DLDataType{1, 8, 1}, shape, strides, 0};
  DLManagedTensorVersioned* tensor = nullptr;
  std::string why;
  const auto note = [](void* context, const char*, const char* message) {
    *static_cast<std::string*>(context) = message;
  };
  if (exchange_api->managed_tensor_allocator(&prototype, &tensor, &why, note) != 0) {
    const py::gil_scoped_acquire gil;
    PyErr_SetString(torch_out_of_memory, why.c_str());
    throw py::error_already_set();
  }
#ifdef FASTNN_CUDA_EMULATOR
  std::memset(tensor->tensor.data, 0xFF, bytes);  // NaN, like shared memory
#endif
  return Workspace(tensor);
}

void* current_stream(int device) {
  void* stream = nullptr;
  if (exchange_api->current_work_stream(kCuda, device, &stream) != 0) throw py::error_already_set();
  return stream;
}

void adopt_torch_threads() {
  thread_local bool adopted = false;
  if (adopted || !torch_get_num_threads) return;
  py::reinterpret_borrow<py::object>(torch_get_num_threads)();
  adopted = true;
}

Tensor Tensor::from_python(py::handle object) {
  if (!torch_tensor_type) throw py::import_error("fastnn._C is not initialised: import fastnn, not fastnn._C");
  if (!PyObject_TypeCheck(object.ptr(), torch_tensor_type))
    throw py::type_error(std::string("expected a torch.Tensor, got ") + Py_TYPE(object.ptr())->tp_name);
  Tensor tensor;
  if (exchange_api->dltensor_from_py_object_no_sync(object.ptr(), &tensor.view_) != 0) throw py::error_already_set();
  if (!tensor.view_.data && tensor.numel() > 0)
    throw std::runtime_error(
        "expected a tensor with memory, got one without (a fake, meta or functional tensor, a "
        "wrapper subclass, or one whose storage was freed)");
  return tensor;
}

bool Tensor::from_plain(py::handle object, Tensor* tensor) {
  if (Py_TYPE(object.ptr()) != torch_tensor_type && Py_TYPE(object.ptr()) != torch_parameter_type) return false;
  if (exchange_api->dltensor_from_py_object_no_sync(object.ptr(), &tensor->view_) != 0) {
    PyErr_Clear();  // sparse, nested, ...
    return false;
  }
  return tensor->view_.data || tensor->numel() == 0;
}

bool Tensor::has_kernels() const {
#ifdef FASTNN_CUDA
  const bool on_cuda = runs_on_cuda() && (!is_cuda() || cuda::device_has_code(view_.device.device_id));
#else
  const bool on_cuda = false;
#endif
  switch (dtype()) {
    case DType::float32:
    case DType::float64: return is_cpu() || on_cuda;
    case DType::bfloat16:
    case DType::float16: return on_cuda;
    default: return false;
  }
}

int64_t Tensor::numel() const {
  int64_t count = 1;
  for (int d = 0; d < view_.ndim; ++d) count *= view_.shape[d];
  return count;
}

DType Tensor::dtype() const {
  const DLDataType type = view_.dtype;
  if (type.lanes != 1) return DType::other;
  if (type.code == 2 && type.bits == 32) return DType::float32;
  if (type.code == 2 && type.bits == 64) return DType::float64;
  if (type.code == 4 && type.bits == 16) return DType::bfloat16;
  if (type.code == 2 && type.bits == 16) return DType::float16;
  if (type.code == 1 && type.bits == 8) return DType::uint8;
  if (type.code == 0 && type.bits == 64) return DType::int64;
  return DType::other;
}

TensorLayout::TensorLayout(const Tensor& tensor)
    : dtype_(tensor.view_.dtype),
      device_(tensor.view_.device),
      shape_(tensor.view_.shape, tensor.view_.shape + tensor.dim()),
      strides_(tensor.view_.strides, tensor.view_.strides + tensor.dim()) {}

bool TensorLayout::is_of(const Tensor& tensor) const {
  const DLTensor& view = tensor.view_;
  if (tensor.dim() != static_cast<int64_t>(shape_.size()) || view.dtype.code != dtype_.code ||
      view.dtype.bits != dtype_.bits || view.device.device_type != device_.device_type ||
      view.device.device_id != device_.device_id)
    return false;
  const bool has_elements = tensor.numel() > 0;
  for (size_t d = 0; d < shape_.size(); ++d)
    if (view.shape[d] != shape_[d] || (has_elements && shape_[d] != 1 && view.strides[d] != strides_[d])) return false;
  return true;
}

py::object stand_in(const Tensor& like, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides) {
  static std::atomic<uintptr_t> next_address{uintptr_t{1} << 45};
  struct Owned : DLManagedTensorVersioned {
    std::vector<int64_t> shape, strides;
  };
  auto owned = std::make_unique<Owned>();
  owned->shape = shape, owned->strides = strides;
  owned->version = exchange_api->header.version;
  owned->manager_context = nullptr;
  owned->deleter = [](DLManagedTensorVersioned* tensor) { delete static_cast<Owned*>(tensor); };
  owned->flags = 0;
  int64_t bytes = like.item_size();
  for (const int64_t size : shape) bytes *= size;
  void* const address =
      bytes > 0 ? reinterpret_cast<void*>(next_address.fetch_add((bytes / 256 + 2) * 256)) : nullptr;  // with a gap
  owned->tensor = {address,
                   like.view_.device,
                   static_cast<int32_t>(shape.size()),
                   like.view_.dtype,
                   owned->shape.data(),
                   owned->strides.data(),
                   0};
  void* object = nullptr;
  if (exchange_api->managed_tensor_to_py_object_no_sync(owned.get(), &object) != 0) throw py::error_already_set();
  owned.release();
  return py::reinterpret_steal<py::object>(static_cast<PyObject*>(object));
}

bool Tensor::has_shape_of(const Tensor& other) const {
  bool same = dim() == other.dim();
  for (int64_t d = 0; same && d < dim(); ++d) same = size(d) == other.size(d);
  return same;
}

bool Tensor::is_contiguous() const {
  int64_t expected = 1;
  for (int d = view_.ndim - 1; d >= 0; --d) {
    if (view_.shape[d] != 1 && view_.strides[d] != expected) return false;
    expected *= view_.shape[d];
  }
  return true;
}

bool Tensor::is_channels_last() const {
  static const int order[] = {0, 2, 3, 1};
  return view_.ndim == 4 && runs_through(view_, order, 4);
}

bool Tensor::is_dense() const {
  int64_t expected = 1;
  const int64_t count = numel();
  while (expected < count) {
    int d = 0;
    while (d < view_.ndim && (view_.shape[d] == 1 || view_.strides[d] != expected)) ++d;
    if (d == view_.ndim) return false;
    expected *= view_.shape[d];
  }
  return true;
}

std::string Tensor::shape_string() const {
  std::string text = "(";
  for (int d = 0; d < view_.ndim; ++d) text += (d ? ", " : "") + std::to_string(view_.shape[d]);
  return text + (view_.ndim == 1 ? ",)" : ")");
}

std::string Tensor::dtype_string() const {
  static const char* const kinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
  const DLDataType type = view_.dtype;
  if (type.code == 6) return "bool";
  return (type.code < 7 ? kinds[type.code] : "dtype") + std::to_string(type.bits);
}

std::string Tensor::device_string() const {
  const std::string index = std::to_string(view_.device.device_id);
  if (is_cpu()) return "cpu";
  return (is_cuda() ? "cuda:" : "device type " + std::to_string(view_.device.device_type) + ":") + index;
}

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::float32: return "float32";
    case DType::float64: return "float64";
    case DType::bfloat16: return "bfloat16";
    case DType::float16: return "float16";
    case DType::uint8: return "uint8";
    case DType::int64: return "int64";
    default: return "other";
  }
}

void fail_value(const char* name, const std::string& expected, const std::string& got) {
  throw py::value_error(std::string(name) + ": expected " + expected + ", got " + got);
}

void fail_type(const char* name, const std::string& expected, const std::string& got) {
  throw py::type_error(std::string(name) + ": expected " + expected + ", got " + got);
}

void check_shape(const char* name, const Tensor& tensor, std::initializer_list<Size> expected) {
  bool same = tensor.dim() == static_cast<int64_t>(expected.size());
  int64_t d = 0;
  for (const Size& size : expected) {
    if (same && !size.name && tensor.size(d) != size.number) same = false;
    ++d;
  }
  if (same) return;
  std::string text = "shape (";
  for (const Size& size : expected) {
    if (&size != expected.begin()) text += ", ";
    text += size.name ? size.name : std::to_string(size.number);
  }
  fail_value(name, text + (expected.size() == 1 ? ",)" : ")"), tensor.shape_string());
}

void check_contiguous(const char* name, const Tensor& tensor) {
  if (tensor.numel() > 0 && !tensor.is_contiguous())
    fail_value(name, "a contiguous tensor", "one of shape " + tensor.shape_string() + " with other strides");
}

void check_channels_last(const char* name, const Tensor& tensor) {
  if (tensor.dim() != 4 || (tensor.numel() > 0 && !tensor.is_channels_last()))
    fail_value(name, "a (batch, channels, height, width) tensor in channels_last order",
               "one of shape " + tensor.shape_string() + " in another order");
}

void check_dense(const char* name, const Tensor& tensor) {
  if (!tensor.is_dense())
    fail_value(name, "a tensor without gaps", "one of shape " + tensor.shape_string() + " with gaps");
}

void check_same_layout(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) {
  bool same_shape = tensor.dim() == other.dim(), same_strides = true;
  for (int64_t d = 0; same_shape && d < tensor.dim(); ++d) {
    same_shape = tensor.size(d) == other.size(d);
    if (tensor.size(d) != 1 && tensor.stride(d) != other.stride(d)) same_strides = false;
  }
  if (!same_shape)
    fail_value(name, "the shape of " + std::string(other_name) + ", " + other.shape_string(), tensor.shape_string());
  check_same_kind(name, tensor, other_name, other);
  if (!same_strides && tensor.numel() > 0)
    fail_value(name, "the strides of " + std::string(other_name), "others, shape " + tensor.shape_string());
}

void check_pair(const char* name, const Pair& pair, int64_t least) {
  constexpr int64_t kMost = int64_t{1} << 31;
  for (const int64_t value : pair)
    if (value < least || value > kMost)
      fail_value(name, "two numbers from " + std::to_string(least) + " to " + std::to_string(kMost),
                 "(" + std::to_string(pair[0]) + ", " + std::to_string(pair[1]) + ")");
}

void check_dtype(const char* name, const Tensor& tensor, DType expected) {
  if (tensor.dtype() != expected) fail_type(name, dtype_name(expected), tensor.dtype_string());
}

void check_same_kind(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) {
  if (tensor.dtype() != other.dtype() || tensor.dtype() == DType::other)
    fail_type(name, other.dtype_string() + " as " + other_name, tensor.dtype_string());
  check_same_device(name, tensor, other_name, other);
}

void check_same_device(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other) {
  if (tensor.is_on_device_of(other)) return;
  fail_value(name, "a tensor on " + other.device_string() + " as " + other_name, "one on " + tensor.device_string());
}

void check_device(const char* name, const Tensor& tensor) {
#if defined(FASTNN_CUDA) && !defined(FASTNN_CUDA_EMULATOR)
  if (!tensor.is_cpu() && !tensor.is_cuda())
    fail_value(name, "a tensor on cpu or cuda", "one on " + tensor.device_string());
#else
  if (!tensor.is_cpu())
    fail_value(name, "a tensor on cpu, since this build has no CUDA kernels", "one on " + tensor.device_string());
#endif
}

}  // namespace fastnn

namespace pybind11::detail {

bool type_caster<fastnn::Tensor>::load(handle source, bool) {
  value = fastnn::Tensor::from_python(source);
  return true;
}

}  // namespace pybind11::detail
