// Weight gradient of any geometry: an outer product per output pixel, summed over pixels in registers.
//
//   grad_w[t][i][o] = sum over images, y, x of source[y * stride + tap_y[t]][x * stride + tap_x[t]][i] * grad[y][x][o]
//
// The register tile's rows are up to kTileRows neighbours of (kx, i) - contiguous in a source row where pixels are
// dense -, in several rows of the kernel where these are few, its columns output channels, its depth the pixels of an
// output row.
//
// A unit is some output rows of one image. Units are cut into chunks whose number depends on the shape alone, each
// chunk sums into its own partial gradient, and the partials are added in order: the same bits for every thread count.
#pragma once

#include "cpu/kernels/conv2d_gather.inl.h"
#include "cpu/kernels/conv2d_grad_weight_packed.inl.h"
#include "cpu/kernels/conv2d_pack.inl.h"

namespace fastnn::cpu {
namespace {

// Pixels of a unit: 128 pixels x 32 channels of grad are 16 KiB, half of L1.
constexpr int64_t kUnitPixels = 128;

struct UnitPlan {
  int64_t rows_per_unit, units_per_image, units, chunks;
};

// At most `most` chunks.
template <class T>
UnitPlan plan_units(const Conv2dShape& s, int64_t partial_elements, int64_t most) {
  int64_t rows = kUnitPixels / s.out_width;
  if (rows < 1) rows = 1;
  if (rows > s.out_height) rows = s.out_height;
  const int64_t units_per_image = (s.out_height + rows - 1) / rows;
  const int64_t units = s.batch * units_per_image;
  int64_t chunks = kMaxPartialBytes / (partial_elements * static_cast<int64_t>(sizeof(T)));
  if (chunks > most) chunks = most;
  if (chunks > units) chunks = units;
  if (chunks < 1) chunks = 1;
  return {rows, units_per_image, units, chunks};
}

// body(first output row, rows, window of the source, images's index) for each unit of a chunk.
template <class T, class Body>
FASTNN_INLINE void for_each_unit(const Conv2dShape& s, const UnitPlan& plan, int64_t chunk, const T* source,
                                 int64_t channels, T* buffer, const Body& body) {
  for (int64_t unit = plan.units * chunk / plan.chunks; unit < plan.units * (chunk + 1) / plan.chunks; ++unit) {
    const int64_t image = unit / plan.units_per_image;
    const int64_t row = unit % plan.units_per_image * plan.rows_per_unit;
    const int64_t rows = s.out_height - row < plan.rows_per_unit ? s.out_height - row : plan.rows_per_unit;
    const Image<T> whole{source + image * s.in_height * s.in_width * s.in_channels, s.in_height, s.in_width,
                         s.in_width * s.in_channels, s.in_channels};
    const WindowRange range{row * s.stride_height - s.padding_height, -s.padding_width,
                            (rows - 1) * s.stride_height + (s.kernel_height - 1) * s.dilation_height + 1,
                            (s.out_width - 1) * s.stride_width + (s.kernel_width - 1) * s.dilation_width + 1};
    body(image, row, rows, window_of(whole, range, channels, buffer));
  }
}

inline int64_t unit_window_elements(const Conv2dShape& s, const UnitPlan& plan, int64_t channels) {
  const int64_t rows = (plan.rows_per_unit - 1) * s.stride_height + (s.kernel_height - 1) * s.dilation_height + 1;
  const int64_t columns = (s.out_width - 1) * s.stride_width + (s.kernel_width - 1) * s.dilation_width + 1;
  return window_elements({0, 0, rows, columns}, channels);
}

// Sums that are held in registers at a time: few at a time would each wait for the one before.
constexpr int kOuterSums = kVectorRegisters == 32 ? 25 : 12;
constexpr int kMostRuns = 5;

// Where the parts of an outer product lie, from one to the next.
struct OuterSteps {
  int64_t source_run, source_row, source_pixel, grad_row, grad_pixel, sum_run, sum;
};

// sums[run][r][column..] += source rows x grad rows for `runs` runs of `rows` neighbours of (kx, i), whose runs
// are rows of the kernel, and one panel.
template <class T, int rows, int vectors>
FASTNN_INLINE void outer_rows(int64_t runs, const T* source, const T* grad, const OuterSteps& steps, int64_t unit_rows,
                              int64_t width, T* sums) {
  with_count<kMostRuns>(runs, [&](auto count) {
    constexpr int held = decltype(count)::value;
    if constexpr (held == 1 || held * rows * vectors <= kOuterSums) {
      Vec<T> acc[held * rows][vectors];
      FASTNN_UNROLL
      for (int r = 0; r < held * rows; ++r) {
        FASTNN_UNROLL
        for (int v = 0; v < vectors; ++v)
          acc[r][v] = load(sums + r / rows * steps.sum_run + r % rows * steps.sum + v * kLanes<T>);
      }
      // multiply_add with one address a run: with as many as it has rows, these would take a third longer.
      for (int64_t y = 0; y < unit_rows; ++y) {
        const T* of_run[held];
        FASTNN_UNROLL
        for (int h = 0; h < held; ++h) of_run[h] = source + y * steps.source_row + h * steps.source_run;
        const T* g = grad + y * steps.grad_row;
        for (int64_t x = 0; x < width; ++x, g += steps.grad_pixel) {
          const int64_t pixel = unknown(x * steps.source_pixel);
          Vec<T> columns[vectors];
          FASTNN_UNROLL
          for (int v = 0; v < vectors; ++v) columns[v] = load(g + v * kLanes<T>);
          FASTNN_UNROLL
          for (int r = 0; r < held * rows; ++r) {
            const Vec<T> value = broadcast((of_run[r / rows] + pixel)[r % rows]);
            FASTNN_UNROLL
            for (int v = 0; v < vectors; ++v) acc[r][v] += value * columns[v];
          }
        }
      }
      FASTNN_UNROLL
      for (int r = 0; r < held * rows; ++r) {
        FASTNN_UNROLL
        for (int v = 0; v < vectors; ++v)
          store(sums + r / rows * steps.sum_run + r % rows * steps.sum + v * kLanes<T>, acc[r][v]);
      }
    }
  });
}

// One group. source and grad are at the group's first channel. Vectors of grad reach past a pixel's channels: what they
// read there adds to sums that nobody reads.
template <class T>
void grad_weight_outer(const Conv2dShape& s, const T* source, const T* grad, T* grad_weight) {
  const int64_t inputs = group_inputs(s), outputs = group_outputs(s), taps = kernel_taps(s);
  const int64_t panels = panels_of<T>(outputs);
  const int64_t padded = (outputs + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  const int64_t elements = taps * inputs * padded;
  // Columns are shared before chunks, each of which has sums of its own that are written, read and added.
  const int64_t column_tasks = panels < kTasks ? panels : kTasks;
  const UnitPlan plan = plan_units<T>(s, elements, (kTasks + column_tasks - 1) / column_tasks);
  const ConvAxis vertical = vertical_axis(s);
  const ThreadScratch<T> windows(max_threads(), unit_window_elements(s, plan, inputs));
  const Scratch<T> partials(plan.chunks * elements);
  const Scratch<T> buffer(is_ohwi(s) ? 0 : taps * inputs * outputs);
  // A copy of the last units' gradient, where they would reach past its end.
  const auto unit_begin = [&](int64_t unit) {
    const int64_t row = unit % plan.units_per_image * plan.rows_per_unit;
    return (unit / plan.units_per_image * s.out_height + row) * s.out_width * s.out_channels;
  };
  const int64_t grad_end = (s.batch * s.out_height * s.out_width - 1) * s.out_channels + outputs;
  int64_t first_copied = plan.units;
  while (first_copied > 0 && unit_begin(first_copied) - s.out_channels + padded > grad_end) --first_copied;
  const int64_t copied = unit_begin(first_copied);
  const Scratch<T> copy(copied < grad_end ? grad_end - copied : 0);
  if (copied < grad_end) copy_run<T>(grad + copied, grad_end - copied, copy);

  // How many runs, rows of the kernel from ky on, are summed at a time: of those of which no row lies outside the
  // image.
  const auto runs_at_a_time = [&](int64_t ky, int64_t row, int64_t unit_rows, int64_t most) {
    const auto inside = [&](int64_t y) { return outputs_inside(vertical, y, row, unit_rows).count == unit_rows; };
    int64_t held = 1;
    while (held < most && ky + held < s.kernel_height && inside(ky) && inside(ky + held)) ++held;
    return held;
  };
  // What a unit adds to the sums of the panels [first, last).
  const auto add_unit = [&](int64_t image, int64_t row, int64_t unit_rows, const Image<T>& window, int64_t first,
                            int64_t last, T* partial) {
    const bool merged = window.pixel_stride == inputs && s.dilation_width == 1;
    const int64_t run = merged ? s.kernel_width * inputs : inputs, runs = taps * inputs / run;
    const int64_t tiles = (run + kTileRows - 1) / kTileRows, longest = (run + tiles - 1) / tiles;
    const OuterSteps steps{s.dilation_height * window.row_stride,
                           s.stride_height * window.row_stride,
                           s.stride_width * window.pixel_stride,
                           s.out_width * s.out_channels,
                           s.out_channels,
                           run * padded,
                           padded};
    const int64_t before = (image * s.out_height + row) * s.out_width * s.out_channels;
    const T* unit_grad = before < copied ? grad + before : copy + (before - copied);
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t column = panel * kTileColumns<T>, vectors = padded - column > kLanes<T> ? 2 : 1;
      const int64_t fit = kOuterSums / (longest * vectors), most = !merged ? 1 : fit < kMostRuns ? fit : kMostRuns;
      int64_t held = 1;
      for (int64_t i = 0; i < runs; i += held) {
        const int64_t ky = merged ? i : i / s.kernel_width, kx = merged ? 0 : i % s.kernel_width;
        const PixelSpan inside = outputs_inside(vertical, ky, row, unit_rows);
        held = runs_at_a_time(ky, row, unit_rows, most);
        if (inside.count == 0) continue;
        const int64_t skipped = inside.first - row;
        const T* from = window.data + ky * steps.source_run + kx * s.dilation_width * window.pixel_stride +
                        skipped * steps.source_row;
        const T* grad_from = unit_grad + skipped * steps.grad_row + column;
        for_row_tiles(run, [&](auto constant, int64_t begin) {
          constexpr int rows = decltype(constant)::value;
          T* to = partial + (i * run + begin) * padded + column;
          if (vectors == 2)
            outer_rows<T, rows, 2>(held, from + begin, grad_from, steps, inside.count, s.out_width, to);
          else
            outer_rows<T, rows, 1>(held, from + begin, grad_from, steps, inside.count, s.out_width, to);
        });
      }
    }
  };

  parallel_tasks(plan.chunks * column_tasks, [&](int64_t task, int thread) {
    const int64_t chunk = task / column_tasks, column_task = task % column_tasks;
    const int64_t first = panels * column_task / column_tasks, last = panels * (column_task + 1) / column_tasks;
    T* partial = partials + chunk * elements;
    for (int64_t r = 0; r < taps * inputs; ++r) {
      const int64_t end = last * kTileColumns<T> < padded ? last * kTileColumns<T> : padded;
      zero_run(end - first * kTileColumns<T>, partial + r * padded + first * kTileColumns<T>);
    }
    for_each_unit(s, plan, chunk, source, inputs, windows[thread],
                  [&](int64_t image, int64_t row, int64_t unit_rows, const Image<T>& window) {
                    add_unit(image, row, unit_rows, window, first, last, partial);
                  });
  });
  add_partials<T>(plan.chunks, elements, elements, partials, partials);
  write_weight_gradient<T>(s, padded, partials, buffer, grad_weight);
}

}  // namespace
}  // namespace fastnn::cpu
