// Convolutions whose weights have few taps - a first layer of one channel - without a product, of whose depth they
// would fill a quarter: the forward pass, and the weight's gradient where windows were pooled.
//
// A lane takes a channel. A warp takes kItems items at a time, which are pooling windows, or four outputs each where
// nothing is pooled. Its lanes share out the inputs that an item's four places touch, and put them into shared memory
// as [tap][place], where all channels read them.
#pragma once

#include "cuda/conv2d.cuh"

namespace fastnn::cuda {

constexpr int kFewTaps = 9;
constexpr int kFewThreads = 256;
constexpr int kFewWarps = kFewThreads / kWarpThreads;
constexpr int kItems = 4;
constexpr int kTouched = 4 * kFewTaps;  // places of an item times taps
constexpr int kTouchedShares = (kTouched + kWarpThreads - 1) / kWarpThreads;

template <class T>
constexpr int kTouchedBytes = kFewWarps * kItems * kTouched * sizeof(Compute<T>);

inline bool has_few_taps(const Conv2dShape& s) {
  return s.groups == 1 && s.in_channels * s.kernel_height * s.kernel_width <= kFewTaps &&
         s.out_channels <= kWarpThreads * kMostGridYZ;
}

// Blocks of x take equal parts of the items, first() up to last(), of y 32 channels.
struct FewTapsGrid {
  int64_t items, items_per_block;
  dim3 blocks;
  FewTapsGrid(const Geometry& s, int64_t most_blocks)
      : items(s.pool ? s.windows() : (s.out_pixels() + 3) / 4),
        items_per_block(0),
        blocks(std::clamp<int64_t>(items / (kFewWarps * kItems), 1, most_blocks),
               (s.out_channels + kWarpThreads - 1) / kWarpThreads) {
    items_per_block = (items + blocks.x - 1) / blocks.x;
  }

  __device__ __forceinline__ int64_t first() const { return blockIdx.x * items_per_block; }
  __device__ __forceinline__ int64_t last() const {
    const int64_t end = first() + items_per_block;
    return end < items ? end : items;
  }
};

// A warp's way through the items of its block, and this lane's share of what they touch: values `lane` and, where that
// is one, `lane` + 32 of [tap][place].
template <class T>
class TouchedInputs {
 public:
  using C = Compute<T>;

  __device__ __forceinline__ TouchedInputs(const ImageSource<T>& source, int64_t first)
      : source_(source),
        first_(first),
        origin_(source.s.pool ? PixelOrigin(first, source.s.pooled) : PixelOrigin(4 * first, source.s.out)),
        touched_(shared_memory<C>() + threadIdx.x / kWarpThreads * kItems * kTouched) {
#pragma unroll
    for (int j = 0; j < kTouchedShares; ++j) taps_[j] = tap_of(source.s, number(j) / 4, source.s.by.group_in);
  }

