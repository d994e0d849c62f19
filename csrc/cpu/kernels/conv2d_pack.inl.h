// Taps of a convolution, its weights in the layouts that the kernels read, and weight gradients back.
//
//   OHWI            [o][tap][i]                       torch's channels_last; the kernels' starting point
//   forward panel   [panel of o][tap][i][columns]     columns = kTileColumns output channels
//   gradient panel  [panel of i][tap][o][columns]     columns = kTileColumns input channels, taps of one phase
#pragma once

#include "cpu/kernels/conv2d_window.inl.h"
#include "cpu/kernels/finite.inl.h"
#include "cpu/kernels/sums.inl.h"
#include "cpu/kernels/tile.inl.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd/transpose.h"
#include "ops/conv2d.h"

namespace fastnn::cpu {
namespace {

// Tasks that a loop is cut into, where the shape allows it: they share work well between 2 to 8 threads.
constexpr int64_t kTasks = 8;
// A weight gradient is summed in chunks, each with its own copy. Copies beyond 16 MiB cost more memory traffic than
// they gain, and such large weights have channels enough to share.
constexpr int64_t kMaxPartialBytes = 16 << 20;

// Memory for weights that a call packs or transforms: shared, or each thread's own. Where copies for all threads are
// small, each makes what it reads for itself, which takes less time than to read what another has written.
template <class T>
class MadeWeights {
 public:
  MadeWeights(int threads, int64_t count)
      : own_(threads * count * static_cast<int64_t>(sizeof(T)) <= kOwnBytes),
        shared_(own_ ? 0 : count),
        copies_(threads, own_ ? count : 0) {}
  bool own() const { return own_; }
  T* of(int thread) const { return own_ ? copies_[thread] : shared_; }

