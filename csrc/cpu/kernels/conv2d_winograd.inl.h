// Winograd's F(4x4, 3x3) and F(2x2, 3x3): m x m outputs of a 3x3 convolution from (m + 2)^2 multiplications instead of
// 9 m^2 (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks", 2015).
//
//   V = B' d B     of each source patch d of (m + 2)^2 pixels, per channel
//   U = G g G'     of each 3x3 kernel g
//   M = sum over channels of U * V: one matrix product for each of the (m + 2)^2 places
//   out = A' M A
//
//   V: [place][tile][channel]   U: [panel][place][channel][kTileColumns]   M: [place][tile][kTileColumns], a panel at a
//   time
//
// A place is a pair of points at which the polynomials behind the algorithm are multiplied. Along an axis they are
//
//   0, 1/s, -1/s, s, -s, infinity, with s = sqrt(2): 4 outputs
//   0, 1/s, -1/s,        infinity:                   2 outputs
//
// The square roots lose half as many digits as the usual 1 and 2 (compare Barabasz et al., "Error Analysis and
// Improving the Accuracy of Winograd Convolution", 2020). The fewer points are among the others, so one U serves tiles
// of both sizes: an axis is cut into tiles of 4 and, where 1 or 2 outputs are left, one of 2.
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
constexpr int64_t kWinogradBlockBytes = 120 << 10;
constexpr int64_t kWinogradTiles = 24;

constexpr int winograd_places(int tile) { return (tile + 2) * (tile + 2); }

// From one place of U, V or M to the next: a line more than the elements of a place, which are a power of two as a
// rule, so that the places of a tile lie in different sets of L1.
template <class Element>
constexpr int64_t winograd_step(int64_t elements) {
  return elements + kLineBytes / static_cast<int64_t>(sizeof(Element));
}

// The transforms of one axis of a tile with so many outputs.
template <int outputs>
struct WinogradAxis;

template <>
struct WinogradAxis<2> {
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
struct WinogradAxis<4> {
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
  static constexpr double kHalfRoot = WinogradAxis<2>::kHalfRoot, kRoot = 2 * kHalfRoot;
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

// Where U of tiles up to `largest` has point i of a tile of `tile` outputs.
constexpr int winograd_point(int tile, int largest, int i) { return tile < largest && i == 3 ? 5 : i; }

// How the sums over channels are formed: in T throughout. conv2d_winograd_bf16.inl.h has another.
template <class T>
struct FullProducts {
  using Element = T;  // of V and U
  static constexpr int kLargestTile = 4;
  static constexpr int64_t kGroup = 1;  // channels that one product takes: U is [place][group][kTileColumns][kGroup]

