// Winograd's F(2x2, 3x3): 2x2 outputs of a 3x3 convolution from 16 multiplications instead of 36 (Lavin and Gray,
// "Fast Algorithms for Convolutional Neural Networks", 2015). The 2x2 outputs of a tile are also a pooling window.
//
//   V = B' d B     of each 4x4 source patch d, per channel          B' = | 1  0 -1  0 |     G = |  1    0    0  |
//   U = G g G'     of each 3x3 kernel g                                  | 0  1  1  0 |         | 1/2  1/2  1/2 |
//   M = sum over channels of U * V: 16 matrix products                   | 0 -1  1  0 |         | 1/2 -1/2  1/2 |
//   out = A' M A                                                         | 0  1  0 -1 |         |  0    0    1  |
//
//   A' = | 1  1  1  0 |     V: [16][tile][channel]     U: [panel][16][channel][kTileColumns]
//        | 0  1 -1 -1 |     M: [16][tile][kTileColumns], one panel at a time
//
// Its sums round differently from a direct convolution's: see docs/performance.md for the bound. Each output still
// depends on its own nine pixels alone (the outer rows and columns of V reach one output row or column), so NaN does
// not spread.
#pragma once

#include "cpu/kernels/conv2d_gather.inl.h"
#include "cpu/kernels/conv2d_pack.inl.h"

