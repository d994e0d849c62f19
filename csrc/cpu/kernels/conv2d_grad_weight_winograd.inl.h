// Weight gradient of a 3x3 convolution of stride 1 by Winograd's F(4x4, 3x3), the transpose of the forward pass
// (conv2d_winograd.inl.h has the matrices): 36 multiplications for the 16 outputs of a tile instead of 144.
//
//   D = A dy A'    of each tile's 4x4 gradients, per output channel
//   dU = sum over tiles of D * V: one matrix product for each of the 36 places
//   dg = G' dU G   of each pair of channels
//
//   V: [place][panel of input channels][tile][kTileColumns]   D: [place][tile][output channel]
//   dU: [place][output channel][panels * kTileColumns]
//
// Tiles are taken a chunk at a time, whose V and D stay in the caches: all are transformed, then every place adds its
// products to dU. So the sums' order is that of the tiles, whatever the threads.
#pragma once

#include "cpu/kernels/conv2d_winograd.inl.h"

namespace fastnn::cpu {
namespace {

// V and D of a chunk. Its tiles are the depth of the products, for which dU is read and written once.
constexpr int64_t kChunkBytes = 3 << 20;
constexpr int64_t kChunkTiles = 64;

// D of one tile: to + place * stride.
template <class T, class Pixel>
FASTNN_INLINE void winograd_gradient(const Pixel& pixel, int64_t channels, T* to, int64_t stride) {
  for (int64_t o = 0; o < channels; o += kLanes<T>) {
    const int64_t left = channels - o < kLanes<T> ? channels - o : kLanes<T>, at = unknown(o);
    const auto axis = [](const auto& dy, auto& m) { WinogradAxis<4>::template output_transposed<T>(dy, m); };
    winograd_transform<T, 4, 4, 6, 6>(
        [&](int y, int x) { return load_upto(pixel(y, x) + at, left); }, axis, axis,
        [&](int y, int x, Vec<T> m) { store_upto(to + (6 * y + x) * stride + at, m, left); });
  }
}

// dU of one place for the output channels [0, outputs) and one panel: du[o][columns] += d[tile][o] * v[tile][columns]
template <class T, int vectors>
FASTNN_INLINE void winograd_add_products(int64_t tiles, int64_t outputs, const T* d, int64_t d_tile, const T* v, T* du,
                                         int64_t du_row) {
  for (int64_t o = 0; o < outputs; o += kTileRows) {
    with_rows(outputs - o < kTileRows ? outputs - o : kTileRows, [&](auto constant) {
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
}

// Whether this is the way with the fewest multiplications, the transformation of dU counted in.
template <class T>
bool winograd_serves_grad_weight(const Conv2dShape& s) {
  if (sizeof(T) != 4 || !is_dense_3x3(s) || group_inputs(s) < kWinogradChannels || group_outputs(s) < kWinogradChannels)
    return false;
  const int64_t places = winograd_places(4), bytes = places * group_inputs(s) * group_outputs(s) * 4;
  const int64_t tiles = s.batch * ((s.out_height + 3) / 4) * ((s.out_width + 3) / 4);
  return places * (tiles + winograd_weight_cost(bytes)) < 9 * s.batch * s.out_height * s.out_width;
}

// One group. source and grad are at the group's first channel, grad_weight at its first weight. What is not finite
// comes out as not finite, but in more places than from a direct sum.
template <class T>
void winograd_grad_weight(const Conv2dShape& s, const T* source, const T* grad, int64_t grad_pixel, T* grad_weight) {
  constexpr int64_t width = kTileColumns<T>, places = winograd_places(4);
  const int64_t inputs = group_inputs(s), outputs = group_outputs(s), panels = panels_of<T>(inputs);
  const int64_t rows = (s.out_height + 3) / 4, columns = (s.out_width + 3) / 4, tiles = s.batch * rows * columns;

  int64_t chunk = kChunkBytes / (places * (panels * width + outputs) * static_cast<int64_t>(sizeof(T)));
  if (chunk < kChunkTiles) chunk = kChunkTiles;
  if (chunk > tiles) chunk = tiles;
  const int64_t v_step = winograd_step<T>(panels * chunk * width), d_step = winograd_step<T>(chunk * outputs);
  const int64_t du_row = panels * width, du_step = winograd_step<T>(outputs * du_row);
  const Scratch<T> v(places * v_step), d(places * d_step), du(places * du_step);
  const Scratch<T> sums(is_ohwi(s) ? 0 : outputs * 9 * inputs);
  const int64_t most = inputs > outputs ? inputs : outputs;
  const Scratch<T> empty_pixel(most);
  const T* zeros = empty_pixel;  // a pixel outside the image
  zero_run<T>(most, empty_pixel);

  for (int64_t first = 0; first < tiles; first += chunk) {
    const int64_t count = tiles - first < chunk ? tiles - first : chunk;
    parallel_for(count, [&](int64_t tile) {
      const int64_t index = first + tile, image = index / (rows * columns);
      const int64_t y = index / columns % rows * 4, x = index % columns * 4;
      const Image<T> of_input{source + image * s.in_height * s.in_width * s.in_channels, s.in_height, s.in_width,
                              s.in_width * s.in_channels, s.in_channels};
      with_patch<6, 6>(of_input, y - s.padding_height, x - s.padding_width, zeros, [&](const auto& pixel) {
        for (int64_t panel = 0; panel < panels; ++panel) {
          const int64_t left = inputs - panel * width < width ? inputs - panel * width : width;
          winograd_input<T, FullProducts<T>, kWinograd4x4, 4>(
              [&](int64_t py, int64_t px) { return pixel(py, px) + panel * width; }, left,
              v + (panel * chunk + tile) * width, v_step);
        }
      });
      const Image<T> of_grad{grad + image * s.out_height * s.out_width * grad_pixel, s.out_height, s.out_width,
                             s.out_width * grad_pixel, grad_pixel};
      with_patch<4, 4>(of_grad, y, x, zeros,
                       [&](const auto& pixel) { winograd_gradient<T>(pixel, outputs, d + tile * outputs, d_step); });
    });
    parallel_for(places * panels, [&](int64_t task) {
      const int64_t place = task / panels, panel = task % panels;
      T* to = du + place * du_step + panel * width;
      if (first == 0)
        for (int64_t o = 0; o < outputs; ++o) zero_run(width, to + o * du_row);
      const T* d_at = d + place * d_step;
      const T* v_at = v + place * v_step + panel * chunk * width;
      if (inputs - panel * width <= kLanes<T>)
        winograd_add_products<T, 1>(count, outputs, d_at, outputs, v_at, to, du_row);
      else
        winograd_add_products<T, 2>(count, outputs, d_at, outputs, v_at, to, du_row);
    });
  }

  T* ohwi = is_ohwi(s) ? grad_weight : sums;
  parallel_for(outputs, [&](int64_t o) {
    for (int64_t c = 0; c < inputs; c += kLanes<T>) {
      const int64_t left = inputs - c < kLanes<T> ? inputs - c : kLanes<T>, at = unknown(c);
      const auto axis = [](const auto& u, auto& g) { WinogradAxis<4>::template weight_transposed<T>(u, g); };
      winograd_transform<T, 6, 6, 3, 3>(
          [&](int y, int x) { return load(du + (6 * y + x) * du_step + o * du_row + at); }, axis, axis,
          [&](int y, int x, Vec<T> g) { store_upto(ohwi + (o * 9 + 3 * y + x) * inputs + at, g, left); });
    }
  });
  if (ohwi != grad_weight) write_ohwi_gradient<T>(s, outputs, 1, 0, sums, grad_weight);
}

}  // namespace
}  // namespace fastnn::cpu