  static const char* name(int largest) { return largest == 4 ? "winograd_4x4" : "winograd_2x2"; }

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

// 3x3 kernels as they lie: tap (y, x) of column c of panel p, channel k at
// data + p * panel_step + k * channel_step + y * row_step + x * tap_step + c. The input gradient turns them by steps
// below zero.
template <class T>
struct WinogradKernels {
  const T* data;
  int64_t panel_step, channel_step, row_step, tap_step;
};

// Returns whether all weights are finite. Where a last group has channels too few, the missing ones are zeros.
template <class T, class Products, int largest>
bool winograd_weights(int64_t columns, int64_t depth, const WinogradKernels<T>& kernels,
                      typename Products::Element* transformed) {
  constexpr int points = largest + 2;
  constexpr int64_t width = kTileColumns<T>;
  const int64_t groups = winograd_groups<Products>(depth);
  const int64_t to_step = winograd_step<typename Products::Element>(groups * Products::kGroup * width);
  bool finite = true;
  parallel_ranges(panels_of<T>(columns) * groups, 16, [&](int64_t begin, int64_t end) {
    Vec<T> zero_or_nan{};
    for (int64_t i = begin; i < end; ++i) {
      typename Products::Element* group =
          transformed + i / groups * points * points * to_step + i % groups * width * Products::kGroup;
      for (int64_t member = 0; member < Products::kGroup; ++member) {
        const int64_t channel = i % groups * Products::kGroup + member;
        if (channel >= depth) break;
        const T* from = kernels.data + i / groups * kernels.panel_step + channel * kernels.channel_step;
        for (int64_t v = 0; v < width; v += kLanes<T>) {
          const int64_t left = columns - i / groups * width - v;
          const int64_t count = left < 0 ? 0 : left < kLanes<T> ? left : kLanes<T>;
          const auto axis = [](const auto& taps, auto& u) { WinogradAxis<largest>::template weight<T>(taps, u); };
          winograd_transform<T, 3, 3, points, points>(
              [&](int y, int x) {
                const Vec<T> g = load_upto(from + y * kernels.row_step + x * kernels.tap_step + v, count);
                zero_or_nan += g * T(0);
                return g;
              },
              axis, axis,
              [&](int y, int x, Vec<T> u) {
                Products::store_weight(group + (points * y + x) * to_step + v * Products::kGroup, u, member);
              });
        }
      }
    }
    if (any_lane<T>(zero_or_nan != zero_or_nan)) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
  });
  return finite;
}

// body(pixel) for a patch of an image, where pixel(y, x) is the address of the patch's pixel; outside the image,
// `zeros`.
template <int height, int width, class T, class Body>
FASTNN_INLINE void with_patch(const Image<T>& image, int64_t top, int64_t left, const T* zeros, const Body& body) {
  const T* first = image.data + top * image.row_stride + left * image.pixel_stride;
  const auto inside = [&](int64_t y, int64_t x) { return first + y * image.row_stride + x * image.pixel_stride; };
  if (lies_inside(image, {top, left, height, width})) return body(inside);
  const T* pixels[height][width];
  for (int64_t y = 0; y < height; ++y)
    for (int64_t x = 0; x < width; ++x)
      pixels[y][x] = lies_inside(image, {top + y, left + x, 1, 1}) ? inside(y, x) : zeros;
  body([&](int64_t y, int64_t x) { return pixels[y][x]; });
}

// V of one tile: to + place * stride.
template <class T, class Products, int height, int width, class Pixel>
FASTNN_INLINE void winograd_input(const Pixel& pixel, int64_t depth, typename Products::Element* to, int64_t stride) {
  for (int64_t c = 0; c < depth; c += kLanes<T>) {
    const int64_t left = depth - c < kLanes<T> ? depth - c : kLanes<T>;
    winograd_transform<T, height + 2, width + 2, height + 2, width + 2>(
        [&](int y, int x) { return load_upto(pixel(y, x) + c, left); },
        [](const auto& d, auto& v) { WinogradAxis<height>::template input<T>(d, v); },
        [](const auto& d, auto& v) { WinogradAxis<width>::template input<T>(d, v); },
        [&](int y, int x, Vec<T> v) { Products::store_input(to + ((width + 2) * y + x) * stride + c, v, left); });
  }
}

// M of one place for the tiles [0, tiles): m[tile][columns] = v[tile][channel] * u[channel][columns]
template <class T, class Products, int vectors>
FASTNN_INLINE void winograd_multiply(int64_t tiles, int64_t groups, const typename Products::Element* v,
                                     const typename Products::Element* u, T* m) {
  const int64_t shares = (tiles + kTileRows - 1) / kTileRows;
  for (int64_t share = 0; share < shares; ++share) {
    const int64_t tile = tiles * share / shares;
    with_rows(tiles * (share + 1) / shares - tile, [&](auto constant) {
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
}

// The outputs of one tile, before bias; m of place 0, `stride` apart.
template <class T, int height, int width>
FASTNN_INLINE void winograd_output(const T* m, int64_t stride, Vec<T> bias, Vec<T> (&out)[height][width]) {
  winograd_transform<T, height + 2, width + 2, height, width>(
      [&](int y, int x) { return load(m + (y * (width + 2) + x) * stride); },
      [](const auto& column, auto& y) { WinogradAxis<height>::template output<T>(column, y); },
      [](const auto& row, auto& y) { WinogradAxis<width>::template output<T>(row, y); },
      [&](int y, int x, Vec<T> value) { out[y][x] = value + bias; });
}

// How an axis of `length` outputs is cut: `fours` tiles of 4 from the first on, then `twos` of 2. The last one may
// reach beyond the end.
struct WinogradCut {
  int64_t fours, twos;
  int64_t tiles(int tile) const { return tile == 4 ? fours : twos; }
  int64_t first(int tile) const { return tile == 4 ? 0 : 4 * fours; }
  int64_t points() const { return 6 * fours + 4 * twos; }
};

inline WinogradCut winograd_cut(int64_t length, int largest) {
  if (largest == 2) return {0, (length + 1) / 2};
  return length % 4 == 3 ? WinogradCut{length / 4 + 1, 0} : WinogradCut{length / 4, (length % 4 + 1) / 2};
}

// The largest tile with which Winograd takes the fewest multiplications, transforming the weights counted in; 0 if the
// gather takes fewer or Winograd does not serve: it wants all nine taps of an undilated 3x3 kernel, step 1, and
// channels enough.
template <class T, class Products>
int winograd_tile(const GatherConv<T>& conv) {
  const bool serves = sizeof(T) == 4 && conv.taps.count == 9 && conv.step_y == 1 && conv.step_x == 1 &&
                      conv.taps.y[8] - conv.taps.y[0] == 2 && conv.taps.x[8] - conv.taps.x[0] == 2 &&
                      conv.taps.y[1] == conv.taps.y[0] && conv.taps.x[1] == conv.taps.x[0] + 1 &&
                      conv.depth >= kWinogradChannels && conv.columns >= kLanes<T> && conv.out_height >= 2 &&
                      conv.out_width >= 2;
  if (!serves) return 0;
  int best = 0;
  int64_t least = 9 * conv.batch * conv.out_height * conv.out_width;
  for (int largest = 2; largest <= Products::kLargestTile; largest += 2) {
    const int64_t places = winograd_places(largest);
    const int64_t bytes = places * conv.depth * conv.columns * static_cast<int64_t>(sizeof(typename Products::Element));
    const int64_t products =
        conv.batch * winograd_cut(conv.out_height, largest).points() * winograd_cut(conv.out_width, largest).points();
    const int64_t cost = products + places * winograd_weight_cost(bytes);
    if (cost < least) least = cost, best = largest;
  }
  return best;
}

// All tiles of one size.
struct WinogradTiles {
  int64_t rows, columns;     // of tiles in an image
  int64_t first_y, first_x;  // output of the first
  int64_t first_block;
};

// One block of tiles, for some panels of columns. Returns whether all outputs were finite before activation; where
// `largest` is 2, nobody asks. `has_input` where v is the block's already.
template <class T, class Products, int largest, int height, int width>
bool winograd_block(const GatherConv<T>& conv, const typename Products::Element* transformed,
                    const WinogradTiles& tiles, int64_t block, int64_t first_tile, int64_t first_panel,
                    int64_t end_panel, const T* zeros, bool stream, bool has_input, typename Products::Element* v,
                    T* m) {
  using Element = typename Products::Element;
  constexpr int64_t panel_width = kTileColumns<T>;
  constexpr int places = (height + 2) * (width + 2);
  const int64_t depth = conv.depth, groups = winograd_groups<Products>(depth), padded = groups * Products::kGroup;
  const int64_t of_image = tiles.rows * tiles.columns, end = conv.batch * of_image;
  const int64_t count = end - first_tile < block ? end - first_tile : block;
  const int64_t u_step = winograd_step<Element>(padded * panel_width);
  const int64_t v_step = winograd_step<Element>(block * padded);
  const int64_t m_step = winograd_step<T>(block * panel_width);
  Vec<T> zero_or_nan{};
  if (padded > depth && !has_input) zero_run(places * v_step, v);

  for (int64_t tile = 0; tile < count && !has_input; ++tile) {
    const int64_t index = first_tile + tile, image = index / of_image;
    const int64_t y = tiles.first_y + index / tiles.columns % tiles.rows * height;
    const int64_t x = tiles.first_x + index % tiles.columns * width;
    const Image<T> source{conv.source + image * conv.source_image_stride, conv.source_height, conv.source_width,
                          conv.source_row_stride, conv.source_pixel_stride};
    with_patch<height + 2, width + 2>(source, y + conv.taps.y[0], x + conv.taps.x[0], zeros, [&](const auto& pixel) {
      winograd_input<T, Products, height, width>(pixel, depth, v + tile * padded, v_step);
    });
  }
  for (int64_t panel = first_panel; panel < end_panel; ++panel) {
    const int64_t column = panel * panel_width;
    const int64_t columns = conv.columns - column < panel_width ? conv.columns - column : panel_width;
    const Element* u = transformed + panel * winograd_places(largest) * u_step;
    const bool narrow = columns <= kLanes<T>;
    for (int place = 0; place < places; ++place) {
      const int u_place = winograd_point(height, largest, place / (width + 2)) * (largest + 2) +
                          winograd_point(width, largest, place % (width + 2));
      const Element* v_at = v + place * v_step;
      const Element* u_at = u + u_place * u_step;
      T* m_at = m + place * m_step;
      if (narrow)
        winograd_multiply<T, Products, 1>(count, groups, v_at, u_at, m_at);
      else
        winograd_multiply<T, Products, 2>(count, groups, v_at, u_at, m_at);
    }
    for (int64_t c = 0; c < columns; c += kLanes<T>) {
      const int64_t left = columns - c < kLanes<T> ? columns - c : kLanes<T>;
      const Vec<T> bias = conv.bias ? load_upto(conv.bias + column + c, left) : Vec<T>{};
      for (int64_t tile = 0; tile < count; ++tile) {
        const int64_t index = first_tile + tile, image = index / of_image;
        const int64_t y = tiles.first_y + index / tiles.columns % tiles.rows * height;
        const int64_t x = tiles.first_x + index % tiles.columns * width;
        Vec<T> out[height][width];
        winograd_output<T, height, width>(m + tile * panel_width + c, m_step, bias, out);
        FASTNN_UNROLL
        for (int i = 0; largest == 4 && i < height * width; ++i) zero_or_nan += out[i / width][i % width] * T(0);
        T* to = conv.out + image * conv.out_image_stride + column + c;
        if (conv.winner) {  // the cut is that of whole windows
          uint8_t* winner = conv.winner + image * conv.out_image_stride + column + c;
          FASTNN_UNROLL
          for (int i = 0; i < height * width / 4; ++i) {
            constexpr int windows = width / 2;
            const int dy = i / windows * 2, dx = i % windows * 2;
            const int64_t row = (y + dy) / 2, pixel = (x + dx) / 2;
            if (row >= conv.out_height / 2 || pixel >= conv.out_width / 2) continue;
            const int64_t at = row * conv.out_row_stride + pixel * conv.out_pixel_stride;
            store_pooled<T>(out[dy][dx], out[dy][dx + 1], out[dy + 1][dx], out[dy + 1][dx + 1], conv.relu, left,
                            to + at, winner + at);
          }
          continue;
        }
        FASTNN_UNROLL
        for (int i = 0; i < height * width; ++i) {
          const int64_t row = y + i / width, pixel = x + i % width;
          if (row >= conv.out_height || pixel >= conv.out_width) continue;
          T* at = to + row * conv.out_row_stride + pixel * conv.out_pixel_stride;
          const Vec<T> value = conv.relu ? relu(out[i / width][i % width]) : out[i / width][i % width];
          if (stream)
            store_streamed(at, value);
          else
            store_upto(at, value, left);
        }
      }
    }
  }
  if (stream) finish_streaming();
  return !any_lane<T>(zero_or_nan != zero_or_nan);
}

// As gather_conv; `transformed` are winograd_weights<largest>(). Returns whether all outputs were finite
// before activation.
template <class T, class Products, int largest>
bool winograd_conv(const GatherConv<T>& conv, const typename Products::Element* transformed) {
  using Element = typename Products::Element;
  // Pooling reads whole windows alone.
  const WinogradCut vertical = winograd_cut(conv.winner ? conv.out_height / 2 * 2 : conv.out_height, largest);
  const WinogradCut horizontal = winograd_cut(conv.winner ? conv.out_width / 2 * 2 : conv.out_width, largest);
  const int64_t panels = panels_of<T>(conv.columns);
  const int64_t padded = winograd_groups<Products>(conv.depth) * Products::kGroup;

  constexpr int kSizes[4][2] = {{4, 4}, {4, 2}, {2, 4}, {2, 2}};
  WinogradTiles kinds[4];
  for (int i = 0; i < 4; ++i) {
    const auto [height, width] = kSizes[i];
    kinds[i] = {vertical.tiles(height), horizontal.tiles(width), vertical.first(height), horizontal.first(width), 0};
  }
  int64_t tiles = 0;
  for (const WinogradTiles& kind : kinds) tiles += conv.batch * kind.rows * kind.columns;
  if (tiles == 0) return true;
  int64_t most = kWinogradBlockBytes / (winograd_places(largest) * padded * static_cast<int64_t>(sizeof(Element)));
  if (most < kWinogradTiles) most = kWinogradTiles;
  const TaskPlan plan = plan_tasks(1, tiles, most, kTileRows, panels);
  const int64_t block = plan.block, column_parts = plan.column_parts;
  int64_t blocks = 0;
  for (WinogradTiles& kind : kinds) {
    kind.first_block = blocks;
    blocks += (conv.batch * kind.rows * kind.columns + block - 1) / block;
  }

  const int threads = max_threads();
  const int64_t v_elements = winograd_places(largest) * winograd_step<Element>(block * padded);
  const int64_t m_elements = winograd_places(largest) * winograd_step<T>(block * kTileColumns<T>);
  const Scratch<Element> inputs(threads * v_elements);
  const Scratch<T> scratch(threads * m_elements);
  constexpr int64_t kLine = kLineBytes / static_cast<int64_t>(sizeof(int64_t));
  const Scratch<int64_t> held(threads * kLine);  // the block whose V a thread has
  for (int thread = 0; thread < threads; ++thread) held[thread * kLine] = -1;
  const Scratch<T> zeros(conv.depth);  // a pixel outside the image
  zero_run<T>(conv.depth, zeros);
  const bool stream = conv.stream && kVectorBytes == kLineBytes;  // vectors of a pixel are stored far apart in time

  bool finite = true;
  parallel_tasks(blocks * column_parts, [&](int64_t task, int thread) {
    const int64_t index = task / column_parts, part = task % column_parts;
    const bool has_input = held[thread * kLine] == index;
    held[thread * kLine] = index;
    const auto run = [&](auto kind, auto height, auto width) {
      const WinogradTiles& of_kind = kinds[decltype(kind)::value];
      const bool block_finite = winograd_block<T, Products, largest, decltype(height)::value, decltype(width)::value>(
          conv, transformed, of_kind, block, (index - of_kind.first_block) * block, panels * part / column_parts,
          panels * (part + 1) / column_parts, zeros, stream, has_input, inputs + thread * v_elements,
          scratch + thread * m_elements);
      if (!block_finite) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
    };
    if constexpr (largest == 4) {
      if (index < kinds[1].first_block) return run(Constant<0>{}, Constant<4>{}, Constant<4>{});
      if (index < kinds[2].first_block) return run(Constant<1>{}, Constant<4>{}, Constant<2>{});
      if (index < kinds[3].first_block) return run(Constant<2>{}, Constant<2>{}, Constant<4>{});
    }
    run(Constant<3>{}, Constant<2>{}, Constant<2>{});
  });
  return finite;
}

}  // namespace
}  // namespace fastnn::cpu
