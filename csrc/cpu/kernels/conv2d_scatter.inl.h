// Input gradient for weights that are not all finite, of any geometry: every product that torch makes and no other.
//
//   grad_in[y * stride + ky * dilation - padding][x * ...][i] += grad[y][x][o] * w[o][ky][kx][i]
//
// for each pixel (y, x) of the gradient and each tap inside the image. The fast kernels multiply zeros around the
// gradient too, and leave out zeros inside it: both are the same until a weight is NaN or infinite.
#pragma once

#include "cpu/kernels/conv2d_window.inl.h"
#include "cpu/parallel.h"
#include "ops/conv2d.h"

namespace fastnn::cpu {
namespace {

// `weight` is OHWI.
template <class T>
void scatter_grad_input(const Conv2dShape& s, const T* grad, const T* weight, T* grad_input) {
  const int64_t inputs = s.in_channels / s.groups, outputs = s.out_channels / s.groups;
  const int64_t taps = s.kernel_height * s.kernel_width, image_elements = s.in_height * s.in_width * s.in_channels;
  parallel_for(s.batch, [&](int64_t image) {
    T* whole = grad_input + image * image_elements;
    zero_run(image_elements, whole);
    for (int64_t pixel = 0; pixel < s.out_height * s.out_width; ++pixel) {
      const T* g = grad + (image * s.out_height * s.out_width + pixel) * s.out_channels;
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t y = pixel / s.out_width * s.stride_height + tap / s.kernel_width * s.dilation_height;
        const int64_t x = pixel % s.out_width * s.stride_width + tap % s.kernel_width * s.dilation_width;
        const int64_t in_y = y - s.padding_height, in_x = x - s.padding_width;
        if (in_y < 0 || in_y >= s.in_height || in_x < 0 || in_x >= s.in_width) continue;
        for (int64_t o = 0; o < s.out_channels; ++o) {
          const T* w = weight + (o * taps + tap) * inputs;
          T* to = whole + (in_y * s.in_width + in_x) * s.in_channels + o / outputs * inputs;
          for (int64_t i = 0; i < inputs; ++i) to[i] += g[o] * w[i];
        }
      }
    }
  });
}

}  // namespace
}  // namespace fastnn::cpu
