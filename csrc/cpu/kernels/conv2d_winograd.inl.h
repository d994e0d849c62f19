// Winograd's F(4x4, 3x3), F(2x2, 3x3) and F(2x2, 5x5): m x m outputs of an r x r convolution from (m + r - 1)^2
// multiplications instead of (m r)^2 (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015).
//
//   V = B' d B     of each source patch d of (m + r - 1)^2 pixels, per channel
//   U = G g G'     of each kernel g
//   M = sum over channels of U * V: one matrix product for each of the (m + r - 1)^2 places
//   out = A' M A
//
//   V: [place][tile][channel]   U: [panel][place][channel][kTileColumns]   M: [place][tile][kTileColumns], a panel at a
//   time
//
// A place is a pair of points at which the polynomials behind the algorithm are multiplied. Along an axis they are
//
//   0, 1/s, -1/s, s, -s, infinity, with s = sqrt(2): 4 outputs of 3 taps, 2 outputs of 5
//   0, 1/s, -1/s,        infinity:                   2 outputs of 3 taps
//
// The square roots lose half as many digits as the usual 1 and 2 (compare Barabasz et al., "Error Analysis and
// Improving the Accuracy of Winograd Convolution", 2020). The fewer points are among the others, so one U of 3x3
// kernels serves tiles of both sizes: an axis is cut into tiles of 4 and, where 1 or 2 outputs are left, one of 2.
//
// Its sums round differently from a direct convolution's: see docs/performance.md for the bound. In a tile of 4 an
// output depends on pixels that a direct convolution would not show it, but for their rounding; a NaN or infinity there
// spreads. So where outputs are not finite, all are made anew with tiles of 2, in which it does not: the first and last
// row of V reach one output row alone.
#pragma once

#include "cpu/kernels/conv2d_gather.inl.h"
#include "cpu/kernels/conv2d_pack.inl.h"

