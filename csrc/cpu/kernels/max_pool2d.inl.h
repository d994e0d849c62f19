// max_pool2d (ops/max_pool2d.h). Vectors run over channels where these lie together, else over output columns.
//
// Channels first, a row of the image is first dealt out by its columns' remainder modulo the stride, -inf in the
// padding, so that one tap of neighbouring windows is one contiguous load (stride 2, kernel 3, padding 1):
//
//   columns    -inf  0  1  2  3  4  5  6
//   phase 0    [-inf 1 3 5]    taps 0 and 2: at x and x + 1
//   phase 1    [   0 2 4 6]    tap 1: at x
#pragma once

#include "cpu/kernels/tile.inl.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd/lanes.h"
#include "cpu/simd/streaming.h"

namespace fastnn::cpu {
namespace {

// Elements times taps of one task: some 10 us, twenty times what an OpenMP region costs.
constexpr int64_t kPoolGrain = 1 << 16;
// Tasks of a channels-first call, each with row buffers of its own.
constexpr int64_t kPoolTasks = 64;

// The taps of a window that lie inside the image along one axis: begin <= i < end.
struct TapsInside {
  int64_t start;  // coordinate of tap 0, maybe outside
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};

inline TapsInside taps_of(const PoolAxis& axis, int64_t position) {
  TapsInside taps{position * axis.stride - axis.padding, 0, axis.kernel};
  if (taps.start < 0) taps.begin = (-taps.start + axis.dilation - 1) / axis.dilation;
  if (taps.start + (axis.kernel - 1) * axis.dilation >= axis.size)
    taps.end = taps.start < axis.size ? (axis.size - taps.start + axis.dilation - 1) / axis.dilation : 0;
  return taps;
}

inline int64_t tap_count(const MaxPool2dShape& shape) { return shape.y.kernel * shape.x.kernel; }

// Where each tap lies relative to tap 0, as an offset into the plane: tap -> i * dilation * width + j * dilation.
inline void fill_tap_offsets(const MaxPool2dShape& shape, int64_t* offsets) {
  for (int64_t i = 0; i < shape.y.kernel; ++i)
    for (int64_t j = 0; j < shape.x.kernel; ++j)
      *offsets++ = i * shape.y.dilation * shape.x.size + j * shape.x.dilation;
}

// The maximum so far of each lane's window and the tap that gave it.
template <class T>
struct Best {
  Vec<T> value;
  Mask<T> tap;
};

template <class T>
FASTNN_INLINE Best<T> no_best(int64_t first_tap) {
  return {broadcast(minus_infinity<T>), broadcast_lane<T>(first_tap)};
}

template <class T>
FASTNN_INLINE void update(Best<T>& best, Vec<T> value, Mask<T> tap) {
  const Mask<T> better = (value > best.value) | (value != value);
  best.value = better ? value : best.value;
  best.tap = better ? tap : best.tap;
}

// Writes `count` lanes at t.output + at, and the winners or indices beside them. room >= count lanes may be written.
// index_of(lane, tap) is called for indices alone.
template <class T, class IndexOf>
FASTNN_INLINE void store_best(const MaxPool2dForward<T>& t, int64_t at, const Best<T>& best, int64_t count,
                              int64_t room, const IndexOf& index_of) {
  if (room >= kLanes<T>) {
    store(t.output + at, best.value);
    if (t.winners) store_bytes<T>(t.winners + at, best.tap);
  } else {
    store_first(t.output + at, best.value, count);
    if (t.winners)
      for (int64_t lane = 0; lane < count; ++lane) t.winners[at + lane] = static_cast<uint8_t>(best.tap[lane]);
  }
  if (t.indices)
    for (int64_t lane = 0; lane < count; ++lane) t.indices[at + lane] = index_of(lane, best.tap[lane]);
}

// --- channels last -------------------------------------------------------------------------------------------------

// `vectors` vectors of the channels of one output pixel, `count` lanes of each. room is what store_best may write.
template <class T, int vectors>
FASTNN_INLINE void pool_channels(const MaxPool2dShape& shape, const MaxPool2dForward<T>& t, const T* image,
                                 const TapsInside& rows, const TapsInside& columns, const int64_t* offsets, int64_t at,
                                 int64_t count, int64_t room) {
  Best<T> best[vectors];
  FASTNN_UNROLL
  for (int v = 0; v < vectors; ++v) best[v] = no_best<T>(rows.begin * shape.x.kernel + columns.begin);
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const T* row = image + (rows.start + i * shape.y.dilation) * shape.x.size * shape.channels;
    for (int64_t j = columns.begin; j < columns.end; ++j) {
      const T* pixel = row + (columns.start + j * shape.x.dilation) * shape.channels;
      const Mask<T> tap = broadcast_lane<T>(i * shape.x.kernel + j);
      FASTNN_UNROLL
      for (int v = 0; v < vectors; ++v) update<T>(best[v], load_upto(pixel + v * kLanes<T>, count), tap);
    }
  }
  const int64_t origin = rows.start * shape.x.size + columns.start;
  const bool empty = rows.empty() || columns.empty();
  FASTNN_UNROLL
  for (int v = 0; v < vectors; ++v)
    store_best<T>(t, at + v * kLanes<T>, best[v], count, room - v * kLanes<T>,
                  [&](int64_t, int64_t tap) { return empty ? -1 : origin + offsets[tap]; });
}

template <class T>
void max_pool2d_forward_channels_last(const MaxPool2dShape& shape, const MaxPool2dForward<T>& t) {
  const Scratch<int64_t> offsets(t.indices ? tap_count(shape) : 0);
  if (t.indices) fill_tap_offsets(shape, offsets);
  const int64_t channels = shape.channels;
  const int64_t grain = kPoolGrain / (shape.x.out_size * channels * tap_count(shape)) + 1;
  parallel_ranges(shape.batch * shape.y.out_size, grain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* image = t.input + row / shape.y.out_size * shape.y.size * shape.x.size * channels;
      const TapsInside rows = taps_of(shape.y, row % shape.y.out_size);
      for (int64_t x = 0; x < shape.x.out_size; ++x) {
        const TapsInside columns = taps_of(shape.x, x);
        const int64_t pixel = (row * shape.x.out_size + x) * channels;
        const int64_t room = end * shape.x.out_size * channels - pixel;
        int64_t c = 0;
        // 4 vectors: 8 registers of state; the loop over taps costs less than its body.
        for (; c + 4 * kLanes<T> <= channels; c += 4 * kLanes<T>)
          pool_channels<T, 4>(shape, t, image + c, rows, columns, offsets, pixel + c, kLanes<T>, room - c);
        for (; c + kLanes<T> <= channels; c += kLanes<T>)
          pool_channels<T, 1>(shape, t, image + c, rows, columns, offsets, pixel + c, kLanes<T>, room - c);
        if (c < channels)
          pool_channels<T, 1>(shape, t, image + c, rows, columns, offsets, pixel + c, channels - c, room - c);
      }
    }
  });
}