namespace fastnn::cpu {
namespace {

// Below 16 channels the transforms outweigh the multiplications saved.
constexpr int64_t kWinogradChannels = 16;
// Fewer pixels do not repay the transformation of the weights; twice as many do where its 16/9 of the weights' memory
// exceeds L2 by far.
constexpr int64_t kWinogradPixels = 128;
constexpr int64_t kWinogradWeightBytes = 8 << 20;
// V of a block is 16 * channels * tiles elements; M as much again where the channels are few. Both stay in L2.
// Blocks of fewer tiles would read U, which may be megabytes, faster than L3 gives it.
constexpr int64_t kWinogradBlockBytes = 80 << 10;
constexpr int64_t kWinogradTiles = 24;

// How the sums over channels are formed: in T throughout. conv2d_winograd_bf16.inl.h has another.
template <class T>
struct FullProducts {
  static constexpr const char* kName = "winograd";
  using Element = T;                    // of V and U
  static constexpr int64_t kGroup = 1;  // channels that one product takes: U is [16][group][kTileColumns][kGroup]

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

// packed: [panel][9][channel][columns] as pack_*_panels makes them. Where a last group has channels too few, the
// missing ones are zeros.
template <class T, class Products>
void winograd_weights(int64_t panels, int64_t depth, const T* packed, typename Products::Element* transformed) {
  constexpr int64_t width = kTileColumns<T>;
  const int64_t groups = winograd_groups<Products>(depth), from_step = depth * width;
  const int64_t to_step = groups * width * Products::kGroup;
  parallel_ranges(panels * groups, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      typename Products::Element* group =
          transformed + i / groups * 16 * to_step + i % groups * width * Products::kGroup;
      for (int64_t member = 0; member < Products::kGroup; ++member) {
        const int64_t channel = i % groups * Products::kGroup + member;
        if (channel >= depth) break;
        const T* from = packed + i / groups * 9 * from_step + channel * width;
        for (int64_t v = 0; v < width; v += kLanes<T>) {
          Vec<T> g[4][3];
          FASTNN_UNROLL
          for (int x = 0; x < 3; ++x) {
            const Vec<T> g0 = load(from + x * from_step + v), g1 = load(from + (3 + x) * from_step + v);
            const Vec<T> g2 = load(from + (6 + x) * from_step + v);
            const Vec<T> sum = (g0 + g2) * T(0.5), half = g1 * T(0.5);
            g[0][x] = g0, g[1][x] = sum + half, g[2][x] = sum - half, g[3][x] = g2;
          }
          FASTNN_UNROLL
          for (int y = 0; y < 4; ++y) {
            const Vec<T> sum = (g[y][0] + g[y][2]) * T(0.5), half = g[y][1] * T(0.5);
            const Vec<T> row[4] = {g[y][0], sum + half, sum - half, g[y][2]};
            FASTNN_UNROLL
            for (int x = 0; x < 4; ++x)
              Products::store_weight(group + (4 * y + x) * to_step + v * Products::kGroup, row[x], member);
          }
        }
      }
    }
  });
}

// V of one tile: to + place * stride for the 16 places. pixel(y, x) is the address of the patch's.
template <class T, class Products, class Pixel>
FASTNN_INLINE void winograd_input(const Pixel& pixel, int64_t depth, typename Products::Element* to, int64_t stride) {
  for (int64_t c = 0; c < depth; c += kLanes<T>) {
    const int64_t left = depth - c < kLanes<T> ? depth - c : kLanes<T>;
    Vec<T> d[4][4];
    FASTNN_UNROLL
    for (int x = 0; x < 4; ++x) {
      Vec<T> row[4];
      FASTNN_UNROLL
      for (int y = 0; y < 4; ++y) row[y] = load_upto(pixel(y, x) + c, left);
      d[0][x] = row[0] - row[2], d[1][x] = row[1] + row[2], d[2][x] = row[2] - row[1], d[3][x] = row[1] - row[3];
    }
    FASTNN_UNROLL
    for (int y = 0; y < 4; ++y) {
      Products::store_input(to + (4 * y) * stride + c, d[y][0] - d[y][2], left);
      Products::store_input(to + (4 * y + 1) * stride + c, d[y][1] + d[y][2], left);
      Products::store_input(to + (4 * y + 2) * stride + c, d[y][2] - d[y][1], left);
      Products::store_input(to + (4 * y + 3) * stride + c, d[y][1] - d[y][3], left);
    }
  }
}

// M of one place for the tiles [0, tiles): m[tile][columns] = v[tile][channel] * u[channel][columns]
template <class T, class Products, int vectors>
FASTNN_INLINE void winograd_multiply(int64_t tiles, int64_t groups, const typename Products::Element* v,
                                     const typename Products::Element* u, T* m) {
  for (int64_t tile = 0; tile < tiles; tile += kTileRows) {
    with_rows(tiles - tile < kTileRows ? tiles - tile : kTileRows, [&](auto constant) {
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

// The 2x2 outputs of one tile, row by row, before bias; m of place 0, `stride` apart.
template <class T>
FASTNN_INLINE void winograd_output(const T* m, int64_t stride, Vec<T> bias, Vec<T> (&out)[4]) {
  Vec<T> s[2][4];
  FASTNN_UNROLL
  for (int x = 0; x < 4; ++x) {
    const Vec<T> m0 = load(m + x * stride), m1 = load(m + (4 + x) * stride);
    const Vec<T> m2 = load(m + (8 + x) * stride), m3 = load(m + (12 + x) * stride);
    s[0][x] = m0 + (m1 + m2), s[1][x] = (m1 - m2) - m3;
  }
  FASTNN_UNROLL
  for (int y = 0; y < 2; ++y) {
    out[2 * y] = s[y][0] + (s[y][1] + s[y][2]) + bias;
    out[2 * y + 1] = (s[y][1] - s[y][2]) - s[y][3] + bias;
  }
}

// Whether the gather is one that Winograd serves: all nine taps of an undilated 3x3 kernel, step 1, enough channels.
template <class T>
bool winograd_serves(const GatherConv<T>& conv) {
  const bool large = 16 * conv.depth * conv.columns * static_cast<int64_t>(sizeof(T)) > kWinogradWeightBytes;
  return sizeof(T) == 4 && conv.taps.count == 9 && conv.step_y == 1 && conv.step_x == 1 &&
         conv.taps.y[8] - conv.taps.y[0] == 2 && conv.taps.x[8] - conv.taps.x[0] == 2 &&
         conv.taps.y[1] == conv.taps.y[0] && conv.taps.x[1] == conv.taps.x[0] + 1 && conv.depth >= kWinogradChannels &&
         conv.columns >= kLanes<T> && conv.out_height >= 2 && conv.out_width >= 2 &&
         conv.batch * conv.out_height * conv.out_width >= (large ? 2 : 1) * kWinogradPixels;
}

// As gather_conv; `transformed` are winograd_weights() of conv.panels.
template <class T, class Products>
void winograd_conv(const GatherConv<T>& conv, const typename Products::Element* transformed) {
  using Element = typename Products::Element;
  constexpr int64_t width = kTileColumns<T>;
  // Pooling reads whole windows alone; else a last odd row or column is half a tile.
  const int64_t tile_rows = conv.winner ? conv.out_height / 2 : (conv.out_height + 1) / 2;
  const int64_t tile_columns = conv.winner ? conv.out_width / 2 : (conv.out_width + 1) / 2;
  const int64_t depth = conv.depth, tiles = conv.batch * tile_rows * tile_columns;
  if (tiles == 0) return;
  const int threads = max_threads();

  int64_t most = kWinogradBlockBytes / (16 * depth * static_cast<int64_t>(sizeof(T)));
  if (most < kWinogradTiles) most = kWinogradTiles;
  const int64_t panels = panels_of<T>(conv.columns);
  const TaskPlan plan = plan_tasks(1, tiles, most, kTileRows, panels);
  const int64_t block = plan.block;

  const int64_t groups = winograd_groups<Products>(depth), padded = groups * Products::kGroup;
  // M is no whole number of pages: each thread's V and M then begin in other sets of L1.
  const int64_t v_elements = 16 * block * padded, m_elements = 16 * block * width + 2 * kLanes<T>;
  const Scratch<Element> inputs(threads * v_elements);
  const Scratch<T> scratch(threads * m_elements);
  const Scratch<T> zeros(depth);  // a pixel outside the image
  zero_run<T>(depth, zeros);
  const bool stream = conv.stream && kVectorBytes == kLineBytes;  // vectors of a pixel are stored far apart in time

  parallel_tasks(plan.blocks * plan.column_parts, [&](int64_t task, int thread) {
    const int64_t first_tile = task / plan.column_parts * block, part = task % plan.column_parts;
    const int64_t count = tiles - first_tile < block ? tiles - first_tile : block;
    Element* v = inputs + thread * v_elements;
    T* m = scratch + thread * m_elements;
    if (padded > depth) zero_run(v_elements, v);

    for (int64_t tile = 0; tile < count; ++tile) {
      const int64_t index = first_tile + tile, image = index / (tile_rows * tile_columns);
      const int64_t y = index / tile_columns % tile_rows * 2, x = index % tile_columns * 2;
      const Image<T> source{conv.source + image * conv.source_image_stride, conv.source_height, conv.source_width,
                            conv.source_row_stride, conv.source_pixel_stride};
      const WindowRange patch{y + conv.taps.y[0], x + conv.taps.x[0], 4, 4};
      const T* first = source.data + patch.top * source.row_stride + patch.left * source.pixel_stride;
      const auto inside = [&](int64_t py, int64_t px) {
        return first + py * source.row_stride + px * source.pixel_stride;
      };
      if (lies_inside(source, patch)) {
        winograd_input<T, Products>(inside, depth, v + tile * padded, block * padded);
        continue;
      }
      const T* pixels[4][4];
      for (int64_t py = 0; py < 4; ++py)
        for (int64_t px = 0; px < 4; ++px)
          pixels[py][px] = lies_inside(source, {patch.top + py, patch.left + px, 1, 1}) ? inside(py, px) : zeros;
      winograd_input<T, Products>([&](int64_t py, int64_t px) { return pixels[py][px]; }, depth, v + tile * padded,
                                  block * padded);
    }
    for (int64_t panel = panels * part / plan.column_parts; panel < panels * (part + 1) / plan.column_parts; ++panel) {
      const int64_t column = panel * width, columns = conv.columns - column < width ? conv.columns - column : width;
      const Element* u = transformed + panel * 16 * padded * width;
      const bool narrow = columns <= kLanes<T>;
      for (int place = 0; place < 16; ++place) {
        const Element* v_place = v + place * block * padded;
        const Element* u_place = u + place * padded * width;
        if (narrow)
          winograd_multiply<T, Products, 1>(count, groups, v_place, u_place, m + place * block * width);
        else
          winograd_multiply<T, Products, 2>(count, groups, v_place, u_place, m + place * block * width);
      }
      for (int64_t c = 0; c < columns; c += kLanes<T>) {
        const int64_t left = columns - c < kLanes<T> ? columns - c : kLanes<T>;
        const Vec<T> bias = conv.bias ? load_upto(conv.bias + column + c, left) : Vec<T>{};
        for (int64_t tile = 0; tile < count; ++tile) {
          const int64_t index = first_tile + tile, image = index / (tile_rows * tile_columns);
          const int64_t y = index / tile_columns % tile_rows, x = index % tile_columns;
          Vec<T> out[4];
          winograd_output(m + tile * width + c, block * width, bias, out);
          T* to = conv.out + image * conv.out_image_stride + column + c;
          if (conv.winner) {
            const int64_t place = y * conv.out_row_stride + x * conv.out_pixel_stride;
            store_pooled<T>(out[0], out[1], out[2], out[3], conv.relu, left, to + place,
                            conv.winner + image * conv.out_image_stride + column + c + place);
            continue;
          }
          FASTNN_UNROLL
          for (int i = 0; i < 4; ++i) {
            const int64_t row = 2 * y + i / 2, pixel = 2 * x + i % 2;
            if (row >= conv.out_height || pixel >= conv.out_width) continue;
            T* place = to + row * conv.out_row_stride + pixel * conv.out_pixel_stride;
            const Vec<T> value = conv.relu ? relu(out[i]) : out[i];
            if (stream)
              store_streamed(place, value);
            else
              store_upto(place, value, left);
          }
        }
      }
    }
    if (stream) finish_streaming();
  });
}

}  // namespace
}  // namespace fastnn::cpu
