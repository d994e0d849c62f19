// Winograd's F(1x4, 3x3): four outputs of a row from 6 multiplications for each row of a 3x3 kernel, instead of 12. For
// first layers: with few channels to sum over, the transformations of both axes (conv2d_winograd.inl.h) would outweigh
// the multiplications that they save, those of one axis do not.
//
//   V = B' d     of each row's patch d of 6 pixels, per channel
//   U = G g      of each kernel row g
//   M = sum over kernel rows and channels of U * V, for each of the 6 points
//   out = 2/3 A' M + bias
//
// The points are 0, 1, -1, 1/2, -1/2 and infinity. With the factor of 2/3 left out of G, where it comes from, all other
// constants are sums of a few powers of two, and small integers come out exact: they reach the factor as 3/2 of what
// they are, and 2/3 is rounded by less than would show.
//
// Two output rows are computed together. The four input rows that they read are two pairs; each pair's V serves the
// outputs above it and those below.
//
//   dealt: [row of a pair][column modulo 4][kDealtElements]      so that a place of all tiles lies together
//   V: [pair modulo 2][row of a pair][point][kRowElements]       of each tile of a row, channels as they lie
//   U: [panel][channel][point][kernel row][kTileColumns]
//
// Numbers beyond kRowLimit, NaN and infinities among them, are left to the gather: they would spread, or overflow.
#pragma once

#include "cpu/kernels/conv2d_gather.inl.h"
#include "cpu/kernels/conv2d_winograd.inl.h"

namespace fastnn::cpu {
namespace {

constexpr int kRowPoints = 6;
constexpr int64_t kRowElements = 64;  // of V for a row and point: a multiple of all vectors' lanes
// Of a dealt row: as many, a pixel before and one behind, and what whole vectors write beyond.
constexpr int64_t kDealtElements = kRowElements + 3 * kWinogradChannels;
// Outputs of a block, whose tasks transform two of its rows a second time.
constexpr int64_t kRowBlockOutputs = 1024;
// The largest magnitude of inputs, weights and bias: sums of some hundred products of two are finite.
constexpr float kRowLimit = 0x1p50f;

// Vectors of columns computed at a time: for each 8 sums and 3 weights, beside 4 values, in 16 registers or 32.
constexpr int kRowVectors = kVectorRegisters == 32 ? 2 : 1;

// Whether it serves: float32, fewer channels than the transformations of both axes want, no more padding than a tile,
// and tiles full enough to save a quarter of the multiplications.
template <class T>
bool winograd_row_serves(const GatherConv<T>& conv) {
  const int64_t width = conv.pool ? conv.out_width / 2 * 2 : conv.out_width;
  return kHasWinograd<T> && dense_square_taps(conv) == 3 && 0 < conv.depth && conv.depth < kWinogradChannels &&
         conv.taps.x[0] >= -4 && 4 * kRowPoints * ((width + 3) / 4) <= 3 * 3 * width;
}

// The lanes of numbers that are beyond the limit.
template <class T>
FASTNN_INLINE Mask<T> beyond_row_limit(Vec<T> v) {
  return magnitude_bits<T>(v) > magnitude_bits<T>(broadcast(T(kRowLimit)));
}
template <class T>
bool within_row_limit(int64_t count, const T* data) {
  Mask<T> beyond{};
  for (int64_t i = 0; i < count; i += kLanes<T>)
    beyond |= beyond_row_limit<T>(load_upto(data + i, count - i < kLanes<T> ? count - i : kLanes<T>));
  return !any_lane<T>(beyond);
}

// Weights as they are packed for the gather, [panel][kernel row][kernel column][channel][kTileColumns], to U.
template <class T>
void winograd_row_weights(int64_t panels, int64_t depth, const T* packed, T* u) {
  parallel_for(panels, [&](int64_t panel) {
    const T* from = packed + panel * 9 * depth * kTileColumns<T>;
    T* to = u + panel * 3 * kRowPoints * depth * kTileColumns<T>;
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t y = 0; y < 3; ++y) {
        for (int64_t v = 0; v < kTileColumns<T>; v += kLanes<T>) {
          const auto tap = [&](int64_t x) { return load(from + ((3 * y + x) * depth + k) * kTileColumns<T> + v); };
          const Vec<T> g0 = tap(0), g1 = tap(1), g2 = tap(2);
          const Vec<T> even = g0 + g2, near_even = T(-4) * g0 - g2, near_odd = T(-2) * g1;
          const Vec<T> points[kRowPoints] = {
              T(6) * g0, even + g1, even - g1, near_even + near_odd, near_even - near_odd, T(1.5) * g2};
          FASTNN_UNROLL
          for (int p = 0; p < kRowPoints; ++p)
            store(to + ((k * kRowPoints + p) * 3 + y) * kTileColumns<T> + v, points[p]);
        }
      }
    }
  });
}

