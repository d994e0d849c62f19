// Gradients of weight and bias from the winners where one or three input channels make short runs: vectors of output
// channels (conv2d_winners.inl.h).
#pragma once

#include "cpu/kernels/conv2d_winners.inl.h"

namespace fastnn::cpu {
namespace {

// Windows whose gradients are asked for before they are read.
constexpr int64_t kWindowsAhead = 16;

// What a window reads of a source row has to fit a vector.
template <class T>
inline bool lookup_serves_grad_weight(const Conv2dShape& s) {
  const bool kernel_is_3 = s.kernel_height == 3 && s.kernel_width == 3;
  const bool kernel_is_5 = s.kernel_height == 5 && s.kernel_width == 5;
  return ((s.in_channels == 1 && (kernel_is_3 || kernel_is_5)) || (s.in_channels == 3 && kernel_is_3)) &&
         s.groups == 1 && (s.kernel_width + 1) * s.in_channels <= kLanes<T> && s.dilation_height == 1 &&
         s.dilation_width == 1 && s.stride_height == 1 && s.stride_width == 1;
}

// Adds one image's share to partial[ky][kx, input channel][output channels], for the output channels [o, o + lanes),
// kernel rows [first_row, first_row + rows) and, of what an output reads in a source row, numbers [first, first +
// count); with the first of each, also the bias's share, which follows the weights'.
template <class T, int inputs, int rows, int count>
void lookup_accumulate(const Conv2dShape& s, const Image<T>& source, const T* grad, const uint8_t* winner, int64_t o,
                       int64_t first_row, int64_t first, T* partial, int64_t padded) {
  const int64_t run = s.kernel_width * inputs;
  const int64_t pooled_height = s.out_height / 2, pooled_width = s.out_width / 2, channels = s.out_channels;
  const int64_t left = channels - o < kLanes<T> ? channels - o : kLanes<T>;
  T* sums = partial + (first_row * run + first) * padded + o;
  Vec<T> acc[rows][count];
  FASTNN_UNROLL
  for (int y = 0; y < rows; ++y) {
    FASTNN_UNROLL
    for (int x = 0; x < count; ++x) acc[y][x] = load(sums + (y * run + x) * padded);
  }
  T* bias = partial + s.kernel_height * run * padded + o;
  Vec<T> bias_acc = load(bias);
  grad += o;
  winner += o;
  for (int64_t py = 0; py < pooled_height; ++py) {
    const T* pixel = source.data + (2 * py + first_row) * source.row_stride + first;
    for (int64_t px = 0; px < pooled_width; ++px, pixel += 2 * inputs, grad += channels, winner += channels) {
      Vec<T> pixels[rows + 1];
      FASTNN_UNROLL
      for (int y = 0; y < rows + 1; ++y) pixels[y] = load_upto(pixel + y * source.row_stride, count + inputs);
      __builtin_prefetch(grad + kWindowsAhead * channels);
      const Mask<T> place = load_bytes<T>(winner, left);  // beyond `left`, g is 0
      const Vec<T> g = place < Mask<T>{} + kNoWinner ? load_upto(grad, left) : Vec<T>{};
      bias_acc += g;
      const Mask<T> at = (place & 1) * inputs, lower = (place & 2) != 0;
      FASTNN_UNROLL
      for (int x = 0; x < count; ++x) {
        FASTNN_UNROLL
        for (int y = 0; y < rows; ++y) acc[y][x] += g * look_up<T>(pixels[y], pixels[y + 1], at + x, lower);
      }
    }
  }
  FASTNN_UNROLL
  for (int y = 0; y < rows; ++y) {
    FASTNN_UNROLL
    for (int x = 0; x < count; ++x) store(sums + (y * run + x) * padded, acc[y][x]);
  }
  if (first_row == 0 && first == 0) store(bias, bias_acc);
}

// As sparse_grad_weight.
template <class T>
bool lookup_grad_weight(const Conv2dShape& s, const Conv2dBackward<T>& t) {
  const int64_t windows = (s.out_height / 2) * (s.out_width / 2), depth = kernel_taps(s) * s.in_channels;
  const int64_t padded = (s.out_channels + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
  const int64_t elements = (depth + 1) * padded;  // the weight's, then the bias's
  const int64_t chunks = image_chunks<T>(s, elements, kTasks);
  const WindowRange range = pooled_range(s);
  const ThreadScratch<T> buffers(max_threads(), window_elements(range, s.in_channels));
  const Scratch<T> partials(chunks * elements);
  const Scratch<T> ohwi(is_ohwi(s) ? 0 : weight_elements(s));
  bool finite = true;

  parallel_tasks(chunks, [&](int64_t chunk, int thread) {
    T* partial = partials + chunk * elements;
    zero_run(elements, partial);
    for (int64_t image = s.batch * chunk / chunks; image < s.batch * (chunk + 1) / chunks; ++image) {
      if (!image_is_finite(s, t.input, image)) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
      const Image<T> source = window_of(image_of(s, t.input, image), range, s.in_channels, buffers[thread]);
      const T* grad = t.grad_output + image * windows * s.out_channels;
      const uint8_t* winner = t.winner + image * windows * s.out_channels;
      for (int64_t o = 0; o < s.out_channels; o += kLanes<T>) {
        const bool is_grey = s.in_channels == 1;
        if constexpr (kLanes<T> >= 4) {
          if (is_grey && s.kernel_width == 3)
            lookup_accumulate<T, 1, 3, 3>(s, source, grad, winner, o, 0, 0, partial, padded);
        }
        if constexpr (kLanes<T> >= 6) {
          for (int64_t ky = 0; is_grey && s.kernel_width == 5 && ky < 5; ++ky)
            lookup_accumulate<T, 1, 1, 5>(s, source, grad, winner, o, ky, 0, partial, padded);
        }
        if constexpr (kLanes<T> >= 12) {
          if (!is_grey) {  // 27 sums are too many for 32 registers
            lookup_accumulate<T, 3, 3, 6>(s, source, grad, winner, o, 0, 0, partial, padded);
            lookup_accumulate<T, 3, 3, 3>(s, source, grad, winner, o, 0, 6, partial, padded);
          }
        }
      }
    }
  });
  add_partials<T>(chunks, elements, elements, partials, partials);
  write_weight_gradient<T>(s, padded, partials, ohwi, t.grad_weight);
  if (t.grad_bias) copy_run<T>(partials + depth * padded, s.out_channels, t.grad_bias);
  return finite;
}

}  // namespace
}  // namespace fastnn::cpu
