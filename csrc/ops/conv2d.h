// conv2d: z[n][y][x][o] = bias[o] + sum over ky, kx, i of
//             input[n][y * stride + ky * dilation - padding][x * stride + kx * dilation - padding][i] *
//             weight[o][ky][kx][i]
//         with input 0 outside the image; per group, i and o run over that group's channels.
//         output = act(z), act = identity or ReLU; with `pool`, the maximum of act(z) over 2x2 windows of stride 2.
//
// Activations lie in channels_last order (n, y, x, channel), densely. Weights lie either as (o, ky, kx, i), torch's
// channels_last, or as (o, i, ky, kx), its default.
//
// With `pool`, `winner` holds for each output the place of its maximum in the window, row by row, 0 to 3, and 4 where
// ReLU cut it: all that backward needs to know of z. Ties go to the first place, and NaN wins, as in torch.
#pragma once

#include <cstdint>

#include "ops/dtype.h"

namespace fastnn {

struct Conv2dShape {
  int64_t batch, in_channels, in_height, in_width;
  int64_t out_channels, out_height, out_width;  // of z
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t padding_height, padding_width;
  int64_t dilation_height, dilation_width;
  int64_t groups;
  bool relu;
  bool pool;
  bool weight_channels_last;
  Precision precision;
};

constexpr uint8_t kNoWinner = 4;

template <class T>
struct Conv2dForward {
  T* output;        // (batch, out_height, out_width, out_channels), or with pool (batch, out_height / 2, ...)
  uint8_t* winner;  // as output, with pool alone; null where no backward pass follows
  const T* input;   // (batch, in_height, in_width, in_channels)
  const T* weight;
  const T* bias;  // (out_channels), or null
};

template <class T>
struct Conv2dBackward {
  T* grad_input;          // as input, or null where not wanted
  T* grad_weight;         // as weight, or null
  T* grad_bias;           // (out_channels), or null
  const T* grad_output;   // as output
  const T* input;         // read for grad_weight alone
  const T* weight;        // read for grad_input alone
  const T* output;        // read with relu and no pool
  const uint8_t* winner;  // read with pool
};

}  // namespace fastnn
