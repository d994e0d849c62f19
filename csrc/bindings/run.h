// How a binding calls its kernel: on the tensor's device, in its dtype, without the GIL - or recorded.
//
//   dispatch("input", input, [&](auto zero) {
//     using T = decltype(zero);
//     run_kernel<T>(input, [=](const auto& kernels) { kernels.linear_forward(shape, {output.data<T>(), ...}); });
//   });
//
// `kernels` is a cpu::Kernels<T> or a cuda::Kernels<T>, which have the same operators.
#pragma once

#include <pybind11/pybind11.h>

#include <type_traits>
#include <vector>

#include "bindings/program.h"
#include "bindings/tensor.h"
#include "cpu/kernel_table.h"
#ifdef FASTNN_CUDA
#include "cuda/device.h"
#include "cuda/kernels.h"
#endif

namespace fastnn {

// body(T{}) with the dtype of `tensor`: float or double, and on CUDA bfloat16 or float16; TypeError for others.
template <class Body>
void dispatch(const char* name, const Tensor& tensor, const Body& body) {
  switch (tensor.dtype()) {
    case DType::float32: return body(float{});
    case DType::float64: return body(double{});
#ifdef FASTNN_CUDA
    case DType::bfloat16:
      if (tensor.runs_on_cuda()) return body(bfloat16{});
      break;
    case DType::float16:
      if (tensor.runs_on_cuda()) return body(float16{});
      break;
#endif
    default: break;
  }
  fail_type(name, tensor.runs_on_cuda() ? "a floating-point tensor" : "a float32 or float64 tensor",
            tensor.dtype_string());
}

// Makes a call without the GIL, or records it. `call` owns all it needs: it captures by value. Of a Tensor it may use
// data(), dtype and device, but neither shape nor strides, which are gone when a recorded call is made.
template <class Call>
void run_or_record(const Call& call) {
  if (Program* program = Program::recording()) {
    program->append(call);
    return;
  }
  const pybind11::gil_scoped_release release;
  call();
}

#ifdef FASTNN_CUDA
// The current stream of a device, and tensors of torch's allocator as workspace for the time of a call. torch hands
// freed memory out again in the order of the stream, so the call may end before its kernels do.
class __attribute__((visibility("hidden"))) CudaCall {
 public:
  explicit CudaCall(int device);
  CudaCall(const CudaCall&) = delete;
  CudaCall& operator=(const CudaCall&) = delete;
  const cuda::Queue& queue() const { return queue_; }

 private:
  static void* allocate(void* self, size_t bytes);
  cuda::Queue queue_;
  cuda::DeviceGuard guard_;
  std::vector<Workspace> workspaces_;
};
#endif

// call(kernels) with the kernels for T on the device of `on`.
template <class T, class Call>
void run_kernel([[maybe_unused]] const Tensor& on, const Call& call) {
#ifdef FASTNN_CUDA
  if (on.runs_on_cuda()) {
    run_or_record([device = on.device_index(), call] {
      const CudaCall context(device);
      call(cuda::Kernels<T>(context.queue()));
    });
    return;
  }
#endif
  if constexpr (std::is_same_v<T, float> || std::is_same_v<T, double>) {
    adopt_torch_threads();
    run_or_record([call] { call(cpu::kernels<T>()); });
  }
}

}  // namespace fastnn
