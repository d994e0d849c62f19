// Gradients of a convolution with fused 2x2 pooling, from the pooled gradient and the winners alone.
//
// At most one of the four outputs in a window has a gradient, and none where ReLU cut it: in practice 11 to 18 % of
// the dense gradient is non-zero. So the sums run over winners, not over pixels:
//
//   grad_w[o][ky][run] += g * source[y + ky][x .. x + kx)        run = (kx, i), contiguous in a source row
//   grad_in[y + ky][x .. x + kx) += g * w[o][ky][run]
//
// for each winner (o, y, x) of gradient g; the bias gradient is summed on the way. What is left out are products with
// zero, which would be NaN where the other factor is not finite: the kernels ask, and say if they did not serve. This
// file has what the three share:
//
//   conv2d_sparse_grad_weight   one output channel at a time: its part of the gradient stays in registers while the
//                               winners of a bit mask pass by
//   conv2d_sparse_grad_input    one output row and one vector of input channels at a time: registers hold what a
//                               window reaches, and slide
//   conv2d_lookup_grad_weight   one input channel, or three (the first layer of a network on pictures): runs would be
//                               too short, so vectors run along output channels and each lane looks its winner's
//                               pixels up
#pragma once

#include "cpu/kernels/conv2d_grad_weight.inl.h"
#include "cpu/kernels/finite.inl.h"
#include "cpu/simd/lanes.h"

namespace fastnn::cpu {
namespace {

// Images are cut into chunks, `most` at most, by the shape alone; each chunk's partial gradient is added in order.
template <class T>
int64_t image_chunks(const Conv2dShape& s, int64_t partial_elements, int64_t most) {
  int64_t chunks = kMaxPartialBytes / (partial_elements * static_cast<int64_t>(sizeof(T)));
  if (chunks > most) chunks = most;
  if (chunks > s.batch) chunks = s.batch;
  return chunks < 1 ? 1 : chunks;
}

// The padded image's source window, from its pixel (0, 0) at (-padding, -padding) to the last pixel that a window
// reads.
inline WindowRange pooled_range(const Conv2dShape& s) {
  return {-s.padding_height, -s.padding_width,
          (s.out_height / 2 * 2 - 1) * s.stride_height + (s.kernel_height - 1) * s.dilation_height + 1,
          (s.out_width / 2 * 2 - 1) * s.stride_width + (s.kernel_width - 1) * s.dilation_width + 1};
}

template <class T>
inline Image<T> image_of(const Conv2dShape& s, const T* input, int64_t image) {
  return {input + image * s.in_height * s.in_width * s.in_channels, s.in_height, s.in_width, s.in_width * s.in_channels,
          s.in_channels};
}

template <class T>
inline bool image_is_finite(const Conv2dShape& s, const T* input, int64_t image) {
  const int64_t elements = s.in_height * s.in_width * s.in_channels;
  return run_is_finite(elements, input + image * elements);
}

}  // namespace
}  // namespace fastnn::cpu
