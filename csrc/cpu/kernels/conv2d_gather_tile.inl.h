// Direct convolution of any geometry, on the register tile: one gather for the forward pass and for the input gradient.
//
//   out[y][x][c] = bias[c] + sum over taps t, channels k of source[y * step + tap_y[t]][x * step + tap_x[t]][k] *
//   w[t][k][c]
//
// forward: the taps are the kernel's, step is the stride. Input gradient: source is grad_output, and the taps are those
// that reach a pixel's phase (its coordinates modulo the stride), step 1, out the pixels of that phase (see
// conv2d.inl.h).
//
// A tile is kTileRows output pixels by kTileColumns channels, or kRowsOfVectors<1> by one vector; one panel of weights
// holds its columns for all taps:
//
//   panel: [tap][k][kTileColumns]      source pixel of row r, tap t: pixel[r] + tap_offset[t], then k contiguous
//
// Taps next to each other in a source row whose pixels are dense count as one tap of several times the depth.
//
// A few columns would leave most of a tile's vectors empty. They are dot products along the depth instead, whose
// weights are [column][tap][k].
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

struct Taps {
  int64_t count;
  const int64_t* y;  // offsets in source pixels
  const int64_t* x;
};

template <class T>
struct GatherConv {
  int64_t batch, out_height, out_width;
  int64_t step_y, step_x;
  Taps taps;
  int64_t groups, depth, columns;  // depth and columns of a group

  const T* source;  // first channel of pixel (0, 0) of image 0
  int64_t source_height, source_width;
  int64_t source_image_stride, source_row_stride, source_pixel_stride;

  bool dots;        // of no more than kFewColumns, from a vector of depth on, without pooling
  const T* panels;  // [group][panel][tap][depth][kTileColumns]; with dots [group][column][tap][depth]
  const T* bias;    // or null
  bool relu;

  T* out;
  int64_t out_image_stride, out_row_stride, out_pixel_stride;
  bool stream;      // stores of `out` go past the caches
  bool pool;        // in 2x2 windows: the out_* sizes above are those before pooling, the strides those of the pooled
  uint8_t* winner;  // with pool, or null

  int64_t panel_columns() const { return dots ? columns : panels_of<T>(columns) * kTileColumns<T>; }
  // Elements of `panels`.
  int64_t panel_elements() const { return groups * panel_columns() * taps.count * depth; }

  // The convolution of one group.
  GatherConv of_group(int64_t group) const {
    GatherConv one = *this;
    one.groups = 1;
    one.source += group * depth;
    if (panels) one.panels += group * one.panel_elements();
    if (bias) one.bias += group * columns;
    one.out += group * columns;
    if (winner) one.winner += group * columns;
    return one;
  }
};

struct Unchanged {
  template <class V>
  FASTNN_INLINE V operator()(V v) const {
    return v;
  }
};

// The largest of the four outputs of a window, of equal ones the first, and its place; after ReLU 0 and kNoWinner where
// none is positive. NaN wins, but only where `with_nan`: otherwise what comes out beside NaN is to be made anew.
// `finish`, monotone, makes outputs of what is compared.
template <class T, bool with_nan, class Finish>
FASTNN_INLINE void pool_window(Vec<T> a, Vec<T> b, Vec<T> c, Vec<T> d, bool with_relu, const Finish& finish,
                               Vec<T>* best, Mask<T>* place) {
  const Mask<T> zero{};
  if constexpr (with_nan) {
    *best = a;
    *place = zero;
    const auto consider = [&](Vec<T> v, int k) {
      const Mask<T> wins = (v > *best) | (v != v);
      *best = wins ? v : *best;
      *place = wins ? zero + k : *place;
    };
    consider(b, 1);
    consider(c, 2);
    consider(d, 3);
  } else {
    const Vec<T> upper = larger<T>(b, a), lower = larger<T>(d, c);
    *best = larger<T>(lower, upper);
    *place = lower > upper ? (d > c ? zero + 3 : zero + 2) : (b > a ? zero + 1 : zero);
  }
  *best = finish(*best);
  if (with_relu) {
    *place = *best <= Vec<T>{} ? zero + kNoWinner : *place;
    *best = relu(*best);
  }
}