 private:
  static constexpr int64_t kOwnBytes = 8 << 20;
  const bool own_;
  const Scratch<T> shared_;
  const ThreadScratch<T> copies_;
};

inline int64_t kernel_taps(const Conv2dShape& s) { return s.kernel_height * s.kernel_width; }
inline int64_t group_inputs(const Conv2dShape& s) { return s.in_channels / s.groups; }
inline int64_t group_outputs(const Conv2dShape& s) { return s.out_channels / s.groups; }
inline int64_t weight_elements(const Conv2dShape& s) { return s.out_channels * group_inputs(s) * kernel_taps(s); }
// 3 or 5 where the kernel is so high and wide, of stride and dilation 1, else 0: what Winograd may serve.
inline int dense_square_taps(const Conv2dShape& s) {
  const bool dense = s.stride_height == 1 && s.stride_width == 1 && s.dilation_height == 1 && s.dilation_width == 1;
  const bool square = s.kernel_height == s.kernel_width && (s.kernel_height == 3 || s.kernel_height == 5);
  return dense && square ? static_cast<int>(s.kernel_height) : 0;
}
template <class T>
inline int64_t panels_of(int64_t columns) {
  return (columns + kTileColumns<T> - 1) / kTileColumns<T>;
}

// A 1x1 convolution of stride 1 without a border is one matrix product over all pixels of all images: the same work on
// one image, a pixel wide.
inline Conv2dShape with_pixels_as_rows(Conv2dShape s) {
  const bool is_pointwise = kernel_taps(s) == 1 && s.stride_height == 1 && s.stride_width == 1 &&
                            s.padding_height == 0 && s.padding_width == 0 && !s.pool;
  if (!is_pointwise) return s;
  s.in_height = s.out_height = s.batch * s.in_height * s.in_width;
  s.batch = s.in_width = s.out_width = 1;
  return s;
}

// A kernel as large as the image makes one pixel of it: a 1x1 convolution of the image's numbers, in the order of OHWI.
inline Conv2dShape with_image_as_pixel(Conv2dShape s) {
  const bool is_image = s.kernel_height == s.in_height && s.kernel_width == s.in_width && s.padding_height == 0 &&
                        s.padding_width == 0 && s.groups == 1;
  if (!is_image) return s;
  s.in_channels *= kernel_taps(s);
  s.in_height = s.in_width = s.kernel_height = s.kernel_width = 1;
  s.stride_height = s.stride_width = s.dilation_height = s.dilation_width = 1;
  return with_pixels_as_rows(s);
}

inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }

// One axis of the geometry.
struct ConvAxis {
  int64_t kernel, size, stride, padding, dilation;
};

inline ConvAxis vertical_axis(const Conv2dShape& s) {
  return {s.kernel_height, s.in_height, s.stride_height, s.padding_height, s.dilation_height};
}
inline ConvAxis horizontal_axis(const Conv2dShape& s) {
  return {s.kernel_width, s.in_width, s.stride_width, s.padding_width, s.dilation_width};
}

// Pixels of one axis: first, first + step, ...
struct PixelSpan {
  int64_t first, step, count;
};

// Those of the outputs [low, low + outs) whose source pixel under this tap lies in the image.
inline PixelSpan outputs_inside(const ConvAxis& axis, int64_t tap, int64_t low, int64_t outs) {
  const int64_t shift = axis.padding - tap * axis.dilation;
  int64_t first = -floor_div(-shift, axis.stride), end = floor_div(axis.size - 1 + shift, axis.stride) + 1;
  if (first < low) first = low;
  if (end > low + outs) end = low + outs;
  return {first, 1, end > first ? end - first : 0};
}

// How many pairs of an output and a tap, in one image, have their source pixel in it.
inline int64_t products_inside(const Conv2dShape& s) {
  const auto along = [](const ConvAxis& axis, int64_t outs) {
    int64_t sum = 0;
    for (int64_t tap = 0; tap < axis.kernel; ++tap) sum += outputs_inside(axis, tap, 0, outs).count;
    return sum;
  };
  return along(vertical_axis(s), s.out_height) * along(horizontal_axis(s), s.out_width);
}

// The taps of one axis: tap i reads the source `offset(i)` pixels on and has the weight at kernel index `place(i)`.
struct TapAxis {
  int64_t count;
  int64_t first_offset, offset_step;
  int64_t first_place, place_step;
  int64_t offset(int64_t i) const { return first_offset + i * offset_step; }
  int64_t place(int64_t i) const { return first_place + i * place_step; }
};

inline TapAxis forward_taps(const ConvAxis& axis) { return {axis.kernel, -axis.padding, axis.dilation, 0, 1}; }

// The taps through which an input pixel of coordinate stride * q + phase receives grad[q + offset]: those k for which
// (phase + padding - k * dilation) / stride is exact. From the last one down, so that offsets grow.
inline TapAxis phase_taps(const ConvAxis& axis, int64_t phase) {
  TapAxis taps{0, 0, 0, 0, 0};
  for (int64_t k = axis.kernel - 1; k >= 0; --k) {
    const int64_t numerator = phase + axis.padding - k * axis.dilation;
    if (numerator % axis.stride != 0) continue;
    const int64_t offset = floor_div(numerator, axis.stride);
    if (taps.count == 0) taps.first_offset = offset, taps.first_place = k;
    if (taps.count == 1) taps.offset_step = offset - taps.first_offset, taps.place_step = k - taps.first_place;
    ++taps.count;
  }
  return taps;
}

// The source offsets of all pairs of taps, row by row.
inline void list_taps(const TapAxis& vertical, const TapAxis& horizontal, int64_t* y, int64_t* x) {
  for (int64_t i = 0; i < vertical.count * horizontal.count; ++i) {
    y[i] = vertical.offset(i / horizontal.count);
    x[i] = horizontal.offset(i % horizontal.count);
  }
}

// Whether the weight as it lies is OHWI already: a kernel of one tap is, in either layout.
inline bool is_ohwi(const Conv2dShape& s) {
  return s.weight_channels_last || kernel_taps(s) == 1 || group_inputs(s) == 1;
}

// A weight as OHWI: itself where it lies so, else a copy.
template <class T>
class OhwiWeight {
 public:
  OhwiWeight(const Conv2dShape& s, const T* weight)
      : copy_(is_ohwi(s) ? 0 : weight_elements(s)), data_(is_ohwi(s) ? weight : copy_) {
    if (is_ohwi(s)) return;
    const int64_t taps = kernel_taps(s), inputs = group_inputs(s);
    parallel_ranges(s.out_channels, 4, [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o)
        transpose_matrix(weight + o * inputs * taps, taps, inputs, taps, copy_ + o * inputs * taps, inputs);
    });
  }
  operator const T*() const { return data_; }

 private:
  const Scratch<T> copy_;
  const T* data_;
};

// Writes panels_of(outputs) * taps * inputs * kTileColumns elements for each group, whose channels `inputs` and
// `outputs` are.
template <class T>
void pack_forward_panels(int64_t groups, int64_t outputs, int64_t inputs, int64_t taps, const T* ohwi, T* panels) {
  const int64_t depth = taps * inputs, panels_of_group = panels_of<T>(outputs);
  parallel_for(groups * panels_of_group, [&](int64_t panel) {
    const T* of_group = ohwi + panel / panels_of_group * outputs * depth;
    for (int v = 0; v < kTileVectors; ++v) {
      const int64_t o = panel % panels_of_group * kTileColumns<T> + v * kLanes<T>;
      const int64_t left = outputs - o < 0 ? 0 : outputs - o < kLanes<T> ? outputs - o : kLanes<T>;
      transpose_panel<T, true>(of_group + o * depth, depth, left, depth,
                               panels + panel * depth * kTileColumns<T> + v * kLanes<T>, kTileColumns<T>);
    }
  });
}

