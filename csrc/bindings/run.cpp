#include "bindings/run.h"

namespace py = pybind11;

namespace fastnn {

#ifdef FASTNN_CUDA

CudaCall::CudaCall(int device) : queue_{device, nullptr, &CudaCall::allocate, this}, guard_(device) {
#ifndef FASTNN_CUDA_EMULATOR
  const py::gil_scoped_acquire gil;
  queue_.stream = current_stream(device);
#endif
}

CudaCall::~CudaCall() {
  if (workspaces_.empty()) return;
  const py::gil_scoped_acquire gil;
  workspaces_.clear();
}

void* CudaCall::allocate(void* self, size_t bytes) {
  CudaCall* call = static_cast<CudaCall*>(self);
  const py::gil_scoped_acquire gil;
  call->workspaces_.push_back(allocate_workspace(bytes, call->queue_.device));
  return Tensor::from_python(call->workspaces_.back()).data<void>();
}

#endif

}  // namespace fastnn
