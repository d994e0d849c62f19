// Direct convolution of any geometry: the tiles of conv2d_gather_tile.inl.h over blocks of images, copied with a border
// where tiles would reach over it, and columns.
#pragma once

#include "cpu/kernels/conv2d_gather_tile.inl.h"

namespace fastnn::cpu {
namespace {

// Pixels of a block: enough to reuse a panel from L2 for some twenty tiles.
constexpr int64_t kBlockPixels = 192;
// One of so many columns may be made of tiles of one pixel, which take four times as long as a pixel of a full tile.
// With few products for each pixel, a copy would cost more.
constexpr int64_t kColumnsOfEdge = 50, kColumnsOfDotEdge = 12;

struct TapRange {
  int64_t y_min, y_max, x_min, x_max;
};

inline TapRange tap_range(const Taps& taps) {
  TapRange range{taps.y[0], taps.y[0], taps.x[0], taps.x[0]};
  for (int64_t t = 1; t < taps.count; ++t) {
    if (taps.y[t] < range.y_min) range.y_min = taps.y[t];
    if (taps.y[t] > range.y_max) range.y_max = taps.y[t];
    if (taps.x[t] < range.x_min) range.x_min = taps.x[t];
    if (taps.x[t] > range.x_max) range.x_max = taps.x[t];
  }
  return range;
}

// How many taps from t on are neighbours in one row.
inline int64_t tap_run(const Taps& taps, int64_t t) {
  int64_t run = 1;
  while (t + run < taps.count && taps.y[t + run] == taps.y[t] && taps.x[t + run] == taps.x[t] + run) ++run;
  return run;
}

// The taps of a window as runs; `table` holds one a tap. Where the window lies `in_place`, without a border, those
// taps alone that find the image under output column `first`.
template <class T>
Runs runs_of(const GatherConv<T>& conv, const TapRange& range, const Image<T>& window, bool in_place, int64_t first,
             Run* table) {
  Runs runs{0, table, 0};
  bool same = true;
  const auto is_outside = [&](int64_t t) {
    const int64_t x = first * conv.step_x + conv.taps.x[t];
    return in_place && (x < 0 || x >= conv.source_width);
  };
  for (int64_t t = 0; t < conv.taps.count;) {
    if (is_outside(t)) {
      ++t;
      continue;
    }
    int64_t length = 1;
    if (window.pixel_stride == conv.depth)
      for (const int64_t most = tap_run(conv.taps, t); length < most && !is_outside(t + length);) ++length;
    table[runs.count] = {
        (conv.taps.y[t] - range.y_min) * window.row_stride + (conv.taps.x[t] - range.x_min) * window.pixel_stride,
        length * conv.depth, conv.taps.y[t], t * conv.depth};
    same = same && table[runs.count].depth == table[0].depth;
    ++runs.count;
    t += length;
  }
  if (same && runs.count > 0) runs.common_depth = table[0].depth;
  return runs;
}

// How a convolution is cut into tasks for eight threads: `images` - of each group - times `blocks` blocks of rows (or
// tiles), times `column_parts`. Each block reads all weights of its columns anew, so columns are shared before blocks
// get smaller.
struct TaskPlan {
  int64_t block, blocks, column_parts;
};

// Blocks of at most `most` out of `count`, multiples of `multiple` where that keeps them about equal: each reads all
// weights, also the one that gets what is left.
inline TaskPlan plan_tasks(int64_t images, int64_t count, int64_t most, int64_t multiple, int64_t panels) {
  TaskPlan plan{0, (count + most - 1) / most, 1};
  for (;;) {
    const int64_t equal = (count + plan.blocks - 1) / plan.blocks, whole = (equal + multiple - 1) / multiple * multiple;
    plan.block = equal < multiple || whole * plan.blocks - count <= count / 8 ? whole : equal;
    plan.blocks = (count + plan.block - 1) / plan.block;
    if (images * plan.blocks * plan.column_parts >= kTasks) return plan;
    if (2 * plan.column_parts <= panels)
      plan.column_parts *= 2;
    else if (plan.block > multiple)
      plan.blocks = 2 * plan.blocks < count ? 2 * plan.blocks : count;
    else
      return plan;
  }
}

// Columns of the output.
struct ColumnRange {
  int64_t first, count;
};

// The columns under which every tap finds the image, where wide images are read as they lie; {0, 0} where windows are
// copied. Tiles leave out the taps above and below the image, and a tile of one pixel those at the sides: in each of
// the other columns, which are few. What a kernel copied it would read at once, behind all the stores of outputs that
// still wait for their lines: up to a fifth of a first layer's time.
template <class T>
ColumnRange columns_in_place(const GatherConv<T>& conv, const TapRange& range) {
  constexpr int kMostRows = kRowsOfVectors<1>;  // of any tile: no row is so narrow that others follow it in a tile
  if (conv.pool || conv.source_pixel_stride != conv.depth || conv.out_width <= kMostRows / 2) return {0, 0};
  const int64_t first = range.x_min < 0 ? -floor_div(range.x_min, conv.step_x) : 0;
  int64_t end = floor_div(conv.source_width - 1 - range.x_max, conv.step_x) + 1;
  if (end > conv.out_width) end = conv.out_width;
  const int64_t edges = conv.out_width - (end - first);
  return edges * (conv.dots ? kColumnsOfDotEdge : kColumnsOfEdge) <= conv.out_width ? ColumnRange{first, end - first}
                                                                                    : ColumnRange{0, 0};
}

// Some rows of an image for one panel; `place` is where the first is stored. `next` is fetched meanwhile.
template <class T>
void gather_panel(const GatherConv<T>& conv, const Image<T>& window, const Runs& runs, int64_t index, int64_t row,
                  int64_t rows, int64_t width, int64_t place, const FetchAhead<T>& next) {
  if (conv.dots) {
    return with_count<kFewColumns<T>>(conv.columns, [&](auto columns) {
      dot_pixels<T, decltype(columns)::value>(conv, window, runs, row, rows, width, conv.out + place, next);
    });
  }
  const int64_t column = index * kTileColumns<T>;
  const T* panel = conv.panels + column * conv.taps.count * conv.depth;
  T* out = conv.out + place + column;
  uint8_t* winner = conv.winner ? conv.winner + place + column : nullptr;
  const auto run = [&](auto vectors, auto depth) {
    constexpr int kVectors = decltype(vectors)::value, kDepth = decltype(depth)::value;
    if (conv.pool)
      pool_twice_if_nan([&](auto with_nan) {
        return gather_windows<T, kVectors, kDepth, decltype(with_nan)::value>(conv, window, runs, panel, column, rows,
                                                                              out, winner);
      });
    else
      gather_pixels<T, kVectors, kDepth>(conv, window, runs, panel, column, row, rows, width, out, next);
  };
  if (conv.columns - column <= kLanes<T>) return run(Constant<1>{}, Constant<0>{});
  switch (runs.common_depth) {
    case 3: return run(Constant<2>{}, Constant<3>{});  // 3x3 on a grey image
    case 9: return run(Constant<2>{}, Constant<9>{});  // 3x3 on three colours
    default: return run(Constant<2>{}, Constant<0>{});
  }
}

// All groups: where their weights are not more than the images, one group's columns of a block after the other's, since
// their numbers lie on the same pages.
template <class T>
void gather_conv(const GatherConv<T>& conv) {
  const int64_t pooling = conv.pool ? 2 : 1;
  const int64_t height = conv.out_height / pooling, width = conv.out_width / pooling;  // of what is stored
  if (conv.batch == 0 || height == 0 || width == 0 || conv.columns == 0) return;
  const TapRange range = tap_range(conv.taps);
  const int64_t panels = panels_of<T>(conv.columns);

  const int64_t rows_of_block = (kBlockPixels + width - 1) / width;
  const TaskPlan plan = plan_tasks(conv.batch * conv.groups, height, rows_of_block, 1, panels);
  const ColumnRange whole = columns_in_place(conv, range);
  const bool in_place = whole.count > 0;
  const int64_t window_width = (conv.out_width - 1) * conv.step_x + range.x_max - range.x_min + 1;
  const int64_t window_rows = (plan.block * pooling - 1) * conv.step_y + range.y_max - range.y_min + 1;
  const int64_t copied = in_place ? 0 : window_elements({0, 0, window_rows, window_width}, conv.depth);
  const bool from_memory = worth_fetching<T>(conv.batch * conv.source_image_stride);
  // Products of several taps hide the time of the memory. Beside one group of several lie other groups' channels.
  const bool fetch = from_memory && conv.depth == conv.source_pixel_stride && conv.taps.count == 1 && !conv.pool &&
                     plan.column_parts == 1;
  const TaskOrder order{conv.batch * plan.blocks, conv.groups * plan.column_parts,
                        conv.panel_elements() > conv.batch * conv.source_image_stride};
  const int64_t ahead = from_memory && conv.groups > 1 && !order.by_columns ? conv.depth : 0;  // the next group
  const ThreadScratch<T> windows(max_threads(), copied);
  const ThreadScratch<Run> tables(max_threads(), conv.taps.count);

  parallel_tasks(order.tasks(), [&](int64_t task, int thread) {
    const int64_t part = order.part(task) % plan.column_parts, block = order.block(task);
    const GatherConv<T> group = conv.of_group(order.part(task) / plan.column_parts);
    const int64_t image = block / plan.blocks, row = block % plan.blocks * plan.block;
    const int64_t rows = height - row < plan.block ? height - row : plan.block;

    const Image<T> source{group.source + image * group.source_image_stride, group.source_height, group.source_width,
                          group.source_row_stride, group.source_pixel_stride};
    FetchAhead<T> next{};  // source rows of the next block
    if (fetch) next = rows_ahead(source, (row + rows) * group.step_y, (row + 2 * rows) * group.step_y);
    const WindowRange window_range{row * pooling * group.step_y + range.y_min, range.x_min,
                                   (rows * pooling - 1) * group.step_y + range.y_max - range.y_min + 1, window_width};
    const Image<T> window = in_place ? window_in_place(source, window_range)
                                     : window_of(source, window_range, group.depth, windows[thread], false, ahead);
    const int64_t place = image * group.out_image_stride + row * group.out_row_stride;
    for (int64_t x = 0, count; x < group.out_width; x += count) {
      count = !in_place ? group.out_width : x == whole.first ? whole.count : 1;
      Image<T> columns = window;
      columns.data += x * group.step_x * window.pixel_stride;
      const Runs runs = runs_of(group, range, window, in_place, x, tables[thread]);
      for (int64_t i = panels * part / plan.column_parts; i < panels * (part + 1) / plan.column_parts; ++i) {
        gather_panel(group, columns, runs, i, row, rows, count, place + x * group.out_pixel_stride,
                     next.part(i, panels));
      }
    }
    if (group.stream) finish_streaming();
  });
}

}  // namespace
}  // namespace fastnn::cpu