// `columns` columns of `rows` rows, from_step apart, as strips of `width` columns: to: [strip][row][width], strips
// `stride` apart. The last strip is padded with zeros. Fetches what lies `ahead` of each strip's rows, unless that is
// 0.
//
// 16 rows at a time: their lines stay in L1 until every strip has its part, and few pages are written in turn.
template <class T, int64_t width>
void pack_strips(int64_t rows, const T* from, int64_t from_step, int64_t columns, T* to, int64_t stride,
                 int64_t ahead = 0) {
  constexpr int64_t kBlock = 16;
  for (int64_t block = 0; block < rows; block += kBlock) {
    const int64_t end = block + kBlock < rows ? block + kBlock : rows;
    for (int64_t c = 0; c < columns; c += width) {
      T* strip = to + c / width * stride;
      const T* first = from + c;
      if (ahead > 0)
        for (int64_t r = block; r < end; ++r) __builtin_prefetch(first + r * from_step + ahead, 0, 2);
      if (columns - c >= width) {
        for (int64_t r = block; r < end; ++r) copy_run(first + r * from_step, width, strip + r * width);
        continue;
      }
      for (int64_t r = block; r < end; ++r) {
        copy_run(first + r * from_step, columns - c, strip + r * width);
        zero_run(c + width - columns, strip + r * width + columns - c);
      }
    }
  }
}

// The taps listed in `places` (index in the kernel), in that order. False where one of their weights is not finite.
template <class T>
bool pack_gradient_panels(int64_t groups, int64_t outputs, int64_t inputs, int64_t taps, const T* ohwi, int64_t count,
                          const int64_t* places, T* panels) {
  constexpr int64_t kRows = 64;  // of a task
  const int64_t blocks = (outputs + kRows - 1) / kRows, strip = count * outputs * kTileColumns<T>;
  const int64_t strips = panels_of<T>(inputs), parts = strips < kTasks ? strips : kTasks;
  bool finite = true;
  // One part of the panels after the other, as gather_conv() may read them: a thread packs its own.
  parallel_for(groups * parts * count * blocks, [&](int64_t task) {
    const int64_t group = task / blocks / count / parts, part = task / blocks / count % parts;
    const int64_t tap = task / blocks % count, first = task % blocks * kRows;
    const int64_t rows = outputs - first < kRows ? outputs - first : kRows;
    const int64_t begin = strips * part / parts, column = begin * kTileColumns<T>;
    const int64_t beyond = strips * (part + 1) / parts * kTileColumns<T>;
    const int64_t columns = (inputs < beyond ? inputs : beyond) - column;
    const T* from = ohwi + ((group * outputs + first) * taps + places[tap]) * inputs + column;
    T* to = panels + (group * strips + begin) * strip + (tap * outputs + first) * kTileColumns<T>;
    pack_strips<T, kTileColumns<T>>(rows, from, taps * inputs, columns, to, strip);
    bool rows_finite = true;  // asked here, where they are in the cache
    for (int64_t r = 0; r < rows; ++r) rows_finite &= run_is_finite(columns, from + r * taps * inputs);
    if (!rows_finite) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
  });
  return finite;
}

// The same as [group][i][tap of places][o], for dot products.
template <class T>
bool pack_gradient_dots(int64_t groups, int64_t outputs, int64_t inputs, int64_t taps, const T* ohwi, int64_t count,
                        const int64_t* places, T* dots) {
  parallel_for(groups * count, [&](int64_t task) {
    const int64_t group = task / count, tap = task % count;
    transpose_matrix(ohwi + (group * outputs * taps + places[tap]) * inputs, taps * inputs, outputs, inputs,
                     dots + (group * inputs * count + tap) * outputs, count * outputs);
  });
  return all_finite(groups * inputs * count * outputs, dots);
}

// One group's weight gradient from its sums [tap][i][padded_outputs]. `buffer` holds one group's weights.
template <class T>
void write_weight_gradient(const Conv2dShape& shape, int64_t padded_outputs, const T* sums, T* buffer, T* grad_weight) {
  const int64_t taps = kernel_taps(shape), inputs = group_inputs(shape), outputs = group_outputs(shape);
  const int64_t depth = taps * inputs;
  const AloneIfSmall scope(outputs * depth);
  T* ohwi = is_ohwi(shape) ? grad_weight : buffer;
  parallel_ranges(outputs, kLanes<T>, [&](int64_t begin, int64_t end) {
    transpose_matrix(sums + begin, padded_outputs, depth, end - begin, ohwi + begin * depth, depth);
    if (ohwi == grad_weight) return;
    for (int64_t o = begin; o < end; ++o)
      transpose_matrix(ohwi + o * depth, inputs, taps, inputs, grad_weight + o * depth, taps);
  });
}

// The same from the sums of chunks, OHWI already, of `outputs` channels.
template <class T>
void write_ohwi_gradient(const Conv2dShape& shape, int64_t outputs, int64_t chunks, int64_t step, T* partials,
                         T* grad_weight) {
  const int64_t taps = kernel_taps(shape), inputs = group_inputs(shape), depth = taps * inputs;
  if (is_ohwi(shape)) return add_partials<T>(chunks, step, outputs * depth, partials, grad_weight);
  add_partials<T>(chunks, step, outputs * depth, partials, partials);
  parallel_ranges(outputs, 4, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o)
      transpose_matrix(partials + o * depth, inputs, taps, inputs, grad_weight + o * depth, taps);
  });
}

}  // namespace
}  // namespace fastnn::cpu
