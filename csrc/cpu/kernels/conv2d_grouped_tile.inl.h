// Convolution in narrow groups, each of as many channels out as in: so few that a vector holds whole groups. Groups of
// one channel are depthwise convolution. Vectors run along the channels of all groups.
//
//   out[y][x][c]         = bias[c] + sum over ky, kx, i of source[y * step + oy[ky]][x * step + ox[kx]][g(c) + i] *
//                          w[ky][kx][i][c]
//   grad_w[ky][kx][i][c] = sum over images, y, x of source[the same][g(c) + i] * grad[y][x][c]
//
// g(c) is the first channel of c's group, i < its channels: members of the group. In the source's vector for member i,
// each lane has its group's member i: a permutation of what is loaded, where a group has more than one.
//
// The input gradient of stride s is the first formula too, with step 1 and grad as the source, for each of the s * s
// phases of the input's pixels (conv2d_pack.inl.h): a row of the input gradient interleaves its s phases.
//
// A tile is kTilePixels neighbours of an output row and one vector of channels, or half as many and two vectors. It
// slides along each source row: a source vector is loaded once for all taps that it meets.
//
//   source row    s0  s1  s2  s3  s4 ...
//                 |________|                  out[0] = s0 w0 + s1 w1 + s2 w2      3 taps, step 1:
//                     |________|              out[1] = s1 w0 + s2 w1 + s3 w2      10 loads for 24 FMAs
//
// Nothing is copied: source rows outside the image are left out of the sum, and so are source columns, in the tiles
// that reach over the left or right edge.
#pragma once

#include "cpu/kernels/conv2d_pack.inl.h"
#include "cpu/kernels/conv2d_window.inl.h"
#include "cpu/kernels/tile.inl.h"
#include "cpu/parallel.h"
#include "cpu/scratch.h"
#include "cpu/simd/lanes.h"
#include "cpu/simd/streaming.h"
#include "ops/conv2d.h"