// Stores at out[at] the `count` channels of a window's maximum and, unless `winner` is null, at winner[at] its place,
// as pool_window has them.
template <class T, bool with_nan, class Finish = Unchanged>
FASTNN_INLINE void store_pooled(Vec<T> a, Vec<T> b, Vec<T> c, Vec<T> d, bool with_relu, int64_t count, T* out,
                                uint8_t* winner, int64_t at, const Finish& finish = {}) {
  Vec<T> best;
  Mask<T> place;
  if (winner) {
    pool_window<T, with_nan>(a, b, c, d, with_relu, finish, &best, &place);
    store_bytes_upto<T>(winner + at, place, count);
  } else {  // again, so that the compiler leaves out what finds the place
    pool_window<T, with_nan>(a, b, c, d, with_relu, finish, &best, &place);
  }
  store_upto(out + at, best, count);
}

// pool(Constant<with_nan>{}) returns whether its outputs may stay.
template <class Pool>
FASTNN_INLINE void pool_twice_if_nan(const Pool& pool) {
  if (!pool(Constant<false>{})) pool(Constant<true>{});
}

// One run of taps: `offset` from a pixel's first tap, `depth` long, in source row y + tap_y; its first number is
// `first` of all that a pixel sums over.
struct Run {
  int64_t offset, depth, tap_y, first;
};

// Some consecutive runs.
struct Runs {
  int64_t count;
  const Run* runs;
  int64_t common_depth;  // of all, or 0
};

// acc += sum over runs. `depth` is the depth of all runs where it is known at compile time - first layers, whose few
// channels make short loops - or 0.
template <class T, int rows, int vectors, int depth>
FASTNN_INLINE void gather_accumulate(const Runs& runs, const T* const (&pixels)[rows], const T* panel,
                                     Vec<T> (&acc)[rows][vectors]) {
  for (int64_t i = 0; i < runs.count; ++i) {
    const T* weights = panel + runs.runs[i].first * kTileColumns<T>;
    const T* sources[rows];
    FASTNN_UNROLL
    for (int r = 0; r < rows; ++r) sources[r] = pixels[r] + runs.runs[i].offset;
    if constexpr (depth > 0) {
      FASTNN_UNROLL
      for (int k = 0; k < depth; ++k) {
        FASTNN_UNROLL
        for (int r = 0; r < rows; ++r) {
          FASTNN_UNROLL
          for (int v = 0; v < vectors; ++v)
            acc[r][v] += broadcast(sources[r][k]) * load(weights + k * kTileColumns<T> + v * kLanes<T>);
        }
      }
    } else {
      multiply_add<T, rows, vectors>(runs.runs[i].depth, sources, 1, weights, kTileColumns<T>, acc);
    }
  }
}

template <class T, int vectors>
FASTNN_INLINE void load_bias(const T* bias, int64_t columns, Vec<T> (&row)[vectors]) {
  FASTNN_UNROLL
  for (int v = 0; v < vectors; ++v) {
    const int64_t left = columns - v * kLanes<T>;
    row[v] = !bias || left <= 0 ? Vec<T>{} : load_upto(bias + v * kLanes<T>, left < kLanes<T> ? left : kLanes<T>);
  }
}

// The runs whose source row, for the output row whose first tap reads `source_row`, lies in the image.
inline Runs runs_inside(const Runs& runs, int64_t source_row, int64_t height) {
  int64_t first = 0, end = runs.count;
  while (first < end && source_row + runs.runs[first].tap_y < 0) ++first;
  while (end > first && source_row + runs.runs[end - 1].tap_y >= height) --end;
  return {end - first, runs.runs + first, runs.common_depth};
}

// tile_of(Constant<rows>{}, runs, pixels, outs) for tiles of at most `most` pixels of the output rows [row, row + rows)
// of an image: where each pixel is in the window and in the output. Tiles stay in one row where it fills most of a
// tile, and leave out the taps above and below the image; narrower rows follow each other in a tile. A tile fetches its
// share of `next`.
template <int most, class T, class Tile>
FASTNN_INLINE void each_tile(const GatherConv<T>& conv, const Image<T>& window, const Runs& all_runs, int64_t row,
                             int64_t rows_in_block, int64_t width, T* out, const FetchAhead<T>& next,
                             const Tile& tile_of) {
  const int64_t x_step = conv.step_x * window.pixel_stride, out_step = conv.out_pixel_stride;
  const int64_t source_turn = conv.step_y * window.row_stride - width * x_step;  // from a row to the next
  const int64_t out_turn = conv.out_row_stride - width * out_step;
  static_assert(most <= kRowsOfVectors<1>);  // see columns_in_place
  const bool by_row = conv.out_width > most / 2;
  const int64_t strips = by_row ? rows_in_block : 1;
  const int64_t strip_pixels = rows_in_block * width / strips;
  const int64_t tiles = (strip_pixels + most - 1) / most;
  const int64_t least = strip_pixels / tiles, longer = strip_pixels % tiles;  // pixels of a tile; tiles of one more
  const T* from = window.data;
  int64_t x = 0;
  for (int64_t strip = 0; strip < strips; ++strip) {
    const Runs runs = by_row ? runs_inside(all_runs, (row + strip) * conv.step_y, conv.source_height) : all_runs;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      next.fetch(strip * tiles + tile, strips * tiles);
      with_count<most>(least + (tile < longer), [&](auto constant) {
        constexpr int rows = decltype(constant)::value;
        const T* pixels[rows];
        T* outs[rows];
        FASTNN_UNROLL
        for (int r = 0; r < rows; ++r) {
          pixels[r] = from, outs[r] = out;
          from += x_step, out += out_step;
          if (++x == width) x = 0, from += source_turn, out += out_turn;
        }
        tile_of(constant, runs, pixels, outs);
      });
    }
  }
}

