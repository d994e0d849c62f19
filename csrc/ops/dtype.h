// The 16-bit floating-point formats as storage: bits without arithmetic. Kernels widen them to float to compute.
#pragma once

#include <cstdint>

namespace fastnn {

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

// What values of T are computed, and sums of them kept, in.
template <class T>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class T>
using Compute = typename ComputeOf<T>::type;

// How a float32 product may be rounded, as torch's switches say. Other dtypes are multiplied as they are.
enum class Precision {
  fp32,  // not at all
  tf32,  // factors to 10 bits of mantissa, where the device has such an instruction
  bf16,  // factors to bfloat16, in the kernels that offer it
};

}  // namespace fastnn
