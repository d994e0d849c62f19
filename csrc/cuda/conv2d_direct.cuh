// conv2d without a product, where an output has few factors: first layers, of one channel or three. Tensor cores would
// multiply zeros for the most part, and gathering the factors would cost more than the multiplications.
//
//   direct   forward       a thread makes 8 channels of 4 pixels, the places of a pooling window where there are such
//   sparse   grad_weight   a lane takes a channel, and of each pooling window the pixel that won: a quarter of all
#pragma once

#include "cuda/conv2d.cuh"

namespace fastnn::cuda {

constexpr int kDirectThreads = 256;
constexpr int kMostFactors = 32;  // of an output

template <class T>
bool has_few_factors(const Conv2dShape& s) {
  const int64_t taps = s.kernel_height * s.kernel_width;
  return s.groups == 1 && taps > 1 && s.in_channels % kChunk<T> != 0 && taps * s.in_channels <= kMostFactors;
}

// Forward

// What comes after the sum: bias, ReLU and pooling.
template <class T>
struct ForwardOutput {
  T* output;
  uint8_t* winner;
  const T* bias;
  bool relu;

  __device__ __forceinline__ T finish(Compute<T> z, int channel) const {
    if (bias) z += widen(bias[channel]);
    return narrow<T>(relu && z <= 0 ? 0 : z);  // NaN stays
  }

