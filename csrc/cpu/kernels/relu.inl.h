// relu (ops/relu.h), and its mask, which linear and conv2d undo their fused ReLU with.
#pragma once

#include "cpu/parallel.h"
#include "cpu/simd/map.h"

namespace fastnn::cpu {
namespace {

// Elements of one task: 2 us of memory traffic, four times what an OpenMP region costs.
constexpr int64_t kReluGrain = 1 << 14;

template <class T>
void relu_forward(const ReluShape& shape, const ReluForward<T>& t) {
  trace<T>("relu_forward", "vector");
  const bool stream = t.output != t.input && worth_streaming(t.output, shape.count);
  parallel_ranges(shape.count, kReluGrain, [&](int64_t begin, int64_t end) {
    const auto rectified = [&](int64_t i, int64_t lanes) { return relu(load_upto(t.input + i, lanes)); };
    store_range(t.output, begin, end, rectified, stream);
  });
}

// masked[i] = grad_output[i] where ReLU let output[i] pass (NaN passes, as in torch), else 0
template <class T>
void relu_mask(int64_t count, const T* grad_output, const T* output, T* masked, bool stream = false) {
  parallel_ranges(count, kReluGrain, [&](int64_t begin, int64_t end) {
    const auto mask = [&](int64_t i, int64_t lanes) {
      return load_upto(output + i, lanes) <= Vec<T>{} ? Vec<T>{} : load_upto(grad_output + i, lanes);
    };
    store_range(masked, begin, end, mask, stream);
  });
}

template <class T>
void relu_backward(const ReluShape& shape, const ReluBackward<T>& t) {
  trace<T>("relu_backward", "vector");
  relu_mask(shape.count, t.grad_output, t.output, t.grad_input, worth_streaming(t.grad_input, shape.count));
}

}  // namespace
}  // namespace fastnn::cpu
