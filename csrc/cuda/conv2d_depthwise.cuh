// Depthwise convolutions: one input and one output channel a group, so that nothing is shared between channels and a
// matrix product would be one column wide. A thread for each value of the result, neighbours on neighbouring channels.
#pragma once

#include "cuda/conv2d.cuh"

namespace fastnn::cuda {

inline bool is_depthwise(const Conv2dShape& s) {
  return s.groups > 1 && s.groups == s.in_channels && s.groups == s.out_channels && !s.pool;
}

template <class T>
void depthwise_forward(const StageNames& names, const Queue& queue, const Conv2dShape& s, const Conv2dForward<T>& b);
template <class T>
void depthwise_backward(const StageNames& names, const Queue& queue, const Conv2dShape& s, const Conv2dBackward<T>& b,
                        const T* gradient_of_z);

}  // namespace fastnn::cuda
