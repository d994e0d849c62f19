// The register tile that every dense kernel is built from: kTileRows rows by kTileVectors vectors.
//
//                b: depth x (vectors * lanes), one row per k
//                +---------+---------+
//                | b[k][0] | b[k][1] |
//                +---------+---------+
//   a[r][k] ---> | acc     | acc     |  acc[r][v] += a[r][k] * b[k][v]
//                +---------+---------+
//
// a[r][k] is one number, broadcast; b[k][v] is a vector. Per k: 2 vector loads, 8 broadcasts, 16 FMAs.
#pragma once

#include "cpu/simd/vector.h"

namespace fastnn::cpu {
namespace {

// 8 rows: 16 accumulators + 2 vectors of b + 1 broadcast of 32 registers, and 16 independent FMAs hide the
// latency of 4 cycles on 2 ports. 5 rows: 10 + 2 + 1 of 16 registers, with room for a product where there is
// no FMA. A sixth row would spill in the pointer-row form, whose row pointers take the general registers.
constexpr int kTileRows = kVectorRegisters == 32 ? 8 : 5;
constexpr int kTileVectors = 2;
template <class T>
constexpr int kTileColumns = kTileVectors * kLanes<T>;
// Rows of a tile of so many vectors: 5 sums alone would wait for each other.
template <int vectors>
constexpr int kRowsOfVectors = vectors == 1 && kVectorRegisters == 16 ? 2 * kTileRows : kTileRows;

// acc[r][v] += sum over k < depth of a[r][k * a_step] * b[k * b_stride + v * lanes]
template <class T, int rows, int vectors>
FASTNN_INLINE void multiply_add(int64_t depth, const T* const (&a)[rows], int64_t a_step, const T* b, int64_t b_stride,
                                Vec<T> (&acc)[rows][vectors]) {
  for (int64_t k = 0; k < depth; ++k, b += b_stride) {
    Vec<T> weights[vectors];
    FASTNN_UNROLL
    for (int v = 0; v < vectors; ++v) weights[v] = load(b + v * kLanes<T>);
    FASTNN_UNROLL
    for (int r = 0; r < rows; ++r) {
      const Vec<T> x = broadcast(a[r][k * a_step]);
      FASTNN_UNROLL
      for (int v = 0; v < vectors; ++v) acc[r][v] += x * weights[v];
    }
  }
}

template <int number>
struct Constant {
  static constexpr int value = number;
};

// body(Constant<count>{}) for a count in [1, most] known only at run time. The largest is asked for first: it is that
// of most tiles.
template <int most, class Body>
FASTNN_INLINE void with_count(int64_t count, const Body& body) {
  if constexpr (most > 1) {
    if (count < most) return with_count<most - 1>(count, body);
  }
  body(Constant<most>{});
}

// The same for the rows of a tile.
template <class Body>
FASTNN_INLINE void with_rows(int64_t rows, const Body& body) {
  with_count<kTileRows>(rows, body);
}

// body(Constant<rows>{}, first row) for tiles of about equal heights that cover `rows` rows: a low one would wait for
// its sums' latency.
template <class Body>
FASTNN_INLINE void for_row_tiles(int64_t rows, const Body& body) {
  const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
  if (tiles == 0) return;
  const int64_t lower = rows / tiles, higher_ones = rows % tiles;
  int64_t first = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t height = lower + (tile < higher_ones ? 1 : 0);
    with_rows(height, [&](auto constant) { body(constant, first); });
    first += height;
  }
}

}  // namespace
}  // namespace fastnn::cpu
