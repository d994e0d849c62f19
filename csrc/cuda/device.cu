#include "device.h"

#include <cuda_runtime.h>

namespace fastnn::cuda {

int device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

}  // namespace fastnn::cuda
