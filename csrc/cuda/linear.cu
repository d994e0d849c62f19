// linear, forward and backward: see ops/linear.h for the formulas. Its rows are images of one pixel.
#include "cuda/conv2d.cuh"

namespace fastnn::cuda {
namespace {

Conv2dShape as_conv2d(const LinearShape& s) {
  Conv2dShape c{};
  c.batch = s.batch, c.in_channels = s.in_features, c.out_channels = s.out_features;
  c.in_height = c.in_width = c.out_height = c.out_width = c.kernel_height = c.kernel_width = 1;
  c.stride_height = c.stride_width = c.dilation_height = c.dilation_width = c.groups = 1;
  c.relu = s.relu, c.weight_channels_last = true, c.precision = s.precision;
  return c;
}

}  // namespace

template <class T>
void Kernels<T>::linear_forward(const LinearShape& s, const LinearForward<T>& b) const {
  run_conv2d_forward<T>(kLinearStages, queue_, as_conv2d(s), {b.output, nullptr, b.input, b.weight, b.bias});
}

template <class T>
void Kernels<T>::linear_backward(const LinearShape& s, const LinearBackward<T>& b) const {
  run_conv2d_backward<T>(
      kLinearStages, queue_, as_conv2d(s),
      {b.grad_input, b.grad_weight, b.grad_bias, b.grad_output, b.input, b.weight, b.output, nullptr});
}

FASTNN_INSTANTIATE(void, linear_forward, LinearShape, LinearForward)
FASTNN_INSTANTIATE(void, linear_backward, LinearShape, LinearBackward)

}  // namespace fastnn::cuda