template <class T>
inline void fill_zero(T* data, int64_t count) {
  __builtin_memset(data, 0, static_cast<size_t>(count) * sizeof(T));
}

// A window over a pixel, along one axis: where its gradients lie, and what the pixel's tap adds to the winner's byte.
struct Cover {
  int64_t offset, tap;
};

// The windows along one axis that cover a coordinate, in their order, at most axis.kernel; returns how many.
inline int64_t covers_of(const PoolAxis& axis, int64_t coordinate, int64_t window_step, int64_t tap_step,
                         Cover* covers) {
  const int64_t last = coordinate + axis.padding, first = last - (axis.kernel - 1) * axis.dilation;
  int64_t count = 0;
  for (int64_t window = first > 0 ? (first + axis.stride - 1) / axis.stride : 0;
       window < axis.out_size && window * axis.stride <= last; ++window) {
    const int64_t distance = last - window * axis.stride;
    if (distance % axis.dilation == 0) covers[count++] = {window * window_step, distance / axis.dilation * tap_step};
  }
  return count;
}

struct Covers {
  const Cover* data;
  int64_t count;
};

// `vectors` vectors of a pixel's channels, `lanes` of each: the sum of the gradients of those windows that it won.
template <class T, int vectors>
FASTNN_INLINE void sum_won(const T* grad_output, const uint8_t* winners, Covers rows, Covers columns, int64_t lanes,
                           bool stream, T* to) {
  Vec<T> sums[vectors]{};
  for (int64_t i = 0; i < rows.count; ++i) {
    for (int64_t j = 0; j < columns.count; ++j) {
      const int64_t at = rows.data[i].offset + columns.data[j].offset;
      const Mask<T> tap = broadcast_lane<T>(rows.data[i].tap + columns.data[j].tap);
      FASTNN_UNROLL
      for (int v = 0; v < vectors; ++v) {
        const Mask<T> won = load_bytes<T>(winners + at + v * kLanes<T>, lanes) == tap;
        sums[v] += won ? load_upto(grad_output + at + v * kLanes<T>, lanes) : Vec<T>{};
      }
    }
  }
  FASTNN_UNROLL
  for (int v = 0; v < vectors; ++v) {
    if (stream)
      store_streamed(to + v * kLanes<T>, sums[v]);
    else
      store_upto(to + v * kLanes<T>, sums[v], lanes);
  }
}

