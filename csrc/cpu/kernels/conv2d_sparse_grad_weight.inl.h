// Gradients of weight and bias from the winners: one output channel at a time (conv2d_winners.inl.h).
#pragma once

#include "cpu/kernels/conv2d_winners.inl.h"

namespace fastnn::cpu {
namespace {

// Sums that are held in registers: 3 kernel rows of up to 6 vectors of 32 registers, of up to 4 of 16. Of 16 registers
// longer runs take one row at a time, 12 vectors of it.
constexpr int kSparseTriples = kVectorRegisters == 32 ? 6 : 4;
constexpr int kSparseVectors = kVectorRegisters == 32 ? 6 : 12;

// Winners of up to 32 output channels among up to 32 windows.
template <class T>
struct WinnerTable {
  int64_t width;             // channels
  LaneType<T> masks[32];     // of a channel, bit q: window q has a winner
  LaneType<T> from[32][32];  // source offset of the winner's first tap: [window][channel]
  const T* grad;             // of window 0 and the first channel; windows are grad_step apart
  int64_t grad_step;
};

// Fills the rest of a table whose width and gradient are set, and adds the gradient where there are winners to `bias`.
// `winner` and `step` are as grad and grad_step. `corners`: source offsets of the windows' first pixels; a place adds
// x_step, y_step or both.
template <class T>
FASTNN_INLINE void fill_winners(const uint8_t* winner, int64_t step, int64_t windows, const int64_t* corners,
                                int64_t x_step, int64_t y_step, T* bias, WinnerTable<T>& table) {
  const Mask<T> zero{}, beside = broadcast_lane<T>(x_step), below = broadcast_lane<T>(y_step);
  for (int64_t c = 0; c < table.width; c += kLanes<T>) {
    const int64_t left = table.width - c < kLanes<T> ? table.width - c : kLanes<T>;
    Mask<T> masks{};
    Vec<T> sum = load_upto(bias + c, left);
    for (int64_t q = 0; q < windows; ++q) {
      const Mask<T> place = load_bytes<T>(winner + q * step + c, left);
      const Mask<T> wins = place < zero + kNoWinner;
      masks |= wins & broadcast_lane<T>(int64_t{1} << q);
      sum += wins ? load_upto(table.grad + q * table.grad_step + c, left) : Vec<T>{};
      store_lanes<T>(table.from[q] + c, broadcast_lane<T>(corners[q]) + ((place & 1) != zero ? beside : zero) +
                                            ((place & 2) != zero ? below : zero));
    }
    store_lanes<T>(table.masks + c, masks);
    store_upto(bias + c, sum, left);
  }
}

// partial: of the first channel; the next one's is partial_channel further on.
template <class T, int rows, int vectors>
void sparse_accumulate(const WinnerTable<T>& winners, const T* source, int64_t source_row, T* partial,
                       int64_t partial_row, int64_t partial_channel, int64_t last_count) {
  for (int64_t c = 0; c < winners.width; ++c, partial += partial_channel) {
    Vec<T> acc[rows][vectors];
    FASTNN_UNROLL
    for (int r = 0; r < rows; ++r) {
      FASTNN_UNROLL
      for (int v = 0; v < vectors; ++v)
        acc[r][v] = load_upto(partial + r * partial_row + v * kLanes<T>, v + 1 < vectors ? kLanes<T> : last_count);
    }
    for (uint32_t mask = static_cast<uint32_t>(winners.masks[c]); mask != 0; mask &= mask - 1) {
      const int q = __builtin_ctz(mask);
      const T* from = source + winners.from[q][c];
      const Vec<T> g = broadcast(winners.grad[q * winners.grad_step + c]);
      FASTNN_UNROLL
      for (int r = 0; r < rows; ++r) {
        FASTNN_UNROLL
        for (int v = 0; v < vectors; ++v) acc[r][v] += g * load(from + r * source_row + v * kLanes<T>);
      }
    }
    FASTNN_UNROLL
    for (int r = 0; r < rows; ++r) {
      FASTNN_UNROLL
      for (int v = 0; v < vectors; ++v)
        store_upto(partial + r * partial_row + v * kLanes<T>, acc[r][v], v + 1 < vectors ? kLanes<T> : last_count);
    }
  }
}

template <class T>
using SparseAccumulate = void (*)(const WinnerTable<T>&, const T*, int64_t, T*, int64_t, int64_t, int64_t);

template <class T, int rows, int... index>
constexpr SparseAccumulate<T> sparse_kernel(int64_t vectors, Indices<index...>) {
  constexpr SparseAccumulate<T> kernels[] = {sparse_accumulate<T, rows, index + 1>...};
  return kernels[vectors - 1];
}

template <class T>
inline bool sparse_serves_grad_weight(const Conv2dShape& s) {
  WindowRange range = pooled_range(s);
  if (range.width < s.in_width) range.width = s.in_width;  // it may be read in place
  return s.groups == 1 && s.dilation_width == 1 && s.kernel_width * s.in_channels >= kLanes<T> / 2 &&
         window_elements(range, s.in_channels) <= INT32_MAX;  // WinnerTable's offsets
}

// sums[o] += grad of the windows that have a winner, for one window's channels.
template <class T>
FASTNN_INLINE void add_winners(const T* grad, const uint8_t* winner, int64_t channels, T* sums) {
  int64_t o = 0;
  for (; o + kLanes<T> <= channels; o += kLanes<T>) {
    const Mask<T> place = widen_bytes<T>(winner + o);
    store(sums + o, load(sums + o) + (place < Mask<T>{} + kNoWinner ? load(grad + o) : Vec<T>{}));
  }
  for (; o < channels; ++o) sums[o] += winner[o] < kNoWinner ? grad[o] : T(0);
}

// Returns whether the weight's gradient is right: the input has to be finite.
template <class T>
bool sparse_grad_weight(const Conv2dShape& s, const Conv2dBackward<T>& t) {
  using Triples = typename MakeIndices<kSparseTriples>::type;
  using Vectors = typename MakeIndices<kSparseVectors>::type;
  const int64_t pooled_width = s.out_width / 2, windows = s.out_height / 2 * pooled_width, channels = s.out_channels;
  const int64_t run = s.kernel_width * s.in_channels, elements = s.kernel_height * run;
  const int64_t partial_elements = channels * elements + channels;  // the weight's, then the bias's
  // Half as many copies of the sums where a task has half of the channels.
  const int64_t tables = (channels + 31) / 32, parts = tables < 2 ? 1 : 2;
  const int64_t chunks = image_chunks<T>(s, partial_elements, kTasks / parts);
  const WindowRange range = pooled_range(s);
  const ThreadScratch<T> buffers(max_threads(), window_elements(range, s.in_channels));
  const Scratch<T> partials(chunks * partial_elements);
  // A run that ends inside a vector reads past it: from a copy, where that is safe.
  const bool copy = run % kLanes<T> != 0;
  // Runs are cut into even groups of at most kSparseVectors vectors.
  const int64_t vectors = (run + kLanes<T> - 1) / kLanes<T>, groups = (vectors + kSparseVectors - 1) / kSparseVectors;
  const bool in_triples = (vectors + groups - 1) / groups <= kSparseTriples;  // the largest group
  bool finite = true;

  parallel_tasks(chunks * parts, [&](int64_t task, int thread) {
    const int64_t chunk = task / parts, part = task % parts;
    const int64_t first_channel = tables * part / parts * 32, beyond = tables * (part + 1) / parts * 32;
    const int64_t end_channel = beyond < channels ? beyond : channels, width = end_channel - first_channel;
    T* partial = partials + chunk * partial_elements;
    T* bias = partial + channels * elements;
    T* buffer = buffers[thread];
    zero_run(width * elements, partial + first_channel * elements);
    zero_run(width, bias + first_channel);
    for (int64_t image = s.batch * chunk / chunks; image < s.batch * (chunk + 1) / chunks; ++image) {
      if (part == 0 && !image_is_finite(s, t.input, image)) __atomic_store_n(&finite, false, __ATOMIC_RELAXED);
      const Image<T> source = window_of(image_of(s, t.input, image), range, s.in_channels, buffer, copy);
      const int64_t y_step = s.stride_height * source.row_stride, x_step = s.stride_width * source.pixel_stride;
      for (int64_t first = 0; first < windows; first += 32) {
        const int64_t count = windows - first < 32 ? windows - first : 32;
        const T* grad = t.grad_output + (image * windows + first) * channels;
        const uint8_t* winner = t.winner + (image * windows + first) * channels;
        int64_t corners[32];
        for (int64_t q = 0; q < count; ++q)
          corners[q] = (first + q) / pooled_width * 2 * y_step + (first + q) % pooled_width * 2 * x_step;
        for (int64_t o = first_channel; o < end_channel; o += 32) {
          WinnerTable<T> winners;
          winners.width = end_channel - o < 32 ? end_channel - o : 32;
          winners.grad = grad + o, winners.grad_step = channels;
          fill_winners<T>(winner + o, channels, count, corners, x_step, y_step, bias + o, winners);
          T* to = partial + o * elements;
          for (int64_t ky = 0; ky < s.kernel_height;) {
            const bool three = in_triples && s.kernel_height - ky >= 3;
            for (int64_t group = 0; group < groups; ++group) {
              const int64_t begin = vectors * group / groups, end = vectors * (group + 1) / groups;
              const int64_t last = (end == vectors ? run : end * kLanes<T>)-(end - 1) * kLanes<T>;
              const auto kernel =
                  three ? sparse_kernel<T, 3>(end - begin, Triples{}) : sparse_kernel<T, 1>(end - begin, Vectors{});
              kernel(winners, source.data + ky * s.dilation_height * source.row_stride + begin * kLanes<T>,
                     s.dilation_height * source.row_stride, to + ky * run + begin * kLanes<T>, run, elements, last);
            }
            ky += three ? 3 : 1;
          }
        }
      }
    }
  });
  write_ohwi_gradient<T>(s, channels, chunks, partial_elements, partials, t.grad_weight);
  if (t.grad_bias) add_partials<T>(chunks, partial_elements, channels, partials + channels * elements, t.grad_bias);
  return finite;
}

// The bias gradient alone, where a dense kernel computes the weight's.
template <class T>
void sparse_grad_bias(const Conv2dShape& s, const Conv2dBackward<T>& t) {
  const int64_t windows = s.batch * (s.out_height / 2) * (s.out_width / 2), channels = s.out_channels;
  zero_run(channels, t.grad_bias);
  for (int64_t q = 0; q < windows; ++q)
    add_winners(t.grad_output + q * channels, t.winner + q * channels, channels, t.grad_bias);
}

}  // namespace
}  // namespace fastnn::cpu
