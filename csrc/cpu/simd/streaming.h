// Memory that lies in no cache: stores past the caches, and reading ahead.
//
// An output so large that no cache keeps it until it is read is stored past them: that spares the processor to read
// every line first and to push out what lies in the caches. Lines of 64 bytes should be written whole and at once. So
// rows of such an output start on one, and a kernel whose vectors are shorter than a line stores a line's vectors one
// after the other.
#pragma once

#include <cstdint>

#include "cpu/simd/vector.h"

namespace fastnn::cpu {
namespace {

constexpr int64_t kLineBytes = 64;
// An output of less may still lie in L3 when the next operator reads it: to store it past the caches would cost that.
constexpr int64_t kStreamedBytes = 16 << 20;
// An input of less mostly lies there. Of more, where other cores use L3 too, much comes from memory.
constexpr int64_t kFetchedBytes = 8 << 20;

// Whether to stream an output of so many elements, dense and aligned.
template <class T>
inline bool worth_streaming(const T* output, int64_t elements) {
  return kVectorBytes >= 32 && elements >= kStreamedBytes / static_cast<int64_t>(sizeof(T)) &&
         reinterpret_cast<uintptr_t>(output) % kLineBytes == 0;
}

// The same where a pixel has `channels` of them.
template <class T>
inline bool worth_streaming(const T* output, int64_t elements, int64_t channels) {
  return worth_streaming(output, elements) && channels % (kLineBytes / static_cast<int64_t>(sizeof(T))) == 0;
}

// Whether to fetch an input of so many elements ahead.
template <class T>
inline bool worth_fetching(int64_t elements) {
  return elements >= kFetchedBytes / static_cast<int64_t>(sizeof(T));
}

#if defined(__AVX512F__)
FASTNN_INLINE void store_streamed(float* p, Vec<float> v) { _mm512_stream_ps(p, (__m512)v); }
FASTNN_INLINE void store_streamed(double* p, Vec<double> v) { _mm512_stream_pd(p, (__m512d)v); }
#elif defined(__AVX2__)
FASTNN_INLINE void store_streamed(float* p, Vec<float> v) { _mm256_stream_ps(p, (__m256)v); }
FASTNN_INLINE void store_streamed(double* p, Vec<double> v) { _mm256_stream_pd(p, (__m256d)v); }
#else
template <class T>
FASTNN_INLINE void store_streamed(T* p, Vec<T> v) {
  store(p, v);
}
#endif

// Elements to be read soon: fetched into L2 in equal shares, one with each piece of the present work, of a few lines:
// the processor waits where more are under way than it can note. It costs a tenth of a kernel's time where they lie
// there already, and saves up to half of it where they come from memory.
template <class T>
struct FetchAhead {
  const T* data;
  int64_t elements;
  FASTNN_INLINE FetchAhead part(int64_t index, int64_t parts) const {
    if (elements == 0) return {};  // before two divisions
    const int64_t first = elements * index / parts;
    return {data + first, elements * (index + 1) / parts - first};
  }
  FASTNN_INLINE void fetch(int64_t share, int64_t shares) const {
    constexpr int64_t line = kLineBytes / static_cast<int64_t>(sizeof(T));
    const FetchAhead mine = part(share, shares);
    for (int64_t e = 0; e < mine.elements; e += line) __builtin_prefetch(mine.data + e, 0, 2);
  }
};

// Ends a task that streamed: other threads see its output.
inline void finish_streaming() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace fastnn::cpu
