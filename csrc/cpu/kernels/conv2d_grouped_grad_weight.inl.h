// The weight's gradient of convolution in narrow groups (conv2d_grouped_tile.inl.h).
#pragma once

#include "cpu/kernels/conv2d_grouped.inl.h"

namespace fastnn::cpu {
namespace {

// As grouped_row, the other way round: sums += source * grad, vectors of sums by steps.
template <class T, int pixels, int width, int step, bool inside, bool depthwise>
FASTNN_INLINE void grouped_outer_row(const GroupedRow<T>& row, const T* from, int64_t column, int64_t left,
                                     const Vec<T> (&grad)[pixels], T* sums, WeightSteps steps) {
  const int64_t pixel_stride = row.source.pixel_stride;
  const int64_t place_step = depthwise ? kLanes<T> : steps.place;
  const int64_t first = -column, end = row.source.width - column;  // the source pixels that the image has
  each_member<T, depthwise>(row.members, [&](Mask<T> lanes, int64_t i) __attribute__((always_inline)) {
    T* of_member = sums + i * steps.member;
    if constexpr (step > 0) {
      each_run_of_taps<width>(row.horizontal.count, [&](auto run, int64_t first_tap) __attribute__((always_inline)) {
        constexpr int taps = decltype(run)::value;
        T* to = of_member + first_tap * place_step;
        Vec<T> acc[taps];
        FASTNN_UNROLL
        for (int kx = 0; kx < taps; ++kx) acc[kx] = load(to + kx * place_step);
        slide<T, pixels, 1, taps, step, inside, depthwise>(
            row, from + first_tap * pixel_stride, column + first_tap, lanes,
            [&](int p, int kx, int, Vec<T> value) __attribute__((always_inline)) { acc[kx] += value * grad[p]; });
        FASTNN_UNROLL
        for (int kx = 0; kx < taps; ++kx) store(to + kx * place_step, acc[kx]);
      });
    } else {
      for (int64_t kx = 0; kx < row.horizontal.count; ++kx) {
        Vec<T> acc = load(of_member + kx * place_step);
        FASTNN_UNROLL
        for (int p = 0; p < pixels; ++p) {
          const int64_t j = p * row.source_step + kx * row.horizontal.offset_step;
          if (!inside && (j < first || j >= end)) continue;
          acc += member_of_groups<T, depthwise>(load_upto(from + j * pixel_stride, left), lanes) * grad[p];
        }
        store(of_member + kx * place_step, acc);
      }
    }
  });
}

// Adds one row of grad to sums: [vector of channels][weight of an output, as it was given][lanes].
template <class T, int width, int step, bool depthwise>
void grouped_outer(const GroupedRow<T>& row, const T* grad, int64_t grad_stride, WeightSteps steps, int64_t weights,
                   T* sums) {
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
            grouped_outer_row<T, pixels, width, step, decltype(inside)::value, depthwise>(
                row, from, column, left, g, sums + i * weights * kLanes<T> + ky * row.horizontal.count * steps.place,
                steps);
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
void grouped_grad_weight(const Conv2dShape& s, const T* input, const T* grad, T* grad_weight) {
  const int64_t weights = kernel_taps(s) * group_inputs(s), rows = s.batch * s.out_height;
  const int64_t chunks = rows < kTasks ? rows : kTasks;
  const int64_t vectors = vectors_of<T>(s.in_channels), elements = vectors * weights * kLanes<T>;
  const bool fetch = worth_fetching<T>(s.batch * s.in_height * s.in_width * s.in_channels);
  const WeightSteps steps = times(given_steps(s), kLanes<T>);
  const Scratch<T> partials(chunks * elements);
  const TapAxis vertical = forward_taps(vertical_axis(s));
  const TapAxis horizontal = forward_taps(horizontal_axis(s));
  parallel_tasks(chunks, [&](int64_t chunk, int) {
    T* sums = partials + chunk * elements;
    zero_run(elements, sums);
    const int64_t source_row = s.in_width * s.in_channels;
    for (int64_t i = rows * chunk / chunks; i < rows * (chunk + 1) / chunks; ++i) {
      GroupedRow<T> row{
          {input + i / s.out_height * s.in_height * source_row, s.in_height, s.in_width, source_row, s.in_channels},
          vertical,
          horizontal,
          i % s.out_height * s.stride_height,
          s.stride_width,
          s.out_width,
          s.in_channels,
          group_inputs(s)};
      if (fetch) {
        row.next_source = next_rows(row, s.stride_height);
        if (i + 1 < rows) row.next_grad = {grad + (i + 1) * s.out_width * s.out_channels, s.out_width * s.out_channels};
      }
      for_each_part(row, [&](const GroupedRow<T>& part, int64_t pixel, int64_t pixel_step) {
        with_taps(part, [&](auto width, auto step, auto depthwise) {
          grouped_outer<T, decltype(width)::value, decltype(step)::value, decltype(depthwise)::value>(
              part, grad + (i * s.out_width + pixel) * s.out_channels, pixel_step * s.out_channels, steps, weights,
              sums);
        });
      });
    }
  });
  add_partials<T>(chunks, elements, elements, partials, partials);
  for (int64_t i = 0; i < vectors; ++i) {
    const int64_t c = vector_start<T>(i, s.in_channels);
    const int64_t left = s.in_channels < kLanes<T> ? s.in_channels : kLanes<T>;
    transpose_matrix<T>(partials + i * weights * kLanes<T>, kLanes<T>, weights, left, grad_weight + c * weights,
                        weights);
  }
}

}  // namespace
}  // namespace fastnn::cpu
