// What the bindings of the losses share: reductions, inputs with a class dimension, and class targets.
#pragma once

#include "bindings/tensor.h"
#include "ops/loss.h"
#include "ops/softmax.h"

namespace fastnn {

Reduction reduction_of(int number);

// (classes) or (batch, classes, ...) as lines along the classes.
SoftmaxShape class_lines(const char* name, const Tensor& input);

// target holds int64 class numbers: the shape of input without its class dimension.
void check_class_target(const Tensor& target, const char* input_name, const Tensor& input);
void check_class_weight(const std::optional<Tensor>& weight, const char* input_name, const Tensor& input,
                        int64_t classes);

// The loss or its gradient: a scalar where it is reduced, else one number per sample.
void check_loss(const char* name, const Tensor& loss, Reduction reduction, const char* input_name, const Tensor& input,
                int64_t samples);

// The divisor of a mean: one number of the dtype that sums of input are kept in.
void check_divisor(const Tensor& divisor, const char* input_name, const Tensor& input);
// Of that dtype, and on input's device.
void check_sums(const char* name, const Tensor& sums, const char* input_name, const Tensor& input);

// Throws IndexError where `sample` >= 0, as torch does. Needs no GIL.
void check_targets_inside(int64_t sample, const int64_t* targets);

}  // namespace fastnn
