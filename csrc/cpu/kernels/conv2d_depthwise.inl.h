// Depthwise convolution (groups = in_channels = out_channels): no sum over channels, so vectors run along them.
//
//   out[y][x][c] = bias[c] + sum over taps t of source[y * step + tap_y[t]][x * step + tap_x[t]][c] * w[t][c]
//   grad_w[t][c] = sum over pixels of source[...][c] * grad[y][x][c]
//
// Both are limited by loads: one of the source for every FMA, which two load ports just feed.
#pragma once

#include "cpu/kernels/conv2d_gather.inl.h"
#include "cpu/kernels/conv2d_pack.inl.h"

namespace fastnn::cpu {
namespace {

// `conv` as for gather_conv with depth 1; its panels are [tap][channels], channels padded to whole vectors.
template <class T>
void depthwise_conv(const GatherConv<T>& conv) {
  if (conv.batch == 0 || conv.out_height == 0 || conv.out_width == 0) return;
  const int64_t channels = conv.columns;
  const int64_t padded = (channels + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  const TapRange range = tap_range(conv.taps);
  const int64_t block = rows_per_task(conv.batch, conv.out_height, conv.out_width);
  const int64_t blocks = (conv.out_height + block - 1) / block;
  const int64_t window_width = (conv.out_width - 1) * conv.step_x + range.x_max - range.x_min + 1;
  const int64_t window_rows = (block - 1) * conv.step_y + range.y_max - range.y_min + 1;
  const int64_t window_elements = window_rows * window_width * channels;
  const int threads = max_threads();
  const Scratch<T> windows(threads * window_elements);
  const Scratch<int64_t> tap_tables(threads * conv.taps.count);

  parallel_tasks(conv.batch * blocks, [&](int64_t task, int thread) {
    const int64_t image = task / blocks, row = task % blocks * block;
    const int64_t rows = conv.out_height - row < block ? conv.out_height - row : block;
    const Image<T> source{conv.source + image * conv.source_image_stride, conv.source_height, conv.source_width,
                          conv.source_row_stride, conv.source_pixel_stride};
    const WindowRange window_range{row * conv.step_y + range.y_min, range.x_min,
                                   (rows - 1) * conv.step_y + range.y_max - range.y_min + 1, window_width};
    const Image<T> window = window_of(source, window_range, channels, windows + thread * window_elements);
    int64_t* offsets = tap_tables + thread * conv.taps.count;
    for (int64_t t = 0; t < conv.taps.count; ++t)
      offsets[t] = (conv.taps.y[t] - range.y_min) * window.row_stride + (conv.taps.x[t] - range.x_min) * window.pixel_stride;

    T* out = conv.out + image * conv.out_image_stride + row * conv.out_row_stride;
    const int64_t x_step = conv.step_x * window.pixel_stride;
    for (int64_t c = 0; c < channels; c += kLanes<T>) {
      const int64_t left = channels - c < kLanes<T> ? channels - c : kLanes<T>;
      const Vec<T> bias = conv.bias ? load_upto(conv.bias + c, left) : Vec<T>{};
      for (int64_t y = 0; y < rows; ++y) {
        const T* pixel = window.data + y * conv.step_y * window.row_stride + c;
        T* to = out + y * conv.out_row_stride + c;
        for (int64_t x = 0; x < conv.out_width; x += kTileRows) {
          with_rows(conv.out_width - x < kTileRows ? conv.out_width - x : kTileRows, [&](auto constant) {
            constexpr int pixels = decltype(constant)::value;
            Vec<T> acc[pixels];
            FASTNN_UNROLL
            for (int p = 0; p < pixels; ++p) acc[p] = bias;
            const T* from = pixel + x * x_step;
            if (left == kLanes<T>) {
              for (int64_t t = 0; t < conv.taps.count; ++t) {
                const Vec<T> w = load(conv.panels + t * padded + c);
                FASTNN_UNROLL
                for (int p = 0; p < pixels; ++p) acc[p] += load(from + offsets[t] + p * x_step) * w;
              }
            } else {
              for (int64_t t = 0; t < conv.taps.count; ++t) {
                const Vec<T> w = load(conv.panels + t * padded + c);
                FASTNN_UNROLL
                for (int p = 0; p < pixels; ++p) acc[p] += load_first(from + offsets[t] + p * x_step, left) * w;
              }
            }
            FASTNN_UNROLL
            for (int p = 0; p < pixels; ++p)
              store_upto(to + (x + p) * conv.out_pixel_stride, conv.relu ? relu(acc[p]) : acc[p], left);
          });
        }
      }
    }
  });
}

// w[t][c], channels padded with zeros, for the taps listed in `places`; weight is (c, tap).
template <class T>
void pack_depthwise(int64_t channels, int64_t taps, const T* weight, int64_t count, const int64_t* places, T* panels) {
  const int64_t padded = (channels + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  for (int64_t t = 0; t < count; ++t)
    for (int64_t c = 0; c < padded; ++c) panels[t * padded + c] = c < channels ? weight[c * taps + places[t]] : T(0);
}

}  // namespace
}  // namespace fastnn::cpu