// Where lane `lane` of vector `vector` of a phase's dealt row comes from: an element of the row as it lies.
template <class T, int depth>
constexpr int dealt_from(int vector, int phase, int lane) {
  const int element = vector * kLanes<T> + lane;
  return (element / depth * 4 + phase) * depth + element % depth;
}
template <class T, int depth, int vector, int phase, int source, int... Index>
FASTNN_INLINE Vec<T> merge_source(Vec<T> merged, Vec<T> from, Indices<Index...>) {
  constexpr auto lane = [](int i) {
    const int element = dealt_from<T, depth>(vector, phase, i);
    return element / kLanes<T> == source ? kLanes<T> + element % kLanes<T> : i;
  };
  return __builtin_shufflevector(merged, from, lane(Index)...);
}
// That vector, from those of the row, the first of which is number `first`.
template <class T, int depth, int vector, int phase, int first, int source, int count>
FASTNN_INLINE Vec<T> dealt_vector(const Vec<T> (&row)[count]) {
  Vec<T> before{};
  if constexpr (source > dealt_from<T, depth>(vector, phase, 0) / kLanes<T>)
    before = dealt_vector<T, depth, vector, phase, first, source - 1>(row);
  return merge_source<T, depth, vector, phase, source>(before, row[source - first], LaneIndices<T>{});
}
template <class T, int depth, int vector, int first, int count, int phase = 0>
FASTNN_INLINE void deal_phases(const Vec<T> (&row)[count], T* dealt) {
  constexpr int last = dealt_from<T, depth>(vector, phase, kLanes<T> - 1) / kLanes<T>;
  store(dealt + phase * kDealtElements + vector * kLanes<T>, dealt_vector<T, depth, vector, phase, first, last>(row));
  if constexpr (phase < 3) deal_phases<T, depth, vector, first, count, phase + 1>(row, dealt);
}
// A vector of each phase, then the next one, from a row of `count` elements.
template <class T, int depth, int vector = 0>
FASTNN_INLINE void deal_vectors(const T* row, int64_t count, T* dealt, Mask<T>* beyond) {
  constexpr int first = dealt_from<T, depth>(vector, 0, 0) / kLanes<T>;
  constexpr int last = dealt_from<T, depth>(vector, 3, kLanes<T> - 1) / kLanes<T>;
  Vec<T> sources[last - first + 1];
  FASTNN_UNROLL
  for (int i = 0; i <= last - first; ++i) {
    const int64_t at = (first + i) * kLanes<T>, left = count - at;
    sources[i] = left <= 0 ? Vec<T>{} : load_upto(row + at, left < kLanes<T> ? left : kLanes<T>);
    *beyond |= beyond_row_limit<T>(sources[i]);
  }
  deal_phases<T, depth, vector, first>(sources, dealt);
  if constexpr (vector + 1 < depth) {
    if (4 * (vector + 1) * kLanes<T> < count + 3 * depth) deal_vectors<T, depth, vector + 1>(row, count, dealt, beyond);
  }
}

