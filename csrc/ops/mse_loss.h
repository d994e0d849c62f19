// mse_loss: e_i = weight_i * (input_i - target_i)^2, weight being 1 where there is none
//
//   output      = e_i (none), sum_i e_i (sum), sum_i e_i / divisor (mean)
//   divisor     = sum_i weight_i; the number of elements without weights; 1 where nothing is reduced
//   grad_input  = 2 g * weight_i * (input_i - target_i),  g = grad_output (/ divisor);  grad_target = -grad_input
//
// All arrays have their elements in the same order.
#pragma once

#include "ops/loss.h"

namespace fastnn {

struct MseLossShape {
  int64_t count;
  Reduction reduction;
};

template <class T>
struct MseLossForward {
  T* output;            // (count), or (1) where it is reduced
  Compute<T>* divisor;  // (1)
  const T* input;       // (count)
  const T* target;      // (count)
  const T* weight;      // (count), or null
};

template <class T>
struct MseLossBackward {
  T* grad_input;              // (count), or null where not wanted
  T* grad_target;             // (count), or null
  const T* grad_output;       // as output
  const Compute<T>* divisor;  // (1); read for the mean alone
  const T* input;
  const T* target;
  const T* weight;
};

}  // namespace fastnn