namespace fastnn::cpu {
namespace {

// 8 pixels: 8 accumulators + 7 weights (of 7x7) + 1 source vector fit 16 registers, with a permutation 5 weights, and
// so do 8 gradients + as many accumulators as weights.
constexpr int kTilePixels = 8;
// Vectors of channels in a tile of whole lines, of as many fewer pixels: 8 accumulators + 6 weights (of 3x3) + 1 source
// vector. Only AVX2 has both: vectors shorter than a line, and registers for a line of 3 weights.
constexpr int kLineVectors = kVectorBytes == 32 ? kLineBytes / kVectorBytes : 1;
// Taps that slide at once where their number is not known at compile time.
constexpr int kSlidingTaps = 4;

// One output row. As template arguments below, `width` is horizontal.count where that is known at compile time, else 0,
// `step` is source_step where taps are neighbours, which slide, else 0, and `depthwise` is whether groups have one
// member.
template <class T>
struct GroupedRow {
  Image<T> source;
  TapAxis vertical, horizontal;
  int64_t source_row, source_step;  // the source row of offset 0; source pixels from one output pixel to the next
  int64_t pixels;
  int64_t channels, members;
  bool stream = false;     // stores of the output go past the caches
  bool backwards = false;  // over the channels, the last tile first
  FetchAhead<T> next_source{}, next_grad{};
};

// The taps [first, end) of an axis that lie inside the image: 0 <= at + offset < size.
struct TapSpan {
  int64_t first, end;
};

inline TapSpan taps_inside(const TapAxis& axis, int64_t at, int64_t size) {
  TapSpan span{0, axis.count};
  while (span.first < span.end && at + axis.offset(span.first) < 0) ++span.first;
  while (span.end > span.first && at + axis.offset(span.end - 1) >= size) --span.end;
  return span;
}

// A tile's place in its row. The tiles of a row are equal to within one pixel.
struct TilePlace {
  int64_t first, pixels;
};

inline int64_t tiles_of(int64_t pixels, int64_t most = kTilePixels) { return (pixels + most - 1) / most; }
inline TilePlace tile_place(int64_t pixels, int64_t tile, int64_t most = kTilePixels) {
  const int64_t tiles = tiles_of(pixels, most), first = pixels * tile / tiles;
  return {first, pixels * (tile + 1) / tiles - first};
}

// Where vector i of the channels starts. The last one begins early enough to be whole, so some channels may be computed
// twice, to the same bits.
template <class T>
int64_t vector_start(int64_t i, int64_t channels) {
  const int64_t last = channels > kLanes<T> ? channels - kLanes<T> : 0;
  return i * kLanes<T> < last ? i * kLanes<T> : last;
}
template <class T>
int64_t vectors_of(int64_t channels) {
  return (channels + kLanes<T> - 1) / kLanes<T>;
}

// One member of each lane's group: the permutation's `lanes`.
template <class T, bool depthwise>
FASTNN_INLINE Vec<T> member_of_groups(Vec<T> channels, Mask<T> lanes) {
  if constexpr (depthwise)
    return channels;
  else
    return permute<T>(channels, lanes);
}

// body(permutation for the member, i) for each member i of the groups.
template <class T, bool depthwise, class Body>
FASTNN_INLINE void each_member(int64_t members, const Body& body) {
  if constexpr (depthwise) {
    body(Mask<T>{}, 0);
  } else {
    Mask<T> lanes = lane_numbers<T>() & broadcast_lane<T>(-members);
    for (int64_t i = 0; i < members; ++i, lanes += 1) body(lanes, i);
  }
}

// body(pixel, kx, v, source vector v) for every pair that meets on one source row; see grouped_row for the arguments.
template <class T, int pixels, int vectors, int width, int step, bool inside, bool depthwise, class Body>
FASTNN_INLINE void slide(const GroupedRow<T>& row, const T* from, int64_t column, Mask<T> lanes, const Body& body) {
  FASTNN_UNROLL
  for (int j = 0; j < (pixels - 1) * step + width; ++j, from += row.source.pixel_stride) {
    if (!inside && (column + j < 0 || column + j >= row.source.width)) continue;
    FASTNN_UNROLL
    for (int v = 0; v < vectors; ++v) {
      const Vec<T> value = in_register(member_of_groups<T, depthwise>(load(from + v * kLanes<T>), lanes));
      FASTNN_UNROLL
      for (int kx = 0; kx < width; ++kx)
        if (j >= kx && (j - kx) % step == 0 && (j - kx) / step < pixels) body((j - kx) / step, kx, v, value);
    }
  }
}

// body(Constant<taps>{}, kx) for neighbouring taps from kx on, until all of a row had their turn.
template <int width, class Body>
FASTNN_INLINE void each_run_of_taps(int64_t count, const Body& body) {
  if constexpr (width > 0) {
    body(Constant<width>{}, 0);
  } else {
    for (int64_t kx = 0; kx < count; kx += kSlidingTaps) {
      const int64_t left = count - kx;
      with_count<kSlidingTaps>(left < kSlidingTaps ? left : kSlidingTaps,
                               [&](auto taps) __attribute__((always_inline)) { body(taps, kx); });
    }
  }
}

// Elements from a vector of weights, or of sums of their gradient, to that of the next kernel place, and to that of the
// next member of the group.
struct WeightSteps {
  int64_t place, member;
};

// acc[p] += the taps of one source row. `from` is the source of pixel 0 and tap 0, in source column `column`;
// steps.place leads from one tap to the next; `left` is the number of channels, at most a vector.
template <class T, int pixels, int vectors, int width, int step, bool inside, bool depthwise>
FASTNN_INLINE void grouped_row(const GroupedRow<T>& row, const T* from, int64_t column, const T* weight,
                               WeightSteps steps, int64_t left, Vec<T> (&acc)[pixels][vectors]) {
  const int64_t pixel_stride = row.source.pixel_stride;
  const int64_t first = -column, end = row.source.width - column;  // the source pixels that the image has
  each_member<T, depthwise>(row.members, [&](Mask<T> lanes, int64_t i) __attribute__((always_inline)) {
    const T* of_member = weight + i * steps.member;
    if constexpr (step > 0) {
      each_run_of_taps<width>(row.horizontal.count, [&](auto run, int64_t first_tap) __attribute__((always_inline)) {
        constexpr int taps = decltype(run)::value;
        Vec<T> w[taps][vectors];
        FASTNN_UNROLL
        for (int kx = 0; kx < taps; ++kx) {
          FASTNN_UNROLL
          for (int v = 0; v < vectors; ++v) w[kx][v] = load(of_member + (first_tap + kx) * steps.place + v * kLanes<T>);
        }
        slide<T, pixels, vectors, taps, step, inside, depthwise>(
            row, from + first_tap * pixel_stride, column + first_tap, lanes,
            [&](int p, int kx, int v, Vec<T> value) __attribute__((always_inline)) { acc[p][v] += value * w[kx][v]; });
      });
    } else {
      const auto taps = [&](const auto& read) __attribute__((always_inline)) {
        for (int64_t kx = 0; kx < row.horizontal.count; ++kx) {
          const Vec<T> w = read(of_member + kx * steps.place);
          FASTNN_UNROLL
          for (int p = 0; p < pixels; ++p) {
            const int64_t j = p * row.source_step + kx * row.horizontal.offset_step;
            if (!inside && (j < first || j >= end)) continue;
            acc[p][0] += member_of_groups<T, depthwise>(read(from + j * pixel_stride), lanes) * w;
          }
        }
      };
      if (left == kLanes<T>)
        taps([](const T* at) { return load(at); });
      else
        taps([&](const T* at) { return load_first(at, left); });
    }
  });
}

// The source rows that the output row `step` source rows on reads and this one does not.
template <class T>
FetchAhead<T> next_rows(const GroupedRow<T>& row, int64_t step) {
  if (row.vertical.count == 0) return {};
  const int64_t next = row.source_row + row.vertical.offset(row.vertical.count - 1) + 1;
  return rows_ahead(row.source, next, next + step);
}

// Where output goes: pixels and rows so many elements apart.
template <class T>
struct GroupedOutput {
  T* data;
  int64_t pixel_stride, row_stride;
};

// `rows` output rows from `row` on, `row_step` source rows apart, all channels, in tiles of `vectors` vectors of
// channels, which divide them where there are several. A tile of all rows comes before the next tile: the source rows
// that it shares with the row before are in L1 still. What comes from memory is better read row by row, and fetched
// ahead.
template <class T, int vectors, int width, int step, bool depthwise>
void grouped_tiles(const GroupedRow<T>& row, int64_t rows, int64_t row_step, const T* weight, WeightSteps steps,
                   int64_t kernel_width, const T* bias, bool with_relu, const GroupedOutput<T>& out) {
  const int64_t reach = row.horizontal.count > 0 ? row.horizontal.offset(row.horizontal.count - 1) : 0;
  const int64_t left = row.channels < kLanes<T> ? row.channels : kLanes<T>;
  const WeightSteps tap_steps{row.horizontal.place_step * steps.place, steps.member};
  constexpr int most = kTilePixels / vectors;
  const int64_t tiles = tiles_of(row.pixels, most), parts = vectors_of<T>(row.channels) / vectors;
  const int64_t out_step = out.pixel_stride;
  const bool stream = row.stream && vectors * kVectorBytes == kLineBytes;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const TilePlace place = tile_place(row.pixels, tile, most);
    const int64_t column = place.first * row.source_step + row.horizontal.first_offset;
    const bool is_inside = column >= 0 && (place.first + place.pixels - 1) * row.source_step + reach < row.source.width;
    with_count<most>(place.pixels, [&](auto constant) {
      constexpr int pixels = decltype(constant)::value;
      const auto run = [&](auto inside, int64_t y) {
        const int64_t source_row = row.source_row + y * row_step;
        const TapSpan span = taps_inside(row.vertical, source_row, row.source.height);
        for (int64_t i = 0; i < parts; ++i) {
          const int64_t c = vector_start<T>((row.backwards ? parts - 1 - i : i) * vectors, row.channels);
          row.next_source.fetch(tile * parts + i, tiles * parts);
          Vec<T> acc[pixels][vectors];
          FASTNN_UNROLL
          for (int v = 0; v < vectors; ++v) {
            const Vec<T> start = bias ? load_upto(bias + c + v * kLanes<T>, left) : Vec<T>{};
            FASTNN_UNROLL
            for (int p = 0; p < pixels; ++p) acc[p][v] = start;
          }
          for (int64_t ky = span.first; ky < span.end; ++ky) {
            const T* from = row.source.data + (source_row + row.vertical.offset(ky)) * row.source.row_stride +
                            column * row.source.pixel_stride + c;
            const T* w =
                weight + (row.vertical.place(ky) * kernel_width + row.horizontal.first_place) * steps.place + c;
            grouped_row<T, pixels, vectors, width, step, decltype(inside)::value, depthwise>(row, from, column, w,
                                                                                             tap_steps, left, acc);
          }
          T* to = out.data + y * out.row_stride + place.first * out_step + c;
          if (with_relu) {
            FASTNN_UNROLL
            for (int p = 0; p < pixels; ++p) {
              FASTNN_UNROLL
              for (int v = 0; v < vectors; ++v) acc[p][v] = relu(acc[p][v]);
            }
          }
          if (stream) {
            FASTNN_UNROLL
            for (int p = 0; p < pixels; ++p) {
              FASTNN_UNROLL
              for (int v = 0; v < vectors; ++v) store_streamed(to + p * out_step + v * kLanes<T>, acc[p][v]);
            }
          } else if (left == kLanes<T>) {
            FASTNN_UNROLL
            for (int p = 0; p < pixels; ++p) {
              FASTNN_UNROLL
              for (int v = 0; v < vectors; ++v) store(to + p * out_step + v * kLanes<T>, acc[p][v]);
            }
          } else {
            FASTNN_UNROLL
            for (int p = 0; p < pixels; ++p) {
              FASTNN_UNROLL
              for (int v = 0; v < vectors; ++v) store_first(to + p * out_step + v * kLanes<T>, acc[p][v], left);
            }
          }
        }
      };
      for (int64_t y = 0; y < rows; ++y) {
        if (is_inside)
          run(Constant<1>{}, y);
        else
          run(Constant<0>{}, y);
      }
    });
  }
}

// The same by tiles of whole lines where they pay: with a stride of 2, which has few products for each line that would
// be fetched once for either half, and where the output is streamed.
template <class T, int width, int step, bool depthwise>
void grouped_pixels(const GroupedRow<T>& row, int64_t rows, int64_t row_step, const T* weight, WeightSteps steps,
                    int64_t kernel_width, const T* bias, bool with_relu, const GroupedOutput<T>& out) {
  const auto run = [&](auto vectors) {
    grouped_tiles<T, decltype(vectors)::value, width, step, depthwise>(row, rows, row_step, weight, steps, kernel_width,
                                                                       bias, with_relu, out);
  };
  if constexpr (kLineVectors > 1 && depthwise && step > 0 && width >= 1 && width <= 3) {
    if ((step == 2 || row.stream) && row.channels % (kLineVectors * kLanes<T>) == 0)
      return run(Constant<kLineVectors>{});
  }
  run(Constant<1>{});
}

// body(Constant<width>{}, Constant<step>{}, Constant<depthwise>{}) for the row's taps.
template <class T, class Body>
FASTNN_INLINE void with_taps(const GroupedRow<T>& row, const Body& body_of_groups) {
  const auto body = [&](auto width, auto step) {
    if (row.members == 1)
      body_of_groups(width, step, Constant<1>{});
    else if constexpr (kPermutesLanes)
      body_of_groups(width, step, Constant<0>{});
  };
  const bool neighbours = row.channels >= kLanes<T> && (row.horizontal.count == 1 || row.horizontal.offset_step == 1);
  if constexpr (sizeof(T) == 8) {
    // Networks are checked in double, not trained: code for each number of taps would be a quarter of the whole module.
    if (neighbours && row.source_step == 1 && row.members == 1)
      return body_of_groups(Constant<0>{}, Constant<1>{}, Constant<1>{});
  } else if (neighbours && row.source_step == 1) {
    switch (row.horizontal.count) {
      case 1: return body(Constant<1>{}, Constant<1>{});  // of a 3x3 kernel's input gradient, stride 2
      case 2: return body(Constant<2>{}, Constant<1>{});  // of 3x3 and 5x5 kernels' input gradients, stride 2
      case 3: return body(Constant<3>{}, Constant<1>{});
      case 5: return body(Constant<5>{}, Constant<1>{});
      default:
        if (row.members > 1) break;  // as much code again, for kernels that networks have in depthwise layers
        if (row.horizontal.count == 7) return body_of_groups(Constant<7>{}, Constant<1>{}, Constant<1>{});
        return body_of_groups(Constant<0>{}, Constant<1>{}, Constant<1>{});
    }
  } else if (neighbours && row.source_step == 2) {
    switch (row.horizontal.count) {
      case 3: return body(Constant<3>{}, Constant<2>{});
      case 5: return body(Constant<5>{}, Constant<2>{});
      default: break;
    }
  }
  body(Constant<0>{}, Constant<0>{});
}

// body(part, first, step) for the parts of a row, every step-th pixel from `first` on, that taps next to each other
// make: a row of step 1 whose taps lie `step` pixels apart is as many rows without a distance.
template <class T, class Body>
FASTNN_INLINE void for_each_part(const GroupedRow<T>& row, const Body& body) {
  const int64_t step = row.horizontal.count > 1 && row.source_step == 1 ? row.horizontal.offset_step : 1;
  for (int64_t first = 0; first < step && first < row.pixels; ++first) {
    GroupedRow<T> part = row;
    const int64_t at = first + row.horizontal.first_offset, column = at - floor_div(at, step) * step;
    part.source.data += column * row.source.pixel_stride;
    part.source.width = (row.source.width - column + step - 1) / step;
    part.source.pixel_stride *= step;
    if (step > 1) part.horizontal.first_offset = floor_div(at, step), part.horizontal.offset_step = 1;
    part.pixels = (row.pixels - first + step - 1) / step;
    if (first > 0) part.next_source = part.next_grad = {};
    body(part, first, step);
  }
}

}  // namespace
}  // namespace fastnn::cpu
