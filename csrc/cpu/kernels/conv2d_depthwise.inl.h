// Depthwise convolution (groups = in_channels = out_channels): no sum over channels, so vectors run along them.
//
//   out[y][x][c]      = bias[c] + sum over ky, kx of source[y * step + oy[ky]][x * step + ox[kx]][c] * w[ky][kx][c]
//   grad_w[ky][kx][c] = sum over images, y, x of source[the same][c] * grad[y][x][c]
//
// The input gradient of stride s is the first formula too, with step 1 and grad as the source, for each of the s * s
// phases of the input's pixels (conv2d_pack.inl.h): a row of the input gradient interleaves its s phases.
//
// A tile is kTilePixels neighbours of an output row and one vector of channels. It slides along each source row: a
// source vector is loaded once for all taps that it meets.
//
//   source row    s0  s1  s2  s3  s4 ...
//                 |________|                  out[0] = s0 w0 + s1 w1 + s2 w2      3 taps, step 1:
//                     |________|              out[1] = s1 w0 + s2 w1 + s3 w2      10 loads for 24 FMAs
//
// Nothing is copied: source rows outside the image are left out of the sum, and so are source columns, in the tiles
// that reach over the left or right edge.
#pragma once

#include "cpu/kernels/conv2d_pack.inl.h"
#include "cpu/kernels/conv2d_window.inl.h"
#include "cpu/kernels/tile.inl.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd/streaming.h"
#include "ops/conv2d.h"