// `count` pixels of a row, `pixel_stride` apart, dealt out by column; zeros, or nothing, are written behind them. Where
// one is beyond the limit, so are lanes of `beyond` afterwards.
template <class T, int depth>
FASTNN_INLINE void deal_row(const T* row, int64_t count, int64_t pixel_stride, int64_t channels, T* dealt,
                            Mask<T>* beyond) {
  if constexpr (depth > 0) {
    if (pixel_stride == depth) {  // a vector of tiles at a time
      for (int64_t x = 0; x < count; x += 4 * kLanes<T>, dealt += depth * kLanes<T>)
        deal_vectors<T, depth>(row + x * depth, (count - x) * depth, dealt, beyond);
      return;
    }
  }
  for (int64_t x = 0; x < count; ++x) {
    const T* from = row + x * pixel_stride;
    T* to = dealt + x % 4 * kDealtElements + x / 4 * channels;
    for (int64_t c = 0; c < channels; c += kLanes<T>) {
      const int64_t left = channels - c < kLanes<T> ? channels - c : kLanes<T>;
      const Vec<T> values = load_upto(from + c, left);
      *beyond |= beyond_row_limit<T>(values);
      store_upto(to + c, values, left);
    }
  }
}

// V of the first `count` elements of a dealt row; pixels[x] is where pixel x of the first tile lies in it. Whole
// vectors are read and written.
template <class T>
FASTNN_INLINE void winograd_row_inputs(const T* dealt, const int64_t (&pixels)[kRowPoints], int64_t count, T* v) {
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    Vec<T> d[kRowPoints];
    FASTNN_UNROLL
    for (int x = 0; x < kRowPoints; ++x) d[x] = load(dealt + pixels[x] + i);
    const Vec<T> even = d[4] - T(0.25) * d[2], odd = d[3] - T(0.25) * d[1];
    const Vec<T> near_even = d[4] - d[2], near_odd = d[3] - d[1];
    const Vec<T> points[kRowPoints] = {d[4] - T(1.25) * d[2] + T(0.25) * d[0],
                                       even + odd,
                                       even - odd,
                                       near_even + T(0.5) * near_odd,
                                       near_even - T(0.5) * near_odd,
                                       d[5] - T(1.25) * d[3] + T(0.25) * d[1]};
    FASTNN_UNROLL
    for (int p = 0; p < kRowPoints; ++p) store(v + p * kRowElements + i, points[p]);
  }
}

// The products of one channel at point p, for both output rows: sums[row][vector].
template <class T, int vectors>
FASTNN_INLINE void winograd_row_point(const T* const (&rows)[4], const T* u, int64_t k, int p,
                                      Vec<T> (&sums)[2][vectors]) {
  Vec<T> weights[3][vectors];
  FASTNN_UNROLL
  for (int y = 0; y < 3; ++y) {
    FASTNN_UNROLL
    for (int w = 0; w < vectors; ++w)
      weights[y][w] = in_register(load(u + ((k * kRowPoints + p) * 3 + y) * kTileColumns<T> + w * kLanes<T>));
  }
  FASTNN_UNROLL
  for (int i = 0; i < 4; ++i) {
    const Vec<T> value = broadcast(rows[i][p * kRowElements + k]);
    FASTNN_UNROLL
    for (int r = 0; r < 2; ++r) {
      if (i < r || i > r + 2) continue;
      FASTNN_UNROLL
      for (int w = 0; w < vectors; ++w) sums[r][w] += value * weights[i - r][w];
    }
  }
}

// body(k) for each channel; `depth` is their number where it is known at compile time, or 0.
template <int depth, class Body>
FASTNN_INLINE void for_each_channel(int64_t channels, const Body& body) {
  if constexpr (depth > 0) {
    FASTNN_UNROLL
    for (int k = 0; k < depth; ++k) body(k);
  } else {
    for (int64_t k = 0; k < channels; ++k) body(k);
  }
}

