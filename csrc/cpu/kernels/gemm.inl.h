// Dense matrix products C = A B on the register tile of tile.inl.h: the three products of linear.
//
// B is cut into panels of kTileColumns columns; a panel is read straight from B where its rows are long enough,
// or packed (k-major, zero-padded to whole vectors):
//
//        B (k x n)                      packed
//   +------+------+---+        +------+  +------+  +---+00+
//   |panel0|panel1|p2 |   ->   |panel0|  |panel1|  |p2 |00|   each k x kTileColumns
//   +------+------+---+        +------+  +------+  +---+00+
#pragma once

#include "cpu/kernels/tile.inl.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd/transpose.h"

namespace fastnn::cpu {
namespace {

// Element (i, j) is data[i * row_stride + j * column_stride].
template <class T>
struct Matrix {
  const T* data;
  int64_t row_stride, column_stride;
};

// From this many rows on, packing B costs less than reading it with large strides: one copy serves m/8 tiles. Not where
// B is this shallow: a panel stays in L1 as it lies.
constexpr int64_t kPackRows = 48;
constexpr int64_t kPackDepth = 64;
// Lines this far apart, or a multiple, share a few sets of L1. More of them than a set holds push each other out: they
// are packed, where several tiles read them.
constexpr int64_t kCollidingBytes = 1 << 10, kCollidingLines = 8;
template <class T>
constexpr bool collide(int64_t lines, int64_t stride) {
  return lines > kCollidingLines && stride * static_cast<int64_t>(sizeof(T)) % kCollidingBytes == 0;
}
// Depth of one pass: a panel of 512 x 32 floats is 64 KiB, which stays in L2 beside the rows of A; one of 256 x 16 is
// 16 KiB, which stays in L1.
constexpr int64_t kDepthBlock = kVectorRegisters == 32 ? 512 : 256;
// Rows of C in one task.
constexpr int64_t kRowBlock = 32;
// What is packed at a time, or a panel for each thread: it stays in L3, and in the scratch memory that outlasts a call.
constexpr int64_t kPackedBytes = int64_t{16} << 20;
// Adjacent panels that are packed at once where rows of B are dense: 8 lines of each row follow each other, one alone
// may cost a look-up of its page and a miss of its own.
constexpr int64_t kPackedPanels = 8;

// `count` panels of B from column `column` on, of which `columns` are left.
template <class T>
void pack_panels(const Matrix<T>& b, int64_t depth, int64_t column, int64_t columns, int64_t count, T* panels) {
  constexpr int64_t width = kTileColumns<T>;
  if (b.column_stride == 1) {
    const int64_t whole = columns / width < count ? columns / width : count;
    for (int64_t k = 0; k < depth; ++k) {
      const T* row = b.data + k * b.row_stride + column;
      T* to = panels + k * width;
      for (int64_t i = 0; i < whole; ++i, row += width, to += depth * width) {
        FASTNN_UNROLL
        for (int v = 0; v < kTileVectors; ++v) store(to + v * kLanes<T>, load(row + v * kLanes<T>));
      }
      if (whole == count) continue;
      FASTNN_UNROLL
      for (int v = 0; v < kTileVectors; ++v) {
        const int64_t left = columns - whole * width - v * kLanes<T>;
        store(to + v * kLanes<T>, left >= kLanes<T> ? load(row + v * kLanes<T>)
                                  : left > 0        ? load_first(row + v * kLanes<T>, left)
                                                    : Vec<T>{});
      }
    }
  } else {
    for (int64_t j = 0; j < count * width; j += kLanes<T>) {
      const int64_t left = columns - j < 0 ? 0 : columns - j < kLanes<T> ? columns - j : kLanes<T>;
      transpose_panel<T, true>(b.data + (column + j) * b.column_stride, b.column_stride, left, depth,
                               panels + j / width * depth * width + j % width, width);
    }
  }
}

// Rows of A whose columns lie apart, kRowBlock of them from `row` on: to[k][row].
template <class T>
void pack_rows(const Matrix<T>& a, int64_t depth, int64_t row, int64_t rows, T* to) {
  for (int64_t k = 0; k < depth; ++k) {
    const T* column = a.data + k * a.column_stride + row;
    for (int64_t r = 0; r < rows; r += kLanes<T>) {
      const int64_t left = rows - r < kLanes<T> ? rows - r : kLanes<T>;
      store_upto(to + k * kRowBlock + r, load_upto(column + r, left), left);
    }
  }
}

// Where a panel of B lies.
template <class T>
struct Panel {
  const T* data;
  int64_t stride;
};

// One tile of C, whose rows are n apart: `depth` products are added to act()'s argument so far, which is the bias, or
// zero, where they are the first. All by value: what stores of C might change would be read again after each.
template <class T, int rows>
FASTNN_INLINE void gemm_tile(int64_t depth, Matrix<T> a, Panel<T> b, int64_t columns, bool first, const T* bias,
                             bool with_relu, T* c, int64_t n) {
  const bool whole = columns == kTileColumns<T>;
  Vec<T> acc[rows][kTileVectors];
  FASTNN_UNROLL
  for (int v = 0; v < kTileVectors; ++v) {
    const int64_t left = columns - v * kLanes<T> < 0 ? 0 : columns - v * kLanes<T>;
    const int64_t lanes = left < kLanes<T> ? left : kLanes<T>;
    const Vec<T> start = first && bias ? load_upto(bias + v * kLanes<T>, lanes) : Vec<T>{};
    FASTNN_UNROLL
    for (int r = 0; r < rows; ++r) acc[r][v] = first ? start : load_upto(c + r * n + v * kLanes<T>, lanes);
  }
  const T* a_rows[rows];
  FASTNN_UNROLL
  for (int r = 0; r < rows; ++r) a_rows[r] = a.data + r * a.row_stride;
  if (a.column_stride == 1)
    multiply_add<T, rows, kTileVectors>(depth, a_rows, 1, b.data, b.stride, acc);
  else
    multiply_add<T, rows, kTileVectors>(depth, a_rows, a.column_stride, b.data, b.stride, acc);
  FASTNN_UNROLL
  for (int v = 0; v < kTileVectors; ++v) {
    const int64_t left = columns - v * kLanes<T>;
    if (left <= 0) break;
    FASTNN_UNROLL
    for (int r = 0; r < rows; ++r) {
      const Vec<T> value = with_relu ? relu(acc[r][v]) : acc[r][v];
      T* to = c + r * n + v * kLanes<T>;
      if (whole)
        store(to, value);
      else
        store_upto(to, value, left < kLanes<T> ? left : kLanes<T>);
    }
  }
}

// Rows [row_begin, row_end) and up to kTileColumns columns of C.
template <class T>
void gemm_block(int64_t row_begin, int64_t row_end, int64_t column, int64_t n, int64_t k, const Matrix<T>& a,
                const Panel<T>& b, const T* bias, bool with_relu, T* c) {
  const int64_t columns = n - column < kTileColumns<T> ? n - column : kTileColumns<T>;
  for (int64_t k0 = 0; k0 < k || k0 == 0; k0 += kDepthBlock) {
    const int64_t depth = k - k0 < kDepthBlock ? k - k0 : kDepthBlock;
    const bool last = k0 + kDepthBlock >= k;
    for_row_tiles(row_end - row_begin, [&](auto rows, int64_t above) {
      const int64_t row = row_begin + above;
      gemm_tile<T, decltype(rows)::value>(
          depth, {a.data + row * a.row_stride + k0 * a.column_stride, a.row_stride, a.column_stride},
          {b.data + k0 * b.stride, b.stride}, columns, k0 == 0, bias ? bias + column : nullptr, last && with_relu,
          c + row * n + column, n);
    });
  }
}

// C (m x n, dense rows) = act(A (m x k) B (k x n) + bias); bias (n) may be null.
// Needs b.column_stride == 1 or b.row_stride == 1.
template <class T>
void gemm(int64_t m, int64_t n, int64_t k, const Matrix<T>& a, const Matrix<T>& b, const T* bias, bool with_relu,
          T* c) {
  constexpr int64_t width = kTileColumns<T>;
  const int64_t panels = (n + width - 1) / width, row_blocks = (m + kRowBlock - 1) / kRowBlock;
  const bool pack_b =
      b.column_stride != 1 || (m >= kPackRows && k > kPackDepth) || (m > 2 * kTileRows && collide<T>(k, b.row_stride));
  const bool pack_a = a.row_stride == 1 && n > 2 * width && collide<T>(k, a.column_stride) &&
                      m * k * static_cast<int64_t>(sizeof(T)) <= kPackedBytes;
  const int64_t read = pack_b ? 0 : n / width;  // panels that are read from B; a last, partial one is always packed
  const int64_t fitting = kPackedBytes / ((k + 1) * width * static_cast<int64_t>(sizeof(T)));
  const int threads = max_threads();
  const int64_t share = (panels - read + threads - 1) / threads;
  const int64_t together = b.column_stride != 1 || share < 1 ? 1 : share < kPackedPanels ? share : kPackedPanels;
  const int64_t most = threads == 1 ? together : fitting > threads ? fitting : threads;  // L2 still has one's own
  const int64_t pass = pack_b && most < panels ? most : panels;
  const Scratch<T> packed_b((pass - read) * k * width), packed_a(pack_a ? row_blocks * kRowBlock * k : 0);
  for (int64_t first = 0; first < panels; first += pass) {
    const int64_t count = panels - first < pass ? panels - first : pass;
    const int64_t of_b = (count - read + together - 1) / together, of_a = pack_a && first == 0 ? row_blocks : 0;
    parallel_for(of_b + of_a, [&](int64_t i) {
      if (i < of_b) {
        const int64_t panel = i * together, left = count - read - panel, column = (first + read + panel) * width;
        pack_panels(b, k, column, n - column, left < together ? left : together, packed_b + panel * k * width);
      } else {
        const int64_t row = (i - of_b) * kRowBlock;
        pack_rows(a, k, row, row + kRowBlock < m ? kRowBlock : m - row, packed_a + row * k);
      }
    });
    const TaskOrder order{row_blocks, count, pack_b && k * n > m * (k + n)};  // B, or A and C
    parallel_for(order.tasks(), [&](int64_t task) {
      const int64_t i = order.part(task), column = (first + i) * width;
      const int64_t row_begin = order.block(task) * kRowBlock;
      const int64_t row_end = row_begin + kRowBlock < m ? row_begin + kRowBlock : m;
      const Panel<T> panel =
          i < read ? Panel<T>{b.data + column, b.row_stride} : Panel<T>{packed_b + (i - read) * k * width, width};
      const Matrix<T> rows = pack_a ? Matrix<T>{packed_a + row_begin * k - row_begin, 1, kRowBlock} : a;
      gemm_block(row_begin, row_end, column, n, k, rows, panel, bias, with_relu, c);
    });
  }
}

}  // namespace
}  // namespace fastnn::cpu
