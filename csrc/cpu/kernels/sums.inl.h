// Sums that several tasks form, each of its own part: the parts are added up in their order, so that the bits are the
// same for every thread count.
#pragma once

#include "cpu/kernels/tile.inl.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd/vector.h"

namespace fastnn::cpu {
namespace {

// to[i] = the sum of the chunks' partials[i], in chunk order; chunks are `step` elements apart. `to` may be the first.
template <class T>
void add_partials(int64_t chunks, int64_t step, int64_t elements, const T* partials, T* to) {
  if (chunks == 1 && to == partials) return;
  parallel_ranges(elements, 1 << 10, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += kLanes<T>) {
      const int64_t left = end - i < kLanes<T> ? end - i : kLanes<T>;
      Vec<T> sum = load_upto(partials + i, left);
      for (int64_t c = 1; c < chunks; ++c) sum += load_upto(partials + c * step + i, left);
      store_upto(to + i, sum, left);
    }
  });
}

// sums[column] = sum over rows of matrix[row * columns + column]. Many rows are summed in parts, which are added up in
// their order.
template <class T>
void column_sums(int64_t rows, int64_t columns, const T* matrix, T* sums) {
  constexpr int64_t kPartRows = 512, kMostParts = 16;
  constexpr int kVectors = 4;
  const AloneIfSmall scope(rows * columns);
  const int64_t strip = kVectors * kLanes<T>, strips = (columns + strip - 1) / strip, whole = rows / kPartRows;
  const int64_t parts = whole < 1 ? 1 : whole < kMostParts ? whole : kMostParts;
  const Scratch<T> partials(parts > 1 ? parts * columns : 0);
  parallel_for(parts * strips, [&](int64_t task) {
    const int64_t part = task / strips, column = task % strips * strip, end = rows * (part + 1) / parts;
    const int64_t count = columns - column < strip ? columns - column : strip;
    with_count<kVectors>((count + kLanes<T> - 1) / kLanes<T>, [&](auto constant) {
      constexpr int vectors = decltype(constant)::value;
      const int64_t left = count - (vectors - 1) * kLanes<T>;  // in the last vector
      Vec<T> even[vectors]{}, odd[vectors]{};                  // rows, so that a sum does not wait for the last one
      const auto add = [&](int64_t row, Vec<T>(&to)[vectors]) {
        const T* from = matrix + row * columns + column;
        FASTNN_UNROLL
        for (int v = 0; v < vectors; ++v)
          to[v] += v < vectors - 1 ? load(from + v * kLanes<T>) : load_upto(from + v * kLanes<T>, left);
      };
      int64_t row = rows * part / parts;
      for (; row + 1 < end; row += 2) add(row, even), add(row + 1, odd);
      if (row < end) add(row, even);
      T* to = (parts > 1 ? partials + part * columns : sums) + column;
      for (int v = 0; v < vectors; ++v)
        store_upto(to + v * kLanes<T>, even[v] + odd[v], v < vectors - 1 ? kLanes<T> : left);
    });
  });
  if (parts > 1) add_partials<T>(parts, columns, columns, partials, sums);
}

}  // namespace
}  // namespace fastnn::cpu