// Each pixel asks the windows over it: it is written once, and no two threads meet.
template <class T>
void gather_by_winner(const MaxPool2dShape& shape, const MaxPool2dBackward<T>& t) {
  const PoolAxis &y_axis = shape.y, &x_axis = shape.x;
  const int64_t channels = shape.channels, out_row = x_axis.out_size * channels;
  const Scratch<Cover> column_covers(x_axis.size * x_axis.kernel);
  const Scratch<int64_t> column_counts(x_axis.size);
  for (int64_t x = 0; x < x_axis.size; ++x)
    column_counts[x] = covers_of(x_axis, x, channels, 1, column_covers + x * x_axis.kernel);
  const bool stream = worth_streaming(t.grad_input, shape.batch * y_axis.size * x_axis.size * channels, channels);
  const int64_t row_work = y_axis.out_size * out_row * tap_count(shape) / y_axis.size + x_axis.size * channels;
  parallel_ranges(shape.batch * y_axis.size, kPoolGrain / row_work + 1, [&](int64_t begin, int64_t end) {
    Cover row_covers[kMaxByteTaps];
    for (int64_t row = begin; row < end; ++row) {
      const Covers rows{row_covers, covers_of(y_axis, row % y_axis.size, out_row, x_axis.kernel, row_covers)};
      const int64_t first = row / y_axis.size * y_axis.out_size * out_row;  // of this image's windows
      for (int64_t x = 0; x < x_axis.size; ++x) {
        const Covers columns{column_covers + x * x_axis.kernel, column_counts[x]};
        T* pixel = t.grad_input + (row * x_axis.size + x) * channels;
        const auto sum = [&](auto vectors, int64_t c, int64_t lanes) {
          sum_won<T, decltype(vectors)::value>(t.grad_output + first + c, t.winners + first + c, rows, columns, lanes,
                                               stream, pixel + c);
        };
        int64_t c = 0;
        for (; c + 4 * kLanes<T> <= channels; c += 4 * kLanes<T>) sum(Constant<4>{}, c, kLanes<T>);
        for (; c + kLanes<T> <= channels; c += kLanes<T>) sum(Constant<1>{}, c, kLanes<T>);
        if (c < channels && channels > kLanes<T>)
          sum(Constant<1>{}, channels - kLanes<T>, kLanes<T>);  // some of them once more
        else if (c < channels)
          sum(Constant<1>{}, c, channels);
      }
    }
    if (stream) finish_streaming();
  });
}

template <class T>
void scatter_by_index(const MaxPool2dShape& shape, const MaxPool2dBackward<T>& t) {
  const int64_t channels = shape.channels, plane = shape.y.size * shape.x.size;
  const int64_t out_plane = shape.y.out_size * shape.x.out_size;
  // A small batch is cut into blocks of channels too, of whole cache lines.
  const int64_t block = shape.batch >= 8 ? channels : 64;
  const int64_t blocks = (channels + block - 1) / block;
  const int64_t grain = kPoolGrain / (out_plane * block * tap_count(shape)) + 1;
  parallel_ranges(shape.batch * blocks, grain, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t image = task / blocks, begin = task % blocks * block;
      const int64_t end = begin + block < channels ? begin + block : channels;
      T* grad_image = t.grad_input + image * plane * channels;
      const T* grad_output = t.grad_output + image * out_plane * channels;
      const int64_t* indices = t.indices + image * out_plane * channels;
      for (int64_t pixel = 0; pixel < plane; ++pixel) fill_zero(grad_image + pixel * channels + begin, end - begin);
      for (int64_t pixel = 0; pixel < out_plane; ++pixel)
        for (int64_t c = begin; c < end; ++c) {
          const int64_t index = indices[pixel * channels + c];
          if (index >= 0 && index < plane) grad_image[index * channels + c] += grad_output[pixel * channels + c];
        }
    }
  });
}

template <class T>
void max_pool2d_backward_channels_last(const MaxPool2dShape& shape, const MaxPool2dBackward<T>& t) {
  t.indices ? scatter_by_index(shape, t) : gather_by_winner(shape, t);
}

// --- channels first ------------------------------------------------------------------------------------------------

// One row of an image dealt out by column modulo stride: column q - padding lies at phase q % stride, place q / stride.
struct Phases {
  int64_t stride, padding;
  int64_t columns;  // that windows reach
  int64_t length;   // of a phase, a multiple of all vectors' lanes that covers every load

