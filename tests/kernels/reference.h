// The formulas of csrc/ops in double, one loop after the other: what kernels are compared with where there is no
// Python.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/conv2d.h"
#include "ops/linear.h"
#include "ops/max_pool2d.h"
#include "ops/softmax.h"

namespace fastnn::tests {

using Doubles = std::vector<double>;

inline double cut(double value, bool relu) { return relu && value < 0 ? 0 : value; }

inline size_t elements(std::initializer_list<int64_t> sizes) {
  int64_t count = 1;
  for (const int64_t size : sizes) count *= size;
  return static_cast<size_t>(count);
}

struct LinearReference {
  Doubles output, grad_input, grad_weight, grad_bias;

  LinearReference(const LinearShape& s, const Doubles& input, const Doubles& weight, const Doubles& bias,
                  const Doubles& grad_output)
      : output(elements({s.batch, s.out_features})),
        grad_input(input.size()),
        grad_weight(weight.size()),
        grad_bias(bias.size()) {
    for (int64_t b = 0; b < s.batch; ++b)
      for (int64_t o = 0; o < s.out_features; ++o) {
        double sum = bias[o];
        for (int64_t i = 0; i < s.in_features; ++i) sum += input[b * s.in_features + i] * weight[o * s.in_features + i];
        output[b * s.out_features + o] = cut(sum, s.relu);
        const double grad = s.relu && sum <= 0 ? 0 : grad_output[b * s.out_features + o];
        grad_bias[o] += grad;
        for (int64_t i = 0; i < s.in_features; ++i) {
          grad_input[b * s.in_features + i] += grad * weight[o * s.in_features + i];
          grad_weight[o * s.in_features + i] += grad * input[b * s.in_features + i];
        }
      }
  }
};

// Weights lie as (o, ky, kx, i).
struct Conv2dReference {
  Doubles output, winner, grad_input, grad_weight, grad_bias;

  Conv2dReference(const Conv2dShape& s, const Doubles& input, const Doubles& weight, const Doubles& bias,
                  const Doubles& grad_output)
      : grad_input(input.size()), grad_weight(weight.size()), grad_bias(bias.size()) {
    Doubles z(elements({s.batch, s.out_height, s.out_width, s.out_channels}));
    each_product(s, [&](int64_t at, int64_t from, int64_t with) { z[at] += input[from] * weight[with]; });
    for (size_t i = 0; i < z.size(); ++i) z[i] = cut(z[i] + bias[i % s.out_channels], s.relu);
    Doubles grad(z.size());
    if (s.pool) {
      pool(s, z, grad_output, grad);
    } else {
      output = z;
      for (size_t i = 0; i < z.size(); ++i) grad[i] = s.relu && z[i] <= 0 ? 0 : grad_output[i];
    }
    each_product(s, [&](int64_t at, int64_t from, int64_t with) {
      grad_input[from] += grad[at] * weight[with];
      grad_weight[with] += grad[at] * input[from];
    });
    for (size_t i = 0; i < grad.size(); ++i) grad_bias[i % s.out_channels] += grad[i];
  }

 private:
  // visit(index into z, into input, into weight) for every product of the convolution.
  template <class Visit>
  static void each_product(const Conv2dShape& s, const Visit& visit) {
    const int64_t inputs = s.in_channels / s.groups, outputs = s.out_channels / s.groups;
    for (int64_t n = 0; n < s.batch; ++n)
      for (int64_t y = 0; y < s.out_height; ++y)
        for (int64_t x = 0; x < s.out_width; ++x)
          for (int64_t o = 0; o < s.out_channels; ++o)
            for (int64_t ky = 0; ky < s.kernel_height; ++ky)
              for (int64_t kx = 0; kx < s.kernel_width; ++kx) {
                const int64_t row = y * s.stride_height + ky * s.dilation_height - s.padding_height;
                const int64_t column = x * s.stride_width + kx * s.dilation_width - s.padding_width;
                if (row < 0 || row >= s.in_height || column < 0 || column >= s.in_width) continue;
                const int64_t at = ((n * s.out_height + y) * s.out_width + x) * s.out_channels + o;
                const int64_t from = ((n * s.in_height + row) * s.in_width + column) * s.in_channels;
                const int64_t with = ((o * s.kernel_height + ky) * s.kernel_width + kx) * inputs;
                for (int64_t i = 0; i < inputs; ++i) visit(at, from + o / outputs * inputs + i, with + i);
              }
  }

