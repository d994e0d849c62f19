// Optimizer updates of many tensors in one pass, with torch.optim's formulas. Every tensor of an entry is dense and has
// the parameter's element order.
//
//   adam:  g = -grad with maximize; decoupled: p *= 1 - lr * weight_decay, else g += weight_decay * p
//          m = beta1 * m + (1 - beta1) * g;  v = beta2 * v + (1 - beta2) * g * g;  with amsgrad v_max = max(v_max, v)
//          p -= lr / (1 - beta1^step) * m / (sqrt(v or v_max) / sqrt(1 - beta2^step) + eps)
//   sgd:   g as above with coupled decay; with momentum b = g on the first step, then b = momentum * b + (1 -
//   dampening) * g
//          p -= lr * (g + momentum * b with nesterov, else b; g without momentum)
#pragma once

#include <cstdint>

namespace fastnn {

// An option that schedules change.
struct Scalar {
  double value;
  const double* place = nullptr;  // read instead where it is given, when the kernel runs
};

struct AdamOptions {
  Scalar lr, beta1, beta2;
  double eps, weight_decay;
  bool decoupled, amsgrad, maximize;
};

template <class T>
struct AdamTensor {
  T* param;
  const T* grad;
  T* exp_avg;
  T* exp_avg_sq;
  T* max_exp_avg_sq;  // with amsgrad
  // The number of updates before this one, to which the kernel adds 1. One of them; float on CUDA.
  float* step;
  double* double_step;
};

struct SgdOptions {
  Scalar lr, momentum;
  double dampening, weight_decay;
  bool nesterov, maximize;
  bool has_momentum() const { return momentum.place || momentum.value != 0; }
};

template <class T>
struct SgdTensor {
  T* param;
  const T* grad;
  T* momentum_buffer;  // with momentum
  bool first;          // the buffer holds nothing yet
};

// Tensors laid end to end: ends[i] is the element count up to and including tensor i.
template <class Tensor>
struct TensorList {
  int64_t count;
  const Tensor* tensors;
  const int64_t* ends;
};

}  // namespace fastnn