  explicit Phases(const PoolAxis& axis)
      : stride(axis.stride),
        padding(axis.padding),
        columns((axis.out_size - 1) * axis.stride + (axis.kernel - 1) * axis.dilation + 1 - axis.padding),
        length((axis.out_size + (axis.kernel - 1) * axis.dilation / axis.stride + 2 * kVectorBytes) / kVectorBytes *
               kVectorBytes) {}
  int64_t row_size() const { return stride * length; }
};

// buffer's padding holds -inf already.
template <class T>
inline void deal_row(const Phases& phases, const T* row, int64_t width, T* buffer) {
  const int64_t stride = phases.stride;
  if (width > phases.columns) width = phases.columns;
  if (stride == 2) {
    const int64_t odd_start = phases.padding % 2;
    T* first = buffer + odd_start * phases.length + phases.padding / 2;               // columns 0, 2, ...
    T* second = buffer + (1 - odd_start) * phases.length + (phases.padding + 1) / 2;  // columns 1, 3, ...
    for (int64_t x = 0; x < width; x += 2 * kLanes<T>) {
      const int64_t left = width - x;
      if (left >= 2 * kLanes<T>) {
        const Vec<T> a = load(row + x), b = load(row + x + kLanes<T>);
        store(first + x / 2, alternate_lanes<T, 0>(a, b));
        store(second + x / 2, alternate_lanes<T, 1>(a, b));
      } else {
        const Vec<T> a = load_upto(row + x, left < kLanes<T> ? left : kLanes<T>);
        const Vec<T> b = left > kLanes<T> ? load_first(row + x + kLanes<T>, left - kLanes<T>) : Vec<T>{};
        store_upto(first + x / 2, alternate_lanes<T, 0>(a, b), (left + 1) / 2);
        store_upto(second + x / 2, alternate_lanes<T, 1>(a, b), left / 2);
      }
    }
    return;
  }
  for (int64_t phase = 0; phase < stride; ++phase) {
    // The first column of this phase, and its place.
    const int64_t column = (phase - phases.padding % stride + stride) % stride;
    T* to = buffer + phase * phases.length + (column + phases.padding) / stride;
    for (int64_t x = column; x < width; x += stride) *to++ = row[x];
  }
}

template <class T>
void max_pool2d_forward_channels_first(const MaxPool2dShape& shape, const MaxPool2dForward<T>& t) {
  const PoolAxis &y_axis = shape.y, &x_axis = shape.x;
  const Phases phases(x_axis);
  const int64_t planes = shape.batch * shape.channels;
  const int64_t plane = y_axis.size * x_axis.size, out_plane = y_axis.out_size * x_axis.out_size;
  const int64_t work = planes * out_plane * tap_count(shape);
  const int64_t wanted = work / kPoolGrain + 1 < kPoolTasks ? work / kPoolGrain + 1 : kPoolTasks;
  const int64_t planes_per_task = (planes + wanted - 1) / wanted;
  const int64_t tasks = (planes + planes_per_task - 1) / planes_per_task;

  const Scratch<int64_t> offsets(tap_count(shape));
  if (t.indices) fill_tap_offsets(shape, offsets);
  const Scratch<int64_t> places(x_axis.kernel);  // of tap j of window 0 in a dealt row
  for (int64_t j = 0; j < x_axis.kernel; ++j) {
    const int64_t q = j * x_axis.dilation;
    places[j] = q % phases.stride * phases.length + q / phases.stride;
  }
  const Scratch<TapsInside> columns(x_axis.out_size);
  const int64_t vectors_x = (x_axis.out_size + kLanes<T> - 1) / kLanes<T>;
  const Scratch<LaneType<T>> first_columns(vectors_x * kLanes<T>);
  for (int64_t x = 0; x < vectors_x * kLanes<T>; ++x) {
    const TapsInside taps = taps_of(x_axis, x);
    if (x < x_axis.out_size) columns[x] = taps;
    first_columns[x] = static_cast<LaneType<T>>(taps.begin);
  }
  const int64_t buffer_size = y_axis.kernel * phases.row_size();
  const Scratch<T> buffers(tasks * buffer_size);

  parallel_for(tasks, [&](int64_t task) {
    T* buffer = buffers + task * buffer_size;
    for (int64_t i = 0; i < buffer_size; ++i) buffer[i] = minus_infinity<T>;
    const int64_t first_plane = task * planes_per_task;
    const int64_t last_plane = first_plane + planes_per_task < planes ? first_plane + planes_per_task : planes;
    for (int64_t p = first_plane; p < last_plane; ++p) {
      for (int64_t y = 0; y < y_axis.out_size; ++y) {
        const TapsInside rows = taps_of(y_axis, y);
        for (int64_t i = rows.begin; i < rows.end; ++i)
          deal_row(phases, t.input + p * plane + (rows.start + i * y_axis.dilation) * x_axis.size, x_axis.size,
                   buffer + i * phases.row_size());
        const int64_t at = p * out_plane + y * x_axis.out_size;
        for (int64_t x = 0; x < x_axis.out_size; x += kLanes<T>) {
          Best<T> best = no_best<T>(rows.begin * x_axis.kernel);
          best.tap += load_lanes<T>(first_columns + x);
          for (int64_t i = rows.begin; i < rows.end; ++i) {
            const T* row = buffer + i * phases.row_size() + x;
            for (int64_t j = 0; j < x_axis.kernel; ++j)
              update<T>(best, load(row + places[j]), broadcast_lane<T>(i * x_axis.kernel + j));
          }
          // Lanes beyond the row may be written where the task's own later rows overwrite them.
          const int64_t count = x_axis.out_size - x < kLanes<T> ? x_axis.out_size - x : kLanes<T>;
          store_best<T>(t, at + x, best, count, last_plane * out_plane - (at + x), [&](int64_t lane, int64_t tap) {
            const TapsInside& window = columns[x + lane];
            return rows.empty() || window.empty() ? -1 : rows.start * x_axis.size + window.start + offsets[tap];
          });
        }
      }
    }
  });
}

