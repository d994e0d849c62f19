// How every kernel is launched, and what kernels of all operators share: the compiler's two faces (nvcc, or a C++
// compiler with the emulator), dtypes, and the instantiation of an operator for each of them.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/trace.h"
#include "cuda/fork.h"
#include "cuda/kernels.h"
#include "cuda/primitives.cuh"

namespace fastnn::cuda {

const char* device_isa(int device);  // "sm_90"; "emulator"
int device_multiprocessors(int device);
int device_capability(int device);    // 90: of the code that runs there, or 0 where this build has none
int device_shared_bytes(int device);  // that a block may have
bool sync_debug();                    // FASTNN_SYNC_DEBUG=1
void check_launch(const char* operation, const Queue& queue);
void allow_shared_bytes(const void* kernel, const Queue& queue, size_t bytes);  // more than the 48 KB that all have

template <class T>
constexpr const char* dtype_name() {
  if constexpr (std::is_same_v<T, float>) return "float32";
  if constexpr (std::is_same_v<T, double>) return "float64";
  if constexpr (std::is_same_v<T, bfloat16>) return "bfloat16";
  if constexpr (std::is_same_v<T, float16>) return "float16";
}

// Records that `variant` of `operation` serves this call.
template <class T>
void trace(const Queue& queue, const char* operation, const char* variant) {
  trace_kernel({operation, variant, device_isa(queue.device), dtype_name<T>(), queue.device});
}

// kernel<<<grid, threads, shared_bytes, stream>>>(arguments...), checked. An empty grid launches nothing.
template <class... Parameters, class... Arguments>
void launch(const char* operation, const Queue& queue, void (*kernel)(Parameters...), dim3 grid, int threads,
            size_t shared_bytes, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#ifdef __CUDACC__
  if (shared_bytes > 48 * 1024) allow_shared_bytes(reinterpret_cast<const void*>(kernel), queue, shared_bytes);
  cudaLaunchAttribute early;
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(queue.stream);
  config.attrs = &early, config.numAttrs = device_capability(queue.device) >= 90 && may_come_early(queue) ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
#else
  emulator::launch(operation, grid, dim3(threads), shared_bytes, [&] {
    kernel(Parameters(arguments)...);
    device_check(emulator::thread->begun, "the kernel did not call begin_kernel()");
  });
#endif
  check_launch(operation, queue);
}

constexpr int kMostGridYZ = 65535;  // blocks along y and z; kernels loop over the rest

// Blocks for `count` items at `per_block` each; kernels loop over items with a grid's stride, so fewer do too.
inline dim3 blocks_for(int64_t count, int64_t per_block) {
  constexpr int64_t kMost = 1 << 16;
  const int64_t blocks = (count + per_block - 1) / per_block;
  return dim3(static_cast<unsigned>(blocks < kMost ? blocks : kMost));
}

}  // namespace fastnn::cuda

// One line a stage: void Kernels<T>::stage(const Shape&, const Buffers<T>&) const for every dtype.
#define FASTNN_INSTANTIATE(result, stage, Shape, Buffers)                                 \
  template result Kernels<float>::stage(const Shape&, const Buffers<float>&) const;       \
  template result Kernels<double>::stage(const Shape&, const Buffers<double>&) const;     \
  template result Kernels<bfloat16>::stage(const Shape&, const Buffers<bfloat16>&) const; \
  template result Kernels<float16>::stage(const Shape&, const Buffers<float16>&) const;
