// Gradients of a convolution with fused 2x2 pooling, from the pooled gradient and the winners alone.
//
// At most one of the four outputs in a window has a gradient, and none where ReLU cut it: in practice 11 to 18 % of
// the dense gradient is non-zero. So the sums run over winners, not over pixels:
//
//   grad_w[o][ky][run] += g * source[y + ky][x .. x + kx)        run = (kx, i), contiguous in a source row
//   grad_in[y + ky][x .. x + kx) += g * w[o][ky][run]
//
// for each winner (o, y, x) of gradient g; the bias gradient is summed on the way. What is left out are products with
// zero, which would be NaN where the other factor is not finite: the kernels ask, and say if they did not serve. Three:
//
//   sparse_grad_weight    one output channel at a time: its part of the gradient stays in registers while the winners
//                         of a bit mask pass by
//   sparse_grad_input     one output row and one vector of input channels at a time: registers hold what a window
//                         reaches, and slide
//   lookup_grad_weight    one input channel, or three (the first layer of a network on pictures): runs would be too
//                         short, so vectors run along output channels and each lane looks its winner's pixels up
#pragma once

#include "cpu/kernels/conv2d_grad_weight.inl.h"
#include "cpu/kernels/finite.inl.h"
#include "cpu/simd/lanes.h"

namespace fastnn::cpu {
namespace {

// Images are cut into chunks, `most` at most, by the shape alone; each chunk's partial gradient is added in order.
template <class T>
int64_t image_chunks(const Conv2dShape& s, int64_t partial_elements, int64_t most) {
  int64_t chunks = kMaxPartialBytes / (partial_elements * static_cast<int64_t>(sizeof(T)));
  if (chunks > most) chunks = most;
  if (chunks > s.batch) chunks = s.batch;
  return chunks < 1 ? 1 : chunks;
}

// The padded image's source window, from its pixel (0, 0) at (-padding, -padding) to the last pixel that a window
// reads.
inline WindowRange pooled_range(const Conv2dShape& s) {
  return {-s.padding_height, -s.padding_width,
          (s.out_height / 2 * 2 - 1) * s.stride_height + (s.kernel_height - 1) * s.dilation_height + 1,
          (s.out_width / 2 * 2 - 1) * s.stride_width + (s.kernel_width - 1) * s.dilation_width + 1};
}

template <class T>
inline Image<T> image_of(const Conv2dShape& s, const T* input, int64_t image) {
  return {input + image * s.in_height * s.in_width * s.in_channels, s.in_height, s.in_width, s.in_width * s.in_channels,
          s.in_channels};
}

template <class T>
inline bool image_is_finite(const Conv2dShape& s, const T* input, int64_t image) {
  const int64_t elements = s.in_height * s.in_width * s.in_channels;
  return run_is_finite(elements, input + image * elements);
}

// ---------------------------------------------------------------------------------------------- sparse_grad_weight

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
  const WindowRange range = pooled_range(s);
  return s.groups == 1 && s.dilation_width == 1 && s.kernel_width * s.in_channels >= kLanes<T> / 2 &&
         range.height * range.width * s.in_channels <= INT32_MAX;  // WinnerTable's offsets
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
  const int64_t window_elements = range.height * range.width * s.in_channels;
  const ThreadScratch<T> buffers(max_threads(), window_elements);
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

// ----------------------------------------------------------------------------------------------- sparse_grad_input

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
  const Scratch<T> ohwi(is_ohwi(s) ? 0 : weight_elements(s));
  const MadeWeights<T> packed(threads, weight_elements(s));
  const Scratch<bool> has_copy(threads);
  for (int thread = 0; thread < threads; ++thread) has_copy[thread] = false;
  const T* weight = weight_to_ohwi<T>(s, t.weight, ohwi);
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

// ---------------------------------------------------------------------------------------------- lookup_grad_weight

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
  const int64_t window_elements = range.height * range.width * s.in_channels;
  const ThreadScratch<T> buffers(max_threads(), window_elements);
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
