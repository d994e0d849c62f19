// One tile of Winograd's algorithm (conv2d_winograd.inl.h): its weights U, its input V, the products M, its outputs.
#pragma once

#include "cpu/kernels/conv2d_pack.inl.h"
#include "cpu/kernels/conv2d_winograd_points.inl.h"
#include "cpu/kernels/conv2d_window.inl.h"
#include "cpu/kernels/tile.inl.h"
#include "cpu/simd/lanes.h"

namespace fastnn::cpu {
namespace {

// F(tile x tile, taps x taps): the largest tile that an axis is cut into, and the kernel.
template <int tile, int taps>
struct Winograd {
  static constexpr int kTile = tile, kTaps = taps, kPoints = tile + taps - 1, kPlaces = kPoints * kPoints;
  static constexpr const char* kName = taps == 5 ? "winograd_2x2_5x5" : tile == 4 ? "winograd_4x4" : "winograd_2x2";
};

// From one place of U, V or M to the next: a line more than the elements of a place, which are a power of two as a
// rule, so that the places of a tile lie in different sets of L1.
template <class Element>
constexpr int64_t winograd_step(int64_t elements) {
  return elements + kLineBytes / static_cast<int64_t>(sizeof(Element));
}

// How the sums over channels are formed: in T throughout. conv2d_winograd_bf16.inl.h has another.
template <class T>
struct FullProducts {
  using Element = T;  // of V and U
  static constexpr int kMostPoints = 6;
  static constexpr int64_t kGroup = 1;  // channels that one product takes: U is [place][group][kTileColumns][kGroup]

  template <class F>
  static constexpr const char* kName = F::kName;

  static FASTNN_INLINE void store_input(Element* to, Vec<T> value, int64_t count) { store_upto(to, value, count); }
  // One vector of columns of channel `member` of a group. Members come in order.
  static FASTNN_INLINE void store_weight(Element* to, Vec<T> value, int64_t) { store(to, value); }