  void pool(const Conv2dShape& s, const Doubles& z, const Doubles& grad_output, Doubles& grad) {
    const int64_t height = s.out_height / 2, width = s.out_width / 2;
    output.resize(elements({s.batch, height, width, s.out_channels}));
    winner.resize(output.size());
    size_t i = 0;
    for (int64_t n = 0; n < s.batch; ++n)
      for (int64_t y = 0; y < height; ++y)
        for (int64_t x = 0; x < width; ++x)
          for (int64_t o = 0; o < s.out_channels; ++o, ++i) {
            const auto place = [&](int64_t tap) {
              return ((n * s.out_height + 2 * y + tap / 2) * s.out_width + 2 * x + tap % 2) * s.out_channels + o;
            };
            int64_t best = 0;
            for (int64_t tap = 1; tap < 4; ++tap)
              if (z[place(tap)] > z[place(best)]) best = tap;
            output[i] = z[place(best)];
            winner[i] = s.relu && output[i] <= 0 ? kNoWinner : static_cast<double>(best);
            if (winner[i] != kNoWinner) grad[place(best)] = grad_output[i];
          }
  }
};

struct MaxPool2dReference {
  Doubles output, indices, grad_input;

  MaxPool2dReference(const MaxPool2dShape& s, const Doubles& input, const Doubles& grad_output)
      : grad_input(input.size()) {
    for (int64_t at = 0; at < s.batch * s.channels * s.y.out_size * s.x.out_size; ++at) {
      const auto [n, c, y, x] = place(s, at);
      double best = -INFINITY;
      int64_t index = -1;
      for (int64_t i = 0; i < s.y.kernel; ++i)
        for (int64_t j = 0; j < s.x.kernel; ++j) {
          const int64_t row = y * s.y.stride + i * s.y.dilation - s.y.padding;
          const int64_t column = x * s.x.stride + j * s.x.dilation - s.x.padding;
          if (row < 0 || row >= s.y.size || column < 0 || column >= s.x.size) continue;
          const double value = input[from(s, n, c, row, column)];
          if (index >= 0 && !(value > best)) continue;
          best = value, index = row * s.x.size + column;
        }
      output.push_back(best), indices.push_back(static_cast<double>(index));
      if (index >= 0) grad_input[from(s, n, c, index / s.x.size, index % s.x.size)] += grad_output[at];
    }
  }

 private:
  struct Place {
    int64_t n, c, y, x;
  };
  static Place place(const MaxPool2dShape& s, int64_t at) {
    const int64_t height = s.y.out_size, width = s.x.out_size;
    if (s.channels_last)
      return {at / (s.channels * width * height), at % s.channels, at / (s.channels * width) % height,
              at / s.channels % width};
    return {at / (width * height * s.channels), at / (width * height) % s.channels, at / width % height, at % width};
  }
  static int64_t from(const MaxPool2dShape& s, int64_t n, int64_t c, int64_t row, int64_t column) {
    return s.channels_last ? ((n * s.y.size + row) * s.x.size + column) * s.channels + c
                           : ((n * s.channels + c) * s.y.size + row) * s.x.size + column;
  }
};

// x - max and log(sum exp(x - max)) of every line.
struct LinesReference {
  Doubles shifted, log_sum;

  LinesReference(const SoftmaxShape& s, const Doubles& input) : shifted(input), log_sum(elements({s.outer, s.inner})) {
    for (int64_t line = 0; line < s.outer * s.inner; ++line) {
      double largest = -INFINITY, sum = 0;
      for (int64_t c = 0; c < s.classes; ++c) largest = std::max(largest, input[at(s, line, c)]);
      for (int64_t c = 0; c < s.classes; ++c) sum += std::exp(shifted[at(s, line, c)] -= largest);
      log_sum[line] = std::log(sum);
    }
  }
  static int64_t at(const SoftmaxShape& s, int64_t line, int64_t c) {
    return (line / s.inner * s.classes + c) * s.inner + line % s.inner;
  }
};

}  // namespace fastnn::tests
