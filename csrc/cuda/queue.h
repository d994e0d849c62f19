// Where kernels run: a device, its stream, and where they get memory for the time of a call.
#pragma once

#include <cstddef>

namespace fastnn::cuda {

struct Queue {
  int device;
  void* stream;  // cudaStream_t
  // Device memory that lives until the call that asked for it has run on the stream; 256-byte aligned.
  void* (*allocate)(void* owner, size_t bytes);
  void* owner;

  template <class T>
  T* workspace(size_t count) const {
    return static_cast<T*>(allocate(owner, count * sizeof(T)));
  }
};

}  // namespace fastnn::cuda
