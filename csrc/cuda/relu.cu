// relu, forward and backward: see ops/relu.h for the formulas.
#include "cuda/launch.cuh"
#include "cuda/vector.cuh"

namespace fastnn::cuda {
namespace {

// One 16-byte load of each array in flight a thread: 2048 threads of a multiprocessor have 32 KiB under way, and memory
// at 3.4 TB/s with 0.7 us of latency asks for 18 KiB from each of 132.
template <class T>
__global__ void __launch_bounds__(kLotThreads)
    relu_forward_kernel(int64_t count, bool aligned, const T* input, T* output) {
  begin_kernel();
  for (int64_t tile = blockIdx.x; tile * Lot<T>::kTile < count; tile += gridDim.x) {
    const Lot<T> lot(tile, count, aligned);
    auto values = lot.load(input);
#pragma unroll
    for (T& value : values.values)
      if (widen(value) <= 0) value = narrow<T>(0);  // NaN stays
    lot.store(output, values);
  }
}

template <class T>
__global__ void __launch_bounds__(kLotThreads)
    relu_backward_kernel(int64_t count, bool aligned, const T* grad_output, const T* output, T* grad_input) {
  begin_kernel();
  for (int64_t tile = blockIdx.x; tile * Lot<T>::kTile < count; tile += gridDim.x) {
    const Lot<T> lot(tile, count, aligned);
    auto grads = lot.load(grad_output);
    const auto outputs = lot.load(output);
#pragma unroll
    for (int e = 0; e < Lot<T>::kSize; ++e)
      if (widen(outputs.values[e]) <= 0) grads.values[e] = narrow<T>(0);
    lot.store(grad_input, grads);
  }
}

}  // namespace

template <class T>
void Kernels<T>::relu_forward(const ReluShape& s, const ReluForward<T>& b) const {
  const bool aligned = aligned_to(16, b.input, b.output);
  trace<T>(queue_, "relu_forward", aligned ? "vector" : "scalar");
  launch("relu_forward", queue_, relu_forward_kernel<T>, blocks_for(s.count, Lot<T>::kTile), kLotThreads, 0, s.count,
         aligned, b.input, b.output);
}

template <class T>
void Kernels<T>::relu_backward(const ReluShape& s, const ReluBackward<T>& b) const {
  const bool aligned = aligned_to(16, b.grad_output, b.output, b.grad_input);
  trace<T>(queue_, "relu_backward", aligned ? "vector" : "scalar");
  launch("relu_backward", queue_, relu_backward_kernel<T>, blocks_for(s.count, Lot<T>::kTile), kLotThreads, 0, s.count,
         aligned, b.grad_output, b.output, b.grad_input);
}

FASTNN_INSTANTIATE(void, relu_forward, ReluShape, ReluForward)
FASTNN_INSTANTIATE(void, relu_backward, ReluShape, ReluBackward)

}  // namespace fastnn::cuda