namespace fastnn::cpu {
namespace {

// 8 pixels: 8 accumulators + 5 weights (5x5) + 1 source vector fit 16 registers, and so do 8 gradients + 5
// accumulators.
constexpr int kTilePixels = 8;

// One output row. `width` as a template argument below is horizontal.count where that is known at compile time and the
// taps are neighbours, else 0.
template <class T>
struct DepthwiseRow {
  Image<T> source;
  TapAxis vertical, horizontal;
  int64_t source_row, source_step;  // the source row of offset 0; source pixels from one output pixel to the next
  int64_t pixels;
  int64_t channels;
  bool stream = false;  // stores of the output go past the caches
  FetchAhead<T> next_source{}, next_grad{};
};

// The taps [first, end) of an axis that lie inside the image: 0 <= at + offset < size.
struct TapSpan {
  int64_t first, end;
};

inline TapSpan taps_inside(const TapAxis& axis, int64_t at, int64_t size) {
  TapSpan span{0, axis.count};
  while (span.first < span.end && at + axis.offset(span.first) < 0) ++span.first;
  while (span.end > span.first && at + axis.offset(span.end - 1) >= size) --span.end;
  return span;
}

// A tile's place in its row. The tiles of a row are equal to within one pixel.
struct TilePlace {
  int64_t first, pixels;
};

inline int64_t tiles_of(int64_t pixels) { return (pixels + kTilePixels - 1) / kTilePixels; }
inline TilePlace tile_place(int64_t pixels, int64_t tile) {
  const int64_t tiles = tiles_of(pixels), first = pixels * tile / tiles;
  return {first, pixels * (tile + 1) / tiles - first};
}

// Where vector i of the channels starts. The last one begins early enough to be whole, so some channels may be computed
// twice, to the same bits.
template <class T>
int64_t vector_start(int64_t i, int64_t channels) {
  const int64_t last = channels > kLanes<T> ? channels - kLanes<T> : 0;
  return i * kLanes<T> < last ? i * kLanes<T> : last;
}
template <class T>
int64_t vectors_of(int64_t channels) {
  return (channels + kLanes<T> - 1) / kLanes<T>;
}

// body(pixel, kx, source vector) for every pair that meets on one source row; see depthwise_row for the arguments.
template <class T, int pixels, int width, int step, bool inside, class Body>
FASTNN_INLINE void slide(const DepthwiseRow<T>& row, const T* from, int64_t column, const Body& body) {
  FASTNN_UNROLL
  for (int j = 0; j < (pixels - 1) * step + width; ++j, from += row.source.pixel_stride) {
    if (!inside && (column + j < 0 || column + j >= row.source.width)) continue;
    const Vec<T> value = in_register(load(from));
    FASTNN_UNROLL
    for (int kx = 0; kx < width; ++kx)
      if (j >= kx && (j - kx) % step == 0 && (j - kx) / step < pixels) body((j - kx) / step, kx, value);
  }
}

// acc[p] += the taps of one source row. `from` is the source of pixel 0 and tap 0, in source column `column`; `left` is
// the number of channels, at most a vector.
template <class T, int pixels, int width, int step, bool inside>
FASTNN_INLINE void depthwise_row(const DepthwiseRow<T>& row, const T* from, int64_t column, const T* weight,
                                 int64_t weight_stride, int64_t left, Vec<T> (&acc)[pixels]) {
  const int64_t pixel_stride = row.source.pixel_stride;
  const int64_t first = -column, end = row.source.width - column;  // the source pixels that the image has
  if constexpr (width > 0) {
    Vec<T> w[width];
    FASTNN_UNROLL
    for (int kx = 0; kx < width; ++kx) w[kx] = load(weight + kx * weight_stride);
    slide<T, pixels, width, step, inside>(row, from, column,
                                          [&](int p, int kx, Vec<T> value)
                                              __attribute__((always_inline)) { acc[p] += value * w[kx]; });
  } else {
    for (int64_t kx = 0; kx < row.horizontal.count; ++kx) {
      const Vec<T> w = load_upto(weight + kx * weight_stride, left);
      FASTNN_UNROLL
      for (int p = 0; p < pixels; ++p) {
        const int64_t j = p * row.source_step + kx * row.horizontal.offset_step;
        if (!inside && (j < first || j >= end)) continue;
        acc[p] += load_upto(from + j * pixel_stride, left) * w;
      }
    }
  }
}

// The source rows that the output row `step` source rows on reads and this one does not.
template <class T>
FetchAhead<T> next_rows(const DepthwiseRow<T>& row, int64_t step) {
  if (row.vertical.count == 0) return {};
  const int64_t next = row.source_row + row.vertical.offset(row.vertical.count - 1) + 1;
  return rows_ahead(row.source, next, next + step);
}

// Where output goes: pixels and rows so many elements apart.
template <class T>
struct DepthwiseOutput {
  T* data;
  int64_t pixel_stride, row_stride;
};

// `rows` output rows from `row` on, `row_step` source rows apart, all channels. weight: [kernel place][channels]. A
// tile of all rows comes before the next tile: the source rows that it shares with the row before are in L1 still. What
// comes from memory is better read row by row, and fetched ahead.
template <class T, int width, int step>
void depthwise_pixels(const DepthwiseRow<T>& row, int64_t rows, int64_t row_step, const T* weight, int64_t kernel_width,
                      const T* bias, bool with_relu, const DepthwiseOutput<T>& out) {
  const int64_t reach = row.horizontal.count > 0 ? row.horizontal.offset(row.horizontal.count - 1) : 0;
  const int64_t left = row.channels < kLanes<T> ? row.channels : kLanes<T>;
  const int64_t weight_stride = row.horizontal.place_step * row.channels;
  const int64_t tiles = tiles_of(row.pixels), vectors = vectors_of<T>(row.channels), out_step = out.pixel_stride;
  const bool stream = row.stream;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const TilePlace place = tile_place(row.pixels, tile);
    const int64_t column = place.first * row.source_step + row.horizontal.first_offset;
    const bool is_inside = column >= 0 && (place.first + place.pixels - 1) * row.source_step + reach < row.source.width;
    with_count<kTilePixels>(place.pixels, [&](auto constant) {
      constexpr int pixels = decltype(constant)::value;
      const auto run = [&](auto inside, int64_t y) {
        const int64_t source_row = row.source_row + y * row_step;
        const TapSpan span = taps_inside(row.vertical, source_row, row.source.height);
        for (int64_t i = 0; i < vectors; ++i) {
          const int64_t c = vector_start<T>(i, row.channels);
          row.next_source.fetch(tile * vectors + i, tiles * vectors);
          Vec<T> acc[pixels];
          const Vec<T> start = bias ? load_upto(bias + c, left) : Vec<T>{};
          FASTNN_UNROLL
          for (int p = 0; p < pixels; ++p) acc[p] = start;
          for (int64_t ky = span.first; ky < span.end; ++ky) {
            const T* from = row.source.data + (source_row + row.vertical.offset(ky)) * row.source.row_stride +
                            column * row.source.pixel_stride + c;
            const T* w =
                weight + (row.vertical.place(ky) * kernel_width + row.horizontal.first_place) * row.channels + c;
            depthwise_row<T, pixels, width, step, decltype(inside)::value>(row, from, column, w, weight_stride, left,
                                                                           acc);
          }
          T* to = out.data + y * out.row_stride + place.first * out_step + c;
          if (with_relu) {
            FASTNN_UNROLL
            for (int p = 0; p < pixels; ++p) acc[p] = relu(acc[p]);
          }
          if (stream) {
            FASTNN_UNROLL
            for (int p = 0; p < pixels; ++p) store_streamed(to + p * out_step, acc[p]);
          } else if (left == kLanes<T>) {
            FASTNN_UNROLL
            for (int p = 0; p < pixels; ++p) store(to + p * out_step, acc[p]);
          } else {
            FASTNN_UNROLL
            for (int p = 0; p < pixels; ++p) store_first(to + p * out_step, acc[p], left);
          }
        }
      };
      for (int64_t y = 0; y < rows; ++y) {
        if (is_inside)
          run(Constant<1>{}, y);
        else
          run(Constant<0>{}, y);
      }
    });
  }
}

// body(Constant<width>{}, Constant<step>{}) for the row's taps.
template <class T, class Body>
FASTNN_INLINE void with_taps(const DepthwiseRow<T>& row, const Body& body) {
  const bool neighbours = row.channels >= kLanes<T> && (row.horizontal.count == 1 || row.horizontal.offset_step == 1);
  if (neighbours && row.source_step == 1) {
    switch (row.horizontal.count) {
      case 1: return body(Constant<1>{}, Constant<1>{});  // of a 3x3 kernel's input gradient, stride 2
      case 2: return body(Constant<2>{}, Constant<1>{});  // of 3x3 and 5x5 kernels' input gradients, stride 2
      case 3: return body(Constant<3>{}, Constant<1>{});
      case 5: return body(Constant<5>{}, Constant<1>{});
      default: break;
    }
  } else if (neighbours && row.source_step == 2) {
    switch (row.horizontal.count) {
      case 3: return body(Constant<3>{}, Constant<2>{});
      case 5: return body(Constant<5>{}, Constant<2>{});
      default: break;
    }
  }
  body(Constant<0>{}, Constant<0>{});
}

// Rows of the output in one task: few enough that eight threads share the work evenly.
inline int64_t depthwise_rows_per_task(int64_t images, int64_t height) {
  const int64_t rows = images * height / 32;
  return rows < 1 ? 1 : rows > height ? height : rows;
}

// Whether to stream an output of so many pixels an image. A tile stores one vector of a pixel's channels.
template <class T>
bool depthwise_streams(const Conv2dShape& s, const T* output, int64_t pixels) {
  return kVectorBytes == kLineBytes && worth_streaming(output, s.batch * pixels * s.in_channels, s.in_channels);
}

// (c, tap) to [tap][c]
template <class T>
void pack_depthwise(int64_t channels, int64_t taps, const T* weight, T* packed) {
  transpose_matrix(weight, taps, channels, taps, packed, channels);
}

template <class T>
void depthwise_forward(const Conv2dShape& s, const Conv2dForward<T>& t) {
  if (s.out_width == 0) return;
  const Scratch<T> weight(weight_elements(s));
  pack_depthwise<T>(s.in_channels, kernel_taps(s), t.weight, weight);
  const TapAxis vertical = forward_taps(vertical_axis(s));
  const TapAxis horizontal = forward_taps(horizontal_axis(s));
  const bool stream = depthwise_streams(s, t.output, s.out_height * s.out_width);
  const bool fetch = exceeds_caches<T>(s.batch * s.in_height * s.in_width * s.in_channels);
  const int64_t block = depthwise_rows_per_task(s.batch, s.out_height), blocks = (s.out_height + block - 1) / block;
  parallel_tasks(s.batch * blocks, [&](int64_t task, int) {
    const int64_t image = task / blocks, first = task % blocks * block;
    const int64_t end = first + block < s.out_height ? first + block : s.out_height;
    const int64_t source_row = s.in_width * s.in_channels, out_row = s.out_width * s.in_channels;
    DepthwiseRow<T> row{
        {t.input + image * s.in_height * source_row, s.in_height, s.in_width, source_row, s.in_channels},
        vertical,
        horizontal,
        0,
        s.stride_width,
        s.out_width,
        s.in_channels,
        stream};
    const int64_t run = fetch ? 1 : end - first;
    for (int64_t y = first; y < end; y += run) {
      row.source_row = y * s.stride_height;
      if (fetch) row.next_source = next_rows(row, s.stride_height);
      with_taps(row, [&](auto width, auto step) {
        depthwise_pixels<T, decltype(width)::value, decltype(step)::value>(
            row, run, s.stride_height, weight, s.kernel_width, t.bias, s.relu,
            {t.output + (image * s.out_height + y) * out_row, s.in_channels, out_row});
      });
    }
    if (stream) finish_streaming();
  });
}

// grad: pixels grad_stride elements apart.
template <class T>
void depthwise_grad_input(const Conv2dShape& s, const T* grad, int64_t grad_stride, const T* weight_as_given,
                          T* grad_input) {
  if (s.in_width == 0) return;
  const Scratch<T> weight(weight_elements(s));
  pack_depthwise<T>(s.in_channels, kernel_taps(s), weight_as_given, weight);
  const bool stream = depthwise_streams(s, grad_input, s.in_height * s.in_width);
  const bool fetch = exceeds_caches<T>(s.batch * s.out_height * s.out_width * s.in_channels);
  const int64_t block = depthwise_rows_per_task(s.batch, s.in_height), blocks = (s.in_height + block - 1) / block;
  parallel_tasks(s.batch * blocks, [&](int64_t task, int) {
    const int64_t image = task / blocks, first = task % blocks * block;
    const int64_t end = first + block < s.in_height ? first + block : s.in_height;
    const int64_t source_row = s.out_width * grad_stride;
    const Image<T> source{grad + image * s.out_height * source_row, s.out_height, s.out_width, source_row, grad_stride};
    const int64_t run = s.stride_height == 1 && !fetch ? end - first : 1;  // rows that read through the same taps
    for (int64_t y = first; y < end; y += run) {
      const TapAxis vertical = phase_taps(vertical_axis(s), y % s.stride_height);
      T* out = grad_input + (image * s.in_height + y) * s.in_width * s.in_channels;
      for (int64_t phase = 0; phase < s.stride_width && phase < s.in_width; ++phase) {
        DepthwiseRow<T> row{source,
                            vertical,
                            phase_taps(horizontal_axis(s), phase),
                            y / s.stride_height,
                            1,
                            (s.in_width - phase + s.stride_width - 1) / s.stride_width,
                            s.in_channels,
                            stream};
        if (fetch && phase == 0 && y % s.stride_height == 0) row.next_source = next_rows(row, 1);
        with_taps(row, [&](auto width, auto step) {
          depthwise_pixels<T, decltype(width)::value, decltype(step)::value>(
              row, run, 1, weight, s.kernel_width, nullptr, false,
              {out + phase * s.in_channels, s.stride_width * s.in_channels, s.in_width * s.in_channels});
        });
      }
    }
    if (stream) finish_streaming();
  });
}

// As depthwise_row, the other way round: acc[kx] += source * grad.
template <class T, int pixels, int width, int step, bool inside>
FASTNN_INLINE void depthwise_outer_row(const DepthwiseRow<T>& row, const T* from, int64_t column, int64_t left,
                                       const Vec<T> (&grad)[pixels], T* sums) {
  const int64_t pixel_stride = row.source.pixel_stride;
  const int64_t first = -column, end = row.source.width - column;  // the source pixels that the image has
  if constexpr (width > 0) {
    Vec<T> acc[width];
    FASTNN_UNROLL
    for (int kx = 0; kx < width; ++kx) acc[kx] = load(sums + kx * kLanes<T>);
    slide<T, pixels, width, step, inside>(row, from, column,
                                          [&](int p, int kx, Vec<T> value)
                                              __attribute__((always_inline)) { acc[kx] += value * grad[p]; });
    FASTNN_UNROLL
    for (int kx = 0; kx < width; ++kx) store(sums + kx * kLanes<T>, acc[kx]);
  } else {
    for (int64_t kx = 0; kx < row.horizontal.count; ++kx) {
      Vec<T> acc = load(sums + kx * kLanes<T>);
      FASTNN_UNROLL
      for (int p = 0; p < pixels; ++p) {
        const int64_t j = p * row.source_step + kx * row.horizontal.offset_step;
        if (!inside && (j < first || j >= end)) continue;
        acc += load_upto(from + j * pixel_stride, left) * grad[p];
      }
      store(sums + kx * kLanes<T>, acc);
    }
  }
}

// Adds one row of grad to sums: [vector of channels][kernel place][lanes].
template <class T, int width, int step>
void depthwise_outer(const DepthwiseRow<T>& row, const T* grad, int64_t grad_stride, int64_t taps, T* sums) {
  const TapSpan span = taps_inside(row.vertical, row.source_row, row.source.height);
  const int64_t reach = row.horizontal.offset(row.horizontal.count - 1);
  const int64_t left = row.channels < kLanes<T> ? row.channels : kLanes<T>;
  for (int64_t tile = 0; tile < tiles_of(row.pixels); ++tile) {
    const TilePlace place = tile_place(row.pixels, tile);
    const int64_t column = place.first * row.source_step + row.horizontal.first_offset;
    const bool is_inside = column >= 0 && (place.first + place.pixels - 1) * row.source_step + reach < row.source.width;
    with_count<kTilePixels>(place.pixels, [&](auto constant) {
      constexpr int pixels = decltype(constant)::value;
      const auto run = [&](auto inside) {
        for (int64_t i = 0; i < vectors_of<T>(row.channels); ++i) {
          const int64_t c = vector_start<T>(i, row.channels);
          const int64_t share = tile * vectors_of<T>(row.channels) + i;
          const int64_t shares = tiles_of(row.pixels) * vectors_of<T>(row.channels);
          row.next_source.fetch(share, shares);
          row.next_grad.fetch(share, shares);
          Vec<T> g[pixels];
          FASTNN_UNROLL
          for (int p = 0; p < pixels; ++p) g[p] = load_upto(grad + (place.first + p) * grad_stride + c, left);
          for (int64_t ky = span.first; ky < span.end; ++ky) {
            const T* from = row.source.data + (row.source_row + row.vertical.offset(ky)) * row.source.row_stride +
                            column * row.source.pixel_stride + c;
            depthwise_outer_row<T, pixels, width, step, decltype(inside)::value>(
                row, from, column, left, g, sums + (i * taps + ky * row.horizontal.count) * kLanes<T>);
          }
        }
      };
      if (is_inside)
        run(Constant<1>{});
      else
        run(Constant<0>{});
    });
  }
}

// Chunks of rows, whose number depends on the shape alone, each sum into their own partial gradient, and the partials
// are added in order: the same bits for every thread count.
template <class T>
void depthwise_grad_weight(const Conv2dShape& s, const T* input, const T* grad, int64_t grad_stride, T* grad_weight) {
  const int64_t taps = kernel_taps(s), rows = s.batch * s.out_height;
  const int64_t chunks = rows < kTasks ? rows : kTasks;
  const int64_t vectors = vectors_of<T>(s.in_channels), elements = vectors * taps * kLanes<T>;
  const bool fetch = exceeds_caches<T>(s.batch * s.in_height * s.in_width * s.in_channels);
  const Scratch<T> partials(chunks * elements);
  const TapAxis vertical = forward_taps(vertical_axis(s));
  const TapAxis horizontal = forward_taps(horizontal_axis(s));
  parallel_tasks(chunks, [&](int64_t chunk, int) {
    T* sums = partials + chunk * elements;
    zero_run(elements, sums);
    const int64_t source_row = s.in_width * s.in_channels;
    for (int64_t i = rows * chunk / chunks; i < rows * (chunk + 1) / chunks; ++i) {
      DepthwiseRow<T> row{
          {input + i / s.out_height * s.in_height * source_row, s.in_height, s.in_width, source_row, s.in_channels},
          vertical,
          horizontal,
          i % s.out_height * s.stride_height,
          s.stride_width,
          s.out_width,
          s.in_channels};
      if (fetch) {
        row.next_source = next_rows(row, s.stride_height);
        if (i + 1 < rows) row.next_grad = {grad + (i + 1) * s.out_width * grad_stride, s.out_width * grad_stride};
      }
      with_taps(row, [&](auto width, auto step) {
        depthwise_outer<T, decltype(width)::value, decltype(step)::value>(row, grad + i * s.out_width * grad_stride,
                                                                          grad_stride, taps, sums);
      });
    }
  });
  add_partials<T>(chunks, elements, elements, partials, partials);
  for (int64_t i = 0; i < vectors; ++i) {
    const int64_t c = vector_start<T>(i, s.in_channels);
    const int64_t left = s.in_channels < kLanes<T> ? s.in_channels : kLanes<T>;
    transpose_matrix<T>(partials + i * taps * kLanes<T>, kLanes<T>, taps, left, grad_weight + c * taps, taps);
  }
}

}  // namespace
}  // namespace fastnn::cpu
