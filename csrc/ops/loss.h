// What the losses share: the reductions, and targets that are class numbers.
#pragma once

#include <cstdint>

#include "ops/dtype.h"

namespace fastnn {

enum class Reduction : int { none = 0, mean = 1, sum = 2 };  // torch's numbers

// target[s] is the class of sample s; samples of ignore_index have no part in the loss.
template <class T>
struct ClassTarget {
  const int64_t* target;  // (samples)
  const T* weight;        // (classes), or null for ones
  int64_t ignore_index;
};

}  // namespace fastnn
