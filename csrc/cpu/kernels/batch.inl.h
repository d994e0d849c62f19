// Batch kernels (ops/batch.h): small passes over memory.
#pragma once

#include "cpu/parallel.h"
#include "cpu/simd/transpose.h"
#include "ops/batch.h"

namespace fastnn::cpu {
namespace {

// Elements of a task: about a microsecond.
constexpr int64_t kBatchGrain = 1 << 12;

template <class T>
void transpose_batch(const TransposeShape& s, const TransposeBuffers<T>& t) {
  trace<T>("transpose", "transpose");
  const int64_t elements = s.rows * s.columns;
  if (elements == 0) return;
  const int64_t grain = kBatchGrain / elements + 1;
  parallel_ranges(s.batch, grain, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      transpose_matrix(t.input + b * elements, s.columns, s.rows, s.columns, t.output + b * elements, s.rows);
  });
}

template <class T, class Source>
void gather_images_from(const GatherImagesShape& s, const GatherImagesBuffers<T>& t) {
  const int64_t elements = s.channels * s.pixels;
  const T divisor = static_cast<T>(s.divisor);
  parallel_ranges(s.batch, kBatchGrain / (elements + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const Source* from = static_cast<const Source*>(t.input) + t.index[b] * elements;
      T* to = t.output + b * elements;
      if (t.target) t.target_output[b] = t.target[t.index[b]];
      for (int64_t c = 0; c < s.channels; ++c)
        for (int64_t p = 0; p < s.pixels; ++p)
          to[p * s.channels + c] = static_cast<T>(from[c * s.pixels + p]) / divisor;
    }
  });
}

template <class T>
void gather_images(const GatherImagesShape& s, const GatherImagesBuffers<T>& t) {
  trace<T>("gather_images", s.from_uint8 ? "uint8" : "copy");
  if (s.from_uint8)
    gather_images_from<T, uint8_t>(s, t);
  else
    gather_images_from<T, T>(s, t);
}

template <class T>
void count_correct(const CountCorrectShape& s, const CountCorrectBuffers<T>& t) {
  trace<T>("count_correct", "scalar");
  int64_t correct = 0;
  for (int64_t b = 0; b < s.batch; ++b) {
    const T* row = t.logits + b * s.classes;
    int64_t best = 0;
    for (int64_t c = 1; c < s.classes; ++c)
      if (row[c] > row[best] || (row[c] != row[c] && row[best] == row[best])) best = c;  // NaN counts as largest
    correct += best == t.target[b];
  }
  *t.correct = correct;
}

}  // namespace
}  // namespace fastnn::cpu
