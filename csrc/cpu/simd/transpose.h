// Transposition of square register blocks: how weights become kernel panels and gradients become weights.
#pragma once

#include "cpu/simd/vector.h"

namespace fastnn::cpu {
namespace {

// Of a vector of pixels [p][plane], the one that begins at element part * lanes: `merged` has the planes before `plane`
// in place - or the only one before it as it came -, `values` are the plane's own.
template <class T, int planes, int part, int plane, int... Index>
FASTNN_INLINE Vec<T> merge_plane(Vec<T> merged, Vec<T> values, Indices<Index...>) {
  constexpr auto source = [](int lane) {
    const int element = part * kLanes<T> + lane, pixel = element / planes, of_plane = element % planes;
    return of_plane == plane ? kLanes<T> + pixel : plane == 1 && of_plane == 0 ? pixel : lane;
  };
  return __builtin_shufflevector(merged, values, source(Index)...);
}
template <class T, int planes, int part, int plane = planes - 1>
FASTNN_INLINE Vec<T> merged_planes(const Vec<T> (&values)[planes]) {
  if constexpr (plane == 0)
    return values[0];
  else
    return merge_plane<T, planes, part, plane>(merged_planes<T, planes, part, plane - 1>(values), values[plane],
                                               LaneIndices<T>{});
}

// to[p * planes + c] = values[c][p]
template <class T, int planes, int part = 0>
FASTNN_INLINE void store_interleaved(const Vec<T> (&values)[planes], T* to) {
  store(to + part * kLanes<T>, merged_planes<T, planes, part>(values));
  if constexpr (part + 1 < planes) store_interleaved<T, planes, part + 1>(values, to);
}

// rows[i][j] becomes rows[j][i]. log2(lanes) perfect shuffles: each pairs row i with row i + lanes/2.
template <class T>
FASTNN_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int n = kLanes<T>;
  FASTNN_UNROLL
  for (int round = 1; round < n; round *= 2) {
    Vec<T> next[n];
    FASTNN_UNROLL
    for (int i = 0; i < n / 2; ++i) {
      next[2 * i] = merge_plane<T, 2, 0, 1>(rows[i], rows[i + n / 2], LaneIndices<T>{});
      next[2 * i + 1] = merge_plane<T, 2, 1, 1>(rows[i], rows[i + n / 2], LaneIndices<T>{});
    }
    FASTNN_UNROLL
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
}

// to[c * to_stride + r] = from[r * from_stride + c] for r < rows <= lanes, c < columns. With `pad`, to's elements from
// `rows` up to a whole vector become 0; else they are left alone.
template <class T, bool pad>
inline void transpose_panel(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to,
                            int64_t to_stride) {
  constexpr int n = kLanes<T>;
  for (int64_t c = 0; c < columns; c += n) {
    const int64_t width = columns - c < n ? columns - c : n, at = unknown(c);
    Vec<T> block[n];
    if (rows == n && width == n) {
      FASTNN_UNROLL
      for (int r = 0; r < n; ++r) block[r] = load(from + r * from_stride + at);
    } else {
      FASTNN_UNROLL
      for (int r = 0; r < n; ++r) block[r] = r < rows ? load_upto(from + r * from_stride + at, width) : Vec<T>{};
    }
    transpose<T>(block);
    for (int r = 0; r < width; ++r) {
      if (pad)
        store(to + (at + r) * to_stride, block[r]);
      else
        store_upto(to + (at + r) * to_stride, block[r], rows);
    }
  }
}

// to[c * to_stride + r] = from[r * from_stride + c] for r < rows, c < columns.
template <class T>
inline void transpose_matrix(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to,
                             int64_t to_stride) {
  for (int64_t r = 0; r < rows; r += kLanes<T>) {
    const int64_t left = rows - r < kLanes<T> ? rows - r : kLanes<T>;
    transpose_panel<T, false>(from + r * from_stride, from_stride, left, columns, to + r, to_stride);
  }
}

}  // namespace
}  // namespace fastnn::cpu
