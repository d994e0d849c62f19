// mse_loss (ops/mse_loss.h): one pass over the elements.
#pragma once

#include "cpu/kernels/loss.inl.h"
#include "cpu/simd/map.h"

namespace fastnn::cpu {
namespace {

// Elements of one task, and of one partial sum.
constexpr int64_t kMseGrain = 1 << 14;
// Sums side by side, so that additions do not wait for each other.
constexpr int kMseSums = 4;

// weight * (input - target)^2 of the elements from i on.
template <class T>
FASTNN_INLINE Vec<T> squared_error(const MseLossForward<T>& t, int64_t i, int64_t lanes) {
  const Vec<T> difference = load_upto(t.input + i, lanes) - load_upto(t.target + i, lanes);
  const Vec<T> square = difference * difference;
  return t.weight ? square * load_upto(t.weight + i, lanes) : square;
}

// The sum of value(i, lanes) over [begin, end).
template <class T, class Value>
FASTNN_INLINE double sum_range(int64_t begin, int64_t end, const Value& value) {
  Vec<T> sums[kMseSums]{};
  int64_t i = begin;
  for (; i + kMseSums * kLanes<T> <= end; i += kMseSums * kLanes<T>) {
    FASTNN_UNROLL
    for (int v = 0; v < kMseSums; ++v) sums[v] += value(i + v * kLanes<T>, kLanes<T>);
  }
  for (; i < end; i += kLanes<T>) sums[0] += value(i, end - i < kLanes<T> ? end - i : kLanes<T>);
  FASTNN_UNROLL
  for (int v = 1; v < kMseSums; ++v) sums[0] += sums[v];
  return horizontal_sum<T>(sums[0]);
}

template <class T>
void mse_loss_forward(const MseLossShape& shape, const MseLossForward<T>& t) {
  trace<T>("mse_loss_forward", t.weight ? "weighted" : "plain");
  if (shape.reduction == Reduction::none) {
    *t.divisor = 1;
    parallel_ranges(shape.count, kMseGrain, [&](int64_t begin, int64_t end) {
      store_range(t.output, begin, end, [&](int64_t i, int64_t lanes) { return squared_error(t, i, lanes); });
    });
    return;
  }
  LossSum total = sum_over_ranges(shape.count, kMseGrain, [&](int64_t begin, int64_t end, LossSum& sum) {
    sum.loss = sum_range<T>(begin, end, [&](int64_t i, int64_t lanes) { return squared_error(t, i, lanes); });
    if (t.weight)
      sum.weight = sum_range<T>(begin, end, [&](int64_t i, int64_t lanes) { return load_upto(t.weight + i, lanes); });
  });
  if (!t.weight) total.weight = static_cast<double>(shape.count);
  store_reduced(shape.reduction, total, t.output, t.divisor);
}

template <class T>
void mse_loss_backward(const MseLossShape& shape, const MseLossBackward<T>& t) {
  trace<T>("mse_loss_backward", t.weight ? "weighted" : "plain");
  const bool elementwise = shape.reduction == Reduction::none;
  const Vec<T> shared =
      broadcast(elementwise ? T(2) : T(2) * sample_gradient(shape.reduction, t.grad_output, t.divisor, 0));
  parallel_ranges(shape.count, kMseGrain, [&](int64_t begin, int64_t end) {
    const auto gradient = [&](int64_t i, int64_t lanes) {
      Vec<T> grad = shared * (load_upto(t.input + i, lanes) - load_upto(t.target + i, lanes));
      if (elementwise) grad *= load_upto(t.grad_output + i, lanes);
      return t.weight ? grad * load_upto(t.weight + i, lanes) : grad;
    };
    if (t.grad_input) store_range(t.grad_input, begin, end, gradient);
    if (t.grad_target)
      store_range(t.grad_target, begin, end, [&](int64_t i, int64_t lanes) {
        return -(t.grad_input ? load_upto(t.grad_input + i, lanes) : gradient(i, lanes));
      });
  });
}

}  // namespace
}  // namespace fastnn::cpu
