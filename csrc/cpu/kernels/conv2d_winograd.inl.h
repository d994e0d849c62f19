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
// conv2d_winograd_points.inl.h has the matrices A, B and G.
//
// Its sums round differently from a direct convolution's: see docs/performance.md for the bound. In a tile of 4 an
// output depends on pixels that a direct convolution would not show it, but for their rounding; a NaN or infinity there
// spreads. So where outputs are not finite, all are made anew with tiles of 2, in which it does not: the first and last
// row of V reach one output row alone.
#pragma once

#include "cpu/kernels/conv2d_gather.inl.h"
#include "cpu/kernels/conv2d_winograd_tile.inl.h"

namespace fastnn::cpu {
namespace {

// Below 16 channels the transforms outweigh the multiplications saved.
constexpr int64_t kWinogradChannels = 16;
// Not for double, whose users want its digits.
template <class T>
constexpr bool kHasWinograd = sizeof(T) == 4;
// What a weight costs at each place - to transform, to write and to read it -, in multiplications: where U is not much
// larger than L2, where it is, and where it needs new pages on each call, being larger than the scratch memory kept.
constexpr int64_t winograd_weight_cost(int64_t bytes) { return bytes <= 12 << 20 ? 16 : bytes <= 32 << 20 ? 64 : 320; }
// V of a block is places * channels * tiles elements; M as much again where the channels are few. Both stay in L2.
// Blocks of fewer tiles would read U, which may be megabytes, faster than L3 gives it.
constexpr int64_t kWinogradBlockBytes = 164 << 10;
constexpr int64_t kWinogradTiles = 24;

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
  const bool serves = kHasWinograd<T> && taps != 0 && conv.depth >= kWinogradChannels && conv.columns >= kLanes<T> &&
                      conv.out_height >= 2 && conv.out_width >= 2;
  if (!serves) return {0, taps};
  int best = 0;
  int64_t least = taps * taps * conv.batch * conv.out_height * conv.out_width;
  constexpr int64_t element_bytes = sizeof(typename Products::Element);
  const auto consider = [&](auto f) {
    using F = decltype(f);
    if (F::kTaps != taps) return;
    const int64_t bytes = F::kPlaces * conv.depth * conv.columns * element_bytes;
    const int64_t products = conv.batch * winograd_cut(conv.out_height, F::kTile).points(taps) *
                             winograd_cut(conv.out_width, F::kTile).points(taps);
    const int64_t cost = products + F::kPlaces * winograd_weight_cost(bytes) * (taps == 5 ? 3 : 2) / 2;
    if (cost < least) least = cost, best = F::kTile;
  };
  consider(Winograd<2, 3>{});
  if constexpr (Products::kMostPoints == 6) {
    consider(Winograd<4, 3>{});
    consider(Winograd<2, 5>{});
  }
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
