// Multi-tensor Adam, AdamW and SGD (ops/optimizer.h).
//
// All tensors count as one long array, cut into tasks of equal size: five hundred biases and one large matrix spread
// over threads alike. Each element is read and written once, so large updates run at the speed of memory.
#pragma once

#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd/vector.h"
#include "ops/optimizer.h"

namespace fastnn::cpu {
namespace {

// 2048 elements of four arrays are 32 KiB: some tenths of a microsecond, so that a small network's parameters are
// shared about equally.
constexpr int64_t kOptimizerGrain = 2048;

// Parameters are lines that other cores have read since: to become this core's, they are asked for so far ahead.
constexpr int64_t kParamBytesAhead = 1 << 10;

// body(tensor, begin, end) for every run of elements that lies in one tensor and one task. Bodies take the tensor's
// pointers by value: behind a reference, every store might change them.
template <class Tensor, class Body>
FASTNN_INLINE void for_each_run(const TensorList<Tensor>& list, const Body& body) {
  const int64_t total = list.count ? list.ends[list.count - 1] : 0;
  parallel_ranges(total, kOptimizerGrain, [&](int64_t begin, int64_t end) {
    int64_t low = 0, high = list.count - 1;  // the first tensor that ends after `begin`
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (list.ends[middle] > begin)
        high = middle;
      else
        low = middle + 1;
    }
    for (int64_t i = low; begin < end; ++i) {
      const int64_t start = i ? list.ends[i - 1] : 0;
      const int64_t stop = list.ends[i] < end ? list.ends[i] : end;
      if (begin < stop) body(list.tensors[i], begin - start, stop - start);
      begin = stop;
    }
  });
}

// update(count, offset) over [begin, end): whole vectors, then the rest.
template <class T, class Update>
FASTNN_INLINE void for_each_vector(int64_t begin, int64_t end, const Update& update) {
  for (; begin + kLanes<T> <= end; begin += kLanes<T>) update(kLanes<T>, begin);
  if (begin < end) update(end - begin, begin);
}

inline Scalar read(const Scalar& scalar) { return {scalar.place ? *scalar.place : scalar.value}; }

// What depends on a tensor's step number: the step size, and the factor of the root of exp_avg_sq.
struct AdamScales {
  double step, step_size, root_scale;
};

template <class T, bool amsgrad>
void adam_run(const AdamOptions& o, const AdamScales& scales, AdamTensor<T> t, int64_t begin, int64_t end) {
  const T sign = o.maximize ? T(-1) : T(1);
  const T coupled = static_cast<T>(o.decoupled ? 0 : o.weight_decay);
  const T keep = static_cast<T>(o.decoupled ? 1 - o.lr.value * o.weight_decay : 1);
  const T beta1 = static_cast<T>(o.beta1.value), one_minus_beta1 = static_cast<T>(1 - o.beta1.value);
  // m + w (g - m) loses m's share where w is large, g - (1 - w)(g - m) where it is small: torch.lerp's choice.
  const bool small_weight = one_minus_beta1 < T(0.5);
  const T beta2 = static_cast<T>(o.beta2.value), one_minus_beta2 = static_cast<T>(1 - o.beta2.value);
  const T step_size = static_cast<T>(scales.step_size), root_scale = static_cast<T>(scales.root_scale);
  const T eps = static_cast<T>(o.eps);
  constexpr int64_t ahead = kParamBytesAhead / static_cast<int64_t>(sizeof(T));
  for_each_vector<T>(begin, end, [&](int64_t n, int64_t i) {
    __builtin_prefetch(t.param + i + ahead, 1);
    Vec<T> p = load_upto(t.param + i, n) * keep;
    Vec<T> g = load_upto(t.grad + i, n) * sign;
    if (coupled != 0) g += coupled * p;  // not without decay: 0 * inf is NaN
    Vec<T> m = load_upto(t.exp_avg + i, n);
    m = small_weight ? m + (g - m) * one_minus_beta1 : g - (g - m) * beta1;
    Vec<T> v = load_upto(t.exp_avg_sq + i, n) * beta2 + one_minus_beta2 * g * g;
    store_upto(t.exp_avg + i, m, n);
    store_upto(t.exp_avg_sq + i, v, n);
    if constexpr (amsgrad) {
      const Vec<T> largest = load_upto(t.max_exp_avg_sq + i, n);
      v = ((v > largest) | (v != v)) ? v : largest;
      store_upto(t.max_exp_avg_sq + i, v, n);
    }
    p -= step_size * (m / (square_root(v) * root_scale + eps));
    store_upto(t.param + i, p, n);
  });
}

template <class T>
void adam_step(const AdamOptions& as_given, const TensorList<AdamTensor<T>>& list) {
  AdamOptions o = as_given;
  o.lr = read(o.lr), o.beta1 = read(o.beta1), o.beta2 = read(o.beta2);
  trace<T>("adam_step", o.decoupled ? "adamw" : "adam");
  const Scratch<AdamScales> scales(list.count);  // of each tensor; most have the step number of the one before
  for (int64_t i = 0; i < list.count; ++i) {
    const AdamTensor<T>& tensor = list.tensors[i];
    const double step = tensor.step ? ++*tensor.step : ++*tensor.double_step;
    scales[i] = i > 0 && step == scales[i - 1].step
                    ? scales[i - 1]
                    : AdamScales{step, o.lr.value / (1 - __builtin_pow(o.beta1.value, step)),
                                 1 / __builtin_sqrt(1 - __builtin_pow(o.beta2.value, step))};
  }
  for_each_run(list, [&](const AdamTensor<T>& t, int64_t begin, int64_t end) {
    const AdamScales& of_tensor = scales[&t - list.tensors];
    if (o.amsgrad)
      adam_run<T, true>(o, of_tensor, t, begin, end);
    else
      adam_run<T, false>(o, of_tensor, t, begin, end);
  });
}

template <class T>
void sgd_step(const SgdOptions& o, const TensorList<SgdTensor<T>>& list) {
  trace<T>("sgd_step", o.has_momentum() ? "momentum" : "plain");
  const T sign = o.maximize ? T(-1) : T(1);
  const T decay = static_cast<T>(o.weight_decay), lr = static_cast<T>(read(o.lr).value);
  const T momentum = static_cast<T>(read(o.momentum).value), fresh = static_cast<T>(1 - o.dampening);
  for_each_run(list, [&](SgdTensor<T> t, int64_t begin, int64_t end) {
    for_each_vector<T>(begin, end, [&](int64_t n, int64_t i) {
      const Vec<T> p = load_upto(t.param + i, n);
      Vec<T> g = load_upto(t.grad + i, n) * sign;
      if (decay != 0) g += decay * p;  // not without decay: 0 * inf is NaN
      if (t.momentum_buffer) {
        const Vec<T> b = t.first ? g : load_upto(t.momentum_buffer + i, n) * momentum + g * fresh;
        store_upto(t.momentum_buffer + i, b, n);
        g = o.nesterov ? g + momentum * b : b;
      }
      store_upto(t.param + i, p - lr * g, n);
    });
  });
}

}  // namespace
}  // namespace fastnn::cpu
