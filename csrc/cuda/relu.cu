// relu, forward and backward: see ops/relu.h for the formulas.
#include "cuda/launch.cuh"

namespace fastnn::cuda {
namespace {

constexpr int kThreads = 256;

template <class T>
__global__ void relu_forward_kernel(int64_t count, const T* input, T* output) {
  for (int64_t i = global_thread(); i < count; i += grid_threads()) {
    const Compute<T> x = widen(input[i]);
    output[i] = x <= 0 ? narrow<T>(0) : input[i];  // NaN stays
  }
}

template <class T>
__global__ void relu_backward_kernel(int64_t count, const T* grad_output, const T* output, T* grad_input) {
  for (int64_t i = global_thread(); i < count; i += grid_threads())
    grad_input[i] = widen(output[i]) <= 0 ? narrow<T>(0) : grad_output[i];
}

}  // namespace

template <class T>
void Kernels<T>::relu_forward(const ReluShape& s, const ReluForward<T>& b) const {
  trace<T>(queue_, "relu_forward", "elementwise");
  launch("relu_forward", queue_, relu_forward_kernel<T>, blocks_for(s.count, kThreads), kThreads, 0, s.count, b.input,
         b.output);
}

template <class T>
void Kernels<T>::relu_backward(const ReluShape& s, const ReluBackward<T>& b) const {
  trace<T>(queue_, "relu_backward", "elementwise");
  launch("relu_backward", queue_, relu_backward_kernel<T>, blocks_for(s.count, kThreads), kThreads, 0, s.count,
         b.grad_output, b.output, b.grad_input);
}

FASTNN_INSTANTIATE(void, relu_forward, ReluShape, ReluForward)
FASTNN_INSTANTIATE(void, relu_backward, ReluShape, ReluBackward)

}  // namespace fastnn::cuda