template <class T>
void max_pool2d_backward_channels_first(const MaxPool2dShape& shape, const MaxPool2dBackward<T>& t) {
  const int64_t plane = shape.y.size * shape.x.size, out_plane = shape.y.out_size * shape.x.out_size;
  // Where each byte points to; what is no tap points outside the image.
  struct Tap {
    int64_t row, column;
  };
  const Scratch<Tap> taps(kMaxByteTaps);
  for (int64_t tap = 0; tap < kMaxByteTaps; ++tap) {
    const int64_t i = tap / shape.x.kernel, j = tap % shape.x.kernel;
    taps[tap] = tap < tap_count(shape) ? Tap{i * shape.y.dilation, j * shape.x.dilation} : Tap{-(int64_t{1} << 62), 0};
  }
  parallel_ranges(shape.batch * shape.channels, kPoolGrain / plane + 1, [&](int64_t begin, int64_t end) {
    fill_zero(t.grad_input + begin * plane, (end - begin) * plane);
    for (int64_t p = begin; p < end; ++p) {
      T* grad_plane = t.grad_input + p * plane;
      const T* grad_output = t.grad_output + p * out_plane;
      if (t.indices) {
        const int64_t* indices = t.indices + p * out_plane;
        for (int64_t pixel = 0; pixel < out_plane; ++pixel)
          if (indices[pixel] >= 0 && indices[pixel] < plane) grad_plane[indices[pixel]] += grad_output[pixel];
        continue;
      }
      const uint8_t* winners = t.winners + p * out_plane;
      for (int64_t y = 0; y < shape.y.out_size; ++y) {
        const int64_t row_start = y * shape.y.stride - shape.y.padding;
        for (int64_t x = 0; x < shape.x.out_size; ++x) {
          const int64_t pixel = y * shape.x.out_size + x;
          const Tap tap = taps[winners[pixel]];
          const int64_t row = row_start + tap.row, column = x * shape.x.stride - shape.x.padding + tap.column;
          if (static_cast<uint64_t>(row) < static_cast<uint64_t>(shape.y.size) &&
              static_cast<uint64_t>(column) < static_cast<uint64_t>(shape.x.size))
            grad_plane[row * shape.x.size + column] += grad_output[pixel];
        }
      }
    }
  });
}

// --- rows of the kernel table --------------------------------------------------------------------------------------

template <class T>
void max_pool2d_forward(const MaxPool2dShape& shape, const MaxPool2dForward<T>& t) {
  trace<T>("max_pool2d_forward", shape.channels_last ? "channels_last" : "channels_first");
  shape.channels_last ? max_pool2d_forward_channels_last(shape, t) : max_pool2d_forward_channels_first(shape, t);
}

template <class T>
void max_pool2d_backward(const MaxPool2dShape& shape, const MaxPool2dBackward<T>& t) {
  trace<T>("max_pool2d_backward", shape.channels_last ? "channels_last" : "channels_first");
  shape.channels_last ? max_pool2d_backward_channels_last(shape, t) : max_pool2d_backward_channels_first(shape, t);
}

}  // namespace
}  // namespace fastnn::cpu
