// max_pool2d, forward and backward: see ops/max_pool2d.h for the formulas.
//
// Channels-first images are channels-last ones of one channel: (batch * channels, height, width, 1). A thread takes an
// item, a pixel and one channel of it or as many as 16 bytes hold; items are numbered in the order of memory.
//
// Backward adds nothing up in memory, so it gives the same bits every time:
//
//   cells    windows that do not overlap: each owns a cell of stride x stride pixels, its taps and the gap to the next
//            window. The thread of a window writes its cell: the gradient at the winner, 0 elsewhere
//   gather   the others: the thread of a pixel looks through the windows that contain it, in order, and adds the
//            gradients of those it won
//
//   kernel 2, stride 3     a a . b b .        kernel 3, stride 2     a a a
//   (one axis)             |cell |                                       b b b     pixel 2 is in a and b
#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/divider.cuh"
#include "cuda/vector.cuh"

namespace fastnn::cuda {
namespace {

constexpr int kPoolThreads = 256;
// Taps that are loaded before the first is compared: all of a 2x2 window. The maximum alone would make each load wait
// for the one before.
constexpr int kTapsAtOnce = 4;
// Cells of at most 4 x 4 pixels: beyond, one thread would write too much of the image alone.
constexpr int64_t kMostCellSide = 4;
// Coordinates are 32-bit numbers, at most three of these added up; torch has the same limit. Offsets are 64-bit.
constexpr int64_t kMostPoolSize = int64_t{1} << 29;
// Items of a launch, which are numbered with 32 bits; more are more launches.
constexpr int64_t kMostPoolItems = int64_t{1} << 30;

// PoolAxis in 32 bits.
struct PoolSide {
  int size, out_size, kernel, stride, padding, dilation;
};

struct PoolImage {
  PoolSide y, x;
  int64_t channels;
};

// The items of a launch: rows of images from first_image's first_row on.
struct PoolItems {
  int64_t first_image, first_offset;  // of the first item's element
  uint32_t first_row, count;
  Divider packs, columns, rows;  // of one pixel, one row, one image
};

struct PoolItem {
  int64_t image;
  int row, column;
  int64_t channel;
};

template <int kPack>
__device__ __forceinline__ PoolItem pool_item(const PoolItems& items, uint32_t index) {
  PoolItem item;
  uint32_t rest = index;
  uint32_t pixel = items.packs.split(rest);
  item.channel = int64_t{rest} * kPack;
  uint32_t row = items.columns.split(pixel) + items.first_row;
  item.column = static_cast<int>(pixel);
  item.image = items.first_image + items.rows.split(row);
  item.row = static_cast<int>(row);
  return item;
}

__device__ __forceinline__ bool is_inside(int position, int size) {
  return static_cast<unsigned>(position) < static_cast<unsigned>(size);
}

__device__ __forceinline__ int64_t pixel_offset(const PoolImage& s, int64_t image, int row, int column) {
  return ((image * s.y.size + row) * s.x.size + column) * s.channels;
}

__device__ __forceinline__ int64_t window_offset(const PoolImage& s, int64_t image, int y, int x) {
  return ((image * s.y.out_size + y) * s.x.out_size + x) * s.channels;
}

// An item is a window. Indices are written with kPack = 1 alone: 8 bytes of 32 neighbouring threads are whole sectors.
template <class T, int kPack>
__global__ void __launch_bounds__(kPoolThreads)
    max_pool2d_forward_kernel(PoolImage s, PoolItems items, Divider kernel_width, MaxPool2dForward<T> b) {
  begin_kernel();
  using C = Compute<T>;
  const int taps = s.y.kernel * s.x.kernel;
  // Offsets from a tap to the next in its row, and from a row's last to the next row's first.
  const int64_t step = s.x.dilation * s.channels;
  const int64_t row_step = (int64_t{s.y.dilation} * s.x.size - int64_t{s.x.dilation} * (s.x.kernel - 1)) * s.channels;
  for (uint32_t index = global_thread(); index < items.count; index += grid_threads()) {
    const PoolItem item = pool_item<kPack>(items, index);
    const int start_row = item.row * s.y.stride - s.y.padding, start_column = item.column * s.x.stride - s.x.padding;
    C best[kPack];
    int winner[kPack];
#pragma unroll
    for (int e = 0; e < kPack; ++e) best[e] = static_cast<C>(-INFINITY), winner[e] = -1;
    int first_inside = -1;  // the winner where all that the window sees is -inf

    int64_t offset = pixel_offset(s, item.image, start_row, start_column) + item.channel;
    int row = start_row, column = start_column, j = 0;
    for (int tap = 0; tap < taps; tap += kTapsAtOnce) {
      Pack<T, kPack> values[kTapsAtOnce] = {};  // GCC cannot see that what is read was loaded
      bool inside[kTapsAtOnce];
#pragma unroll
      for (int u = 0; u < kTapsAtOnce; ++u) {
        inside[u] = tap + u < taps && is_inside(row, s.y.size) && is_inside(column, s.x.size);
        if (inside[u]) values[u] = load_pack<T, kPack>(b.input + offset);
        const bool ends_row = ++j == s.x.kernel;
        offset += ends_row ? row_step : step;
        row += ends_row ? s.y.dilation : 0;
        column = ends_row ? start_column : column + s.x.dilation;
        j = ends_row ? 0 : j;
      }
#pragma unroll
      for (int u = 0; u < kTapsAtOnce; ++u) {
        if (!inside[u]) continue;
        if (first_inside < 0) first_inside = tap + u;
#pragma unroll
        for (int e = 0; e < kPack; ++e) {
          const C x = widen(values[u].values[e]);
          if (x > best[e] || x != x) best[e] = x, winner[e] = tap + u;
        }
      }
    }

    Pack<T, kPack> output;
    Pack<uint8_t, kPack> bytes;
#pragma unroll
    for (int e = 0; e < kPack; ++e) {
      if (winner[e] < 0) winner[e] = first_inside;
      output.values[e] = narrow<T>(best[e]);
      bytes.values[e] = static_cast<uint8_t>(winner[e]);
    }
    const int64_t at = items.first_offset + int64_t{index} * kPack;
    store_pack(b.output + at, output);
    if (b.winners) store_pack(b.winners + at, bytes);
    if constexpr (kPack == 1)
      if (b.indices) {
        uint32_t place = winner[0];
        const int i = kernel_width.split(place);
        b.indices[at] = winner[0] < 0 ? -1
                                      : int64_t{start_row + i * s.y.dilation} * s.x.size + start_column +
                                            static_cast<int>(place) * s.x.dilation;
      }
  }
}

// Who won kPack windows: bytes, or the index of a single one.
template <class T, int kPack>
struct PoolWinners {
  Pack<uint8_t, kPack> bytes{};
  int64_t index = -1;

