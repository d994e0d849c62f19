// Batch kernels (ops/batch.h): small passes over memory.
#pragma once

#include "cpu/kernels/tile.inl.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd/bytes.h"
#include "cpu/simd/streaming.h"
#include "cpu/simd/transpose.h"
#include "ops/batch.h"

namespace fastnn::cpu {
namespace {

// Elements of a task: some tenths of a microsecond.
constexpr int64_t kBatchGrain = 1 << 10;
// Images of a batch lie anywhere in memory, each too short for the processor to fetch ahead by itself: the first bytes
// of the next but one are asked for while one is read.
constexpr int64_t kImagesAhead = 2;
constexpr int64_t kBytesAhead = 4 << 10;

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

// to[p][c] = from[c * stride + p] / divisor for each of the planes c.
template <int planes, class T, class Source>
void interleave_planes(const Source* from, int64_t stride, int64_t pixels, T divisor, T* to) {
  const bool divide = divisor != T(1);
  int64_t p = 0;
  for (; p + kLanes<T> <= pixels; p += kLanes<T>) {
    Vec<T> values[planes];
    FASTNN_UNROLL
    for (int c = 0; c < planes; ++c) {
      if constexpr (sizeof(Source) == 1)
        values[c] = __builtin_convertvector(widen_bytes<T>(from + c * stride + p), Vec<T>);
      else
        values[c] = load(from + c * stride + p);
      if (divide) values[c] /= divisor;
    }
    store_interleaved<T, planes>(values, to + p * planes);
  }
  for (; p < pixels; ++p) {
    FASTNN_UNROLL
    for (int c = 0; c < planes; ++c) to[p * planes + c] = static_cast<T>(from[c * stride + p]) / divisor;
  }
}

template <class T, class Source>
void gather_images_from(const GatherImagesShape& s, const GatherImagesBuffers<T>& t) {
  const int64_t elements = s.channels * s.pixels, bytes = elements * static_cast<int64_t>(sizeof(Source));
  const T divisor = static_cast<T>(s.divisor);
  const auto image = [&](int64_t b) { return static_cast<const Source*>(t.input) + t.index[b] * elements; };
  // Images of many channels are divided plane by plane, some pixels at a time, and then transposed.
  constexpr int kFewChannels = 4;
  const int64_t run = (kBatchGrain / (s.channels + 1) / kLanes<T> + 1) * kLanes<T>;
  const ThreadScratch<T> buffers(max_threads(), s.channels > kFewChannels ? s.channels * run : 0);

  const int64_t grain = kBatchGrain / (elements + 1) + 1;
  parallel_tasks((s.batch + grain - 1) / grain, [&](int64_t task, int thread) {
    T* divided = buffers[thread];
    for (int64_t b = task * grain; b < (task + 1) * grain && b < s.batch; ++b) {
      if (b + kImagesAhead < s.batch) {
        const char* next = reinterpret_cast<const char*>(image(b + kImagesAhead));
        for (int64_t i = 0; i < bytes && i < kBytesAhead; i += kLineBytes) __builtin_prefetch(next + i);
      }
      const Source* from = image(b);
      T* to = t.output + b * elements;
      if (t.target) t.target_output[b] = t.target[t.index[b]];
      if (elements == 0) continue;
      if (s.channels <= kFewChannels) {
        with_count<kFewChannels>(s.channels, [&](auto planes) {
          interleave_planes<decltype(planes)::value>(from, s.pixels, s.pixels, divisor, to);
        });
        continue;
      }
      for (int64_t p = 0; p < s.pixels; p += run) {
        const int64_t count = s.pixels - p < run ? s.pixels - p : run;
        for (int64_t c = 0; c < s.channels; ++c)
          interleave_planes<1>(from + c * s.pixels + p, 0, count, divisor, divided + c * run);
        transpose_matrix(divided, run, s.channels, count, to + p * s.channels, s.channels);
      }
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
