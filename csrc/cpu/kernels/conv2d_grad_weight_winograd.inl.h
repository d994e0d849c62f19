// Weight gradient of a 3x3 or 5x5 convolution of stride 1 by Winograd's F(4x4, 3x3) or F(2x2, 5x5), the transpose of
// the forward pass, whose matrices are in conv2d_winograd_points.inl.h: 36 multiplications for a tile instead of 144
// or 100.
//
//   D = A dy A'    of each tile's gradients, per output channel
//   dU = sum over tiles of D * V: one matrix product for each of the 36 places
//   dg = G' dU G   of each pair of channels
//
//   V: [place][panel of input channels][tile][kTileColumns]   D: [place][tile][output channel]
//   dU: [place][output channel][panels * kTileColumns]
//
// Tiles are summed in parts, whose dU are added at the end. A thread takes a part by itself, so that V and D stay in
// its caches, unless there are more threads than parts: then all share each part. A part's tiles are taken a chunk at a
// time: all are transformed, then every place adds its products to dU. So the sums' order is that of the tiles,
// whatever the threads.
#pragma once

#include "cpu/kernels/conv2d_winograd.inl.h"

namespace fastnn::cpu {
namespace {

// V and D of a chunk, one thread's own or all threads'. Its tiles are the depth of the products, for which dU is read
// and written once.
constexpr int64_t kOwnChunkBytes = 512 << 10;
constexpr int64_t kSharedChunkBytes = 3 << 20;
constexpr int64_t kChunkTiles = 64;

// In how many parts the tiles are summed, a power of two. Each has a dU of its own, which has to be worth its tiles.
inline int64_t winograd_parts(int64_t tiles, int64_t du_bytes) {
  constexpr int64_t kMost = 8, kTileBytes = 3 << 10;
  int64_t parts = 1;
  while (parts < kMost && tiles / (2 * parts) >= du_bytes / kTileBytes) parts *= 2;
  return parts;
}

// D of one tile: to + place * stride.
template <class T, class F, class Pixel>
FASTNN_INLINE void winograd_gradient(const Pixel& pixel, int64_t channels, T* to, int64_t stride) {
  for (int64_t o = 0; o < channels; o += kLanes<T>) {
    const int64_t left = channels - o < kLanes<T> ? channels - o : kLanes<T>, at = unknown(o);
    const auto axis = [](const auto& dy, auto& m) {
      WinogradAxis<F::kTile, F::kTaps>::template output_transposed<T>(dy, m);
    };
    winograd_transform<T, F::kTile, F::kTile, F::kPoints, F::kPoints>(
        [&](int y, int x) { return load_upto(pixel(y, x) + at, left); }, axis, axis,
        [&](int y, int x, Vec<T> m) { store_upto(to + (F::kPoints * y + x) * stride + at, m, left); });
  }
}

// dU of one place for the output channels [0, outputs) and one panel: du[o][columns] += d[tile][o] * v[tile][columns]
template <class T, int vectors>
FASTNN_INLINE void winograd_add_products(int64_t tiles, int64_t outputs, const T* d, int64_t d_tile, const T* v, T* du,
                                         int64_t du_row) {
  for_row_tiles(outputs, [&](auto constant, int64_t o) {
    constexpr int rows = decltype(constant)::value;
    const T* sources[rows];
    Vec<T> acc[rows][vectors];
    FASTNN_UNROLL
    for (int r = 0; r < rows; ++r) {
      sources[r] = d + o + r;
      FASTNN_UNROLL
      for (int w = 0; w < vectors; ++w) acc[r][w] = load(du + (o + r) * du_row + w * kLanes<T>);
    }
    multiply_add<T, rows, vectors>(tiles, sources, d_tile, v, kTileColumns<T>, acc);
    FASTNN_UNROLL
    for (int r = 0; r < rows; ++r) {
      FASTNN_UNROLL
      for (int w = 0; w < vectors; ++w) store(du + (o + r) * du_row + w * kLanes<T>, acc[r][w]);
    }
  });
}

// Whether this is the way with the fewest multiplications, the transformation of dU counted in. Tiles of 5x5 kernels
// have four times as many transformations as those of 3x3, so they count half again, and more weights. What they are
// compared with leaves out taps outside small images.
template <class T>
bool winograd_serves_grad_weight(const Conv2dShape& s) {
  const int taps = dense_square_taps(s);
  if (!kHasWinograd<T> || taps == 0 || group_inputs(s) < kWinogradChannels || group_outputs(s) < kWinogradChannels)
    return false;
  constexpr int64_t places = Winograd<4, 3>::kPlaces;  // as many as of Winograd<2, 5>
  const int64_t bytes = places * group_inputs(s) * group_outputs(s) * 4, tile = 7 - taps;
  const int64_t tiles = s.batch * ((s.out_height + tile - 1) / tile) * ((s.out_width + tile - 1) / tile);
  if (taps == 3) return places * (tiles + winograd_weight_cost(bytes)) < 9 * s.batch * s.out_height * s.out_width;
  return 3 * places * (tiles + 4 * winograd_weight_cost(bytes)) < 2 * s.batch * products_inside(s);
}

// One group. source and grad are at the group's first channel, grad_weight at its first weight. What is not finite
// comes out as not finite, but in more places than from a direct sum.
template <class T, class F>
void winograd_grad_weight(const Conv2dShape& s, const T* source, const T* grad, T* grad_weight) {
  constexpr int64_t width = kTileColumns<T>, places = F::kPlaces;
  constexpr int size = F::kTile == 4 ? kWinograd4x4 : kWinograd2x2;
  const int64_t inputs = group_inputs(s), outputs = group_outputs(s), panels = panels_of<T>(inputs);
  const int64_t rows = (s.out_height + F::kTile - 1) / F::kTile, columns = (s.out_width + F::kTile - 1) / F::kTile;
  const int64_t tiles = s.batch * rows * columns;
  const int64_t du_row = panels * width, du_step = winograd_step<T>(outputs * du_row), du_part = places * du_step;
  const int64_t parts = winograd_parts(tiles, du_part * static_cast<int64_t>(sizeof(T)));

  const bool own = parts > 1 && parts >= max_threads();
  const int owners = own ? max_threads() : 1;
  int64_t chunk = (own ? kOwnChunkBytes : kSharedChunkBytes) /
                  (places * (panels * width + outputs) * static_cast<int64_t>(sizeof(T)));
  if (chunk < kChunkTiles) chunk = kChunkTiles;
  const int64_t largest_part = (tiles + parts - 1) / parts, chunks = (largest_part + chunk / 2) / chunk;
  chunk = chunks < 2 ? largest_part : (largest_part + chunks - 1) / chunks;  // about equal ones
  const int64_t v_step = winograd_step<T>(panels * chunk * width), d_step = winograd_step<T>(chunk * outputs);
  const Scratch<T> du(parts * du_part);
  const Scratch<T> sums(is_ohwi(s) ? 0 : weight_elements(s) / s.groups);
  const int64_t most = inputs > outputs ? inputs : outputs;
  const Scratch<T> empty_pixel(most);
  const T* zeros = empty_pixel;  // a pixel outside the image
  zero_run<T>(most, empty_pixel);

  // V and D of a tile, which is number `row` of its chunk.
  const auto transform = [&](int64_t tile, int64_t row, T* v, T* d) {
    const int64_t image = tile / (rows * columns);
    const int64_t y = tile / columns % rows * F::kTile, x = tile % columns * F::kTile;
    const Image<T> of_input{source + image * s.in_height * s.in_width * s.in_channels, s.in_height, s.in_width,
                            s.in_width * s.in_channels, s.in_channels};
    with_patch<F::kPoints, F::kPoints>(
        of_input, y - s.padding_height, x - s.padding_width, zeros, [&](const auto& pixel) {
          for (int64_t panel = 0; panel < panels; ++panel) {
            const int64_t left = inputs - panel * width < width ? inputs - panel * width : width;
            winograd_input<T, FullProducts<T>, size, F>(
                [&](int64_t py, int64_t px) { return pixel(py, px) + panel * width; }, left,
                v + (panel * chunk + row) * width, v_step);
          }
        });
    const Image<T> of_grad{grad + image * s.out_height * s.out_width * s.out_channels, s.out_height, s.out_width,
                           s.out_width * s.out_channels, s.out_channels};
    with_patch<F::kTile, F::kTile>(of_grad, y, x, zeros, [&](const auto& pixel) {
      winograd_gradient<T, F>(pixel, outputs, d + row * outputs, d_step);
    });
  };
  // What the first `count` tiles of a chunk add to dU, or begin it with, at one place of one panel.
  const auto add_products = [&](int64_t task, int64_t count, bool begin, const T* v, const T* d, T* sum) {
    const int64_t place = task / panels, panel = task % panels;
    T* to = sum + place * du_step + panel * width;
    if (begin)
      for (int64_t o = 0; o < outputs; ++o) zero_run(width, to + o * du_row);
    const T* d_at = d + place * d_step;
    const T* v_at = v + place * v_step + panel * chunk * width;
    if (inputs - panel * width <= kLanes<T>)
      winograd_add_products<T, 1>(count, outputs, d_at, outputs, v_at, to, du_row);
    else
      winograd_add_products<T, 2>(count, outputs, d_at, outputs, v_at, to, du_row);
  };

  const ThreadScratch<T> all_v(owners, places * v_step), all_d(owners, places * d_step);
  const auto sum_part = [&](int64_t part, int owner) {
    T *v = all_v[owner], *d = all_d[owner];
    const int64_t begin = tiles * part / parts, end = tiles * (part + 1) / parts;
    for (int64_t first = begin; first < end; first += chunk) {
      const int64_t count = end - first < chunk ? end - first : chunk;
      parallel_for(count, [&](int64_t row) { transform(first + row, row, v, d); });
      parallel_for(places * panels,
                   [&](int64_t task) { add_products(task, count, first == begin, v, d, du + part * du_part); });
    }
  };
  if (own)  // loops inside a task are its thread's alone
    parallel_tasks(parts, sum_part);
  else
    for (int64_t part = 0; part < parts; ++part) sum_part(part, 0);

  T* ohwi = is_ohwi(s) ? grad_weight : sums;
  parallel_for(outputs, [&](int64_t o) {
    for (int64_t c = 0; c < inputs; c += kLanes<T>) {
      const int64_t left = inputs - c < kLanes<T> ? inputs - c : kLanes<T>, at = unknown(c);
      const auto axis = [](const auto& u, auto& g) {
        WinogradAxis<F::kTile, F::kTaps>::template weight_transposed<T>(u, g);
      };
      winograd_transform<T, F::kPoints, F::kPoints, F::kTaps, F::kTaps>(
          [&](int y, int x) {
            const T* of_place = du + (F::kPoints * y + x) * du_step + o * du_row + at;
            Vec<T> sum = load(of_place);
            for (int64_t part = 1; part < parts; ++part) sum += load(of_place + part * du_part);
            return sum;
          },
          axis, axis,
          [&](int y, int x, Vec<T> g) {
            store_upto(ohwi + ((o * F::kTaps + y) * F::kTaps + x) * inputs + at, g, left);
          });
    }
  });
  if (ohwi != grad_weight) write_ohwi_gradient<T>(s, outputs, 1, 0, sums, grad_weight);
}

}  // namespace
}  // namespace fastnn::cpu