// Two output rows of one tile, but for factor and bias, from the four rows of V that they read. The sums of points 0
// and infinity, which reach one output each, go on from what the others give it.
template <class T, int vectors, int depth>
FASTNN_INLINE void winograd_row_tile(const T* const (&rows)[4], int64_t channels, const T* u,
                                     Vec<T> (&out)[vectors][2][4]) {
  Vec<T> m[4][2][vectors]{};  // of points 1, -1, 1/2, -1/2
  Vec<T> first[2][vectors], last[2][vectors];
  for_each_channel<depth>(channels, [&](int64_t k) {
    FASTNN_UNROLL
    for (int p = 1; p <= 4; ++p) winograd_row_point<T, vectors>(rows, u, k, p, m[p - 1]);
  });
  FASTNN_UNROLL
  for (int r = 0; r < 2; ++r) {
    FASTNN_UNROLL
    for (int w = 0; w < vectors; ++w) {
      const Vec<T> sum = m[0][r][w] + m[1][r][w], difference = m[0][r][w] - m[1][r][w];
      const Vec<T> near_sum = m[2][r][w] + m[3][r][w], near_difference = m[2][r][w] - m[3][r][w];
      first[r][w] = sum + near_sum;
      out[w][r][1] = difference + T(0.5) * near_difference;
      out[w][r][2] = sum + T(0.25) * near_sum;
      last[r][w] = difference + T(0.125) * near_difference;
    }
  }
  for_each_channel<depth>(channels, [&](int64_t k) {
    winograd_row_point<T, vectors>(rows, u, k, 0, first);
    winograd_row_point<T, vectors>(rows, u, k, 5, last);
  });
  FASTNN_UNROLL
  for (int r = 0; r < 2; ++r) {
    FASTNN_UNROLL
    for (int w = 0; w < vectors; ++w) out[w][r][0] = first[r][w], out[w][r][3] = last[r][w];
  }
}

// Where a run of tiles goes: two output rows, or with `rows` 1 one, from some pixel on, `left` pixels of the row and
// `columns` channels.
template <class T>
struct RowOutput {
  T* out;
  uint8_t* winner;  // or null
  int64_t row_stride, pixel_stride;
  int64_t rows, left, columns;
  bool relu, stream;
};

// One tile's outputs of one vector of `count` channels: `all`, or those inside the image.
template <class T, bool pool, bool all>
FASTNN_INLINE void winograd_row_store(const RowOutput<T>& to, int64_t x, int64_t column, int64_t count, Vec<T> bias,
                                      const Vec<T> (&out)[2][4]) {
  // The product is rounded before the sum: one instruction for both would show that 2/3 is not exact.
  const auto finish = [&](Vec<T> value) { return in_register(value * T(2. / 3)) + bias; };
  if constexpr (pool) {
    FASTNN_UNROLL
    for (int i = 0; i < 4; i += 2) {
      if (!all && x + i >= to.left) return;
      store_pooled<T, false>(out[0][i], out[0][i + 1], out[1][i], out[1][i + 1], to.relu, count, to.out, to.winner,
                             (x + i) / 2 * to.pixel_stride + column, finish);
    }
  } else {
    FASTNN_UNROLL
    for (int i = 0; i < 8; ++i) {
      if (!all && (i / 4 >= to.rows || x + i % 4 >= to.left)) continue;
      T* at = to.out + i / 4 * to.row_stride + (x + i % 4) * to.pixel_stride + column;
      Vec<T> value = finish(out[i / 4][i % 4]);
      if (to.relu) value = relu(value);
      if (to.stream)
        store_streamed(at, value);
      else
        store_upto(at, value, count);
    }
  }
}

// A run of tiles; `u` is that of the output's channels.
template <class T, int vectors, int depth, bool pool>
__attribute__((noinline)) void winograd_row_tiles(int64_t channels, const T* const (&ring)[4], const T* u,
                                                  const T* bias_or_null, const RowOutput<T> to, int64_t tiles) {
  const T* rows[4] = {ring[0], ring[1], ring[2], ring[3]};
  Vec<T> bias[vectors];
  load_bias<T, vectors>(bias_or_null, to.columns, bias);
  const int64_t last = to.columns - (vectors - 1) * kLanes<T>;
  for (int64_t x = 0; x < 4 * tiles; x += 4) {
    Vec<T> out[vectors][2][4];
    winograd_row_tile<T, vectors, kRowVectors == 1 ? 0 : depth>(rows, channels, u, out);
    const auto store_vectors = [&](auto all) {
      FASTNN_UNROLL
      for (int w = 0; w < vectors; ++w)
        winograd_row_store<T, pool, decltype(all)::value>(to, x, w * kLanes<T>, w + 1 < vectors ? kLanes<T> : last,
                                                          bias[w], out[w]);
    };
    if (to.rows >= 2 && x + 4 <= to.left)
      store_vectors(Constant<true>{});
    else
      store_vectors(Constant<false>{});
    FASTNN_UNROLL
    for (int i = 0; i < 4; ++i) rows[i] += channels;
  }
}

