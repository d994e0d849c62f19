// softmax and log_softmax, forward and backward: see ops/softmax.h for the formulas.
#include <cmath>

#include "cuda/lines.cuh"

namespace fastnn::cuda {
namespace {

template <class T, bool kLog>
__global__ void __launch_bounds__(kWideLineThreads, kWideLineBlocks<T>)
    softmax_forward_kernel(Lines lines, SoftmaxForward<T> b) {
  begin_kernel();
  using C = Compute<T>;
  const T* __restrict__ input = b.input;
  T* __restrict__ output = b.output;
  const auto load = [&](int64_t at, int64_t) { return widen(input[at]); };
  for_lines(lines, [&](const Team& team, const Line& line) {
    const C largest = line_largest(team, line, input);
    C sum = 0;
    line.walk(load, [&](C x, int64_t, int64_t) { sum += std::exp(x - largest); });
    sum = team.sum(sum);
    const C term = kLog ? std::log(sum) : 1 / sum;
    line.walk(load, [&](C x, int64_t at, int64_t) {
      output[at] = narrow<T>(kLog ? x - largest - term : std::exp(x - largest) * term);
    });
  });
}

template <class T, bool kLog>
__global__ void __launch_bounds__(kWideLineThreads, kWideLineBlocks<T>)
    softmax_backward_kernel(Lines lines, SoftmaxBackward<T> b) {
  begin_kernel();
  using C = Compute<T>;
  const T* __restrict__ grad_output = b.grad_output;
  const T* __restrict__ output = b.output;
  T* __restrict__ grad_input = b.grad_input;
  struct Values {
    C grad, y;
  };
  const auto load = [&](int64_t at, int64_t) { return Values{widen(grad_output[at]), widen(output[at])}; };
  for_lines(lines, [&](const Team& team, const Line& line) {
    C sum = 0;
    line.walk(load, [&](Values v, int64_t, int64_t) { sum += kLog ? v.grad : v.grad * v.y; });
    sum = team.sum(sum);
    line.walk(load, [&](Values v, int64_t at, int64_t) {
      grad_input[at] = narrow<T>(kLog ? v.grad - std::exp(v.y) * sum : v.y * (v.grad - sum));
    });
  });
}

template <class T, class Buffers>
void launch_lines(const char* operation, const Queue& queue, void (*kernel)(Lines, Buffers), const SoftmaxShape& s,
                  const Buffers& b) {
  const Lines lines = plan_lines(s);
  trace<T>(queue, operation, lines.variant());
  launch(operation, queue, kernel, blocks_for(lines.bundles(), 1), lines.team.threads(),
         lines.team.shared_bytes<Compute<T>>(), lines, b);
}

}  // namespace

template <class T>
void Kernels<T>::softmax_forward(const SoftmaxShape& s, const SoftmaxForward<T>& b) const {
  launch_lines<T>("softmax_forward", queue_, softmax_forward_kernel<T, false>, s, b);
}

template <class T>
void Kernels<T>::softmax_backward(const SoftmaxShape& s, const SoftmaxBackward<T>& b) const {
  launch_lines<T>("softmax_backward", queue_, softmax_backward_kernel<T, false>, s, b);
}

template <class T>
void Kernels<T>::log_softmax_forward(const SoftmaxShape& s, const SoftmaxForward<T>& b) const {
  launch_lines<T>("log_softmax_forward", queue_, softmax_forward_kernel<T, true>, s, b);
}

template <class T>
void Kernels<T>::log_softmax_backward(const SoftmaxShape& s, const SoftmaxBackward<T>& b) const {
  launch_lines<T>("log_softmax_backward", queue_, softmax_backward_kernel<T, true>, s, b);
}

FASTNN_INSTANTIATE(void, softmax_forward, SoftmaxShape, SoftmaxForward)
FASTNN_INSTANTIATE(void, softmax_backward, SoftmaxShape, SoftmaxBackward)
FASTNN_INSTANTIATE(void, log_softmax_forward, SoftmaxShape, SoftmaxForward)
FASTNN_INSTANTIATE(void, log_softmax_backward, SoftmaxShape, SoftmaxBackward)

}  // namespace fastnn::cuda
