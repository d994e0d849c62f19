// nll_loss (ops/nll_loss.h): one number read, or written, per sample.
#pragma once

#include "cpu/kernels/loss.inl.h"

namespace fastnn::cpu {
namespace {

// Samples of one task: each a cache miss or two, 10 us together.
constexpr int64_t kSampleGrain = 1 << 11;
// Elements cleared by one task.
constexpr int64_t kClearGrain = 1 << 15;

// Where class c of sample s lies.
FASTNN_INLINE int64_t sample_offset(const SoftmaxShape& lines, int64_t s, int64_t c) {
  if (lines.inner == 1) return s * lines.classes + c;
  return (s / lines.inner * lines.classes + c) * lines.inner + s % lines.inner;
}

// Returns the first sample whose target is no class, or -1.
template <class T>
int64_t nll_loss_forward(const NllLossShape& shape, const NllLossForward<T>& t) {
  trace<T>("nll_loss_forward", "indices");
  const LossSum total = sum_over_ranges(shape.samples(), kSampleGrain, [&](int64_t begin, int64_t end, LossSum& sum) {
    for (int64_t s = begin; s < end; ++s) {
      const WeightedClass<T> target = class_of(t.classes, shape.lines.classes, s);
      T loss = 0;
      if (target.index >= 0)
        loss = -target.weight * t.input[sample_offset(shape.lines, s, target.index)];
      else
        note_outside(t.classes, s, sum);
      sum.loss += loss;
      sum.weight += target.weight;
      if (shape.reduction == Reduction::none) t.output[s] = loss;
    }
  });
  store_reduced(shape.reduction, total, t.output, t.divisor);
  return total.outside;
}

template <class T>
void nll_loss_backward(const NllLossShape& shape, const NllLossBackward<T>& t) {
  trace<T>("nll_loss_backward", "indices");
  parallel_ranges(shape.samples() * shape.lines.classes, kClearGrain, [&](int64_t begin, int64_t end) {
    __builtin_memset(t.grad_input + begin, 0, static_cast<size_t>(end - begin) * sizeof(T));
  });
  parallel_ranges(shape.samples(), kSampleGrain, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const WeightedClass<T> target = class_of(t.classes, shape.lines.classes, s);
      if (target.index < 0) continue;
      const T grad = sample_gradient(shape.reduction, t.grad_output, t.divisor, s);
      t.grad_input[sample_offset(shape.lines, s, target.index)] = -grad * target.weight;
    }
  });
}

}  // namespace
}  // namespace fastnn::cpu
