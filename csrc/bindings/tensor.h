// Tensor arguments of the module, read through DLPack's C exchange API, and the checks that every binding makes.
//
// This folder is the only place that knows Python. A binding checks its arguments once, by name - what was
// expected and what came - then calls the kernel through run_kernel(), see run.h.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bindings/dlpack.h"
#include "bindings/moves.h"

namespace fastnn {

enum class DType { float32, float64, bfloat16, float16, uint8, int64, other };

// A view of a torch.Tensor's memory, valid during the call that took it.
class Tensor {
 public:
  // Throws TypeError where `object` is no torch.Tensor, RuntimeError where it has no memory that can be read.
  static Tensor from_python(pybind11::handle object);
  // Whether `object` is exactly a torch.Tensor or Parameter with memory, which *tensor then is.
  static bool from_plain(pybind11::handle object, Tensor* tensor);

  int64_t dim() const { return view_.ndim; }
  int64_t size(int64_t d) const { return view_.shape[d]; }
  // 1 x ... x 1 tensors carry arbitrary strides: see is_contiguous() for how to ask about layout.
  int64_t stride(int64_t d) const { return view_.strides[d]; }
  int64_t numel() const;
  bool is_cpu() const { return view_.device.device_type == kCpu; }
  bool is_cuda() const { return view_.device.device_type == kCuda; }
#ifdef FASTNN_CUDA_EMULATOR
  bool runs_on_cuda() const { return true; }
#else
  bool runs_on_cuda() const { return is_cuda(); }  // on CUDA's kernels; the emulator runs them on the CPU's tensors
#endif
  int device_index() const { return view_.device.device_id; }
  bool has_shape_of(const Tensor& other) const;
  bool is_on_device_of(const Tensor& other) const {
    return view_.device.device_type == other.view_.device.device_type && device_index() == other.device_index();
  }
  int64_t item_size() const { return view_.dtype.bits / 8; }
  DType dtype() const;
  bool has_kernels() const;       // for its dtype on its device
  bool is_contiguous() const;     // row-major; dimensions of size 1 do not count
  bool is_dense() const;          // in the order of some permutation of its dimensions, without gaps or overlaps
  bool is_channels_last() const;  // (n, c, h, w) stored as n, h, w, c

  // Where it lies, or in a run of a program on other tensors that which stands for it.
  template <class T>
  T* data() const {
    char* const address = static_cast<char*>(view_.data) + view_.byte_offset;
    const Moves* const moves = Moves::active();
    return reinterpret_cast<T*>(moves ? moves->find(address) : address);
  }

  std::string shape_string() const;   // "(32, 1, 28, 28)"
  std::string dtype_string() const;   // "float32"
  std::string device_string() const;  // "cpu", "cuda:0"

 private:
  friend class TensorLayout;
  friend pybind11::object stand_in(const Tensor& like, const std::vector<int64_t>& shape,
                                   const std::vector<int64_t>& strides);
  DLTensor view_;
};

// Shape, strides, dtype and device.
class TensorLayout {
 public:
  explicit TensorLayout(const Tensor& tensor);
  bool is_of(const Tensor& tensor) const;

 private:
  DLDataType dtype_;
  DLDevice device_;
  std::vector<int64_t> shape_, strides_;
};

// Takes torch.Tensor.__dlpack_c_exchange_api__ from torch, once, at import. `out_of_memory` is torch's exception;
// `is_grad_enabled` and `modes` are what quick_way() asks.
void initialise_tensors(pybind11::handle tensor_type, pybind11::handle parameter_type, pybind11::handle get_num_threads,
                        pybind11::handle out_of_memory, pybind11::handle is_grad_enabled, pybind11::tuple modes);

// The common case of autograd.common.route: "kernel" where all tensors (or None) are plain, on one device, of one dtype
// that its kernels have, and no mode is on; "record" where autograd must record the call, too; None for all else.
pybind11::handle quick_way(const pybind11::args& tensors);

// A tensor of torch with this dtype and device that has an address of its own and no memory, for a program to record.
pybind11::object stand_in(const Tensor& like, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides);

// Memory for a CUDA kernel from torch's allocator (from the CPU's where the emulator stands for the GPU). Neither
// taking it nor giving it back needs the GIL.
struct FreeWorkspace {
  void operator()(DLManagedTensorVersioned* tensor) const { tensor->deleter(tensor); }
};
using Workspace = std::unique_ptr<DLManagedTensorVersioned, FreeWorkspace>;
Workspace allocate_workspace(size_t bytes, int device);

void* current_stream(int device);  // torch's cudaStream_t

// torch keeps its thread count per Python thread and sets it up on first use: called by every binding, so that
// torch.set_num_threads() governs our loops in threads that torch has not seen yet.
void adopt_torch_threads();

// Checks. Each throws ValueError or TypeError as "weight: expected shape (out_features, 8), got (4, 7)".
[[noreturn]] void fail_value(const char* name, const std::string& expected, const std::string& got);
[[noreturn]] void fail_type(const char* name, const std::string& expected, const std::string& got);

// One size of an expected shape: a number, or a name for a size that may be anything.
struct Size {
  int64_t number;
  const char* name;
  Size(int64_t size) : number(size), name(nullptr) {}
  Size(const char* any) : number(-1), name(any) {}
};
void check_shape(const char* name, const Tensor& tensor, std::initializer_list<Size> expected);
void check_contiguous(const char* name, const Tensor& tensor);
void check_channels_last(const char* name, const Tensor& tensor);
void check_dense(const char* name, const Tensor& tensor);
// The same kind, shape and strides: elements in the same order.
void check_same_layout(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other);
void check_dtype(const char* name, const Tensor& tensor, DType expected);
void check_same_kind(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other);
void check_same_device(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other);
void check_device(const char* name, const Tensor& tensor);  // one that there are kernels for

using Pair = std::array<int64_t, 2>;  // (height, width)
// Both numbers from `least` to 2^31: larger ones would overflow when multiplied, and no such tensor fits in memory.
void check_pair(const char* name, const Pair& pair, int64_t least);

const char* dtype_name(DType dtype);

template <class T>
T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->data<T>() : nullptr;
}

}  // namespace fastnn

namespace pybind11::detail {

template <>
struct type_caster<fastnn::Tensor> {
  PYBIND11_TYPE_CASTER(fastnn::Tensor, const_name("torch.Tensor"));
  bool load(handle source, bool);
};

}  // namespace pybind11::detail
