// Elementwise loops over flat memory.
#pragma once

#include "cpu/simd/streaming.h"
#include "cpu/simd/vector.h"

namespace fastnn::cpu {
namespace {

// Four vectors are computed before the first is stored: a load that follows a store to the same place modulo 4 KiB
// waits for it, which cost a fifth of relu's time at some addresses.
constexpr int kMapVectors = 4;

// output[i] = value(i, lanes) for begin <= i < end, a vector of `lanes` elements from i at a time. To `stream`, the
// range has to begin on a line.
template <class T, class Value>
FASTNN_INLINE void store_range(T* output, int64_t begin, int64_t end, const Value& value, bool stream = false) {
  int64_t i = begin;
  const auto whole = [&](const auto& store_one) __attribute__((always_inline)) {
    for (; i + kMapVectors * kLanes<T> <= end; i += kMapVectors * kLanes<T>) {
      Vec<T> values[kMapVectors];
      FASTNN_UNROLL
      for (int v = 0; v < kMapVectors; ++v) values[v] = value(i + v * kLanes<T>, kLanes<T>);
      FASTNN_UNROLL
      for (int v = 0; v < kMapVectors; ++v) store_one(output + i + v * kLanes<T>, values[v]);
    }
  };
  if (stream)
    whole([](T* to, Vec<T> v) { store_streamed(to, v); });
  else
    whole([](T* to, Vec<T> v) { store(to, v); });
  for (; i < end; i += kLanes<T>) {
    const int64_t lanes = end - i < kLanes<T> ? end - i : kLanes<T>;
    store_upto(output + i, value(i, lanes), lanes);
  }
  if (stream) finish_streaming();
}

}  // namespace
}  // namespace fastnn::cpu