// Some output rows of an image for one panel.
template <class T, int vectors, int depth>
void gather_pixels(const GatherConv<T>& conv, const Image<T>& window, const Runs& all_runs, const T* panel,
                   int64_t column, int64_t row, int64_t rows_in_block, int64_t width, T* out,
                   const FetchAhead<T>& next) {
  const int64_t columns = conv.columns - column;
  const bool whole = columns >= vectors * kLanes<T>, with_relu = conv.relu, stream = conv.stream;
  Vec<T> bias[vectors];
  load_bias<T, vectors>(conv.bias ? conv.bias + column : nullptr, columns, bias);
  const auto tile = [&](auto constant, const Runs& runs, const auto& pixels, const auto& outs) {
    constexpr int rows = decltype(constant)::value;
    Vec<T> acc[rows][vectors];
    FASTNN_UNROLL
    for (int r = 0; r < rows; ++r) {
      FASTNN_UNROLL
      for (int v = 0; v < vectors; ++v) acc[r][v] = bias[v];
    }
    gather_accumulate<T, rows, vectors, depth>(runs, pixels, panel, acc);
    const auto each = [&](const auto& body) {
      FASTNN_UNROLL
      for (int r = 0; r < rows; ++r) {
        FASTNN_UNROLL
        for (int v = 0; v < vectors; ++v) body(outs[r] + v * kLanes<T>, acc[r][v], columns - v * kLanes<T>);
      }
    };
    if (with_relu) each([](T*, Vec<T>& value, int64_t) { value = relu(value); });
    if (stream) return each([](T* to, Vec<T> value, int64_t) { store_streamed(to, value); });
    if (whole) return each([](T* to, Vec<T> value, int64_t) { store(to, value); });
    each([](T* to, Vec<T> value, int64_t left) {
      if (left > 0) store_upto(to, value, left < kLanes<T> ? left : kLanes<T>);
    });
  };
  each_tile<kRowsOfVectors<vectors>>(conv, window, all_runs, row, rows_in_block, width, out, next, tile);
}

// So many columns leave half of a vector empty.
template <class T>
constexpr int kFewColumns = kLanes<T> / 2;

// Whether columns are worth dot products: with full vectors along the depth, they make fewer products than a vector for
// each number that a pixel sums over - half a vector where Winograd along rows is the other way -, although the lanes
// of each sum have to be added up, which takes as long as some products.
template <class T>
inline bool dots_serve(int64_t columns, int64_t taps, int64_t depth, bool by_row) {
  constexpr int64_t kSumOfLanes = 5, kVector = kLanes<T>;
  const int64_t products = columns * (taps * ((depth + kVector - 1) / kVector) + kSumOfLanes);
  return columns <= kFewColumns<T> && depth >= kVector && products < taps * depth / (by_row ? 2 : 1);
}

// Pixels of a tile of dot products: their sums, a weight of each column and a source vector fit the registers.
constexpr int dot_rows(int columns) {
  if (kVectorRegisters == 32) return columns <= 2 ? 8 : columns <= 6 ? 4 : 2;
  return columns == 1 ? 8 : columns == 2 ? 5 : columns == 3 ? 4 : 2;
}