namespace fastnn::cpu {
namespace {

// Below 16 channels the transforms outweigh the multiplications saved.
constexpr int64_t kWinogradChannels = 16;
// What a weight costs at each place - to transform, to write and to read it -, in multiplications: where U is not much
// larger than L2, where it is, and where it needs new pages on each call, being larger than the scratch memory kept.
constexpr int64_t winograd_weight_cost(int64_t bytes) { return bytes <= 12 << 20 ? 16 : bytes <= 32 << 20 ? 64 : 320; }
// V of a block is places * channels * tiles elements; M as much again where the channels are few. Both stay in L2.
// Blocks of fewer tiles would read U, which may be megabytes, faster than L3 gives it.
constexpr int64_t kWinogradBlockBytes = 164 << 10;
constexpr int64_t kWinogradTiles = 24;

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

// The transforms of one axis of a tile with so many outputs of so many taps.
template <int outputs, int taps>
struct WinogradAxis;

template <>
struct WinogradAxis<2, 3> {
  template <class T>
  static FASTNN_INLINE void input(const Vec<T> (&d)[4], Vec<T> (&v)[4]) {
    const Vec<T> odd = d[1] * T(kHalfRoot);
    v[0] = d[0] - T(2) * d[2];
    v[1] = d[2] + odd;
    v[2] = d[2] - odd;
    v[3] = d[3] - T(0.5) * d[1];
  }
  template <class T>
  static FASTNN_INLINE void weight(const Vec<T> (&g)[3], Vec<T> (&u)[4]) {
    const Vec<T> even = g[0] + T(0.5) * g[2], odd = g[1] * T(kHalfRoot);
    u[0] = g[0], u[1] = even + odd, u[2] = even - odd, u[3] = g[2];
  }
  template <class T>
  static FASTNN_INLINE void output(const Vec<T> (&m)[4], Vec<T> (&y)[2]) {
    y[0] = m[0] + (m[1] + m[2]);
    y[1] = m[3] + T(kHalfRoot) * (m[1] - m[2]);
  }
  static constexpr double kHalfRoot = 0.70710678118654752440;  // 1 / sqrt(2)
};

template <>
struct WinogradAxis<4, 3> {
  template <class T>
  static FASTNN_INLINE void input(const Vec<T> (&d)[6], Vec<T> (&v)[6]) {
    const Vec<T> even = d[4] - T(2) * d[2], odd = d[3] - T(2) * d[1];
    const Vec<T> far_even = d[4] - T(0.5) * d[2], far_odd = d[3] - T(0.5) * d[1];
    v[0] = (d[0] + d[4]) - T(2.5) * d[2];
    v[1] = even + T(kHalfRoot) * odd;
    v[2] = even - T(kHalfRoot) * odd;
    v[3] = far_even + T(kRoot) * far_odd;
    v[4] = far_even - T(kRoot) * far_odd;
    v[5] = (d[1] + d[5]) - T(2.5) * d[3];
  }
  template <class T>
  static FASTNN_INLINE void weight(const Vec<T> (&g)[3], Vec<T> (&u)[6]) {
    const Vec<T> even = g[0] + T(0.5) * g[2], far_even = g[0] + T(2) * g[2];
    u[0] = g[0];
    u[1] = even + T(kHalfRoot) * g[1];
    u[2] = even - T(kHalfRoot) * g[1];
    u[3] = far_even + T(kRoot) * g[1];
    u[4] = far_even - T(kRoot) * g[1];
    u[5] = g[2];
  }
  template <class T>
  static FASTNN_INLINE void output(const Vec<T> (&m)[6], Vec<T> (&y)[4]) {
    const Vec<T> sum = m[1] + m[2], difference = m[1] - m[2], far_sum = m[3] + m[4], far_difference = m[3] - m[4];
    y[0] = m[0] - T(2. / 3) * sum + T(1. / 6) * far_sum;
    y[1] = T(kRoot / 6) * far_difference - T(2 * kHalfRoot / 3) * difference;
    y[2] = T(1. / 3) * far_sum - T(1. / 3) * sum;
    y[3] = m[5] - T(kHalfRoot / 3) * difference + T(kRoot / 3) * far_difference;
  }
  // The transposes of output() and weight(), for gradients.
  template <class T>
  static FASTNN_INLINE void output_transposed(const Vec<T> (&y)[4], Vec<T> (&m)[6]) {
    const Vec<T> even = T(-2. / 3) * y[0] - T(1. / 3) * y[2];
    const Vec<T> odd = T(2 * kHalfRoot / 3) * y[1] + T(kHalfRoot / 3) * y[3];
    const Vec<T> far_even = T(1. / 6) * y[0] + T(1. / 3) * y[2];
    const Vec<T> far_odd = T(kRoot / 6) * y[1] + T(kRoot / 3) * y[3];
    m[0] = y[0], m[1] = even - odd, m[2] = even + odd, m[3] = far_even + far_odd, m[4] = far_even - far_odd,
    m[5] = y[3];
  }
  template <class T>
  static FASTNN_INLINE void weight_transposed(const Vec<T> (&u)[6], Vec<T> (&g)[3]) {
    const Vec<T> sum = u[1] + u[2], difference = u[1] - u[2], far_sum = u[3] + u[4], far_difference = u[3] - u[4];
    g[0] = u[0] + (sum + far_sum);
    g[1] = T(kHalfRoot) * difference + T(kRoot) * far_difference;
    g[2] = u[5] + T(0.5) * sum + T(2) * far_sum;
  }
  static constexpr double kHalfRoot = WinogradAxis<2, 3>::kHalfRoot, kRoot = 2 * kHalfRoot;
};

// The same points as for 4 outputs of 3 taps. What those scale in their outputs is scaled in the weights here.
template <>
struct WinogradAxis<2, 5> {
  template <class T>
  static FASTNN_INLINE void input(const Vec<T> (&d)[6], Vec<T> (&v)[6]) {
    WinogradAxis<4, 3>::input<T>(d, v);
  }
  template <class T>
  static FASTNN_INLINE void weight(const Vec<T> (&g)[5], Vec<T> (&u)[6]) {
    const Vec<T> even = T(-2. / 3) * (g[0] + T(0.5) * g[2] + T(0.25) * g[4]);
    const Vec<T> odd = T(-2 * kHalfRoot / 3) * (g[1] + T(0.5) * g[3]);
    const Vec<T> far_even = T(1. / 6) * (g[0] + T(2) * g[2] + T(4) * g[4]);
    const Vec<T> far_odd = T(kRoot / 6) * (g[1] + T(2) * g[3]);
    u[0] = g[0], u[1] = even + odd, u[2] = even - odd, u[3] = far_even + far_odd, u[4] = far_even - far_odd,
    u[5] = g[4];
  }
  template <class T>
  static FASTNN_INLINE void output(const Vec<T> (&m)[6], Vec<T> (&y)[2]) {
    y[0] = m[0] + ((m[1] + m[2]) + (m[3] + m[4]));
    y[1] = m[5] + T(kHalfRoot) * (m[1] - m[2]) + T(kRoot) * (m[3] - m[4]);
  }
  template <class T>
  static FASTNN_INLINE void output_transposed(const Vec<T> (&y)[2], Vec<T> (&m)[6]) {
    const Vec<T> odd = T(kHalfRoot) * y[1], far_odd = T(kRoot) * y[1];
    m[0] = y[0], m[1] = y[0] + odd, m[2] = y[0] - odd, m[3] = y[0] + far_odd, m[4] = y[0] - far_odd, m[5] = y[1];
  }
  template <class T>
  static FASTNN_INLINE void weight_transposed(const Vec<T> (&u)[6], Vec<T> (&g)[5]) {
    const Vec<T> sum = T(-2. / 3) * (u[1] + u[2]), difference = T(-2 * kHalfRoot / 3) * (u[1] - u[2]);
    const Vec<T> far_sum = T(1. / 6) * (u[3] + u[4]), far_difference = T(kRoot / 6) * (u[3] - u[4]);
    g[0] = u[0] + (sum + far_sum);
    g[1] = difference + far_difference;
    g[2] = T(0.5) * sum + T(2) * far_sum;
    g[3] = T(0.5) * difference + T(2) * far_difference;
    g[4] = u[5] + T(0.25) * sum + T(4) * far_sum;
  }
  static constexpr double kHalfRoot = WinogradAxis<2, 3>::kHalfRoot, kRoot = 2 * kHalfRoot;
};

// Transforms both axes: `down` along y, then `along` along x, each from an array of vectors to another. from(y, x)
// loads, to(y, x, value) stores.
template <class T, int from_height, int from_width, int height, int width, class From, class Down, class Along,
          class To>
FASTNN_INLINE void winograd_transform(const From& from, const Down& down, const Along& along, const To& to) {
  Vec<T> rows[height][from_width];
  FASTNN_UNROLL
  for (int x = 0; x < from_width; ++x) {
    Vec<T> column[from_height], result[height];
    FASTNN_UNROLL
    for (int y = 0; y < from_height; ++y) column[y] = from(y, x);
    down(column, result);
    FASTNN_UNROLL
    for (int y = 0; y < height; ++y) rows[y][x] = result[y];
  }
  FASTNN_UNROLL
  for (int y = 0; y < height; ++y) {
    Vec<T> result[width];
    along(rows[y], result);
    FASTNN_UNROLL
    for (int x = 0; x < width; ++x) to(y, x, result[x]);
  }
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

// How an axis of `length` outputs is cut: `fours` tiles of 4 from the first on, then `twos` of 2. The last one may
// reach beyond the end.
struct WinogradCut {
  int64_t fours, twos;
  int64_t tiles(int tile) const { return tile == 4 ? fours : twos; }
  int64_t first(int tile) const { return tile == 4 ? 0 : 4 * fours; }
  int64_t points(int taps) const { return (3 + taps) * fours + (1 + taps) * twos; }
};

inline WinogradCut winograd_cut(int64_t length, int largest) {
  if (largest == 2) return {0, (length + 1) / 2};
  return length % 4 == 3 ? WinogradCut{length / 4 + 1, 0} : WinogradCut{length / 4, (length % 4 + 1) / 2};
}

// 3 or 5 where these are all taps of an undilated kernel so high and wide, read at step 1, else 0.
template <class T>
int dense_square_taps(const GatherConv<T>& conv) {
  const Taps& taps = conv.taps;
  const int side = taps.count == 9 ? 3 : taps.count == 25 ? 5 : 0;
  if (side == 0 || conv.step_y != 1 || conv.step_x != 1) return 0;
  const int64_t last = taps.count - 1;
  const bool dense = taps.y[last] - taps.y[0] == side - 1 && taps.x[last] - taps.x[0] == side - 1 &&
                     taps.y[1] == taps.y[0] && taps.x[1] == taps.x[0] + 1;
  return dense ? side : 0;
}

// How a convolution is computed; without a tile by the gather.
struct WinogradChoice {
  int tile, taps;
};

// What takes the fewest multiplications, transforming the weights counted in; Winograd wants channels enough.
template <class T, class Products>
WinogradChoice winograd_choice(const GatherConv<T>& conv) {
  const int taps = dense_square_taps(conv);
  const bool serves = sizeof(T) == 4 && taps != 0 && conv.depth >= kWinogradChannels && conv.columns >= kLanes<T> &&
                      conv.out_height >= 2 && conv.out_width >= 2;
  if (!serves) return {0, taps};
  int best = 0;
  int64_t least = taps * taps * conv.batch * conv.out_height * conv.out_width;
  const auto consider = [&](auto f, int64_t element_bytes) {
    using F = decltype(f);
    if (F::kTaps != taps) return;
    const int64_t bytes = F::kPlaces * conv.depth * conv.columns * element_bytes;
    const int64_t products = conv.batch * winograd_cut(conv.out_height, F::kTile).points(taps) *
                             winograd_cut(conv.out_width, F::kTile).points(taps);
    const int64_t cost = products + F::kPlaces * winograd_weight_cost(bytes) * (taps == 5 ? 3 : 2) / 2;
    if (cost < least) least = cost, best = F::kTile;
  };
  consider(Winograd<2, 3>{}, sizeof(typename Products::Element));
  if constexpr (Products::kMostPoints == 6) consider(Winograd<4, 3>{}, sizeof(typename Products::Element));
  consider(Winograd<2, 5>{}, sizeof(T));
  return {best, taps};
}

// All tiles of one size: `rows` times `columns` in an image, the first one at output (first_y, first_x).
struct WinogradTiles {
  int64_t rows, columns, first_y, first_x;
};

// A task's share of the tiles: of each size `count` from tile `first` on, which have the rows of V and M from `row` on.
struct WinogradShare {
  int64_t first[kWinogradSizes], count[kWinogradSizes], row[kWinogradSizes + 1];
};

inline WinogradShare winograd_share(const WinogradTiles* tiles, int64_t batch, int64_t share, int64_t shares) {
  WinogradShare result{};
  for (int size = 0; size < kWinogradSizes; ++size) {
    const int64_t all = batch * tiles[size].rows * tiles[size].columns;
    result.first[size] = all * share / shares;
    result.count[size] = all * (share + 1) / shares - result.first[size];
    result.row[size + 1] = result.row[size] + result.count[size];
  }
  return result;
}

// body(image, y, x, row) for each tile of one size, whose first output is (y, x).
template <int size, class Body>
FASTNN_INLINE void for_each_tile(const WinogradTiles* tiles, const WinogradShare& share, const Body& body) {
  const auto [rows, columns, first_y, first_x] = tiles[size];
  for (int64_t i = 0; i < share.count[size]; ++i) {
    const int64_t tile = share.first[size] + i;
    body(tile / columns / rows, first_y + tile / columns % rows * kWinogradHeight[size],
         first_x + tile % columns * kWinogradWidth[size], share.row[size] + i);
  }
}

// V of a share; places are v_step apart.
template <class T, class Products, class F>
void winograd_inputs(const GatherConv<T>& conv, const WinogradTiles* tiles, const WinogradShare& share, const T* zeros,
                     typename Products::Element* v, int64_t v_step) {
  const int64_t padded = winograd_groups<Products>(conv.depth) * Products::kGroup;
  if (padded > conv.depth) zero_run(F::kPlaces * v_step, v);
  for_each_size<F>([&](auto constant) {
    constexpr int size = decltype(constant)::value;
    for_each_tile<size>(tiles, share, [&](int64_t image, int64_t y, int64_t x, int64_t row) {
      const Image<T> source{conv.source + image * conv.source_image_stride, conv.source_height, conv.source_width,
                            conv.source_row_stride, conv.source_pixel_stride};
      with_patch<kWinogradHeight[size] + F::kTaps - 1, kWinogradWidth[size] + F::kTaps - 1>(
          source, y + conv.taps.y[0], x + conv.taps.x[0], zeros, [&](const auto& pixel) {
            winograd_input<T, Products, size, F>(pixel, conv.depth, v + row * padded, v_step);
          });
    });
  });
}

// M of a share for one panel. A place is one of the tiles whose height and width have its points: those of 4 alone, or
// all. Not inlined: beside the transforms, whose loops want registers too, each product would wait for addresses.
template <class T, class Products, class F>
__attribute__((noinline)) void winograd_products(int64_t groups, bool narrow, const WinogradShare& share,
                                                 const typename Products::Element* v, int64_t v_step,
                                                 const typename Products::Element* u, int64_t u_step, T* m,
                                                 int64_t m_step) {
  const auto of_all = [](int point) { return F::kTile == 2 || (point != 3 && point != 4); };
  for (int place = 0; place < F::kPlaces; ++place) {
    const bool any_height = of_all(place / F::kPoints), any_width = of_all(place % F::kPoints);
    const int64_t row = share.row[any_width ? 0 : 1];
    const int64_t rows = share.row[!any_height ? 2 : any_width ? 4 : 3] - row;
    const typename Products::Element* v_at = v + place * v_step + row * groups * Products::kGroup;
    T* m_at = m + place * m_step + row * kTileColumns<T>;
    if (narrow)
      winograd_multiply<T, Products, 1>(rows, groups, v_at, u + place * u_step, m_at);
    else
      winograd_multiply<T, Products, 2>(rows, groups, v_at, u + place * u_step, m_at);
  }
}

// One tile's outputs to where they belong: windows pooled, or `stream`ed past the caches.
template <class T, bool with_nan, int height, int width>
FASTNN_INLINE void winograd_store(const GatherConv<T>& conv, int64_t image, int64_t y, int64_t x, int64_t column,
                                  int64_t left, bool stream, const Vec<T> (&out)[height][width]) {
  const int64_t first = image * conv.out_image_stride + column;
  if (conv.pool) {  // the cut is that of whole windows
    FASTNN_UNROLL
    for (int i = 0; i < height * width / 4; ++i) {
      constexpr int windows = width / 2;
      const int dy = i / windows * 2, dx = i % windows * 2;
      const int64_t row = (y + dy) / 2, pixel = (x + dx) / 2;
      if (row >= conv.out_height / 2 || pixel >= conv.out_width / 2) continue;
      const int64_t at = first + row * conv.out_row_stride + pixel * conv.out_pixel_stride;
      store_pooled<T, with_nan>(out[dy][dx], out[dy][dx + 1], out[dy + 1][dx], out[dy + 1][dx + 1], conv.relu, left,
                                conv.out, conv.winner, at);
    }
    return;
  }
  FASTNN_UNROLL
  for (int i = 0; i < height * width; ++i) {
    const int64_t row = y + i / width, pixel = x + i % width;
    if (row >= conv.out_height || pixel >= conv.out_width) continue;
    T* at = conv.out + first + row * conv.out_row_stride + pixel * conv.out_pixel_stride;
    const Vec<T> value = conv.relu ? relu(out[i / width][i % width]) : out[i / width][i % width];
    if (stream)
      store_streamed(at, value);
    else
      store_upto(at, value, left);
  }
}

// In pairs, which do not wait for each other.
template <class T, int height, int width>
FASTNN_INLINE Vec<T> sum_of_tile(const Vec<T> (&out)[height][width]) {
  Vec<T> rows[height];
  FASTNN_UNROLL
  for (int y = 0; y < height; ++y) {
    rows[y] = out[y][0] + out[y][1];
    if constexpr (width == 4) rows[y] += out[y][2] + out[y][3];
  }
  Vec<T> sum = rows[0] + rows[1];
  if constexpr (height == 4) sum += rows[2] + rows[3];
  return sum;
}

// The outputs of a share in one panel's columns. Returns whether all were finite before activation; `with_nan`, or
// where tiles of 2 are not pooled, nobody asks.
template <class T, class F, bool with_nan>
bool winograd_outputs(const GatherConv<T>& conv, const WinogradTiles* tiles, const WinogradShare& share, int64_t panel,
                      bool stream, const T* m, int64_t m_step) {
  const int64_t begin = panel * kTileColumns<T>, beyond = begin + kTileColumns<T>;
  const int64_t end = conv.columns < beyond ? conv.columns : beyond;
  Vec<T> all{};  // the sum of all outputs: not finite if any is not, or if it overflows
  for (int64_t column = begin; column < end; column += kLanes<T>) {
    const int64_t left = end - column < kLanes<T> ? end - column : kLanes<T>;
    const Vec<T> bias = conv.bias ? load_upto(conv.bias + column, left) : Vec<T>{};
    for_each_size<F>([&](auto constant) {
      constexpr int size = decltype(constant)::value, height = kWinogradHeight[size], width = kWinogradWidth[size];
      for_each_tile<size>(tiles, share, [&](int64_t image, int64_t y, int64_t x, int64_t row) {
        Vec<T> out[height][width];
        winograd_output<T, size, F>(m + row * kTileColumns<T> + column - begin, m_step, bias, out);
        if (!with_nan && (F::kTile == 4 || conv.pool)) {
          all += sum_of_tile<T>(out);
        }
        winograd_store<T, with_nan>(conv, image, y, x, column, left, stream, out);
      });
    });
  }
  const Vec<T> zero_or_nan = all * T(0);
  return !any_lane<T>(zero_or_nan != zero_or_nan);
}

// What a thread has made in this call: V of the share before `end_share`, and U of some panels.
struct alignas(kLineBytes) WinogradHeld {
  int64_t end_share, first_panel, end_panel;

  // Keeps one run of panels: the longer one where two do not meet.
  void add_panels(int64_t first, int64_t end) {
    if (first <= end_panel && end >= first_panel && end_panel > first_panel) {
      if (first < first_panel) first_panel = first;
      if (end > end_panel) end_panel = end;
    } else if (end - first > end_panel - first_panel) {
      first_panel = first, end_panel = end;
    }
  }
};

// Convolves one group. Returns whether all outputs were finite before activation; where `weights_finite` is set to
// false, the outputs are to be made anew unless `always`.
//
// A task has its share of the tiles of every size, so that it is the same images that a thread has here and in the
// loops before and after, and a place's weights are read once for all of them. Where all threads' copies of U are
// small, each thread transforms the weights for itself: that takes less time than to read what others have written.
template <class T, class Products, class F>
bool winograd_conv(const GatherConv<T>& conv, const WinogradKernels<T>& kernels, bool always, bool* weights_finite) {
  using Element = typename Products::Element;
  constexpr int places = F::kPlaces;
  // Pooling reads whole windows alone.
  const WinogradCut vertical = winograd_cut(conv.pool ? conv.out_height / 2 * 2 : conv.out_height, F::kTile);
  const WinogradCut horizontal = winograd_cut(conv.pool ? conv.out_width / 2 * 2 : conv.out_width, F::kTile);
  const int64_t panels = panels_of<T>(conv.columns), groups = winograd_groups<Products>(conv.depth);
  const int64_t padded = groups * Products::kGroup;

  WinogradTiles tiles[kWinogradSizes];
  int64_t count = 0;
  for (int size = 0; size < kWinogradSizes; ++size) {
    const int height = kWinogradHeight[size], width = kWinogradWidth[size];
    tiles[size] = {vertical.tiles(height), horizontal.tiles(width), vertical.first(height), horizontal.first(width)};
    count += conv.batch * tiles[size].rows * tiles[size].columns;
  }
  if (count == 0) return true;
  int64_t most = kWinogradBlockBytes / (places * padded * static_cast<int64_t>(sizeof(Element)));
  if (most < kWinogradTiles) most = kWinogradTiles;
  const TaskPlan plan = plan_tasks(1, count, most, kTileRows, panels);
  const int64_t shares = plan.blocks, column_parts = plan.column_parts;
  const int64_t most_rows = count / shares + kWinogradSizes;  // of a share

  const int threads = max_threads();
  const int64_t u_step = winograd_step<Element>(padded * kTileColumns<T>), u_panel = places * u_step;
  const int64_t v_step = winograd_step<Element>(most_rows * padded);
  const int64_t m_step = winograd_step<T>(most_rows * kTileColumns<T>);
  const MadeWeights<Element> weights(threads, panels * u_panel);
  const ThreadScratch<Element> inputs(threads, places * v_step);
  const ThreadScratch<T> sums(threads, places * m_step);
  const Scratch<WinogradHeld> all_held(threads);
  for (int thread = 0; thread < threads; ++thread) all_held[thread] = {};
  const Scratch<T> zeros(conv.depth);  // a pixel outside the image
  zero_run<T>(conv.depth, zeros);
  const bool stream = conv.stream && kVectorBytes == kLineBytes;  // vectors of a pixel are stored far apart in time
  const int64_t units = winograd_units(conv.depth);
  const auto transform = [&](int64_t panel, int64_t unit, Element* to) {
    if (!winograd_weights<T, Products, F>(conv.columns, conv.depth, kernels, panel, unit, to))
      __atomic_store_n(weights_finite, false, __ATOMIC_RELAXED);
  };

  *weights_finite = true;
  if (!weights.own()) {
    parallel_for(panels * units, [&](int64_t task) { transform(task / units, task % units, weights.of(0)); });
    if (!*weights_finite && !always) return false;
  }
  const TaskOrder order{shares, column_parts,
                        !weights.own() && panels * u_panel > conv.batch * conv.source_image_stride};
  bool finite = true;
  parallel_tasks(order.tasks(), [&](int64_t task, int thread) {
    const int64_t index = order.block(task), part = order.part(task);
    const int64_t first_panel = panels * part / column_parts, end_panel = panels * (part + 1) / column_parts;
    const WinogradShare share = winograd_share(tiles, conv.batch, index, shares);
    WinogradHeld& held = all_held[thread];
    Element* u = weights.of(thread);
    Element* v = inputs[thread];
    T* m = sums[thread];
    if (held.end_share != index + 1) winograd_inputs<T, Products, F>(conv, tiles, share, zeros, v, v_step);
    held.end_share = index + 1;
    for (int64_t panel = first_panel; panel < end_panel; ++panel) {
      if (weights.own() && (panel < held.first_panel || panel >= held.end_panel))
        for (int64_t unit = 0; unit < units; ++unit) transform(panel, unit, u);
      const bool narrow = conv.columns - panel * kTileColumns<T> <= kLanes<T>;
      winograd_products<T, Products, F>(groups, narrow, share, v, v_step, u + panel * u_panel, u_step, m, m_step);
      if (winograd_outputs<T, F, false>(conv, tiles, share, panel, stream, m, m_step)) continue;
      __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
      if constexpr (F::kTile == 2) winograd_outputs<T, F, true>(conv, tiles, share, panel, stream, m, m_step);
    }
    held.add_panels(first_panel, end_panel);
    if (stream) finish_streaming();
  });
  return finite && *weights_finite;
}

}  // namespace
}  // namespace fastnn::cpu
