// softmax and log_softmax along the middle dimension of a dense (outer, classes, inner) array, for a line x:
//
//   softmax:      y_i = exp(x_i - max x) / sum_j exp(x_j - max x)
//   log_softmax:  y_i = (x_i - max x) - log(sum_j exp(x_j - max x))
//
//   softmax:      grad_input_i = y_i * (grad_i - sum_j grad_j y_j)
//   log_softmax:  grad_input_i = grad_i - exp(y_i) * sum_j grad_j
#pragma once

#include <cstdint>

namespace fastnn {

struct SoftmaxShape {
  int64_t outer, classes, inner;
};

template <class T>
struct SoftmaxForward {
  T* output;  // (outer, classes, inner), as all here
  const T* input;
};

template <class T>
struct SoftmaxBackward {
  T* grad_input;
  const T* grad_output;
  const T* output;
};

}  // namespace fastnn
