// max_pool2d: output[n][c][y][x] = max over taps (i, j) of input[n][c][y * stride + i * dilation - padding][...j]
//
// The column is built from x and j as the row is from y and i; outside the image lies -inf. NaN beats every number;
// among equal values the first tap in row-major order wins.
//
//   grad_input[n][c][row][column] = sum of grad_output[n][c][y][x] over the windows that this pixel won
//
// The winner of a window is kept as a byte, i * kernel_width + j, where the kernel has at most 256 taps; or as torch's
// index, row * width + column. A window that sees padding alone gives -inf; it has no winner (its index is -1).
//
// Images are dense, all channels-last (batch, height, width, channels) or all channels-first.
#pragma once

#include <cstdint>

namespace fastnn {

// One axis of the pooling.
struct PoolAxis {
  int64_t size, out_size, kernel, stride, padding, dilation;
};

struct MaxPool2dShape {
  int64_t batch, channels;
  PoolAxis y, x;
  bool channels_last;
};

constexpr int64_t kMaxByteTaps = 256;

template <class T>
struct MaxPool2dForward {
  T* output;         // (batch, channels, y.out_size, x.out_size)
  uint8_t* winners;  // like output, or null
  int64_t* indices;  // like output, or null; not both of them
  const T* input;    // (batch, channels, y.size, x.size)
};

template <class T>
struct MaxPool2dBackward {
  T* grad_input;           // (batch, channels, y.size, x.size)
  const T* grad_output;    // (batch, channels, y.out_size, x.out_size)
  const uint8_t* winners;  // like grad_output; null where indices are given
  const int64_t* indices;  // like grad_output; null where winners are given
};

}  // namespace fastnn