  // Brings what kItems items from `item` on touch; before and after it, all of the warp's lanes.
  __device__ __forceinline__ void bring(int64_t item) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) load(static_cast<uint32_t>(item + i - first_), values_[i]);
    sync_warp();  // nobody reads the last items any more
#pragma unroll
    for (int i = 0; i < kItems; ++i)
#pragma unroll
      for (int j = 0; j < kTouchedShares; ++j)
        if (number(j) < kTouched) touched_[i * kTouched + number(j)] = values_[i][j];
    sync_warp();
  }

  // Of the i-th item brought: the input at a tap of a place, and those of all four places.
  __device__ __forceinline__ C at(int i, int tap, int place) const { return touched_[i * kTouched + 4 * tap + place]; }
  __device__ __forceinline__ void at_places(int i, int tap, C (&values)[4]) const {
    constexpr int kPack = kPackOf16Bytes<C>;
#pragma unroll
    for (int first = 0; first < 4; first += kPack) {
      const auto pack = load_pack<C, kPack>(touched_ + i * kTouched + 4 * tap + first);
#pragma unroll
      for (int e = 0; e < kPack; ++e) values[first + e] = pack.values[e];
    }
  }
  // This lane's j-th value of the i-th item.
  __device__ __forceinline__ C share(int i, int j) const { return values_[i][j]; }

 private:
  static __device__ __forceinline__ int number(int j) { return threadIdx.x % kWarpThreads + j * kWarpThreads; }

  __device__ __forceinline__ void load(uint32_t item, C (&values)[kTouchedShares]) const {
    const Geometry& s = source_.s;
    const int place = threadIdx.x % 4;
    const Pixel p = s.pool ? at_place(pixel_after(origin_, item, s.by.pooled_height, s.by.pooled_width, s.batch), place)
                           : out_pixel_after(s, origin_, 4 * item + place);
    const T* image = source_.image + p.image * s.in.count * s.in_channels;
#pragma unroll
    for (int j = 0; j < kTouchedShares; ++j) {
      const Place<T> from =
          input_at(s, image, p.y * s.stride_y - s.padding_y, p.x * s.stride_x - s.padding_x, taps_[j]);
      values[j] = p.valid && from.valid && number(j) < 4 * s.taps * s.in_channels ? widen(*from.from) : 0;
    }
  }

  const ImageSource<T>& source_;
  const int64_t first_;
  const PixelOrigin origin_;
  C* touched_;
  Tap taps_[kTouchedShares];
  C values_[kItems][kTouchedShares];
};

// `problem` is that of the product which this takes the place of.
template <class T, class Problem>
__global__ void __launch_bounds__(kFewThreads)
    direct_forward_kernel(const GRID_CONSTANT Problem problem, const GRID_CONSTANT FewTapsGrid grid) {
  begin_kernel();
  using C = Compute<T>;
  const Geometry& s = problem.a.s;
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  const int channel = blockIdx.y * kWarpThreads + lane, depth = s.taps * s.in_channels;
  const int64_t first = grid.first(), last = grid.last();

  C weights[kFewTaps];
#pragma unroll
  for (int t = 0; t < kFewTaps; ++t)
    weights[t] = channel < s.out_channels && t < depth ? widen(problem.b.weight[int64_t{channel} * depth + t]) : 0;
  TouchedInputs<T> inputs(problem.a, first);
  for (int64_t item = first + warp * kItems; item < last; item += kFewWarps * kItems) {
    inputs.bring(item);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      C z[4] = {};
#pragma unroll
      for (int t = 0; t < kFewTaps; ++t) {
        C values[4];
        inputs.at_places(i, t, values);
#pragma unroll
        for (int place = 0; place < 4; ++place) z[place] += weights[t] * values[place];
      }
      if (channel < s.out_channels && item + i < last) problem.store_places(item + i, channel, z);
    }
  }
}

template <class T, class Problem>
void direct_forward(const char* operation, const Queue& queue, const Problem& problem) {
  trace<T>(queue, operation, "direct");
  const FewTapsGrid grid(problem.a.s, 8 * device_multiprocessors(queue.device));
  if (grid.items == 0) return;
  launch(operation, queue, direct_forward_kernel<T, Problem>, grid.blocks, kFewThreads, kTouchedBytes<T>, problem,
         grid);
}

inline bool is_sparse(const Conv2dShape& s) {
  return s.pool && has_few_taps(s) && s.batch * (s.out_height / 2) * (s.out_width / 2) > 0;
}

template <class T>
constexpr int kSparseSharedBytes =
    kTouchedBytes<T> + kFewWarps * ((kFewTaps + 1) * kWarpThreads + kTouched) * sizeof(Compute<T>);

