// linear (ops/linear.h). Forward for a small batch: dot products along in_features, which read the weight as it lies;
// for a larger one gemm. Backward: gemm, too, but for the smallest batches, whose time is that of the weight's memory,
// one walk along the rows of the weight and of its gradient.
#pragma once

#include "cpu/kernels/gemm.inl.h"
#include "cpu/kernels/relu.inl.h"
#include "cpu/kernels/sums.inl.h"

namespace fastnn::cpu {
namespace {

// 4 x 4 dot products: 16 accumulators, and 8 loads feed 16 FMAs. Three rows fit 16 registers.
constexpr int kDotRows = kVectorRegisters == 32 ? 4 : 3;
constexpr int kDotColumns = 4;

// Numbers of an input's or weight's row in one pass: the rows of a tile, some 32 KiB, stay in L1 for the next tile.
constexpr int64_t kDotBytes = 4 << 10;

// output[r][o] = act(bias[o] + input[r] . weight[o]) for rows x columns of the output, from the numbers [begin, end) of
// the rows. `sums` holds what the numbers before gave, and then these, unless they are the last.
template <class T, int rows, int columns>
void linear_dot_tile(const LinearShape& shape, const LinearForward<T>& t, int64_t row, int64_t column, int64_t begin,
                     int64_t end, Vec<T>* sums) {
  const int64_t depth = shape.in_features;
  const T* input = t.input + row * depth;
  const T* weight = t.weight + column * depth;
  Vec<T> acc[rows][columns];
  FASTNN_UNROLL
  for (int i = 0; i < rows * columns; ++i) acc[i / columns][i % columns] = begin > 0 ? sums[i] : Vec<T>{};
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
  int64_t k = begin;
  for (; k + kLanes<T> <= end; k += kLanes<T>) step(k, [](const T* p) { return load(p); });
  if (k < end) step(k, [left = end - k](const T* p) { return load_first(p, left); });
  if (end < depth) {
    FASTNN_UNROLL
    for (int i = 0; i < rows * columns; ++i) sums[i] = acc[i / columns][i % columns];
    return;
  }
  FASTNN_UNROLL
  for (int r = 0; r < rows; ++r) {
    FASTNN_UNROLL
    for (int o = 0; o < columns; ++o) {
      const T sum = horizontal_sum<T>(acc[r][o]) + (t.bias ? t.bias[column + o] : T(0));
      t.output[(row + r) * shape.out_features + column + o] = shape.relu ? relu(sum) : sum;
    }
  }
}

// For fewer than kPackRows rows.
template <class T>
void linear_forward_dot(const LinearShape& shape, const LinearForward<T>& t) {
  constexpr int64_t pass = kDotBytes / static_cast<int64_t>(sizeof(T));
  const int64_t depth = shape.in_features, passes = depth > 0 ? (depth + pass - 1) / pass : 1;
  const auto end_of = [&](int64_t i) { return i < passes ? depth * i / passes / kLanes<T> * kLanes<T> : depth; };
  const int64_t column_tiles = (shape.out_features + kDotColumns - 1) / kDotColumns;
  parallel_for(column_tiles, [&](int64_t tile) {
    const int64_t column = tile * kDotColumns;
    Vec<T> sums[(kPackRows / kDotRows + 1) * kDotRows * kDotColumns];
    for (int64_t i = 0; i < passes; ++i) {
      for (int64_t row = 0; row < shape.batch; row += kDotRows) {
        const auto run = [&](auto rows) {
          constexpr int kRows = decltype(rows)::value;
          if (column + kDotColumns <= shape.out_features)
            return linear_dot_tile<T, kRows, kDotColumns>(shape, t, row, column, end_of(i), end_of(i + 1),
                                                          sums + row * kDotColumns);
          for (int64_t o = column; o < shape.out_features; ++o)
            if (i == 0) linear_dot_tile<T, kRows, 1>(shape, t, row, o, 0, depth, sums);
        };
        switch (shape.batch - row) {
          case 1: run(Constant<1>{}); break;
          case 2: run(Constant<2>{}); break;
          case 3: run(Constant<3>{}); break;
          default: run(Constant<kDotRows>{}); break;
        }
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

// The largest batch whose gradients walk along rows.
constexpr int kStreamedBatch = 4;

// The gradients of `count` outputs from o on, of each image.
template <class T, int batch, int count>
FASTNN_INLINE void broadcast_grads(const LinearShape& s, const T* grad, int64_t o, Vec<T> (&grads)[batch][count]) {
  FASTNN_UNROLL
  for (int b = 0; b < batch; ++b) {
    FASTNN_UNROLL
    for (int i = 0; i < count; ++i) grads[b][i] = broadcast(grad[b * s.out_features + o + i]);
  }
}

// Elements [begin, end) of an axis.
struct AxisRange {
  int64_t begin, end;
};

// sums = what these rows of the weight give the columns of grad_input. They stay in the caches while the rows pass,
// several at a time.
template <class T, int batch>
void stream_part_of_grad_input(const LinearShape& s, const T* grad, const T* weight, AxisRange rows, AxisRange columns,
                               T* sums) {
  constexpr int kSteps = 8 / batch;
  const auto add_rows = [&](int64_t o, auto constant) {
    constexpr int steps = decltype(constant)::value;
    Vec<T> g[batch][steps];
    broadcast_grads(s, grad, o, g);
    for (int64_t j = columns.begin; j < columns.end; j += kLanes<T>) {
      const int64_t lanes = columns.end - j < kLanes<T> ? columns.end - j : kLanes<T>;
      Vec<T> sum[batch];
      FASTNN_UNROLL
      for (int b = 0; b < batch; ++b)
        sum[b] = o > rows.begin ? load_upto(sums + b * s.in_features + j, lanes) : Vec<T>{};
      FASTNN_UNROLL
      for (int i = 0; i < steps; ++i) {
        const Vec<T> w = load_upto(weight + (o + i) * s.in_features + j, lanes);
        FASTNN_UNROLL
        for (int b = 0; b < batch; ++b) sum[b] += g[b][i] * w;
      }
      FASTNN_UNROLL
      for (int b = 0; b < batch; ++b) store_upto(sums + b * s.in_features + j, sum[b], lanes);
    }
  };
  int64_t o = rows.begin;
  for (; o + kSteps <= rows.end; o += kSteps) add_rows(o, Constant<kSteps>{});
  for (; o < rows.end; ++o) add_rows(o, Constant<1>{});
}

// A large weight is read from front to back, by blocks of rows with sums of their own, as the prefetcher likes it. Of a
// small one each task has a part of the columns, whose sums are final.
template <class T, int batch>
void stream_grad_input(const LinearShape& s, const T* grad, const T* weight, T* grad_input) {
  constexpr int64_t kLarge = 1 << 18, kBlocks = 8;
  if (s.in_features * s.out_features < kLarge || s.out_features < kBlocks) {
    // An eighth of a row, but no runs too short for the prefetcher, nor sums that leave L1.
    const int64_t eighth = (s.in_features / 8 + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
    const int64_t columns = eighth < 256 ? 256 : eighth > 2048 ? 2048 : eighth;
    parallel_ranges(s.in_features, columns, [&](int64_t begin, int64_t end) {
      stream_part_of_grad_input<T, batch>(s, grad, weight, {0, s.out_features}, {begin, end}, grad_input);
    });
    return;
  }
  const int64_t numbers = batch * s.in_features;
  const Scratch<T> partials(kBlocks * numbers);
  parallel_for(kBlocks, [&](int64_t block) {
    const AxisRange rows{s.out_features * block / kBlocks, s.out_features * (block + 1) / kBlocks};
    stream_part_of_grad_input<T, batch>(s, grad, weight, rows, {0, s.in_features}, partials + block * numbers);
  });
  add_partials<T>(kBlocks, numbers, numbers, partials, grad_input);
}

// grad_weight for rows [begin, end): each is written once, from front to back.
template <class T, int batch>
void stream_grad_weight(const LinearShape& s, const T* grad, const T* input, T* grad_weight, int64_t begin,
                        int64_t end) {
  const auto write_rows = [&](int64_t o, auto constant) {
    constexpr int rows = decltype(constant)::value;
    Vec<T> g[batch][rows];
    broadcast_grads(s, grad, o, g);
    for (int64_t j = 0; j < s.in_features; j += kLanes<T>) {
      const int64_t lanes = s.in_features - j < kLanes<T> ? s.in_features - j : kLanes<T>;
      Vec<T> sums[rows]{};
      FASTNN_UNROLL
      for (int b = 0; b < batch; ++b) {
        const Vec<T> x = load_upto(input + b * s.in_features + j, lanes);
        FASTNN_UNROLL
        for (int r = 0; r < rows; ++r) sums[r] += g[b][r] * x;
      }
      FASTNN_UNROLL
      for (int r = 0; r < rows; ++r) store_upto(grad_weight + (o + r) * s.in_features + j, sums[r], lanes);
    }
  };
  int64_t o = begin;
  for (; o + 2 <= end; o += 2) write_rows(o, Constant<2>{});
  if (o < end) write_rows(o, Constant<1>{});
}

template <class T, int batch>
void linear_backward_streamed(const LinearShape& s, const LinearBackward<T>& t, const T* grad) {
  if (t.grad_input) stream_grad_input<T, batch>(s, grad, t.weight, t.grad_input);
  if (t.grad_weight)  // at least 8192 numbers a task
    parallel_ranges(s.out_features, 8192 / (s.in_features + 1) + 2, [&](int64_t begin, int64_t end) {
      stream_grad_weight<T, batch>(s, grad, t.input, t.grad_weight, begin, end);
    });
}

template <class T>
void linear_backward(const LinearShape& shape, const LinearBackward<T>& t) {
  const AloneIfSmall scope(shape.batch * shape.in_features * shape.out_features);
  const bool streamed = shape.batch >= 1 && shape.batch <= kStreamedBatch && shape.out_features > 0;
  trace<T>("linear_backward", streamed ? "streamed" : "gemm");
  const int64_t count = shape.batch * shape.out_features;
  const Scratch<T> masked(shape.relu ? count : 0);
  if (shape.relu) relu_mask<T>(count, t.grad_output, t.output, masked);
  const T* grad = shape.relu ? static_cast<T*>(masked) : t.grad_output;
  if (streamed) {
    with_count<kStreamedBatch>(
        shape.batch, [&](auto batch) { linear_backward_streamed<T, decltype(batch)::value>(shape, t, grad); });
  } else {
    if (t.grad_input)
      gemm<T>(shape.batch, shape.in_features, shape.out_features, {grad, shape.out_features, 1},
              {t.weight, shape.in_features, 1}, nullptr, false, t.grad_input);
    if (t.grad_weight)
      gemm<T>(shape.out_features, shape.in_features, shape.batch, {grad, 1, shape.out_features},
              {t.input, shape.in_features, 1}, nullptr, false, t.grad_weight);
  }
  if (t.grad_bias) column_sums(shape.batch, shape.out_features, grad, t.grad_bias);
}

}  // namespace
}  // namespace fastnn::cpu