  __device__ __forceinline__ void load(const MaxPool2dBackward<T>& b, int64_t offset) {
    if (kPack > 1 || b.winners)
      bytes = load_pack<uint8_t, kPack>(b.winners + offset);
    else
      index = b.indices[offset];
  }
  // Whether window e was won by the pixel which is its tap `tap`, -1 if it is none.
  __device__ __forceinline__ bool won_by(const MaxPool2dBackward<T>& b, int e, int tap, int64_t pixel) const {
    return kPack > 1 || b.winners ? bytes.values[e] == tap : index == pixel;
  }
};

// An item is a cell.
template <class T, int kPack>
__global__ void __launch_bounds__(kPoolThreads)
    max_pool2d_backward_cells_kernel(PoolImage s, PoolItems items, MaxPool2dBackward<T> b) {
  begin_kernel();
  for (uint32_t index = global_thread(); index < items.count; index += grid_threads()) {
    const PoolItem item = pool_item<kPack>(items, index);
    Pack<T, kPack> grads{};
    PoolWinners<T, kPack> winners;
    const bool has_window = item.row < s.y.out_size && item.column < s.x.out_size;
    if (has_window) {
      const int64_t at = window_offset(s, item.image, item.row, item.column) + item.channel;
      grads = load_pack<T, kPack>(b.grad_output + at);
      winners.load(b, at);
    }
    const int start_row = item.row * s.y.stride - s.y.padding, start_column = item.column * s.x.stride - s.x.padding;
    for (int i = 0; i < s.y.stride; ++i) {
      const int row = start_row + i;
      if (!is_inside(row, s.y.size)) continue;
      for (int j = 0; j < s.x.stride; ++j) {
        const int column = start_column + j;
        if (!is_inside(column, s.x.size)) continue;
        const int tap = has_window && i < s.y.kernel && j < s.x.kernel ? i * s.x.kernel + j : -1;
        const int64_t pixel = int64_t{row} * s.x.size + column;
        Pack<T, kPack> result;
#pragma unroll
        for (int e = 0; e < kPack; ++e)
          result.values[e] = winners.won_by(b, e, tap, pixel) ? grads.values[e] : narrow<T>(0);
        store_pack(b.grad_input + pixel_offset(s, item.image, row, column) + item.channel, result);
      }
    }
  }
}

// The windows along one axis that may contain a position: first <= window <= last.
struct PoolWindows {
  int position;  // from the start of window 0
  int first, last;
};

__device__ __forceinline__ PoolWindows windows_of(const PoolSide& side, const Divider& stride, int position) {
  const int place = position + side.padding, reach = (side.kernel - 1) * side.dilation;
  const int last = static_cast<int>(stride.divide(place));
  return {place, place > reach ? static_cast<int>(stride.divide(place - reach + side.stride - 1)) : 0,
          last < side.out_size ? last : side.out_size - 1};
}

// The number of the window's tap that lies at the position, or -1 where dilation steps over it.
__device__ __forceinline__ int tap_at(const PoolSide& side, const Divider& dilation, const PoolWindows& windows,
                                      int window) {
  uint32_t rest = windows.position - window * side.stride;
  const int tap = dilation.split(rest);
  return rest == 0 ? tap : -1;
}

struct PoolDividers {
  Divider y_stride, x_stride, y_dilation, x_dilation;
};

// An item is a pixel.
template <class T, int kPack>
__global__ void __launch_bounds__(kPoolThreads, 4)
    max_pool2d_backward_gather_kernel(PoolImage s, PoolItems items, PoolDividers by, MaxPool2dBackward<T> b) {
  begin_kernel();
  for (uint32_t index = global_thread(); index < items.count; index += grid_threads()) {
    const PoolItem item = pool_item<kPack>(items, index);
    const PoolWindows rows = windows_of(s.y, by.y_stride, item.row);
    const PoolWindows columns = windows_of(s.x, by.x_stride, item.column);
    const int64_t pixel = int64_t{item.row} * s.x.size + item.column;
    Compute<T> sums[kPack] = {};
    for (int y = rows.first; y <= rows.last; ++y) {
      const int i = tap_at(s.y, by.y_dilation, rows, y);
      if (i < 0) continue;
      for (int x = columns.first; x <= columns.last; ++x) {
        const int j = tap_at(s.x, by.x_dilation, columns, x);
        if (j < 0) continue;
        const int64_t at = window_offset(s, item.image, y, x) + item.channel;
        const Pack<T, kPack> grads = load_pack<T, kPack>(b.grad_output + at);
        PoolWinners<T, kPack> winners;
        winners.load(b, at);
#pragma unroll
        for (int e = 0; e < kPack; ++e)
          if (winners.won_by(b, e, i * s.x.kernel + j, pixel)) sums[e] += widen(grads.values[e]);
      }
    }
    Pack<T, kPack> result;
#pragma unroll
    for (int e = 0; e < kPack; ++e) result.values[e] = narrow<T>(sums[e]);
    store_pack(b.grad_input + items.first_offset + int64_t{index} * kPack, result);
  }
}

PoolSide pool_side(const PoolAxis& axis) {
  // Of a single tap, and of a single window, these may be any number: one that makes a cell of the window.
  const int64_t dilation = axis.kernel == 1 ? 1 : axis.dilation;
  const int64_t stride = axis.out_size == 1 ? axis.kernel : axis.stride;
  for (const int64_t size : {axis.size, axis.out_size, axis.kernel, stride, axis.padding, dilation,
                             (axis.kernel - 1) * dilation, (axis.out_size - 1) * stride})
    if (size > kMostPoolSize) throw std::runtime_error("max_pool2d: expected sizes of at most 2^29 along an axis");
  const auto narrowed = [](int64_t size) { return static_cast<int>(size); };
  return {narrowed(axis.size), narrowed(axis.out_size), narrowed(axis.kernel),
          narrowed(stride),    narrowed(axis.padding),  narrowed(dilation)};
}

// How a call's images are seen: the layout folded in, and whether 16 bytes of channels are moved at once.
struct PoolPlan {
  PoolImage image;
  int64_t images;
  bool vector;
  int layout;  // 0: channels-first, 1: channels-last, 2: channels-last in vectors
};

template <class T, class... Pointers>
PoolPlan plan_pool(const MaxPool2dShape& s, const uint8_t* winners, const int64_t* indices, const Pointers*... arrays) {
  constexpr int kPack = kPackOf16Bytes<T>;
  const int64_t channels = s.channels_last ? s.channels : 1;
  if (s.y.kernel > kMostPoolSize / s.x.kernel) throw std::runtime_error("max_pool2d: expected at most 2^29 taps");
  const bool vector = !indices && channels % kPack == 0 && aligned_to(16, arrays...) && aligned_to(kPack, winners);
  return {{pool_side(s.y), pool_side(s.x), channels},
          s.channels_last ? s.batch : s.batch * s.channels,
          vector,
          s.channels_last ? 1 + vector : 0};
}

// kernel(image, items, arguments...) for all rows of images of rows x columns pixels, windows or cells.
template <class T, class... Parameters, class... Arguments>
void launch_pool(const char* operation, const Queue& queue, void (*kernel)(Parameters...), const PoolPlan& plan,
                 int64_t rows, int64_t columns, const Arguments&... arguments) {
  const int64_t pack = plan.vector ? kPackOf16Bytes<T> : 1, packs = plan.image.channels / pack;
  const int64_t row_items = columns * packs, all_rows = plan.images * rows;
  if (row_items > kMostPoolItems) throw std::runtime_error("max_pool2d: expected rows of at most 2^30 elements");
  const int64_t rows_at_once = kMostPoolItems / row_items;
  for (int64_t row = 0; row < all_rows; row += rows_at_once) {
    const int64_t count = std::min(rows_at_once, all_rows - row) * row_items;
    const PoolItems items{row / rows,
                          row * row_items * pack,
                          static_cast<uint32_t>(row % rows),
                          static_cast<uint32_t>(count),
                          Divider(packs),
                          Divider(columns),
                          Divider(rows)};
    launch(operation, queue, kernel, blocks_for(count, kPoolThreads), kPoolThreads, 0, plan.image, items, arguments...);
  }
}

// Whether each window owns a cell along this axis.
bool has_cells(const PoolSide& side) {
  return side.dilation == 1 && side.kernel <= side.stride && side.stride <= kMostCellSide;
}

int64_t cell_count(const PoolSide& side) { return (int64_t{side.size} + side.padding + side.stride - 1) / side.stride; }

}  // namespace

template <class T>
void Kernels<T>::max_pool2d_forward(const MaxPool2dShape& s, const MaxPool2dForward<T>& b) const {
  constexpr int kPack = kPackOf16Bytes<T>;
  constexpr const char* kVariants[] = {"channels_first", "channels_last", "channels_last_vector"};
  const PoolPlan plan = plan_pool<T>(s, b.winners, b.indices, b.output, b.input);
  trace<T>(queue_, "max_pool2d_forward", kVariants[plan.layout]);
  launch_pool<T>("max_pool2d_forward", queue_,
                 plan.vector ? max_pool2d_forward_kernel<T, kPack> : max_pool2d_forward_kernel<T, 1>, plan,
                 s.y.out_size, s.x.out_size, Divider(s.x.kernel), b);
}

template <class T>
void Kernels<T>::max_pool2d_backward(const MaxPool2dShape& s, const MaxPool2dBackward<T>& b) const {
  constexpr int kPack = kPackOf16Bytes<T>;
  constexpr const char* kCells[] = {"cells_channels_first", "cells_channels_last", "cells_channels_last_vector"};
  constexpr const char* kGather[] = {"gather_channels_first", "gather_channels_last", "gather_channels_last_vector"};
  const PoolPlan plan = plan_pool<T>(s, b.winners, b.indices, b.grad_input, b.grad_output);
  const PoolSide &y = plan.image.y, &x = plan.image.x;
  const bool cells = has_cells(y) && has_cells(x);
  trace<T>(queue_, "max_pool2d_backward", (cells ? kCells : kGather)[plan.layout]);
  if (cells)
    launch_pool<T>("max_pool2d_backward", queue_,
                   plan.vector ? max_pool2d_backward_cells_kernel<T, kPack> : max_pool2d_backward_cells_kernel<T, 1>,
                   plan, cell_count(y), cell_count(x), b);
  else
    launch_pool<T>("max_pool2d_backward", queue_,
                   plan.vector ? max_pool2d_backward_gather_kernel<T, kPack> : max_pool2d_backward_gather_kernel<T, 1>,
                   plan, s.y.size, s.x.size,
                   PoolDividers{Divider(y.stride), Divider(x.stride), Divider(y.dilation), Divider(x.dilation)}, b);
}

FASTNN_INSTANTIATE(void, max_pool2d_forward, MaxPool2dShape, MaxPool2dForward)
FASTNN_INSTANTIATE(void, max_pool2d_backward, MaxPool2dShape, MaxPool2dBackward)

}  // namespace fastnn::cuda
