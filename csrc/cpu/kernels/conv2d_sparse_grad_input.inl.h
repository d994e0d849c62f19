// The gradient of the input from the winners: one output row at a time (conv2d_winners.inl.h).
#pragma once

#include "cpu/kernels/conv2d_winners.inl.h"

namespace fastnn::cpu {
namespace {

// Kernel rows whose sums are kept in registers, for one vector of input channels: (width + 1) accumulators each.
constexpr int slide_rows(int64_t width) { return kVectorRegisters == 32 || width == 3 ? 3 : 2; }
// The sums of a band of an image, which stay in the nearest cache beside the weights of 64 output channels.
constexpr int64_t kBandBytes = 16 << 10;
// Pixels whose lines are asked for before they are written.
constexpr int64_t kPixelsAhead = 12;
// Windows of a task, which reads the weights once, where images are small.
constexpr int64_t kSlideWindows = 64;
// Kernel rows of all output channels that are packed by one task.
constexpr int64_t kSlideGrain = 32;

template <class T>
inline bool sparse_serves_grad_input(const Conv2dShape& s) {
  return s.groups == 1 && s.stride_height == 1 && s.stride_width == 1 && s.dilation_height == 1 &&
         s.dilation_width == 1 && (s.kernel_width == 3 || s.kernel_width == 5) && s.in_channels % kLanes<T> == 0;
}

// Some rows of windows, for up to 64 output channels.
template <class T>
struct SlideBand {
  int64_t rows, windows;  // in a row
  const uint64_t* masks;  // masks[window * 4 + place] selects channels
  const T* grad;          // grad[window * grad_step + channel]
  int64_t grad_step;
  const T* weight;  // [output channel][kernel row][kx], one vector each
  T* to;            // input pixels that window 0 reaches, one vector each
  int64_t to_row;
};

// Adds the winners at place `shift` (0 or 1) of a window into acc[...][shift ...].
template <class T, int width, int rows, int shift>
FASTNN_INLINE void slide_add(uint64_t mask, const T* grad, const T* weight, Vec<T> (&acc)[rows][width + 1]) {
  for (; mask != 0; mask &= mask - 1) {
    const int64_t o = __builtin_ctzll(mask);
    const T* w = weight + o * rows * width * kLanes<T>;
    const Vec<T> g = broadcast(grad[o]);
    FASTNN_UNROLL
    for (int y = 0; y < rows; ++y) {
      FASTNN_UNROLL
      for (int x = 0; x < width; ++x) acc[y][shift + x] += g * load(w + (y * width + x) * kLanes<T>);
    }
  }
}

// By value, so that nothing of it is read again behind stores, and not inlined, so that it has the registers.
template <class T, int width, int rows>
__attribute__((noinline)) void slide_band(SlideBand<T> band) {
  for (int64_t y = 0; y < 2 * band.rows; ++y) {
    Vec<T> acc[rows][width + 1];
    T* to = band.to + y * band.to_row;
    // body(sum, memory) for some columns of what a window reaches.
    const auto columns = [&](int first, int end, const auto& body) {
      FASTNN_UNROLL
      for (int r = 0; r < rows; ++r) {
        FASTNN_UNROLL
        for (int x = first; x < end; ++x) body(acc[r][x], to + r * band.to_row + x * kLanes<T>);
      }
    };
    const auto fetch = [](Vec<T>& sum, const T* from) { sum = load(from); };
    const auto keep = [](Vec<T> sum, T* at) { store(at, sum); };
    const int64_t first = y / 2 * band.windows;
    columns(0, width - 1, fetch);
    for (int64_t q = first; q < first + band.windows; ++q) {
      columns(width - 1, width + 1, fetch);
      const uint64_t* masks = band.masks + q * 4 + y % 2 * 2;
      slide_add<T, width, rows, 0>(masks[0], band.grad + q * band.grad_step, band.weight, acc);
      slide_add<T, width, rows, 1>(masks[1], band.grad + q * band.grad_step, band.weight, acc);
      columns(0, 2, keep);
      FASTNN_UNROLL
      for (int r = 0; r < rows; ++r) {
        FASTNN_UNROLL
        for (int x = 0; x < width - 1; ++x) acc[r][x] = acc[r][x + 2];
      }
      to += 2 * kLanes<T>;
    }
    columns(0, width - 1, keep);
  }
}

template <class T, int width>
void slide_band_of(int64_t rows, const SlideBand<T>& band) {
  switch (rows) {
    case 3:
      if constexpr (slide_rows(width) == 3) return slide_band<T, width, 3>(band);
      [[fallthrough]];
    case 2: return slide_band<T, width, 2>(band);
    default: return slide_band<T, width, 1>(band);
  }
}

// masks[(word * windows + q) * 4 + place]: which of 64 output channels have their winner there.
inline void mark_winners(int64_t windows, int64_t channels, const uint8_t* winner, uint64_t* masks) {
  for (int64_t o = 0; o < channels; o += 64) {
    const int64_t left = channels - o;
    for (int64_t q = 0; q < windows; ++q) {
      const uint8_t* from = winner + q * channels + o;
      for (uint8_t place = 0; place < 4; ++place) {
        uint64_t mask = equal_mask_upto(from, left < 32 ? left : 32, place);
        if (left > 32)
          mask |= static_cast<uint64_t>(equal_mask_upto(from + 32, left < 64 ? left - 32 : 32, place)) << 32;
        *masks++ = mask;
      }
    }
  }
}

// Kernel rows that slide together.
struct SlideRows {
  int64_t first, count;
};

inline SlideRows slide_rows_at(const Conv2dShape& s, int64_t ky) {
  const int64_t most = slide_rows(s.kernel_width), first = ky / most * most;
  return {first, s.kernel_height - first < most ? s.kernel_height - first : most};
}

// Where the weights of some rows begin among those of a vector of inputs: [rows][output channel][row][kx][lanes].
template <class T>
int64_t slide_place(const Conv2dShape& s, SlideRows rows, int64_t channel) {
  return (rows.first * s.out_channels + channel * rows.count) * s.kernel_width * kLanes<T>;
}

// Packs the kernel rows [begin, end) of all output channels' together; returns whether all are finite.
template <class T>
bool pack_slide_weights(const Conv2dShape& s, const T* ohwi, int64_t begin, int64_t end, T* to) {
  const int64_t vectors = s.in_channels / kLanes<T>, of_vector = s.out_channels * kernel_taps(s) * kLanes<T>;
  Vec<T> zero_or_nan{};
  for (int64_t i = begin; i < end; ++i) {
    const int64_t o = i / s.kernel_height, ky = i % s.kernel_height;
    const SlideRows rows = slide_rows_at(s, ky);
    T* row = to + slide_place<T>(s, rows, o) + (ky - rows.first) * s.kernel_width * kLanes<T>;
    for (int64_t kx = 0; kx < s.kernel_width; ++kx, row += kLanes<T>) {
      for (int64_t v = 0; v < vectors; ++v) {
        const Vec<T> w = load(ohwi + ((i * s.kernel_width + kx) * vectors + v) * kLanes<T>);
        zero_or_nan += w * T(0);
        store(row + v * of_vector, w);
      }
    }
  }
  return !any_lane<T>(zero_or_nan != zero_or_nan);
}

// Returns whether it served: the weights have to be finite.
//
// One vector of input channels at a time, so that its weights stay in the nearest cache while the images of a task pass
// by, each in bands of window rows: a band's sums are in a buffer, whose last rows begin the next band.
template <class T>
bool sparse_grad_input(const Conv2dShape& s, const Conv2dBackward<T>& t) {
  const int64_t pooled_height = s.out_height / 2, pooled_width = s.out_width / 2,
                windows = pooled_height * pooled_width;
  const int64_t words = (s.out_channels + 63) / 64, inputs = s.in_channels, vectors = inputs / kLanes<T>;
  const int threads = max_threads();
  const OhwiWeight<T> weight(s, t.weight);
  const MadeWeights<T> packed(threads, weight_elements(s));
  const Scratch<bool> has_copy(threads);
  for (int thread = 0; thread < threads; ++thread) has_copy[thread] = false;
  const int64_t kernel_rows = s.out_channels * s.kernel_height;
  bool finite = true;
  const auto pack = [&](int64_t begin, int64_t end, T* to) {
    if (!pack_slide_weights<T>(s, weight, begin, end, to)) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
  };
  if (!packed.own()) {
    parallel_ranges(kernel_rows, kSlideGrain, [&](int64_t begin, int64_t end) { pack(begin, end, packed.of(0)); });
    if (!finite) return false;
  }

  const int64_t overlap = s.kernel_height - 1;
  const int64_t height = s.in_height + 2 * s.padding_height, width = s.in_width + 2 * s.padding_width;
  const int64_t buffer_row = width * kLanes<T>;
  int64_t band = kBandBytes / (2 * buffer_row * static_cast<int64_t>(sizeof(T)));  // in rows of windows
  if (band > pooled_height) band = pooled_height;
  if (band < 1) band = 1;
  int64_t images = s.batch / (2 * kTasks);
  if (images * windows > kSlideWindows) images = kSlideWindows / windows;
  if (images < 1) images = 1;
  const int64_t blocks = (s.batch + images - 1) / images, parts = blocks < kTasks ? vectors : 1;
  const ThreadScratch<T> buffers(threads, (2 * band + overlap) * buffer_row);
  const ThreadScratch<uint64_t> all_masks(threads, images * windows * 4 * words);

  parallel_tasks(blocks * parts, [&](int64_t task, int thread) {
    const int64_t first = task / parts * images, part = task % parts;
    const int64_t end = first + images < s.batch ? first + images : s.batch;
    uint64_t* masks = all_masks[thread];
    T* buffer = buffers[thread];
    T* weights = packed.of(thread);
    if (packed.own() && !has_copy[thread]) {
      pack(0, kernel_rows, weights);
      has_copy[thread] = true;
    }
    mark_winners((end - first) * windows, s.out_channels, t.winner + first * windows * s.out_channels, masks);
    for (int64_t v = vectors * part / parts; v < vectors * (part + 1) / parts; ++v) {
      const T* of_vector = weights + v * s.out_channels * kernel_taps(s) * kLanes<T>;
      for (int64_t image = first; image < end; ++image) {
        T* to = t.grad_input + image * s.in_height * s.in_width * inputs + v * kLanes<T>;
        // Rows [begin, beyond) of the padded image, or zeros. Where a line of the image is more than a vector, each
        // store would wait for its line.
        const auto write = [&](int64_t begin, int64_t beyond, const T* from) {
          for (int64_t row = begin; row < beyond; ++row) {
            const int64_t y = row - s.padding_height;
            if (y < 0 || y >= s.in_height) continue;
            T* pixel = to + y * s.in_width * inputs;
            const T* sums = from ? from + (row - begin) * buffer_row + s.padding_width * kLanes<T> : nullptr;
            for (int64_t x = 0, in_width = s.in_width; x < in_width; ++x, pixel += inputs) {
              __builtin_prefetch(pixel + kPixelsAhead * inputs, 1);
              store(pixel, sums ? load(sums + x * kLanes<T>) : Vec<T>{});
            }
          }
        };
        zero_run(overlap * buffer_row, buffer);
        for (int64_t row = 0; row < pooled_height; row += band) {
          const int64_t count = pooled_height - row < band ? pooled_height - row : band;
          zero_run(2 * count * buffer_row, buffer + overlap * buffer_row);
          for (int64_t word = 0; word < words; ++word) {
            const uint64_t* of_word = masks + (word * (end - first) + image - first) * windows * 4;
            for (int64_t ky = 0; ky < s.kernel_height; ky += slide_rows(s.kernel_width)) {
              const SlideRows rows = slide_rows_at(s, ky);
              const int64_t q = image * windows + row * pooled_width;
              const SlideBand<T> slide{
                  .rows = count,
                  .windows = pooled_width,
                  .masks = of_word + row * pooled_width * 4,
                  .grad = t.grad_output + q * s.out_channels + word * 64,
                  .grad_step = s.out_channels,
                  .weight = of_vector + slide_place<T>(s, rows, word * 64),
                  .to = buffer + ky * buffer_row,
                  .to_row = buffer_row,
              };
              if (s.kernel_width == 3)
                slide_band_of<T, 3>(rows.count, slide);
              else
                slide_band_of<T, 5>(rows.count, slide);
            }
          }
          write(2 * row, 2 * (row + count), buffer);
          move_run(buffer + 2 * count * buffer_row, overlap * buffer_row, buffer);
        }
        write(2 * pooled_height, 2 * pooled_height + overlap, buffer);
        write(2 * pooled_height + overlap, height, nullptr);
      }
    }
  });
  return finite;
}

}  // namespace
}  // namespace fastnn::cpu