// Of each window a lane takes the pixel that won, a quarter of all that a product would take. Partial sums go to
// (block of x, channel, tap), after the last tap the bias's.
//
// What lost, or was cut, has gradient 0, and 0 times what is not finite is NaN: so that it comes out as in torch, each
// lane adds up 0 times its share of what windows touch.
template <class T>
__global__ void __launch_bounds__(kFewThreads)
    sparse_grad_weight_kernel(const GRID_CONSTANT ImageSource<T> input, const GRID_CONSTANT FewTapsGrid grid,
                              int columns, const T* grad_output, const uint8_t* winner, Compute<T>* partials) {
  begin_kernel();
  using C = Compute<T>;
  const Geometry& s = input.s;
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  const int channel = blockIdx.y * kWarpThreads + lane, depth = s.taps * s.in_channels;
  const int64_t first = grid.first(), last = grid.last();

  C sums[kFewTaps] = {}, sum = 0, nothing[kTouchedShares] = {};
  TouchedInputs<T> inputs(input, first);
  for (int64_t window = first + warp * kItems; window < last; window += kFewWarps * kItems) {
    C grads[kItems];
    int places[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const bool there = channel < s.out_channels && window + i < last;
      const int64_t at = there ? (window + i) * s.out_channels + channel : 0;
      places[i] = there ? winner[at] : kNoWinner;
      grads[i] = widen(grad_output[at]);
      if (places[i] == kNoWinner) places[i] = 0, grads[i] = 0;
    }
    inputs.bring(window);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      sum += grads[i];
#pragma unroll
      for (int t = 0; t < kFewTaps; ++t) sums[t] += grads[i] * inputs.at(i, t, places[i]);
#pragma unroll
      for (int j = 0; j < kTouchedShares; ++j) nothing[j] += 0 * inputs.share(i, j);
    }
  }

  C* of_taps = shared_memory<C>() + kTouchedBytes<T> / sizeof(C);       // (warp, tap and one for the bias, lane)
  C* of_nothing = of_taps + kFewWarps * (kFewTaps + 1) * kWarpThreads;  // (warp, tap and place)
#pragma unroll
  for (int t = 0; t <= kFewTaps; ++t)
    of_taps[(warp * (kFewTaps + 1) + t) * kWarpThreads + lane] = t < kFewTaps ? sums[t] : sum;
#pragma unroll
  for (int j = 0; j < kTouchedShares; ++j)
    if (lane + j * kWarpThreads < kTouched) of_nothing[warp * kTouched + lane + j * kWarpThreads] = nothing[j];
  sync_block();
  if (channel >= s.out_channels) return;
  for (int column = warp; column < columns; column += kFewWarps) {
    const int t = column < depth ? column : kFewTaps;
    C total = 0;
    for (int w = 0; w < kFewWarps; ++w) {
      total += of_taps[(w * (kFewTaps + 1) + t) * kWarpThreads + lane];
      if (t < kFewTaps)
        for (int place = 0; place < 4; ++place) total += of_nothing[w * kTouched + 4 * t + place];
    }
    partials[(int64_t{blockIdx.x} * s.out_channels + channel) * columns + column] = total;
  }
}

// `problem` is that of the product which this takes the place of.
template <class T, class Problem>
void sparse_grad_weight(const char* operation, const Queue& queue, const Conv2dShape& fused, const Conv2dBackward<T>& b,
                        Problem problem) {
  trace<T>(queue, operation, "sparse");
  const auto input = ImageSource<T>::input(b.input, Geometry(fused));
  const FewTapsGrid grid(input.s, 2 * device_multiprocessors(queue.device));
  GemmSize& size = problem.size;
  size.splits = static_cast<int>(grid.blocks.x);
  problem.partials = queue.workspace<Compute<T>>(size.splits * size.m * size.columns());
  launch(operation, queue, sparse_grad_weight_kernel<T>, grid.blocks, kFewThreads, kSparseSharedBytes<T>, input, grid,
         static_cast<int>(size.columns()), b.grad_output, b.winner, problem.partials);
  add_splits<T>(operation, queue, problem);
}

}  // namespace fastnn::cuda
