// mse_loss, forward and backward: see ops/mse_loss.h for the formulas.
#include "cuda/loss.cuh"

namespace fastnn::cuda {
namespace {

// Elements a thread loads at a time, and adds in T's own precision before they join the sum in double: few graphics
// cards are fast at that.
constexpr int kMseItems = 8;

template <class T>
__device__ __forceinline__ Compute<T> weight_at(const T* weight, int64_t i) {
  return weight ? widen(weight[i]) : 1;
}

template <class T>
__global__ void __launch_bounds__(kOneBlockThreads, 1)
    mse_loss_sum_kernel(int64_t count, MseLossForward<T> b, LossTotal<T> total) {
  begin_kernel();
  using C = Compute<T>;
  LossSum sum{0, 0};
  const int64_t round = int64_t{blockDim.x} * kMseItems;
  for (int64_t start = blockIdx.x * round; start < count; start += gridDim.x * round) {
    C input[kMseItems] = {}, target[kMseItems] = {}, weight[kMseItems] = {};
    for (int k = 0; k < kMseItems; ++k) {
      const int64_t i = start + k * int64_t{blockDim.x} + threadIdx.x;
      if (i >= count) continue;
      input[k] = widen(b.input[i]);
      target[k] = widen(b.target[i]);
      weight[k] = weight_at(b.weight, i);
    }
    C errors = 0, weights = 0;
    for (int k = 0; k < kMseItems; ++k) {
      const C difference = input[k] - target[k];
      errors += difference * difference * weight[k];
      weights += weight[k];
    }
    sum.loss += errors;
    sum.weight += weights;
  }
  total.add(sum);
}

template <class T>
__global__ void mse_loss_elementwise_kernel(int64_t count, MseLossForward<T> b) {
  begin_kernel();
  if (global_thread() == 0) *b.divisor = 1;
  for (int64_t i = global_thread(); i < count; i += grid_threads()) {
    const Compute<T> difference = widen(b.input[i]) - widen(b.target[i]);
    b.output[i] = narrow<T>(difference * difference * weight_at(b.weight, i));
  }
}

template <class T>
__global__ void mse_loss_backward_kernel(MseLossShape s, MseLossBackward<T> b) {
  begin_kernel();
  using C = Compute<T>;
  const bool elementwise = s.reduction == Reduction::none;
  const C shared = elementwise ? 0 : 2 * sample_gradient(s.reduction, b.grad_output, b.divisor, 0);
  for (int64_t i = global_thread(); i < s.count; i += grid_threads()) {
    const C factor = elementwise ? 2 * widen(b.grad_output[i]) : shared;
    const C grad = factor * (widen(b.input[i]) - widen(b.target[i])) * weight_at(b.weight, i);
    if (b.grad_input) b.grad_input[i] = narrow<T>(grad);
    if (b.grad_target) b.grad_target[i] = narrow<T>(-grad);
  }
}

}  // namespace

template <class T>
void Kernels<T>::mse_loss_forward(const MseLossShape& s, const MseLossForward<T>& b) const {
  if (s.reduction == Reduction::none) {
    trace<T>(queue_, "mse_loss_forward", "elementwise");
    const dim3 blocks = blocks_for(std::max<int64_t>(s.count, 1), kLossThreads);  // one at least, for the divisor
    launch("mse_loss_forward", queue_, mse_loss_elementwise_kernel<T>, blocks, kLossThreads, 0, s.count, b);
    return;
  }
  const LossGrid grid = loss_grid(s.count, kMseItems);
  trace<T>(queue_, "mse_loss_forward", grid.variant());
  launch_loss<T>("mse_loss_forward", queue_, mse_loss_sum_kernel<T>, grid.blocks, grid.threads, 0,
                 {s.reduction, b.output, b.divisor, nullptr}, s.count, b);
}

template <class T>
void Kernels<T>::mse_loss_backward(const MseLossShape& s, const MseLossBackward<T>& b) const {
  trace<T>(queue_, "mse_loss_backward", "elementwise");
  launch("mse_loss_backward", queue_, mse_loss_backward_kernel<T>, blocks_for(s.count, kLossThreads), kLossThreads, 0,
         s, b);
}

FASTNN_INSTANTIATE(void, mse_loss_forward, MseLossShape, MseLossForward)
FASTNN_INSTANTIATE(void, mse_loss_backward, MseLossShape, MseLossBackward)

}  // namespace fastnn::cuda
