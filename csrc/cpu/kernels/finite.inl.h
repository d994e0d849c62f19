// Whether numbers are all finite: what decides if a kernel may leave out products with zero.
#pragma once

#include "cpu/parallel.h"
#include "cpu/simd/vector.h"

namespace fastnn::cpu {
namespace {

// Elements of one task: 64 KiB of float32, some 2 us from L2, about what an OpenMP region costs.
constexpr int64_t kFiniteGrain = 1 << 14;

// A finite number times 0 is 0; an infinity or NaN gives NaN, which no addition removes.
template <class T>
bool run_is_finite(int64_t count, const T* data) {
  constexpr int kSums = 4;  // additions take 4 cycles
  const Vec<T> zero{};
  Vec<T> sums[kSums]{};
  int64_t i = 0;
  for (; i + kSums * kLanes<T> <= count; i += kSums * kLanes<T>) {
    FASTNN_UNROLL
    for (int v = 0; v < kSums; ++v) sums[v] += load(data + i + v * kLanes<T>) * zero;
  }
  for (; i < count; i += kLanes<T>)
    sums[0] += load_upto(data + i, count - i < kLanes<T> ? count - i : kLanes<T>) * zero;
  const T sum = horizontal_sum<T>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  return sum == sum;
}

template <class T>
bool all_finite(int64_t count, const T* data) {
  const AloneIfSmall scope(count);
  bool finite = true;
  parallel_ranges(count, kFiniteGrain, [&](int64_t begin, int64_t end) {
    if (!run_is_finite(end - begin, data + begin)) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
  });
  return finite;
}

}  // namespace
}  // namespace fastnn::cpu
