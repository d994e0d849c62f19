// linear: output[b][o] = act(bias[o] + sum_i input[b][i] * weight[o][i]),  act = identity or ReLU
//
//   grad[b][o]        = grad_output[b][o], zero where ReLU cut the output
//   grad_input[b][i]  = sum_o grad[b][o] * weight[o][i]
//   grad_weight[o][i] = sum_b grad[b][o] * input[b][i]
//   grad_bias[o]      = sum_b grad[b][o]
//
// All arrays are row-major and dense.
#pragma once

#include <cstdint>

#include "ops/dtype.h"

namespace fastnn {

struct LinearShape {
  int64_t batch, in_features, out_features;
  bool relu;
  Precision precision;
};

template <class T>
struct LinearForward {
  T* output;        // (batch, out_features)
  const T* input;   // (batch, in_features)
  const T* weight;  // (out_features, in_features)
  const T* bias;    // (out_features), or null
};

template <class T>
struct LinearBackward {
  T* grad_input;         // (batch, in_features), or null where not wanted
  T* grad_weight;        // (out_features, in_features), or null
  T* grad_bias;          // (out_features), or null
  const T* grad_output;  // (batch, out_features)
  const T* input;        // (batch, in_features); read for grad_weight alone
  const T* weight;       // (out_features, in_features); read for grad_input alone
  const T* output;       // (batch, out_features); read with relu alone
};

}  // namespace fastnn
