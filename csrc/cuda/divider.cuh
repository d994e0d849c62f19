// Division by a number that the host knows, as a multiplication: 3 instructions where a division takes 20. And division
// of 64 bits, which takes a hundred.
//
// Granlund and Montgomery, Division by Invariant Integers using Multiplication (1994), figure 4.1, for n < 2^31: then
// the sum below does not overflow.
#pragma once

#include <cstdint>

#include "cuda/primitives.cuh"

namespace fastnn::cuda {

class Divider {
 public:
  Divider() = default;
  // 1 <= divisor < 2^31
  explicit Divider(int64_t divisor) : divisor_(static_cast<uint32_t>(divisor)) {
    while ((uint64_t{1} << shift_) < divisor_) ++shift_;
    multiplier_ = static_cast<uint32_t>((((uint64_t{1} << shift_) - divisor_) << 32) / divisor_ + 1);
  }

  __device__ __forceinline__ uint32_t divide(uint32_t n) const {
    return (static_cast<uint32_t>(uint64_t{n} * multiplier_ >> 32) + n) >> shift_;
  }
  // n / divisor; n becomes n % divisor.
  __device__ __forceinline__ uint32_t split(uint32_t& n) const {
    const uint32_t quotient = divide(n);
    n -= quotient * divisor_;
    return quotient;
  }

 private:
  uint32_t divisor_ = 1, multiplier_ = 1;
  int shift_ = 0;
};

// a / b, in 32 bits where they do: a quarter of the instructions.
__device__ __forceinline__ int64_t divide64(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

}  // namespace fastnn::cuda
