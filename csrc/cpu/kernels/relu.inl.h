// relu (ops/relu.h), and its mask, which linear and conv2d undo their fused ReLU with.
#pragma once

#include "cpu/parallel.h"
#include "cpu/simd/vector.h"

namespace fastnn::cpu {
namespace {

// Elements of one task: 2 us of memory traffic, four times what an OpenMP region costs.
constexpr int64_t kReluGrain = 1 << 14;

template <class T>
void relu_forward(const ReluShape& shape, const ReluForward<T>& t) {
  trace<T>("relu_forward", "vector");
  parallel_ranges(shape.count, kReluGrain, [&](int64_t begin, int64_t end) {
    int64_t i = begin;
    for (; i + kLanes<T> <= end; i += kLanes<T>) store(t.output + i, relu(load(t.input + i)));
    if (i < end) store_first(t.output + i, relu(load_first(t.input + i, end - i)), end - i);
  });
}

// masked[i] = grad_output[i] where ReLU let output[i] pass (NaN passes, as in torch), else 0
template <class T>
void relu_mask(int64_t count, const T* grad_output, const T* output, T* masked) {
  parallel_ranges(count, kReluGrain, [&](int64_t begin, int64_t end) {
    const auto mask = [](Vec<T> grad, Vec<T> y) { return y <= Vec<T>{} ? Vec<T>{} : grad; };
    int64_t i = begin;
    for (; i + kLanes<T> <= end; i += kLanes<T>) store(masked + i, mask(load(grad_output + i), load(output + i)));
    if (i < end) {
      const int64_t left = end - i;
      store_first(masked + i, mask(load_first(grad_output + i, left), load_first(output + i, left)), left);
    }
  });
}

template <class T>
void relu_backward(const ReluShape& shape, const ReluBackward<T>& t) {
  trace<T>("relu_backward", "vector");
  relu_mask(shape.count, t.grad_output, t.output, t.grad_input);
}

}  // namespace
}  // namespace fastnn::cpu