// A block of an image: rows y on, so many pairs of them, and the tiles [first_tile, end_tile) of each.
struct RowBlock {
  int64_t image, y, pairs, first_tile, end_tile;
};

// One block for the panels [first_panel, end_panel). Returns whether its pixels were within the limit.
template <class T, int depth>
bool winograd_row_block(const GatherConv<T>& conv, const RowBlock& block, const T* u, int64_t first_panel,
                        int64_t end_panel, T* dealt, T* v) {
  constexpr int64_t kDealtRow = 4 * kDealtElements, kRow = kRowPoints * kRowElements;
  const int64_t pooling = conv.pool ? 2 : 1, channels = conv.depth, tiles = block.end_tile - block.first_tile;
  const int64_t x = 4 * block.first_tile, top = block.y + conv.taps.y[0];
  // The first tile's first pixel lies `beside` the image, or else the first one that is dealt.
  const int64_t left = x + conv.taps.x[0], beside = left < 0 ? -left : 0, first = left + beside;
  const int64_t wanted = 4 * tiles + 2 - beside;
  const int64_t count = conv.source_width - first < wanted ? conv.source_width - first : wanted;
  const T* source = conv.source + block.image * conv.source_image_stride + first * conv.source_pixel_stride;
  const auto is_inside = [&](int64_t row) { return top + row >= 0 && top + row < conv.source_height; };
  zero_run(2 * kDealtRow, dealt);  // the pixels beside the image stay so
  int64_t pixels[kRowPoints];      // of the first tile in a dealt row, behind a tile of pixels beside the image
  for (int64_t i = 0; i < kRowPoints; ++i)
    pixels[i] = (i - beside + 4) % 4 * kDealtElements + (i - beside + 4) / 4 * channels;

  Mask<T> beyond{};
  const auto deal = [&](int64_t pair) {
    for (int64_t i = 0, row = 2 * pair; i < 2; ++i, ++row)
      if (is_inside(row))
        deal_row<T, depth>(source + (top + row) * conv.source_row_stride, count, conv.source_pixel_stride, channels,
                           dealt + i * kDealtRow + channels, &beyond);
  };
  const auto transform = [&](int64_t pair) {
    for (int64_t i = 0, row = 2 * pair; i < 2; ++i, ++row) {
      T* to = v + row % 4 * kRow;
      if (!is_inside(row)) {
        zero_run(kRow, to);
        continue;
      }
      winograd_row_inputs<T>(dealt + i * kDealtRow, pixels, tiles * channels, to);
    }
  };
  const auto multiply = [&](int64_t pair) {
    const T* rows[4];
    for (int64_t i = 0; i < 4; ++i) rows[i] = v + (2 * pair + i) % 4 * kRow;
    const int64_t y = block.y + 2 * pair;
    const int64_t place =
        block.image * conv.out_image_stride + y / pooling * conv.out_row_stride + x / pooling * conv.out_pixel_stride;
    for (int64_t vector = first_panel * kTileVectors; vector < end_panel * kTileVectors; vector += kRowVectors) {
      const int64_t column = vector * kLanes<T>, columns = conv.columns - column;
      if (columns <= 0) break;
      RowOutput<T> to{conv.out + place + column,
                      conv.winner ? conv.winner + place + column : nullptr,
                      conv.out_row_stride,
                      conv.out_pixel_stride,
                      conv.out_height - y,
                      conv.out_width / pooling * pooling - x,
                      columns < kRowVectors * kLanes<T> ? columns : kRowVectors * kLanes<T>,
                      conv.relu,
                      conv.stream && kVectorBytes == kLineBytes};
      const T* of_vectors =
          u + vector / kTileVectors * 3 * kRowPoints * channels * kTileColumns<T> + vector % kTileVectors * kLanes<T>;
      const T* bias = conv.bias ? conv.bias + column : nullptr;
      const auto run = [&](auto vectors, auto pool) {
        winograd_row_tiles<T, decltype(vectors)::value, depth, decltype(pool)::value>(channels, rows, of_vectors, bias,
                                                                                      to, tiles);
      };
      const auto run_vectors = [&](auto vectors) {
        if (conv.pool)
          run(vectors, Constant<true>{});
        else
          run(vectors, Constant<false>{});
      };
      if (columns > kLanes<T>)
        run_vectors(Constant<kRowVectors>{});
      else
        run_vectors(Constant<1>{});
    }
  };

  deal(0);
  for (int64_t pair = 0; pair <= block.pairs; ++pair) {
    transform(pair);
    if (pair < block.pairs) deal(pair + 1);  // now: what has just been written in parts comes late as whole vectors
    if (pair > 0) multiply(pair - 1);
  }
  return !any_lane<T>(beyond);
}