// As gather_pixels for all columns of a convolution of few.
template <class T, int columns>
void dot_pixels(const GatherConv<T>& conv, const Image<T>& window, const Runs& all_runs, int64_t row,
                int64_t rows_in_block, int64_t width, T* out, const FetchAhead<T>& next) {
  const int64_t column_step = conv.taps.count * conv.depth;
  const auto tile = [&](auto constant, const Runs& runs, const auto& pixels, const auto& outs) {
    constexpr int rows = decltype(constant)::value;
    Vec<T> acc[rows][columns]{};
    for (int64_t i = 0; i < runs.count; ++i) {
      const Run& run = runs.runs[i];
      const auto step = [&](int64_t k, const auto& read) {
        Vec<T> weights[columns];
        FASTNN_UNROLL
        for (int c = 0; c < columns; ++c) weights[c] = read(conv.panels + c * column_step + run.first + k);
        FASTNN_UNROLL
        for (int r = 0; r < rows; ++r) {
          const Vec<T> value = read(pixels[r] + run.offset + k);
          FASTNN_UNROLL
          for (int c = 0; c < columns; ++c) acc[r][c] += value * weights[c];
        }
      };
      int64_t k = 0;
      for (; k + kLanes<T> <= run.depth; k += kLanes<T>) step(k, [](const T* at) { return load(at); });
      if (k < run.depth) {  // the last whole vector, without what it shares with the one before
        const int64_t last = run.depth - kLanes<T>;
        const Mask<T> is_new = lane_numbers<T>() >= broadcast_lane<T>(k - last);
        step(last, [is_new](const T* at) { return (Vec<T>)((Mask<T>)load(at) & is_new); });
      }
    }
    FASTNN_UNROLL
    for (int r = 0; r < rows; ++r) {
      FASTNN_UNROLL
      for (int c = 0; c < columns; ++c) {
        const T sum = horizontal_sum<T>(acc[r][c]) + (conv.bias ? conv.bias[c] : T(0));
        outs[r][c] = conv.relu ? relu(sum) : sum;
      }
    }
  };
  each_tile<dot_rows(columns)>(conv, window, all_runs, row, rows_in_block, width, out, next, tile);
}

// As gather_pixels for pooled output: the four pixels of a window are four rows of a tile. Returns whether the outputs
// may stay: false where there was NaN but not `with_nan`.
template <class T, int vectors, int depth, bool with_nan>
bool gather_windows(const GatherConv<T>& conv, const Image<T>& window, const Runs& runs, const T* panel, int64_t column,
                    int64_t pooled_rows, T* out, uint8_t* winner) {
  constexpr int kWindows = kTileRows / 4;
  const int64_t columns = conv.columns - column;
  const int64_t pooled_width = conv.out_width / 2;
  const int64_t count = pooled_rows * pooled_width;
  const int64_t y_step = conv.step_y * window.row_stride, x_step = conv.step_x * window.pixel_stride;
  Vec<T> bias[vectors];
  load_bias<T, vectors>(conv.bias ? conv.bias + column : nullptr, columns, bias);
  Vec<T> all{};  // the sum of all outputs: NaN if any is
  int64_t y = 0, x = 0;
  const auto tile = [&](auto constant) {
    constexpr int windows = decltype(constant)::value;
    const T* pixels[4 * windows];
    int64_t places[windows];
    FASTNN_UNROLL
    for (int w = 0; w < windows; ++w) {
      const T* corner = window.data + 2 * y * y_step + 2 * x * x_step;
      pixels[4 * w] = corner;
      pixels[4 * w + 1] = corner + x_step;
      pixels[4 * w + 2] = corner + y_step;
      pixels[4 * w + 3] = corner + y_step + x_step;
      places[w] = y * conv.out_row_stride + x * conv.out_pixel_stride;
      if (++x == pooled_width) x = 0, ++y;
    }
    Vec<T> acc[4 * windows][vectors];
    FASTNN_UNROLL
    for (int r = 0; r < 4 * windows; ++r) {
      FASTNN_UNROLL
      for (int v = 0; v < vectors; ++v) acc[r][v] = bias[v];
    }
    gather_accumulate<T, 4 * windows, vectors, depth>(runs, pixels, panel, acc);
    FASTNN_UNROLL
    for (int w = 0; w < windows; ++w) {
      FASTNN_UNROLL
      for (int v = 0; v < vectors; ++v) {
        const int64_t left = columns - v * kLanes<T>;
        if (left <= 0) continue;
        const int64_t width = left < kLanes<T> ? left : kLanes<T>;
        const Vec<T> a = acc[4 * w][v], b = acc[4 * w + 1][v], c = acc[4 * w + 2][v], d = acc[4 * w + 3][v];
        all += (a + b) + (c + d);
        store_pooled<T, with_nan>(a, b, c, d, conv.relu, width, out, winner, places[w] + v * kLanes<T>);
      }
    }
  };
  int64_t p = 0;
  for (; p + kWindows <= count; p += kWindows) tile(Constant<kWindows>{});
  for (; p < count; ++p) tile(Constant<1>{});
  return with_nan || !any_lane<T>(all != all);
}

}  // namespace
}  // namespace fastnn::cpu
