// The weight's gradient where a weight has few taps - a first layer of one channel - and windows were pooled: a lane
// takes a channel, and of each window the pixel that won, a quarter of all that a product would take.
#pragma once

#include "cuda/conv2d.cuh"

namespace fastnn::cuda {

constexpr int kSparseTaps = 9;
constexpr int kSparseThreads = 256;
constexpr int kSparseWarps = kSparseThreads / kWarpThreads;
constexpr int kSparseTouched = 4 * kSparseTaps;  // places of a window times taps
template <class T>
constexpr int kSparseSharedBytes =
    kSparseWarps * ((kSparseTaps + 1) * kWarpThreads + kSparseTouched) * sizeof(Compute<T>);

inline bool is_sparse(const Conv2dShape& s) {
  return s.pool && s.groups == 1 && s.in_channels * s.kernel_height * s.kernel_width <= kSparseTaps &&
         s.batch * (s.out_height / 2) * (s.out_width / 2) > 0;
}

// Blocks of x take equal parts of the windows, a warp every eighth; of y 32 channels, a lane each. Partial sums go to
// (x, channel, tap), after the last tap the bias's.
//
// What lost, or was cut, has gradient 0, and 0 times what is not finite is NaN: so that it comes out as in torch, the
// lanes share the places and taps of each window out and add up 0 times the input there.
template <class T>
__global__ void __launch_bounds__(kSparseThreads)
    sparse_grad_weight_kernel(const GRID_CONSTANT ImageSource<T> input, int64_t windows_per_block, int columns,
                              const T* grad_output, const uint8_t* winner, Compute<T>* partials) {
  begin_kernel();
  using C = Compute<T>;
  const Geometry& s = input.s;
  const int lane = threadIdx.x % kWarpThreads, warp = threadIdx.x / kWarpThreads;
  const int channel = blockIdx.y * kWarpThreads + lane, depth = s.taps * s.in_channels;
  const int64_t first = blockIdx.x * windows_per_block, end = first + windows_per_block;
  const int64_t last = end < s.windows() ? end : s.windows();
  const PixelOrigin origin(first, s.pooled);

  Tap taps[kSparseTaps];
#pragma unroll
  for (int t = 0; t < kSparseTaps; ++t) taps[t] = tap_of(s, t, s.by.group_in);
  constexpr int kShares = (kSparseTouched + kWarpThreads - 1) / kWarpThreads;
  Tap touched[kShares];
#pragma unroll
  for (int j = 0; j < kShares; ++j) touched[j] = tap_of(s, (lane + j * kWarpThreads) / 4, s.by.group_in);

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
    for (int t = 0; t < kSparseTaps; ++t) sums[t] += grad * value(place, taps[t], t < depth);
#pragma unroll
    for (int j = 0; j < kShares; ++j) {
      const int number = lane + j * kWarpThreads;
      nothing[j] += 0 * value(number % 4, touched[j], number < 4 * depth);
    }
  }

  C* of_taps = shared_memory<C>();                                            // (warp, tap and one for the bias, lane)
  C* of_nothing = of_taps + kSparseWarps * (kSparseTaps + 1) * kWarpThreads;  // (warp, tap and place)
#pragma unroll
  for (int t = 0; t <= kSparseTaps; ++t)
    of_taps[(warp * (kSparseTaps + 1) + t) * kWarpThreads + lane] = t < kSparseTaps ? sums[t] : sum;
#pragma unroll
  for (int j = 0; j < kShares; ++j)
    if (lane + j * kWarpThreads < kSparseTouched)
      of_nothing[warp * kSparseTouched + lane + j * kWarpThreads] = nothing[j];
  sync_block();
  if (channel >= s.out_channels) return;
  for (int column = warp; column < columns; column += kSparseWarps) {
    const int t = column < depth ? column : kSparseTaps;
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
  const dim3 grid(size.splits, (size.m + kWarpThreads - 1) / kWarpThreads);
  launch(operation, queue, sparse_grad_weight_kernel<T>, grid, kSparseThreads, kSparseSharedBytes<T>,
         ImageSource<T>::input(b.input, geometry), (windows + size.splits - 1) / size.splits, static_cast<int>(size.n),
         b.grad_output, b.winner, problem.partials);
  add_splits<T>(operation, queue, problem);
}

}  // namespace fastnn::cuda