  // The maximum of a window's four places: the first of equals, and NaN before all.
  __device__ __forceinline__ T largest(const Compute<T> (&places)[4], int channel, uint8_t& winner_of) const {
    Compute<T> best = places[0];
    int place = 0;
#pragma unroll
    for (int i = 1; i < 4; ++i)
      if (places[i] > best || (places[i] != places[i] && best == best)) best = places[i], place = i;
    if (bias) best += widen(bias[channel]);
    const bool cut = relu && best <= 0;
    winner_of = cut ? kNoWinner : place;
    return narrow<T>(cut ? 0 : best);
  }
};

constexpr int kDirectChannels = 8;  // of a thread
constexpr int kDirectTile = 32;     // of a block
constexpr int kDirectLanes = kDirectTile / kDirectChannels;
constexpr int kDirectItems = kDirectThreads / kDirectLanes;  // windows of a block, or quarters of its pixels

template <class T, bool kPool>
__global__ void __launch_bounds__(kDirectThreads)
    direct_forward_kernel(const GRID_CONSTANT ImageSource<T> input, const T* weight, bool weight_channels_last,
                          ForwardOutput<T> to) {
  begin_kernel();
  using C = Compute<T>;
  const Geometry& s = input.s;
  const int depth = s.taps * s.in_channels, tile = blockIdx.y * kDirectTile;
  C* weights = shared_memory<C>();  // (depth, kDirectTile)
  for (int i = threadIdx.x; i < depth * kDirectTile; i += kDirectThreads) {
    uint32_t in = i / kDirectTile;
    const int channel = tile + i % kDirectTile, k = static_cast<int>(in);
    const int tap = static_cast<int>(s.by.group_in.split(in));
    const int at = weight_channels_last ? k : static_cast<int>(in) * s.taps + tap;
    weights[i] = channel < s.out_channels ? widen(weight[int64_t{channel} * depth + at]) : 0;
  }
  sync_block();

  const int lane = threadIdx.x % kDirectLanes, item = threadIdx.x / kDirectLanes;
  const int64_t first = int64_t{blockIdx.x} * kDirectItems * (kPool ? 1 : 4);
  const T* image[4];
  int y[4], x[4];
  bool valid[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    Pixel p;
    if constexpr (kPool) {
      p = pixel_after(PixelOrigin(first, s.pooled), item, s.by.pooled_height, s.by.pooled_width, s.batch);
      p.y = 2 * p.y + i / 2, p.x = 2 * p.x + i % 2;
    } else {
      p = out_pixel_after(s, PixelOrigin(first, s.out), item + i * kDirectItems);
    }
    image[i] = input.image + p.image * s.in.count * s.in_channels;
    y[i] = p.y * s.stride_y - s.padding_y, x[i] = p.x * s.stride_x - s.padding_x;
    valid[i] = p.valid;
  }

  C z[4][kDirectChannels] = {};
  for (int k = 0; k < depth; ++k) {
    const Tap tap = tap_of(s, k, s.by.group_in);
    const auto w = load_pack<C, kDirectChannels / 2>(weights + k * kDirectTile + lane * kDirectChannels);
    const auto v =
        load_pack<C, kDirectChannels / 2>(weights + k * kDirectTile + lane * kDirectChannels + kDirectChannels / 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Place<T> place = input_at(s, image[i], y[i], x[i], tap);
      const C value = place.valid && valid[i] ? widen(*place.from) : 0;
#pragma unroll
      for (int e = 0; e < kDirectChannels; ++e)
        z[i][e] += value * (e < kDirectChannels / 2 ? w.values[e % (kDirectChannels / 2)]
                                                    : v.values[e % (kDirectChannels / 2)]);
    }
  }

  const int channel = tile + lane * kDirectChannels;
#pragma unroll
  for (int i = 0; i < (kPool ? 1 : 4); ++i) {
    if (!valid[i]) return;
    const int64_t at = (first + item + i * kDirectItems) * s.out_channels + channel;
#pragma unroll
    for (int e = 0; e < kDirectChannels; ++e) {
      if (channel + e >= s.out_channels) break;
      if constexpr (kPool) {
        const C places[4] = {z[0][e], z[1][e], z[2][e], z[3][e]};
        to.output[at + e] = to.largest(places, channel + e, to.winner[at + e]);
      } else {
        to.output[at + e] = to.finish(z[i][e], channel + e);
      }
    }
  }
}

template <class T>
void direct_forward(const char* operation, const Queue& queue, const Conv2dShape& s, const Conv2dForward<T>& b) {
  trace<T>(queue, operation, "direct");
  const Geometry geometry(s);
  const int64_t items = s.pool ? geometry.windows() : (geometry.out_pixels() + 3) / 4;
  const dim3 grid((items + kDirectItems - 1) / kDirectItems, (s.out_channels + kDirectTile - 1) / kDirectTile);
  const size_t shared_bytes = geometry.taps * s.in_channels * kDirectTile * sizeof(Compute<T>);
  launch(operation, queue, s.pool ? direct_forward_kernel<T, true> : direct_forward_kernel<T, false>, grid,
         kDirectThreads, shared_bytes, ImageSource<T>::input(b.input, geometry), b.weight, s.weight_channels_last,
         ForwardOutput<T>{b.output, b.winner, b.bias, s.relu});
}

// Gradient of the weight, where windows were pooled

constexpr int kSparseTaps = 9;  // of a block
constexpr int kSparseWarps = kDirectThreads / kWarpThreads;
constexpr int kSparseTouched = 4 * kSparseTaps;  // places of a window times taps
template <class T>
constexpr int kSparseSharedBytes =
    kSparseWarps * ((kSparseTaps + 1) * kWarpThreads + kSparseTouched) * sizeof(Compute<T>);

// Blocks of x take equal parts of the windows, a warp every eighth; of y 32 channels, a lane each; of z nine taps.
// Partial sums go to (x, channel, tap), after the last tap the bias's.
//
// What lost, or was cut, has gradient 0, and 0 times what is not finite is NaN: so that it comes out as in torch, the
// lanes share the places and taps of each window out and add up 0 times the input there.
template <class T>
__global__ void __launch_bounds__(kDirectThreads)
    sparse_grad_weight_kernel(const GRID_CONSTANT ImageSource<T> input, int64_t windows_per_block, int columns,
                              const T* grad_output, const uint8_t* winner, Compute<T>* partials) {
  begin_kernel();
  using C = Compute<T>;
  const Geometry& s = input.s;
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  const int channel = blockIdx.y * kWarpThreads + lane, first_tap = blockIdx.z * kSparseTaps;
  const int depth = s.taps * s.in_channels;
  const int64_t first = blockIdx.x * windows_per_block, end = first + windows_per_block;
  const int64_t last = end < s.windows() ? end : s.windows();
  const PixelOrigin origin(first, s.pooled);

  Tap taps[kSparseTaps];
#pragma unroll
  for (int t = 0; t < kSparseTaps; ++t) taps[t] = tap_of(s, first_tap + t, s.by.group_in);
  constexpr int kShares = (kSparseTouched + kWarpThreads - 1) / kWarpThreads;
  Tap touched[kShares];
#pragma unroll
  for (int j = 0; j < kShares; ++j) touched[j] = tap_of(s, first_tap + (lane + j * kWarpThreads) / 4, s.by.group_in);

  C sums[kSparseTaps] = {}, sum = 0, nothing[kShares] = {};
  for (int64_t window = first + warp; window < last; window += kSparseWarps) {
    const Pixel p =
        pixel_after(origin, static_cast<uint32_t>(window - first), s.by.pooled_height, s.by.pooled_width, s.batch);
    const T* image = input.image + p.image * s.in.count * s.in_channels;
    const auto value = [&](int place, const Tap& tap, bool wanted) -> C {
      const int y = (2 * p.y + place / 2) * s.stride_y - s.padding_y;
      const int x = (2 * p.x + place % 2) * s.stride_x - s.padding_x;
      const Place<T> at = input_at(s, image, y, x, tap);
      return at.valid && wanted ? widen(*at.from) : 0;
    };
    int place = channel < s.out_channels ? winner[window * s.out_channels + channel] : kNoWinner;
    const C grad = place != kNoWinner ? widen(grad_output[window * s.out_channels + channel]) : 0;
    place &= 3;
    sum += grad;
#pragma unroll
    for (int t = 0; t < kSparseTaps; ++t) sums[t] += grad * value(place, taps[t], first_tap + t < depth);
#pragma unroll
    for (int j = 0; j < kShares; ++j) {
      const int number = lane + j * kWarpThreads;
      nothing[j] += 0 * value(number % 4, touched[j], number < kSparseTouched && first_tap + number / 4 < depth);
    }
  }

  C* of_taps = shared_memory<C>();                                            // (warp, tap and one for the bias, lane)
  C* of_nothing = of_taps + kSparseWarps * (kSparseTaps + 1) * kWarpThreads;  // (warp, place and tap)
#pragma unroll
  for (int t = 0; t <= kSparseTaps; ++t)
    of_taps[(warp * (kSparseTaps + 1) + t) * kWarpThreads + lane] = t < kSparseTaps ? sums[t] : sum;
#pragma unroll
  for (int j = 0; j < kShares; ++j)
    if (lane + j * kWarpThreads < kSparseTouched)
      of_nothing[warp * kSparseTouched + lane + j * kWarpThreads] = nothing[j];
  sync_block();
  if (channel >= s.out_channels) return;
  for (int t = warp; t <= kSparseTaps; t += kSparseWarps) {
    const int column = t < kSparseTaps ? first_tap + t : depth;
    if (t < kSparseTaps ? column >= depth : column >= columns || blockIdx.z > 0) continue;
    C total = 0;
    for (int w = 0; w < kSparseWarps; ++w) {
      total += of_taps[(w * (kSparseTaps + 1) + t) * kWarpThreads + lane];
      if (t < kSparseTaps)
        for (int place = 0; place < 4; ++place) total += of_nothing[w * kSparseTouched + 4 * t + place];
    }
    partials[(int64_t{blockIdx.x} * s.out_channels + channel) * columns + column] = total;
  }
}

// `problem` is that of the product which this takes the place of.
template <class T, class Problem>
void sparse_grad_weight(const char* operation, const Queue& queue, const Conv2dShape& fused, const Conv2dBackward<T>& b,
                        Problem problem) {
  trace<T>(queue, operation, "sparse");
  const Geometry geometry(fused);
  const int64_t windows = geometry.windows(), most = 4 * device_multiprocessors(queue.device);
  GemmSize& size = problem.size;
  size.splits = static_cast<int>(std::clamp<int64_t>(windows / (4 * kSparseWarps), 1, most));
  problem.partials = queue.workspace<Compute<T>>(size.splits * size.m * size.n);
  const int64_t depth = geometry.taps * fused.in_channels;
  const dim3 grid(size.splits, (size.m + kWarpThreads - 1) / kWarpThreads, (depth + kSparseTaps - 1) / kSparseTaps);
  launch(operation, queue, sparse_grad_weight_kernel<T>, grid, kDirectThreads, kSparseSharedBytes<T>,
         ImageSource<T>::input(b.input, geometry), (windows + size.splits - 1) / size.splits, static_cast<int>(size.n),
         b.grad_output, b.winner, problem.partials);
  add_splits<T>(operation, queue, problem);
}

}  // namespace fastnn::cuda
