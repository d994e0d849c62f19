// nll_loss over the classes of a dense (outer, classes, inner) array x:
//
//   loss_s       = -weight_t * x[s][t],  t = target[s]; 0 for ignored samples
//   output       = loss_s (none), sum_s loss_s (sum), sum_s loss_s / divisor (mean)
//   divisor      = sum_s weight_t over the samples that count
//   grad_input   = -g * weight_t at [s][t], else 0,  g = grad_output (/ divisor)
#pragma once

#include "ops/loss.h"
#include "ops/softmax.h"

namespace fastnn {

struct NllLossShape {
  SoftmaxShape lines;
  Reduction reduction;
  int64_t samples() const { return lines.outer * lines.inner; }
};

template <class T>
struct NllLossForward {
  T* output;            // (samples), or (1) where it is reduced
  Compute<T>* divisor;  // (1)
  const T* input;       // (outer, classes, inner)
  ClassTarget<T> classes;
};

template <class T>
struct NllLossBackward {
  T* grad_input;              // (outer, classes, inner)
  const T* grad_output;       // as output
  const Compute<T>* divisor;  // (1); read for the mean alone
  ClassTarget<T> classes;
};

}  // namespace fastnn
