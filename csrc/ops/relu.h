// relu: output_i = max(input_i, 0), NaN staying NaN;  grad_input_i = grad_output_i where output_i > 0, else 0
//
// All arrays have their elements in the same order. output may be input.
#pragma once

#include <cstdint>

namespace fastnn {

struct ReluShape {
  int64_t count;
};

template <class T>
struct ReluForward {
  T* output;
  const T* input;
};

template <class T>
struct ReluBackward {
  T* grad_input;
  const T* grad_output;
  const T* output;
};

}  // namespace fastnn
