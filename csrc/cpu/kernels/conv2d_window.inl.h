// A window of an image with its zero border: what a convolution kernel reads.
//
// Kernels address every tap of every output pixel as one pointer plus one offset, with no test for the border. A
// window that lies inside the image is the image itself; one that reaches over its edge is copied, zeros included,
// into scratch memory: one pass over the input against kernel_size * out_channels operations on each element.
//
//            left                      width
//            |  0 0 0 0 0 0 0 0 0 0 0 0 |
//       top  |  0 0 +---------------------- image
//            |  0 0 | x x x x x x x x x
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/simd/streaming.h"
#include "cpu/simd/vector.h"

namespace fastnn::cpu {
namespace {

// Some channels of an image (y, x, channel).
template <class T>
struct Image {
  const T* data;  // of its pixel (0, 0), first channel
  int64_t height, width;
  int64_t row_stride, pixel_stride;
};

struct WindowRange {
  int64_t top, left, height, width;  // in image pixels; may reach outside
};

// Elements of a window of so many channels; INT64_MAX, which Scratch refuses, for more than that: a kernel that is
// dilated a million times may reach so far beyond a small image.
inline int64_t window_elements(const WindowRange& range, int64_t channels) {
  int64_t elements;
  const bool overflows = __builtin_mul_overflow(range.height, range.width, &elements) ||
                         __builtin_mul_overflow(elements, channels, &elements);
  return overflows ? INT64_MAX : elements;
}

template <class T>
inline bool lies_inside(const Image<T>& image, const WindowRange& range) {
  return range.top >= 0 && range.left >= 0 && range.top + range.height <= image.height &&
         range.left + range.width <= image.width;
}

// Rows [first, end) of an image, as far as it has them, to be fetched ahead.
template <class T>
inline FetchAhead<T> rows_ahead(const Image<T>& image, int64_t first, int64_t end) {
  if (first < 0) first = 0;
  if (end > image.height) end = image.height;
  if (end <= first) return {};
  return {image.data + first * image.row_stride, (end - first) * image.row_stride};
}

template <class T>
inline void copy_run(const T* from, int64_t count, T* to) {
  __builtin_memcpy(to, from, static_cast<size_t>(count) * sizeof(T));
}
// As copy_run for runs that may overlap.
template <class T>
inline void move_run(const T* from, int64_t count, T* to) {
  __builtin_memmove(to, from, static_cast<size_t>(count) * sizeof(T));
}
template <class T>
inline void zero_run(int64_t count, T* to) {
  __builtin_memset(to, 0, static_cast<size_t>(count) * sizeof(T));
}

// The window where it lies. Rows of it that the image does not have must not be read.
template <class T>
inline Image<T> window_in_place(const Image<T>& image, const WindowRange& range) {
  return {image.data + range.top * image.row_stride + range.left * image.pixel_stride, range.height, range.width,
          image.row_stride, image.pixel_stride};
}

// The window as an image whose pixel (0, 0) is (top, left); `buffer` holds range.height * range.width * channels. With
// `copy`, a copy even where the window lies inside: for kernels that read past the end of a row. Some channels of a
// pixel are copied; what lies `ahead` of them is fetched, unless that is 0.
template <class T>
Image<T> window_of(const Image<T>& image, const WindowRange& range, int64_t channels, T* buffer, bool copy = false,
                   int64_t ahead = 0) {
  if (!copy && lies_inside(image, range)) return window_in_place(image, range);
  const int64_t row_elements = range.width * channels;
  const int64_t first = range.left < 0 ? -range.left < range.width ? -range.left : range.width : 0;
  int64_t end = image.width - range.left < range.width ? image.width - range.left : range.width;
  if (end < first) end = first;
  for (int64_t y = 0; y < range.height; ++y) {
    T* to = buffer + y * row_elements;
    const int64_t row = range.top + y;
    if (row < 0 || row >= image.height) {
      zero_run(row_elements, to);
      continue;
    }
    zero_run(first * channels, to);
    const T* from = image.data + row * image.row_stride + (range.left + first) * image.pixel_stride;
    if (image.pixel_stride == channels) {
      copy_run(from, (end - first) * channels, to + first * channels);
    } else {
      for (int64_t x = first; x < end; ++x, from += image.pixel_stride) {
        if (ahead > 0) __builtin_prefetch(from + ahead, 0, 2);
        copy_run(from, channels, to + x * channels);
      }
    }
    zero_run((range.width - end) * channels, to + end * channels);
  }
  return {buffer, range.height, range.width, row_elements, channels};
}

}  // namespace
}  // namespace fastnn::cpu