  template <int rows, int vectors>
  static FASTNN_INLINE void accumulate(int64_t groups, const Element* const (&sources)[rows], const Element* u,
                                       Vec<T> (&acc)[rows][vectors]) {
    multiply_add<T, rows, vectors>(groups, sources, 1, u, kTileColumns<T>, acc);
  }
};

template <class Products>
int64_t winograd_groups(int64_t depth) {
  return (depth + Products::kGroup - 1) / Products::kGroup;
}

// Kernels as they lie: tap (y, x) from channel k to column c at
// data + c * column_step + k * channel_step + y * row_step + x * tap_step. One of the first two steps is 1. The input
// gradient turns the kernels by steps below zero.
template <class T>
struct WinogradKernels {
  const T* data;
  int64_t column_step, channel_step, row_step, tap_step;
};

// Channels whose weights are transformed at a time.
constexpr int64_t kWinogradUnit = 16;

inline int64_t winograd_units(int64_t depth) { return (depth + kWinogradUnit - 1) / kWinogradUnit; }

// U of one panel and the channels of one unit; returns whether these weights are finite. Where a last group has
// channels too few, the missing ones are zeros.
template <class T, class Products, class F>
bool winograd_weights(int64_t columns, int64_t depth, const WinogradKernels<T>& as_they_lie, int64_t panel,
                      int64_t unit, typename Products::Element* transformed) {
  constexpr int taps = F::kTaps, points = F::kPoints;
  constexpr int64_t width = kTileColumns<T>;
  const int64_t first = unit * kWinogradUnit, end = first + kWinogradUnit < depth ? first + kWinogradUnit : depth;
  const int64_t groups = winograd_groups<Products>(depth);
  const int64_t step = winograd_step<typename Products::Element>(groups * Products::kGroup * width);
  WinogradKernels<T> kernels = as_they_lie;
  kernels.data += panel * width * kernels.column_step + first * kernels.channel_step;
  const auto columns_from = [&](int64_t v) {
    const int64_t left = columns - panel * width - v;
    return left < 0 ? 0 : left < kLanes<T> ? left : kLanes<T>;
  };
  T packed[taps * taps * kWinogradUnit * width];
  if (kernels.column_step != 1) {
    for (int tap = 0; tap < taps * taps; ++tap) {
      const T* from = kernels.data + tap / taps * kernels.row_step + tap % taps * kernels.tap_step;
      for (int64_t v = 0; v < width; v += kLanes<T>)
        transpose_panel<T, true>(from + v * kernels.column_step, kernels.column_step, columns_from(v), end - first,
                                 packed + tap * kWinogradUnit * width + v, width);
    }
    kernels = {packed, 1, width, taps * kWinogradUnit * width, kWinogradUnit * width};
  }

  Vec<T> zero_or_nan[taps]{};  // one for each row of taps: one alone would wait for itself
  for (int64_t channel = first; channel < end; ++channel) {
    const T* from = kernels.data + unknown(channel - first) * kernels.channel_step;
    typename Products::Element* group =
        transformed + panel * F::kPlaces * step + unknown(channel / Products::kGroup) * width * Products::kGroup;
    for (int64_t v = 0; v < width; v += kLanes<T>) {
      const int64_t count = columns_from(v);
      const auto axis = [](const auto& g, auto& u) { WinogradAxis<F::kTile, taps>::template weight<T>(g, u); };
      winograd_transform<T, taps, taps, points, points>(
          [&](int y, int x) {
            const Vec<T> g = load_upto(from + y * kernels.row_step + x * kernels.tap_step + v, count);
            zero_or_nan[y] += g * T(0);
            return g;
          },
          axis, axis,
          [&](int y, int x, Vec<T> u) {
            Products::store_weight(group + (points * y + x) * step + v * Products::kGroup, u,
                                   channel % Products::kGroup);
          });
    }
  }
  Vec<T> all{};
  for (const Vec<T>& row : zero_or_nan) all += row;
  return !any_lane<T>(all != all);
}

// body(pixel) for a patch of an image, where pixel(y, x) is the address of the patch's pixel; outside the image,
// `zeros`.
template <int height, int width, class T, class Body>
FASTNN_INLINE void with_patch(const Image<T>& image, int64_t top, int64_t left, const T* zeros, const Body& body) {
  const T* first = image.data + top * image.row_stride + left * image.pixel_stride;
  const auto inside = [&](int64_t y, int64_t x) { return first + y * image.row_stride + x * image.pixel_stride; };
  if (lies_inside(image, {top, left, height, width})) return body(inside);
  const T* pixels[height][width];
  for (int64_t y = 0; y < height; ++y) {
    const bool has_row = top + y >= 0 && top + y < image.height;
    for (int64_t x = 0; x < width; ++x) {
      const bool has_column = left + x >= 0 && left + x < image.width;
      pixels[y][x] = has_row && has_column ? inside(y, x) : zeros;
    }
  }
  body([&](int64_t y, int64_t x) { return pixels[y][x]; });
}

// The tiles of up to four sizes, height by width; an order in which the sizes that have a place follow each other,
// whichever place it is.
constexpr int kWinogradSizes = 4;
constexpr int kWinogradHeight[kWinogradSizes] = {4, 4, 2, 2}, kWinogradWidth[kWinogradSizes] = {2, 4, 4, 2};
constexpr int kWinograd4x4 = 1, kWinograd2x2 = 3;

// body(Constant<size>{}) for each that F has.
template <class F, class Body>
FASTNN_INLINE void for_each_size(const Body& body) {
  if constexpr (F::kTile == 4) {
    body(Constant<0>{});
    body(Constant<1>{});
    body(Constant<2>{});
  }
  body(Constant<3>{});
}

// Where point (y, x) of a tile of this size lies among F's places.
template <int size, class F>
constexpr int winograd_place(int y, int x) {
  const auto point = [](int tile, int i) { return tile < F::kTile && i == 3 ? 5 : i; };
  return point(kWinogradHeight[size], y) * F::kPoints + point(kWinogradWidth[size], x);
}

// V of `count` channels of one tile, from channel c on: to + place * stride.
template <class T, class Products, int size, class F, class Pixel>
FASTNN_INLINE void winograd_input_vector(const Pixel& pixel, int64_t c, int64_t count, typename Products::Element* to,
                                         int64_t stride) {
  constexpr int taps = F::kTaps, height = kWinogradHeight[size], width = kWinogradWidth[size];
  constexpr int points_down = height + taps - 1, points_along = width + taps - 1;
  winograd_transform<T, points_down, points_along, points_down, points_along>(
      [&](int y, int x) { return load_upto(pixel(y, x) + c, count); },
      [](const auto& d, auto& v) { WinogradAxis<height, taps>::template input<T>(d, v); },
      [](const auto& d, auto& v) { WinogradAxis<width, taps>::template input<T>(d, v); },
      [&](int y, int x, Vec<T> v) {
        Products::store_input(to + winograd_place<size, F>(y, x) * stride + c, v, count);
      });
}

// V of one tile.
template <class T, class Products, int size, class F, class Pixel>
FASTNN_INLINE void winograd_input(const Pixel& pixel, int64_t depth, typename Products::Element* to, int64_t stride) {
  int64_t c = 0;
  for (; c + kLanes<T> <= depth; c += kLanes<T>)
    winograd_input_vector<T, Products, size, F>(pixel, unknown(c), kLanes<T>, to, stride);
  if (c < depth) winograd_input_vector<T, Products, size, F>(pixel, c, depth - c, to, stride);
}

// M of one place for some tiles: m[tile][columns] = v[tile][channel] * u[channel][columns]
template <class T, class Products, int vectors>
FASTNN_INLINE void winograd_multiply(int64_t tiles, int64_t groups, const typename Products::Element* v,
                                     const typename Products::Element* u, T* m) {
  for_row_tiles(tiles, [&](auto constant, int64_t tile) {
    constexpr int rows = decltype(constant)::value;
    const typename Products::Element* sources[rows];
    FASTNN_UNROLL
    for (int r = 0; r < rows; ++r) sources[r] = v + (tile + r) * groups * Products::kGroup;
    Vec<T> acc[rows][vectors]{};
    Products::template accumulate<rows, vectors>(groups, sources, u, acc);
    FASTNN_UNROLL
    for (int r = 0; r < rows; ++r) {
      FASTNN_UNROLL
      for (int w = 0; w < vectors; ++w) store(m + (tile + r) * kTileColumns<T> + w * kLanes<T>, acc[r][w]);
    }
  });
}

// The outputs of one tile; m of place 0, `stride` apart.
template <class T, int size, class F, int height, int width>
FASTNN_INLINE void winograd_output(const T* m, int64_t stride, Vec<T> bias, Vec<T> (&out)[height][width]) {
  constexpr int taps = F::kTaps;
  winograd_transform<T, height + taps - 1, width + taps - 1, height, width>(
      [&](int y, int x) { return load(m + winograd_place<size, F>(y, x) * stride); },
      [](const auto& column, auto& y) { WinogradAxis<height, taps>::template output<T>(column, y); },
      [](const auto& row, auto& y) { WinogradAxis<width, taps>::template output<T>(row, y); },
      [&](int y, int x, Vec<T> value) { out[y][x] = value + bias; });
}

}  // namespace
}  // namespace fastnn::cpu
