#include "bindings/run.h"

namespace fastnn {

#ifdef FASTNN_CUDA

CudaCall::CudaCall(int device) : queue_{device, nullptr, &CudaCall::allocate, this}, guard_(device) {
#ifndef FASTNN_CUDA_EMULATOR
  const pybind11::gil_scoped_acquire gil;
  queue_.stream = current_stream(device);
#endif
}

void* CudaCall::allocate(void* self, size_t bytes) {
  CudaCall* call = static_cast<CudaCall*>(self);
  call->workspaces_.push_back(allocate_workspace(bytes, call->queue_.device));
  return call->workspaces_.back()->tensor.data;
}

#endif

}  // namespace fastnn
