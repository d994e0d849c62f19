// linear (ops/linear.h). Forward for a small batch: dot products along in_features, which read the weight as it
// lies; for a larger one, and for both gradients, gemm.
#pragma once

#include "cpu/kernels/gemm.inl.h"
#include "cpu/kernels/relu.inl.h"

namespace fastnn::cpu {
namespace {

// 4 x 4 dot products: 16 accumulators, and 8 loads feed 16 FMAs. Three rows fit 16 registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kDotRows = 4;
#else
constexpr int kDotRows = 3;
#endif
constexpr int kDotColumns = 4;

// output[r][o] = act(bias[o] + input[r] . weight[o]) for rows x columns of the output
template <class T, int rows, int columns>
void linear_dot_tile(const LinearShape& shape, const LinearForward<T>& t, int64_t row, int64_t column) {
  const int64_t depth = shape.in_features;
  const T* input = t.input + row * depth;
  const T* weight = t.weight + column * depth;
  Vec<T> acc[rows][columns]{};
  const auto step = [&](int64_t k, auto load_vector) {
    Vec<T> x[rows];
    FASTNN_UNROLL
    for (int r = 0; r < rows; ++r) x[r] = load_vector(input + r * depth + k);
    FASTNN_UNROLL
    for (int o = 0; o < columns; ++o) {
      const Vec<T> w = load_vector(weight + o * depth + k);
      FASTNN_UNROLL
      for (int r = 0; r < rows; ++r) acc[r][o] += x[r] * w;
    }
  };
  int64_t k = 0;
  for (; k + kLanes<T> <= depth; k += kLanes<T>) step(k, [](const T* p) { return load(p); });
  if (k < depth) step(k, [left = depth - k](const T* p) { return load_first(p, left); });
  FASTNN_UNROLL
  for (int r = 0; r < rows; ++r) {
    FASTNN_UNROLL
    for (int o = 0; o < columns; ++o) {
      const T sum = horizontal_sum<T>(acc[r][o]) + (t.bias ? t.bias[column + o] : T(0));
      t.output[(row + r) * shape.out_features + column + o] = shape.relu ? relu(sum) : sum;
    }
  }
}

template <class T>
void linear_forward_dot(const LinearShape& shape, const LinearForward<T>& t) {
  const int64_t column_tiles = (shape.out_features + kDotColumns - 1) / kDotColumns;
  parallel_for(column_tiles, [&](int64_t tile) {
    const int64_t begin = tile * kDotColumns;
    for (int64_t row = 0; row < shape.batch; row += kDotRows) {
      const auto run = [&](auto rows) {
        constexpr int kRows = decltype(rows)::value;
        if (begin + kDotColumns <= shape.out_features) {
          linear_dot_tile<T, kRows, kDotColumns>(shape, t, row, begin);
        } else {
          for (int64_t o = begin; o < shape.out_features; ++o) linear_dot_tile<T, kRows, 1>(shape, t, row, o);
        }
      };
      switch (shape.batch - row) {
        case 1: run(Constant<1>{}); break;
        case 2: run(Constant<2>{}); break;
        case 3: run(Constant<3>{}); break;
        default: run(Constant<kDotRows>{}); break;
      }
    }
  });
}

template <class T>
void linear_forward(const LinearShape& shape, const LinearForward<T>& t) {
  const AloneIfSmall scope(shape.batch * shape.in_features * shape.out_features);
  if (shape.batch < kPackRows) {
    trace<T>("linear_forward", "dot");
    linear_forward_dot(shape, t);
  } else {
    trace<T>("linear_forward", "gemm");
    gemm<T>(shape.batch, shape.out_features, shape.in_features, {t.input, shape.in_features, 1},
            {t.weight, 1, shape.in_features}, t.bias, shape.relu, t.output);
  }
}

// sums[column] = sum over rows of matrix[row * row_stride + column], in row order
template <class T>
void column_sums(int64_t rows, int64_t columns, const T* matrix, int64_t row_stride, T* sums) {
  const int64_t vectors = (columns + kLanes<T> - 1) / kLanes<T>;
  parallel_for(vectors, [&](int64_t i) {
    const int64_t column = i * kLanes<T>;
    const int64_t left = columns - column < kLanes<T> ? columns - column : kLanes<T>;
    Vec<T> sum{};
    for (int64_t row = 0; row < rows; ++row) sum += load_upto(matrix + row * row_stride + column, left);
    store_upto(sums + column, sum, left);
  });
}

template <class T>
void linear_backward(const LinearShape& shape, const LinearBackward<T>& t) {
  const AloneIfSmall scope(shape.batch * shape.in_features * shape.out_features);
  trace<T>("linear_backward", "gemm");
  const int64_t count = shape.batch * shape.out_features;
  const Scratch<T> masked(shape.relu ? count : 0);
  if (shape.relu) relu_mask<T>(count, t.grad_output, t.output, masked);
  const T* grad = shape.relu ? static_cast<T*>(masked) : t.grad_output;
  if (t.grad_input)
    gemm<T>(shape.batch, shape.in_features, shape.out_features, {grad, shape.out_features, 1},
            {t.weight, shape.in_features, 1}, nullptr, false, t.grad_input);
  if (t.grad_weight)
    gemm<T>(shape.out_features, shape.in_features, shape.batch, {grad, 1, shape.out_features},
            {t.input, shape.in_features, 1}, nullptr, false, t.grad_weight);
  if (t.grad_bias) column_sums(shape.batch, shape.out_features, grad, shape.out_features, t.grad_bias);
}

}  // namespace
}  // namespace fastnn::cpu
