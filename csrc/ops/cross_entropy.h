// cross_entropy over the classes of a dense (outer, classes, inner) array; a sample s is one line x along the classes:
//
//   loss_s   = -sum_c q_c * log_softmax(x)_c
//   q_c      = weight_c * ((1 - label_smoothing) * t_c + label_smoothing / classes)    target: probabilities t_c
//   q_c      = (1 - label_smoothing) * weight_t * [c == t] + label_smoothing / classes * weight_c   target: class t
//   output   = loss_s (none), sum_s loss_s (sum), sum_s loss_s / divisor (mean)
//   divisor  = sum_s weight_t over the samples that count, or the number of samples where targets are probabilities
//
//   grad_input_c  = g * (softmax(x)_c * sum_c q_c - q_c),  g = grad_output (/ divisor)
//   grad_target_c = -g * (1 - label_smoothing) * weight_c * log_softmax(x)_c
//
// Forward keeps of each sample what makes its softmax again: the largest x, the inverse of sum_c exp(x_c - largest),
// and the mass sum_c q_c.
#pragma once

#include "ops/loss.h"
#include "ops/softmax.h"

namespace fastnn {

struct CrossEntropyShape {
  SoftmaxShape lines;
  Reduction reduction;
  double label_smoothing;
  int64_t samples() const { return lines.outer * lines.inner; }
};

template <class T>
struct CrossEntropyStatistics {
  Compute<T>* largest;      // (samples); null where nothing is kept
  Compute<T>* inverse_sum;  // (samples)
  Compute<T>* mass;         // (samples) for probabilities, else null
  Compute<T>* divisor;      // (1)
};

template <class T>
struct CrossEntropyForward {
  T* output;  // (samples), or (1) where it is reduced
  CrossEntropyStatistics<T> statistics;
  const T* input;          // (outer, classes, inner)
  ClassTarget<T> classes;  // target is null where probabilities are given
  const T* probabilities;  // (outer, classes, inner), or null
};

template <class T>
struct CrossEntropyBackward {
  T* grad_input;         // (outer, classes, inner), or null where not wanted
  T* grad_target;        // (outer, classes, inner), or null; of probabilities
  const T* grad_output;  // as output
  CrossEntropyStatistics<T> statistics;
  const T* input;
  ClassTarget<T> classes;
  const T* probabilities;
};

}  // namespace fastnn