// Convolves one group, whose weights are packed for the gather in conv.panels. Returns whether all numbers were within
// the limit; otherwise the outputs are to be made anew.
template <class T>
bool winograd_row_conv(const GatherConv<T>& conv) {
  const int64_t height = conv.pool ? conv.out_height / 2 * 2 : conv.out_height;
  const int64_t width = conv.pool ? conv.out_width / 2 * 2 : conv.out_width;
  const int64_t pairs = (height + 1) / 2, tiles = (width + 3) / 4, depth = conv.depth;
  const int64_t panels = panels_of<T>(conv.columns);
  if (conv.batch == 0 || pairs == 0 || tiles == 0 || panels == 0) return true;
  if (conv.bias && !within_row_limit(conv.columns, conv.bias)) return false;
  if (!within_row_limit(panels * kTileColumns<T> * 9 * depth, conv.panels)) return false;

  const int64_t most_tiles = kRowElements / depth, runs = (tiles + most_tiles - 1) / most_tiles;
  const TaskPlan plan = plan_tasks(conv.batch, pairs, (kRowBlockOutputs + 2 * width - 1) / (2 * width), 1, panels);
  const TaskOrder order{conv.batch * plan.blocks, plan.column_parts, false};
  const int threads = max_threads();
  const Scratch<T> u(panels * 3 * kRowPoints * depth * kTileColumns<T>);
  const ThreadScratch<T> dealt(threads, 2 * 4 * kDealtElements);
  const ThreadScratch<T> v(threads, 4 * kRowPoints * kRowElements);
  winograd_row_weights<T>(panels, depth, conv.panels, u);

  bool within = true;
  parallel_tasks(order.tasks(), [&](int64_t task, int thread) {
    const int64_t part = order.part(task), index = order.block(task);
    const int64_t first_pair = index % plan.blocks * plan.block, left = pairs - first_pair;
    RowBlock block{index / plan.blocks, 2 * first_pair, left < plan.block ? left : plan.block, 0, 0};
    for (int64_t run = 0; run < runs; ++run) {
      block.first_tile = block.end_tile;
      block.end_tile = tiles * (run + 1) / runs;
      const auto with_depth = [&](auto constant) {
        if (!winograd_row_block<T, decltype(constant)::value>(conv, block, u, panels * part / plan.column_parts,
                                                              panels * (part + 1) / plan.column_parts, dealt[thread],
                                                              v[thread]))
          __atomic_store_n(&within, false, __ATOMIC_RELAXED);
      };
      switch (depth) {
        case 1: with_depth(Constant<1>{}); break;
        case 3: with_depth(Constant<3>{}); break;
        default: with_depth(Constant<0>{});
      }
    }
    if (conv.stream) finish_streaming();
  });
  return within;
}

}  // namespace
}  // namespace fastnn::cpu
